"""What a graph does with a LoRA factor, followed node by node: which product takes it, how it is scaled, where it ends.

Strict: a node that is none of those that exporters put there ends the search with an error that names it.
"""

import onnx_ir as ir

from hra_export.errors import GraphError, UnsupportedModelError
from hra_export.graph.sites import Weight, weight_of

QUANTIZED = ("MatMulNBits", "MatMulBnb4", "DequantizeLinear")
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
PASSED = ("Identity", "Cast")


def product_of(value: ir.Value) -> tuple[ir.Node, bool]:
    """The product that a factor is the right side of, and whether it is transposed on its way there."""
    is_transposed = False
    while True:
        uses = list(value.uses())
        if len(uses) != 1:
            raise GraphError(f"`{value.name}` is used {len(uses)} times, expected once")
        node, position = uses[0]
        if node.op_type in PRODUCTS and position == 1:
            return node, is_transposed != _flag(node, "transB")
        if node.op_type == "Transpose":
            is_transposed = not is_transposed
        elif node.op_type in QUANTIZED:
            raise UnsupportedModelError(f"`{value.name}` is quantized (`{node.op_type}`)")
        elif node.op_type == "Conv":
            raise UnsupportedModelError(f"`{value.name}` is a factor of a convolution")
        elif node.op_type not in PASSED:
            raise GraphError(f"`{value.name}` goes into {node.op_type} `{node.name}`, expected a product")
        (value,) = node.outputs


def scale_between(first: ir.Node, second: ir.Node) -> float:
    """What X A is multiplied by on its way to B."""
    scale, value = 1.0, second.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node is first:
            return scale
        step = _scaled(node, value)
        if step is None:
            break
        scale, value = scale * step[0], step[1]
    raise GraphError("its first product does not lead to its second")


def scale_behind(second: ir.Node) -> tuple[float, ir.Value | None]:
    """What X A B is multiplied by, and what it is added to."""
    if second.op_type == "Gemm" and len(second.inputs) > 2 and second.inputs[2] is not None:
        raise GraphError("the graph adds a bias to its second product")
    scale, (value,) = 1.0, second.outputs
    while len(uses := list(value.uses())) == 1:
        node, position = uses[0]
        if node.op_type == "Add":
            return scale, node.inputs[1 - position]
        step = _scaled(node, node.outputs[0])
        if step is None:
            break
        scale, (value,) = scale * step[0], node.outputs
    raise GraphError(f"its second product, `{second.name}`, is not added to anything")


def _scaled(node: ir.Node, output: ir.Value) -> tuple[float, ir.Value | None] | None:
    """The scale of a node that does no more than scale, and what it scales."""
    if node.op_type in PASSED:
        return 1.0, node.inputs[0]
    if node.op_type != "Mul" or output is not node.outputs[0]:
        return None
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        constant = weight_of(other)
        if constant is not None and constant.tensor.size == 1:
            return float(constant.array().item()), value
    return None


def as_multiplied(weight: Weight, node: ir.Node) -> Weight:
    """W as (d, o), whatever the node's own transposition is."""
    if not _flag(node, "transB"):
        return weight
    return Weight(weight.value, weight.tensor, weight.permutation[::-1], weight.is_plain)


def alpha(node: ir.Node) -> float:
    """The factor that a product has of its own."""
    return float(node.attributes["alpha"].as_float()) if "alpha" in node.attributes else 1.0


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and node.attributes[name].as_int() == 1
