"""The last passes over a graph: precision, swapping, the form of the reflections, and what it says about itself.

The order matters. Quantizers must meet the reflections as opaque nodes, one by one; what joins them, gives them a body
or takes them apart comes after every pass that would inline them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch

from hra_export.adapter import HraAdapter
from hra_export.codebook import CodebookMatrix
from hra_export.errors import GraphError
from hra_export.graph.adapter_file import SUFFIX, write_adapter_file
from hra_export.graph.forms import Form, lower_
from hra_export.graph.grouped_operator import declare_used_
from hra_export.graph.half import DTYPES, Half, to_half_
from hra_export.graph.kept_bits import Matrix, keep_bits_
from hra_export.graph.operator import is_reflection
from hra_export.graph.options import GraphOptions
from hra_export.graph.provenance import clean_, declare_versions_, describe_
from hra_export.graph.quantize import quantize_
from hra_export.graph.regrouping import group_, ungroup_
from hra_export.graph.rows import lower_rows_
from hra_export.graph.swap_sites import SwapContract
from hra_export.graph.swapping import make_row_swappable_, make_swappable_

ADAPTER_FOLDER = "adapters"
HALVES: Mapping[torch.dtype, Half] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Port:
    """An input or output, as the manifest has it."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Finished:
    """What a graph is in the end.

    Attributes:
        nodes: how many.
        reflections: target → rank; empty for a merged graph.
        forms: target → the form its reflection was lowered to; empty where it is the operator.
        inputs: without those that have defaults.
        outputs: in the order of the graph.
        contract: what a swappable graph asks of its adapters; None for any other.
        notes: what a user should know, one sentence each.
    """

    nodes: int
    reflections: Mapping[str, int]
    forms: Mapping[str, Form]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    contract: SwapContract | None
    notes: tuple[str, ...]


def finish_(
    model: ir.Model,
    adapters: Sequence[HraAdapter],
    options: GraphOptions,
    *,
    family: str,
    properties: Mapping[str, str],
    blocks: Mapping[str, Matrix],
    renamed: Mapping[str, str],
) -> Finished:
    """Bring a graph into the shape that is written.

    Args:
        model: with opaque reflections, or with those that a graph had before.
        adapters: that it was made with.
        options: precision, swapping, form.
        family: what kind of model it belongs to; decides how int8 works.
        properties: for its metadata.
        blocks: what the base's weights are made of, by parameter name, for precision `keep`.
        renamed: target of an adapter → its name in the graph, where they differ.

    Raises:
        GraphError: the graph cannot be brought there.
        NumericalError: a weight that the precision cannot hold.
        UnsupportedModelError: chains before convolutions cannot be swapped.
    """
    ungroup_(model)
    reflections = dict(_reflections(model))
    keeps = options.precision == "keep"
    notes = _keep_bits_(model, blocks, options) if keeps else _quantize_(model, options, family)
    if options.activations in HALVES and _is_float32(model):
        to_half_(model, HALVES[options.activations])
    inputs = tuple(_port(value) for value in model.graph.inputs if value.name not in model.graph.initializers)
    known = {path: name for path, name in renamed.items() if name in reflections}
    parts = [_part(adapter, {*reflections, *known}) for adapter in adapters]
    contract = _make_swappable_(model, parts, options, known)
    forms = lower_(model) if options.plain_ops else {}
    group_(model)
    declare_used_(model)
    clean_(model)
    declare_versions_(model)
    describe_(model, properties)
    outputs = tuple(_port(value) for value in model.graph.outputs)
    return Finished(len(list(model.graph)), reflections, forms, inputs, outputs, contract, notes)


def write_adapters(
    adapters: Sequence[HraAdapter], contract: SwapContract, folder: Path, *, graph: str, strength: float = 1.0
) -> dict[str, Path]:
    """Each adapter as a file for a swappable graph.

    Args:
        adapters: one file each, named after its directory, and after the graph where that is not `model`.
        contract: of the graph.
        folder: an existing one, where they are written.
        graph: stem of the graph's file.
        strength: s in R → I + s (R − I).

    Returns:
        Name in the output directory → file.
    """
    found: dict[str, Path] = {}
    ending = SUFFIX if graph == "model" else f".{graph}{SUFFIX}"
    for index, adapter in enumerate(adapters):
        name = adapter.path.name if adapter.path is not None else f"adapter{index}"
        if f"{ADAPTER_FOLDER}/{name}{ending}" in found:
            name = f"{name}-{index}"
        own = _part(adapter, {site.target for site in contract.sites} | contract.renamed.keys())
        for path in write_adapter_file(folder / f"{name}{ending}", [own], contract, strength=strength):
            found[f"{ADAPTER_FOLDER}/{path.name}"] = path
    return found


def _part(adapter: HraAdapter, targets: Collection[str]) -> HraAdapter:
    """The chains of an adapter that one graph of a model has: an encoder's, say."""
    chains = {path: vectors for path, vectors in adapter.chains.items() if path in targets}
    return replace(adapter, chains=chains)


def _keep_bits_(model: ir.Model, blocks: Mapping[str, Matrix], options: GraphOptions) -> tuple[str, ...]:
    if not blocks:  # a graph that is the base has its bits
        return ()
    # Still float32 here: without the level, matrices in 8 bits would be split as the CPU needs it.
    report = keep_bits_(model, blocks, accuracy_level=4 if options.activations in HALVES else 0)
    sizes = f"{report.size_before / 1e6:.1f} MB became {report.size_after / 1e6:.1f} MB"
    notes = [f"{len(report.sites)} weights keep the base's own bits, which loses nothing: {sizes}"]
    dtypes = {matrix.dtype for matrix in blocks.values() if isinstance(matrix, CodebookMatrix)} - {torch.float32}
    for dtype in sorted(map(str, dtypes)):
        name = dtype.removeprefix("torch.")
        notes.append(f"bitsandbytes rounds its weights to {name} wherever it computes with them, the graph does not")
    return tuple(notes)


def _quantize_(model: ir.Model, options: GraphOptions, family: str) -> tuple[str, ...]:
    if options.precision not in ("int8", "int4"):
        return ()
    report = quantize_(
        model,
        options.precision,
        family=family,
        block_size=options.block_size,
        symmetric=options.symmetric,
    )
    sizes = f"{report.size_before / 1e6:.1f} MB became {report.size_after / 1e6:.1f} MB"
    worst = f"the worst is off by {report.worst.error:.1%} (`{report.worst.name}`)"
    return (f"{options.precision}: {len(report.sites)} weights, {sizes}; {worst}",)


def _is_float32(model: ir.Model) -> bool:
    """Whether no weight is in half precision yet."""
    return not any(value.dtype in DTYPES.values() for value in model.graph.initializers.values())


def _make_swappable_(
    model: ir.Model, adapters: Sequence[HraAdapter], options: GraphOptions, renamed: Mapping[str, str]
) -> SwapContract | None:
    chosen = adapters if options.default == "adapter" else ()
    if options.swap == "adapter":
        return make_swappable_(model, default=chosen[:1], baked=adapters[:1], renamed=renamed, strength=options.linear)
    if options.swap == "rows":
        defaults = [[adapter] for adapter in chosen]
        contract = make_row_swappable_(
            model, default=defaults, baked=adapters[:1], renamed=renamed, strength=options.linear
        )
        if options.plain_ops:
            lower_rows_(model)
        return contract
    return None


def _reflections(model: ir.Model) -> Mapping[str, int]:
    found = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if is_reflection(node):
            u = node.inputs[1]
            if u is None or u.const_value is None:
                raise GraphError(f"`{node.name}`: U is not a constant")
            found[str(node.name).removesuffix("/hra")] = int(u.const_value.shape.numpy()[1])
    return found


def _port(value: ir.Value) -> Port:
    if value.dtype is None or value.shape is None:
        raise GraphError(f"`{value.name}` has no type or shape")
    return Port(str(value.name), value.dtype.name.lower(), tuple(_size(size) for size in value.shape))


def _size(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else str(size.value)
