"""What a graph says about itself, and what it must not say: provenance in, local paths out, versions as used."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

import onnx
import onnx_ir as ir

from hra_export.adapter import HraAdapter
from hra_export.errors import GraphError
from hra_export.graph.document import MAX_IR_VERSION, MAX_OPSET, MIN_OPSET

FORMAT_VERSION = "1"
STRENGTH_KEY, INTERPOLATION_KEY = "hra.strength", "hra.interpolation"
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # node → module path; the key that says which module a node came from
MIN_IR_VERSION = 10  # functions, bfloat16 and int4; what torch and the GenAI builder write
TOOLS = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")


def provenance(*, mode: str, base_fingerprint: str, adapters: Sequence[HraAdapter], **further: str) -> dict[str, str]:
    """The `hra.` properties of an exported graph. No times and no machine: equal inputs, equal bytes.

    Args:
        mode: `merged` or `reflect`.
        base_fingerprint: of the base's weights.
        adapters: in the order of W R_1 R_2 ….
        further: more properties, without their prefix.
    """
    described = {
        "format_version": FORMAT_VERSION,
        "mode": mode,
        "base": base_fingerprint,
        "adapters": json.dumps([adapter.digest for adapter in adapters]),
        "ranks": json.dumps([adapter.rank for adapter in adapters]),
        "apply_GS": json.dumps([adapter.orthogonalize for adapter in adapters]),
        "targets": json.dumps(sorted({path for adapter in adapters for path in adapter.chains})),
        "tool": f"hra-export {metadata.version('hra-export')}",
        "tool_versions": json.dumps({name: metadata.version(name) for name in TOOLS}),
        **further,
    }
    return {f"hra.{key}": value for key, value in described.items()}


def stated_strength(model: ir.Model) -> dict[str, object]:
    """`strength` and `interpolation` of the adapters in a graph, as it says itself; empty when it does not.

    Raises:
        GraphError: the metadata are damaged.
    """
    properties = model.metadata_props
    if STRENGTH_KEY not in properties:
        return {}
    try:
        strength = json.loads(properties[STRENGTH_KEY])
    except ValueError as error:
        raise GraphError(f"the graph's metadata are damaged: `{STRENGTH_KEY}` is no number") from error
    return {"strength": strength, "interpolation": properties.get(INTERPOLATION_KEY)}


def describe_(model: ir.Model, properties: Mapping[str, str]) -> None:
    """Put properties into a model's metadata, where a session shows them; `provenance` makes them."""
    model.metadata_props.update(properties)


def clean_(model: ir.Model) -> None:
    """Take out what exporters leave for their own authors: stack traces with local paths, fx nodes, doc strings.

    `name_scopes` stay: they say which module a node came from. So do properties that no exporter wrote.
    """
    model.doc_string = None
    _strip_(model.metadata_props)
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        graph.doc_string = None
        _strip_(graph.metadata_props)
        for value in (*graph.inputs, *graph.initializers.values()):
            _clean_value_(value)
        for node in graph:
            node.doc_string = None
            _strip_(node.metadata_props)
            for value in node.outputs:
                _clean_value_(value)


def declare_versions_(model: ir.Model) -> None:
    """Import exactly the domains that are used, and set the lowest IR version that has all of it, at least 10.

    Raises:
        GraphError: the opset is not one that runtimes take.
    """
    imports = model.graph.opset_imports
    opset = imports.get("", 0)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise GraphError(f"opset: expected {MIN_OPSET} to {MAX_OPSET}, got {opset}")
    used = {"", *_domains(model)}
    for domain in set(imports) - used:
        del imports[domain]
    for domain in sorted(used - set(imports)):
        imports[domain] = 1
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = min(max(needed, MIN_IR_VERSION), MAX_IR_VERSION)


def _domains(model: ir.Model) -> Iterator[str]:
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        yield from (node.domain for node in graph)


def _clean_value_(value: ir.Value) -> None:
    value.doc_string = None
    _strip_(value.metadata_props)
    tensor = value.const_value
    if tensor is not None and tensor.doc_string:
        value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)


def _strip_(properties: dict[str, str]) -> None:
    for key in [key for key in properties if key.startswith("pkg.") and key != NAME_SCOPES]:
        del properties[key]
