"""Put reflections into a graph that exists: the exporter's, the GenAI builder's, a user's own.

A product gets the operator in front, a lookup behind; a convolution has no rows to reflect, and ΔW stands beside it as
two small convolutions. Everything is found, checked and computed before anything is changed.

Limits: the graph must be of the base without the adapter, which its weights are not compared with. Products whose
input is quantized already (`MatMulInteger`) are refused, and so are stacked experts.

Letters: d in_features, o out_features, r rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from hra_export import householder
from hra_export.adapter import HraAdapter
from hra_export.errors import MismatchError
from hra_export.graph.matching import Matches, Part, match
from hra_export.graph.operator import node, operands
from hra_export.graph.parameters import find_parameters
from hra_export.graph.reflections import A, B, Reflection, U, V, reflection_sites
from hra_export.graph.sites import Site, sites_of
from hra_export.graph.splitting import part_sizes, split_, split_finding, take_over_
from hra_export.householder import BlockReflector

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}
# What the two small convolutions have in common with the one beside them.
SHARED_ATTRIBUTES = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


@dataclass(frozen=True)
class InsertionReport:
    """What was done to a graph.

    Attributes:
        reflections: by target.
        parameters: the trained parameters that replaced the base's.
        split: the packed products that were taken apart.
        notes: how names were matched, where not literally.
    """

    reflections: Mapping[str, Reflection]
    parameters: tuple[str, ...]
    split: tuple[str, ...]
    notes: tuple[str, ...]


def insert_reflections_(
    model: ir.Model,
    adapters: Sequence[HraAdapter],
    *,
    rename: Mapping[str, str] | None = None,
    out_features: Mapping[str, int] | None = None,
    dtype: ir.DataType | None = None,
    strength: float = 1.0,
) -> InsertionReport:
    """Put adapters into the graph of their base, in place; several compose as W R_1 R_2 ….

    The reflections are opaque nodes: `operator.declare_` gives them a body, after every optimizer.

    Args:
        model: the base's graph. Nothing is changed unless every chain and every parameter has its place.
        adapters: in order; trained biases and saved modules replace initializers, the last adapter's winning.
        rename: target → the module path or the node name that it has in this graph, where it cannot be guessed.
        out_features: target → o, to split a packed product whose parts the graph does not tell.
        dtype: of U and V where the graph does not say what its activations are.
        strength: s in W + s (W R − W).

    Raises:
        MismatchError: a target without a site or with several, a shape that disagrees, a site that is reflected
            already or that no chain can act on, a parameter without a place; all findings.
        GraphError: an attribute that decides is not of its type.
        NumericalError: a chain has no direction.
    """
    chains = _chains(adapters)
    sites = sites_of(model)
    widths = {target: users[0].chains[target].shape[0] for target, users in chains.items()}
    matches = match(widths, sites, rename or {})
    sizes = {id(p.site.node): _sizes(p, target, matches, out_features or {}) for target, p in matches.parts.items()}
    trained = {name: value for adapter in adapters for name, value in adapter.parameters.items()}
    changes, unplaced = find_parameters(trained, matches, sites, model)
    present = reflection_sites(model)
    findings = [
        *_width_findings(chains),
        *(f"{target}: the graph has a reflection of this name already" for target in chains if target in present),
        *matches.findings,
        *_dtype_findings(matches, dtype),
        *_split_findings(matches, sizes),
        *unplaced,
    ]
    if findings:
        raise MismatchError(
            f"the adapter does not fit this graph: {len(findings)} things disagree",
            findings=findings,
            hint="`rename` maps a target to the module path or the node name that it has in the graph",
        )
    constants = {target: _constants(target, users, matches, dtype, strength) for target, users in chains.items()}
    split = _split_(matches, sizes)
    for target, pair in constants.items():
        _insert_(model, target, matches.sites[target], pair)
    for change in changes:
        change.apply_()
    names = tuple(change.name for change in changes)
    return InsertionReport(reflection_sites(model), names, split, tuple(matches.notes))


def _chains(adapters: Sequence[HraAdapter]) -> dict[str, list[HraAdapter]]:
    """Target → the adapters that have a chain for it, in order."""
    chains: dict[str, list[HraAdapter]] = {}
    for adapter in adapters:
        for target in adapter.chains:
            chains.setdefault(target, []).append(adapter)
    return chains


def _sizes(part: Part, target: str, matches: Matches, out_features: Mapping[str, int]) -> tuple[int, ...] | None:
    """The outputs of the members of a packed site, from the caller or from the graph."""
    stem = target.rpartition(".")[0]
    given = [out_features.get(f"{stem}.{member}" if stem else member) for member in part.members]
    if all(size is not None for size in given):
        return tuple(size for size in given if size is not None)
    return part_sizes(part)


def _width_findings(chains: Mapping[str, Sequence[HraAdapter]]) -> Iterator[str]:
    for target, users in chains.items():
        widths = {adapter.chains[target].shape[0] for adapter in users}
        if len(widths) > 1:
            yield f"{target}: the adapters' chains have {sorted(widths)} features"


def _dtype_findings(matches: Matches, dtype: ir.DataType | None) -> Iterator[str]:
    for target, site in _first_sites(matches).items():
        got = site.dtype or dtype
        if got not in DTYPES:
            yield f"{target}: {site.label}: expected activations of a float type, got {got}; `dtype` says which"


def _first_sites(matches: Matches) -> dict[str, Site]:
    whole = {target: sites[0] for target, sites in matches.sites.items()}
    return whole | {target: part.site for target, part in matches.parts.items()}


def _split_findings(matches: Matches, sizes: Mapping[int, Sequence[int] | None]) -> Iterator[str]:
    for target, part in matches.parts.items():
        reason = split_finding(part, sizes[id(part.site.node)])
        if reason is not None:
            yield f"{target}: {part.site.label} {reason}"


def _constants(
    target: str, adapters: Sequence[HraAdapter], matches: Matches, dtype: ir.DataType | None, strength: float
) -> tuple[Tensor, Tensor]:
    """U and V of a target, or A and B of a convolution."""
    site = _first_sites(matches)[target]
    blocks = [adapter.reflector(target) for adapter in adapters]
    torch_dtype = DTYPES[site.dtype or dtype or ir.DataType.FLOAT]
    if site.kind == "convolution":
        return _small_kernels(site, blocks, torch_dtype, strength)
    return operands(blocks, torch_dtype, rows=site.kind == "lookup", strength=strength)


def _small_kernels(
    site: Site, blocks: Sequence[BlockReflector], dtype: torch.dtype, strength: float
) -> tuple[Tensor, Tensor]:
    """A (r, in, kh, kw) and B (o, r, 1, 1) with s ΔW = B A."""
    assert site.weight is not None
    kernel = torch.from_numpy(site.weight.array().astype("float64"))
    rows = kernel.reshape(kernel.shape[0], -1)
    whole = householder.compose(blocks[0], *blocks[1:])
    b, a = householder.low_rank_factors(rows, whole)
    b, a = householder.balanced(strength * b, a)
    return a.reshape(-1, *kernel.shape[1:]).to(dtype).contiguous(), b[:, :, None, None].to(dtype).contiguous()


def _split_(matches: Matches, sizes: Mapping[int, Sequence[int] | None]) -> tuple[str, ...]:
    """Take packed sites apart, and let their targets have the pieces."""
    pieces: dict[int, list[Site]] = {}
    names = []
    for target, part in matches.parts.items():
        site, size = part.site, sizes[id(part.site.node)]
        assert size is not None
        if id(site.node) not in pieces:
            names.append(site.node.name or "")
            pieces[id(site.node)] = [replace(site, node=node) for node in split_(part, size)]
        matches.sites[target] = [pieces[id(site.node)][part.position]]
    return tuple(names)


def _insert_(model: ir.Model, target: str, sites: Sequence[Site], pair: tuple[Tensor, Tensor]) -> None:
    suffixes = (A, B) if sites[0].kind == "convolution" else (U, V)
    constants = [
        _initializer_(model, f"{target}{suffix}", tensor) for suffix, tensor in zip(suffixes, pair, strict=True)
    ]
    if sites[0].kind == "product":
        by_input: dict[ir.Value, list[ir.Node]] = {}
        for site in sites:
            x = site.node.inputs[0]
            assert x is not None
            by_input.setdefault(x, []).append(site.node)
        for i, (x, nodes) in enumerate(by_input.items()):
            _reflect_input_(x, nodes, constants, name=_numbered(f"{target}/hra", i))
        return
    for i, site in enumerate(sites):
        change = _put_beside_ if site.kind == "convolution" else _reflect_output_
        change(site.node, constants, _numbered(f"{target}/hra", i))


def _initializer_(model: ir.Model, name: str, tensor: Tensor) -> ir.Value:
    content = ir.tensor(tensor, name=name)
    value = ir.Value(name=name, type=ir.TensorType(content.dtype), shape=ir.Shape(tensor.shape), const_value=content)
    model.graph.register_initializer(value)
    return value


def _reflect_input_(x: ir.Value, nodes: Sequence[ir.Node], constants: Sequence[ir.Value], *, name: str) -> None:
    made = node(x, *constants, name=name)
    producer = x.producer()
    if producer is not None and producer.graph is not None:
        producer.graph.insert_after(producer, made)
    else:  # an input of the graph, or of a subgraph
        owner = x.graph
        assert owner is not None
        owner.insert_before(owner[0], made)
    for consumer in nodes:
        consumer.replace_input_with(0, made.outputs[0])


def _reflect_output_(lookup: ir.Node, constants: Sequence[ir.Value], name: str) -> None:
    rows, graph = lookup.outputs[0], lookup.graph
    assert graph is not None
    made = node(rows, *constants, name=name)
    take_over_(rows, made.outputs[0])
    made.replace_input_with(0, rows)
    graph.insert_after(lookup, made)


def _put_beside_(convolution: ir.Node, constants: Sequence[ir.Value], name: str) -> None:
    x, y, graph = convolution.inputs[0], convolution.outputs[0], convolution.graph
    assert graph is not None
    shared = [value for key, value in convolution.attributes.items() if key in SHARED_ATTRIBUTES]
    reduced = ir.Node("", "Conv", [x, constants[0]], shared, name=f"{name}/A")
    change = ir.Node("", "Conv", [reduced.outputs[0], constants[1]], name=f"{name}/B")
    total = ir.Node("", "Add", [y, change.outputs[0]], name=f"{name}/Add")
    for made in (reduced, change):
        made.outputs[0].name, made.outputs[0].type = f"{made.name}_output", y.type
    take_over_(y, total.outputs[0])
    total.replace_input_with(0, y)
    graph.insert_after(convolution, [reduced, change, total])


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name
