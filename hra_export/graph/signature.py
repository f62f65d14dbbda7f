"""What a graph takes and gives, and in which precision it computes. Headers only; no weight is read."""

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

# Operators of quantized products and the bits of their weights, where no attribute says so.
INTEGER_PRODUCTS = {"MatMulInteger": 8, "DynamicQuantizeMatMul": 8, "QLinearMatMul": 8, "MatMulBnb4": 4}
FLOATS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}


@dataclass(frozen=True)
class GraphInput:
    """One input that must be fed.

    Attributes:
        dtype: as numpy spells it; `bfloat16` for what numpy has no word for.
        axes: a size, or None where it may change.
    """

    name: str
    dtype: str
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class Signature:
    """The outside of a graph.

    Attributes:
        inputs: by name, in order; those with a default are left out.
        defaults: inputs that an initializer stands in for.
        outputs: names, in order.
        precision: `fp32`, `fp16`, `bf16`, `int8` or `int4`: of most of its weights.
        operators: types of its nodes.
    """

    inputs: dict[str, GraphInput]
    defaults: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str
    operators: frozenset[str]


def read_signature(model: ir.Model) -> Signature:
    """The outside of a model."""
    graph = model.graph
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    return Signature(
        inputs={str(value.name): _input(value) for value in graph.inputs if value.name not in graph.initializers},
        defaults=tuple(str(value.name) for value in graph.inputs if value.name in graph.initializers),
        outputs=tuple(str(value.name) for value in graph.outputs),
        precision=_precision(model, nodes),
        operators=frozenset(node.op_type for node in nodes),
    )


def _input(value: ir.Value) -> GraphInput:
    axes = () if value.shape is None else tuple(size if isinstance(size, int) else None for size in value.shape)
    dtype = value.dtype or ir.DataType.FLOAT
    return GraphInput(str(value.name), "bfloat16" if dtype == ir.DataType.BFLOAT16 else str(dtype.numpy()), axes)


def _precision(model: ir.Model, nodes: list[ir.Node]) -> str:
    """That of quantized products, if there are any: the rest of such a graph is small; else that of most weights."""
    bits = {node.attributes.get_int("bits", 4) for node in nodes if node.op_type == "MatMulNBits"}
    bits |= {INTEGER_PRODUCTS[node.op_type] for node in nodes if node.op_type in INTEGER_PRODUCTS}
    if bits:
        return f"int{min(bits)}"
    sizes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else "fp32"
