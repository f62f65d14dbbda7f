"""Split a packed product by its outputs, exactly: x [W_q W_k W_v] is [x W_q, x W_k, x W_v].

Reflections of different chains cannot stand in front of one product; in front of its parts they can.

Letters: d in_features, o out_features.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hra_export.graph.matching import FUSED, Part
from hra_export.graph.sites import Weight, constant_inputs, weight_of

HEADS = {"GroupQueryAttention": ("num_heads", "kv_num_heads")}
# What may stand between a packed product and the attention that takes it apart.
BETWEEN = ("Add", "Cast", "Identity")
LONGEST_WAY = 4
# Inputs of a block-quantized product that have one row for each output; the others belong to the input.
BLOCK_ROWS = (1, 2, 3, 5)


def part_sizes(part: Part) -> tuple[int, ...] | None:
    """The outputs of each member of a packed product; None when the graph does not say."""
    if part.members != ("q_proj", "k_proj", "v_proj"):
        return None
    value = part.site.node.outputs[0]
    for _ in range(LONGEST_WAY):
        consumers = list(value.consumers())
        if len(consumers) != 1:
            return None
        (consumer,) = consumers
        if consumer.op_type in HEADS:
            return _head_sizes(consumer, part.site.outputs)
        if consumer.op_type not in BETWEEN:
            return None
        value = consumer.outputs[0]
    return None


def split_finding(part: Part, sizes: Sequence[int] | None) -> str | None:
    """Why a site cannot be split, if so."""
    if sizes is None:
        return "packs several layers, and their sizes are not known: give `out_features`, or build without packing"
    if len(sizes) != len(part.members) or sum(sizes) != part.site.outputs:
        return f"packs {part.site.outputs} outputs, which are not {' + '.join(map(str, sizes))}"
    is_plain = part.site.weight is not None and part.site.weight.is_plain and part.site.node.op_type == "MatMul"
    if not is_plain and part.site.node.op_type != "MatMulNBits":
        return f"packs several layers in a {part.site.node.op_type}, which cannot be split"
    return None


def split_(part: Part, sizes: Sequence[int]) -> list[ir.Node]:
    """Replace a packed product by one product for each member and their concatenation.

    Returns:
        The products, in the order of `part.members`.
    """
    packed = part.site.node
    graph = packed.graph
    assert isinstance(graph, ir.Graph)
    ends = [int(end) for end in np.cumsum(sizes)]
    nodes = [
        _piece(graph, part, member, slice(end - size, end))
        for member, size, end in zip(part.members, sizes, ends, strict=True)
    ]
    joined = ir.node("Concat", [node.outputs[0] for node in nodes], {"axis": -1}, name=f"{packed.name}/Concat")
    take_over_(packed.outputs[0], joined.outputs[0])
    graph.insert_before(packed, [*nodes, joined])
    sources = [weight.value for _, weight in constant_inputs(packed)]
    graph.remove(packed, safe=True)
    _drop_unused_(sources)
    return nodes


def take_over_(old: ir.Value, new: ir.Value) -> None:
    """Let a value stand wherever another one stood, under its name, as an output of the graph too."""
    new.type, new.shape = old.type, old.shape
    name = old.name
    old.name = f"{name}_before"
    new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _head_sizes(attention: ir.Node, outputs: int) -> tuple[int, ...] | None:
    query, key = (attention.attributes[name].as_int() for name in HEADS[attention.op_type])
    head, rest = divmod(outputs, query + 2 * key)
    return None if rest else (query * head, key * head, key * head)


def _piece(graph: ir.Graph, part: Part, member: str, columns: slice) -> ir.Node:
    packed = part.site.node
    inputs = list(packed.inputs)
    attributes = dict(packed.attributes)
    size = columns.stop - columns.start
    if packed.op_type == "MatMul":
        assert part.site.weight is not None
        inputs[1] = _initializer(graph, part, member, part.site.weight, (slice(None), columns))
    else:
        attributes["N"] = ir.AttrInt64("N", size)
        for position in BLOCK_ROWS:
            weight = weight_of(inputs[position]) if position < len(inputs) else None
            if weight is not None:
                inputs[position] = _initializer(graph, part, member, weight, (columns,))
    name = _renamed(packed.name or "packed", part, member)
    node = ir.Node(packed.domain, packed.op_type, inputs, attributes.values(), name=name, version=packed.version)
    output, whole = node.outputs[0], packed.outputs[0]
    output.name, output.type = f"{name}/output_0", whole.type
    output.shape = ir.Shape([*list(whole.shape)[:-1], size]) if whole.shape is not None else None
    return node


def _initializer(graph: ir.Graph, part: Part, member: str, weight: Weight, index: tuple[slice, ...]) -> ir.Value:
    """A part of a constant, cut out when it is written and not before."""
    is_flat = len(index) == 1 and weight.shape[0] != part.site.outputs  # the rows of all outputs, one after another
    rows = (part.site.outputs, math.prod(weight.shape) // part.site.outputs) if is_flat else weight.shape
    cut_shape = np.broadcast_to(0, rows)[index].shape
    shape = (math.prod(cut_shape),) if is_flat else cut_shape
    name = _renamed(weight.value.name or "packed", part, member)

    def cut() -> ir.TensorProtocol:
        content = weight.array().reshape(rows)[index].reshape(shape)
        return ir.Tensor(np.ascontiguousarray(content), dtype=weight.tensor.dtype, name=name)

    tensor = ir.LazyTensor(cut, dtype=weight.tensor.dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, type=ir.TensorType(weight.tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _renamed(name: str, part: Part, member: str) -> str:
    """`…/qkv_proj/MatMul` → `…/q_proj/MatMul`."""
    fused = next(fused for fused, members in FUSED.items() if members == part.members)
    return name.replace(fused, member) if fused in name else f"{name}.{member}"


def _drop_unused_(values: Sequence[ir.Value]) -> None:
    """Take out initializers that nothing reads any more."""
    for value in values:
        graph = value.graph
        if graph is not None and value.is_initializer() and not value.uses() and not value.is_graph_input():
            graph.initializers.pop(value.name or "")
