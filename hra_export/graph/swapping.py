"""Graphs whose adapter is an input: one for a run, or one for each row of a batch.

    make_swappable_        U (d, r) and V (r, d) of every place become inputs with defaults; r is dynamic
    make_row_swappable_    U (a, d, r) and V (a, r, d) hold all adapters, and `adapter_index` (b,) names each row's

The default is the base, as tensors of rank 0: X + 0 is X to the bit. Inputs are named `<target>.hra_U` and
`<target>.hra_V`, as the initializers that give their defaults.

Both passes come after quantization, and change nodes as little as they can: the first only turns initializers into
inputs, so it holds for nodes of the operator and for their MatMul, MatMul, Add. The second replaces nodes of the
operator by nodes of `hra::HouseholderReflectionRows` (rows.py).

Limits: ΔW of a convolution is made of the base's weight, so it cannot be an input: such graphs are refused.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from hra_export.adapter import HraAdapter
from hra_export.errors import GraphError, UnsupportedModelError
from hra_export.graph.adapter_file import adapter_parameters, parameters_digest, stack_operands
from hra_export.graph.grouped_operator import is_operator, members
from hra_export.graph.provenance import NAME_SCOPES
from hra_export.graph.regrouping import ungroup_
from hra_export.graph.rows import place_rows_
from hra_export.graph.swap_sites import U_SUFFIX, V_SUFFIX, Site, SwapContract, Swapping
from hra_export.graph.values import Array, TensorSpec, numpy_dtype

CONVOLUTION_SUFFIX = ".hra_A"
CHUNK_BYTES = 2**24
# What may stand between a table and the rows that are looked up in it: a scale, a change of type or shape.
BETWEEN_LOOKUP_AND_CHAIN = {"Mul", "Cast", "Reshape", "Identity"}
STEPS_TO_LOOKUP = 4


def make_swappable_(
    model: ir.Model,
    *,
    default: Sequence[HraAdapter] = (),
    baked: Sequence[HraAdapter] = (),
    base_rank: int = 0,
    renamed: Mapping[str, str] | None = None,
    strength: float = 1.0,
) -> SwapContract:
    """Make U and V of every reflection inputs with defaults, in place.

    Args:
        model: with nodes of the operator, or their MatMul, MatMul, Add.
        default: what the graph computes while nothing is fed, composed in the order of W R_1 R_2 …; the base if empty.
        baked: adapters whose biases and saved modules are part of the graph; `default`'s when left out.
        base_rank: of the zeros that stand for the base; 1 for a runtime that takes no empty tensors.
        renamed: other names that adapters may have for targets → the graph's.
        strength: s of the default, in R → I + s (R − I).

    Returns:
        What adapters must bring; it is in the model's metadata too.

    Raises:
        GraphError: no reflection, or one that is not in this form; all findings at once.
        UnsupportedModelError: a chain before a convolution.
        MismatchError: `default` has a target that the graph has not, or other parameters than `baked`.
    """
    contract = replace(_contract(model, "adapter", baked or default), renamed=renamed or {})
    if default:
        parameters = adapter_parameters(default, contract, strength=strength)
    else:
        parameters = {name: array for site in contract.sites for name, array in _zeros(site, base_rank)}
    for site in contract.sites:
        rank = ir.SymbolicDim(f"{site.target}.rank")
        _make_input_(model, site.u, parameters[site.u], (site.size, rank))
        _make_input_(model, site.v, parameters[site.v], (rank, site.size))
        for node in model.graph.initializers[site.u].consumers():
            _open_last_size_(node, rank)
    model.metadata_props.update(contract.metadata)
    return contract


def make_row_swappable_(
    model: ir.Model,
    *,
    default: Sequence[Sequence[HraAdapter]] = (),
    baked: Sequence[HraAdapter] = (),
    batch: str | int | None = None,
    base_rank: int = 0,
    renamed: Mapping[str, str] | None = None,
    strength: float = 1.0,
) -> SwapContract:
    """Make every reflection read its row's adapter, in place.

    Args:
        model: with nodes of the operator, still opaque; X is (b, t, d), (b, d) or (b, h, w, d).
        default: the adapters that the graph has before any is fed: adapter i has the index i + 1, 0 is the base.
        baked: adapters whose biases and saved modules are part of the graph.
        batch: the size that counts rows, as the graph names it; the first size of the first input when left out.
        base_rank: of the zeros that stand for the base when there is no default.
        renamed: other names that adapters may have for targets → the graph's.
        strength: s of the defaults, in R → I + s (R − I).

    Returns:
        What adapters must bring; it is in the model's metadata too.

    Raises:
        GraphError: no reflection, one that has lost its operator, or an X whose first size is not the batch; all
            findings at once.
        UnsupportedModelError: a chain before a convolution.
        MismatchError: a default has a target that the graph has not, or other parameters than `baked`.
    """
    contract = replace(_contract(model, "rows", baked or (default[0] if default else ())), renamed=renamed or {})
    stacked = stack_operands(default, contract, strength=strength)
    if not default:
        stacked = {name: array[None] for site in contract.sites for name, array in _zeros(site, base_rank)}
    ungroup_(model)
    place_rows_(model, contract.sites, batch)
    count = ir.SymbolicDim("adapters")
    for site in contract.sites:
        rank = ir.SymbolicDim(f"{site.target}.rank")
        _make_input_(model, site.u, stacked[site.u], (count, site.size, rank))
        _make_input_(model, site.v, stacked[site.v], (count, rank, site.size))
    model.metadata_props.update(contract.metadata)
    return contract


def read_contract(model: ir.Model) -> SwapContract | None:
    """What a graph that was opened asks of its adapters; None when it is not swappable.

    Raises:
        GraphError: its metadata are damaged.
    """
    optional = [_spec(value) for value in model.graph.inputs if value.name in model.graph.initializers]
    return SwapContract.of(optional, model.metadata_props)


def weights_fingerprint(model: ir.Model, *, without: Collection[str] = ()) -> str:
    """SHA-256 over the name, type, shape and bytes of every weight but U and V, hex.

    Args:
        model: a graph.
        without: further initializers that are no weights: defaults of factors that are inputs.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or name.endswith((U_SUFFIX, V_SUFFIX)) or name in without:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = memoryview(tensor.tobytes())
        for start in range(0, len(data), CHUNK_BYTES):
            digest.update(data[start : start + CHUNK_BYTES])
    return digest.hexdigest()


def _contract(model: ir.Model, swapping: Swapping, baked: Sequence[HraAdapter]) -> SwapContract:
    initializers = model.graph.initializers
    convolutions = [name.removesuffix(CONVOLUTION_SUFFIX) for name in initializers if name.endswith(CONVOLUTION_SUFFIX)]
    if convolutions:
        raise UnsupportedModelError(
            "chains before convolutions cannot be swapped",
            findings=sorted(convolutions),
            hint="export this adapter without `--swappable`, or train one without convolutions",
        )
    targets = sorted(name.removesuffix(U_SUFFIX) for name in initializers if name.endswith(U_SUFFIX))
    findings = [finding for target in targets for finding in _flaws(model, target)]
    findings += [
        f"{node.name}: its U and V have other names than `<target>{U_SUFFIX}` and `<target>{V_SUFFIX}`"
        for node in model.graph
        if any(not str(each.u.name).endswith(U_SUFFIX) for each in members(node))
    ]
    if findings or not targets:
        raise GraphError("this graph cannot be made swappable", findings=findings or ["it has no reflection"])
    sites = tuple(_site(model, target) for target in targets)
    return SwapContract(swapping, sites, weights_fingerprint(model), parameters_digest(baked))


def _flaws(model: ir.Model, target: str) -> Iterator[str]:
    u, v = (model.graph.initializers.get(target + suffix) for suffix in (U_SUFFIX, V_SUFFIX))
    if v is None or u is None:
        yield f"{target}: U without V"
    elif u.const_value is None or v.const_value is None or u.is_graph_input():
        yield f"{target}: U and V are not constants: the graph is swappable already"
    elif len(u.const_value.shape) != 2 or tuple(u.const_value.shape) != tuple(v.const_value.shape)[::-1]:
        yield f"{target}: expected U (d, r) and V (r, d), got {u.const_value.shape} and {v.const_value.shape}"


def _site(model: ir.Model, target: str) -> Site:
    u = model.graph.initializers[target + U_SUFFIX]
    assert u.const_value is not None
    size = u.const_value.shape[0]
    assert isinstance(size, int)
    return Site(target, size, u.const_value.dtype.numpy().name, _is_looked_up(u, target))


def _is_looked_up(u: ir.Value, target: str) -> bool:
    """Whether X of a place is what an embedding, the target itself, looked up.

    A layer may also follow a lookup at once. What the lookup is called tells them apart: its module path, its node
    name, or the name of its table (which is another module's when weights are tied).

    Raises:
        GraphError: X was looked up, and nothing says by which module.
    """
    lookup = _lookup(next(iter(u.consumers())).inputs[0])
    if lookup is None:
        return False
    scopes = lookup.metadata_props.get(NAME_SCOPES)
    if scopes is not None:
        return f"'{target}'" in scopes
    table = lookup.inputs[0]
    names = [str(lookup.name).replace("/", "."), "" if table is None else str(table.name)]
    if any(f"{target}." in name for name in names):
        return True
    raise GraphError(
        f"`{target}`: its input was looked up by `{lookup.name}`; whether the target is that embedding cannot be told",
        hint="name the node or its table after the module it came from",
    )


def _lookup(value: ir.Value | None) -> ir.Node | None:
    """The lookup that a value comes from, with no more than a scale or a change of type between."""
    for _ in range(STEPS_TO_LOOKUP):
        node = None if value is None else value.producer()
        if node is None or node.op_type.startswith("Gather"):
            return node
        if node.op_type not in BETWEEN_LOOKUP_AND_CHAIN:
            return None
        value = node.inputs[0]
    return None


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise GraphError(f"`{value.name}` has no type or shape")
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return TensorSpec(str(value.name), value.dtype.numpy().name, sizes)


def _zeros(site: Site, rank: int) -> Iterator[tuple[str, Array]]:
    dtype = numpy_dtype(site.dtype)
    yield site.u, np.zeros((site.size, rank), dtype)
    yield site.v, np.zeros((rank, site.size), dtype)


def _make_input_(model: ir.Model, name: str, default: Array, shape: Sequence[int | ir.SymbolicDim]) -> None:
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(default, name=name)
    value.shape = ir.Shape(shape)
    value.type = ir.TensorType(value.const_value.dtype)
    model.graph.inputs.append(value)


def _open_last_size_(node: ir.Node, rank: ir.SymbolicDim) -> None:
    """X U of a place that has been lowered is (…, r): its size is no longer known."""
    shape = node.outputs[0].shape
    if not is_operator(node) and shape is not None:
        node.outputs[0].shape = ir.Shape([*tuple(shape)[:-1], rank])
