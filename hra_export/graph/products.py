"""The products with constant matrices in a graph: what a quantizer may take, and where each came from.

Letters: o out_features, d in_features.
"""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from hra_export.errors import UnsupportedModelError

NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # of a traced node: the modules it lies in, outermost first
# Operands of a reflection that was lowered to plain operators: never quantized.
REFLECTION_SUFFIXES = (".hra_U", ".hra_V", ".hra_A", ".hra_B")

Array = NDArray[Any]


@dataclass(frozen=True)
class Product:
    """x Wᵀ (+ bias) with a constant W.

    Attributes:
        node: MatMul, or a Gemm without scaling.
        weight: the initializer.
        is_transposed: it is stored (o, d), as torch does; otherwise (d, o).
        bias: of a Gemm.
        turn: the Transpose between weight and MatMul, as of a head that is tied to the embedding.
    """

    node: ir.Node
    weight: ir.Value
    is_transposed: bool
    bias: ir.Value | None = None
    turn: ir.Node | None = None

    @property
    def x(self) -> ir.Value:
        """The activations."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def name(self) -> str:
        """The module path where the graph tells it, or else the name of the weight."""
        return module_path(self.node) or str(self.weight.name)

    @property
    def shape(self) -> tuple[int, int]:
        """(o, d)."""
        first, second = _constant(self.weight).shape.numpy()
        return (first, second) if self.is_transposed else (second, first)

    def matrix(self) -> Array:
        """W (o, d), a view of the initializer's memory or file."""
        stored = _constant(self.weight).numpy()
        return stored if self.is_transposed else stored.T


def weight_products(model: ir.Model) -> tuple[Product, ...]:
    """Every product with a constant matrix, in the graph's order; those of reflections apart.

    Raises:
        UnsupportedModelError: the graph has subgraphs, in which products would be overlooked.
    """
    branches = [node for node in model.graph if any(_is_graph(attribute) for attribute in node.attributes.values())]
    if branches:
        raise UnsupportedModelError(
            "a graph with branches or loops cannot change its precision",
            findings=[f"{node.name}: {node.op_type} holds a graph of its own" for node in branches],
        )
    return tuple(product for node in model.graph if (product := _product(node)) is not None)


def lookups(model: ir.Model) -> tuple[ir.Node, ...]:
    """Every Gather of rows of a constant float matrix: the embeddings."""
    return tuple(node for node in model.graph if _is_lookup(node))


def module_path(node: ir.Node) -> str:
    """The path of the module that a traced node came from; empty when the graph does not tell."""
    scopes = node.metadata_props.get(NAME_SCOPES, "")
    paths = [part.strip("'\" ") for part in scopes.strip("[]").split(",")]
    return paths[-2].removesuffix(".base_layer") if len(paths) > 1 else ""  # the last is the node itself


def drop_unread_(graph: ir.Graph, product: Product) -> None:
    """Take out what only a product that was replaced had read."""
    if product.turn is not None and product.turn.graph is graph and _is_unread(product.turn.outputs[0]):
        graph.remove(product.turn, safe=True)
    drop_constant_(graph, product.weight)


def drop_constant_(graph: ir.Graph, value: ir.Value) -> None:
    """Take a constant out that nobody reads."""
    if value.name is not None and value.name in graph.initializers and _is_unread(value):
        del graph.initializers[value.name]


def _is_unread(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output()


def _product(node: ir.Node) -> Product | None:
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    turn = _turn(node.inputs[1]) if node.op_type == "MatMul" else None
    weight = node.inputs[1] if turn is None else turn.inputs[0]
    if weight is None or not _is_float_matrix(weight) or str(weight.name).endswith(REFLECTION_SUFFIXES):
        return None
    if node.op_type == "MatMul":
        return Product(node, weight, is_transposed=turn is not None, turn=turn)
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    scaled = options.get("alpha", 1.0) != 1.0 or options.get("transA", 0) or (bias and options.get("beta", 1.0) != 1.0)
    return None if scaled else Product(node, weight, bool(options.get("transB", 0)), bias)


def _turn(value: ir.Value | None) -> ir.Node | None:
    """The Transpose of a constant matrix that a value comes from."""
    node = None if value is None else value.producer()
    if node is None or node.domain or node.op_type != "Transpose" or not _is_float_matrix(node.inputs[0]):
        return None
    return node


def _is_lookup(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    return (
        not node.domain and node.op_type == "Gather" and not (axis and axis.value) and _is_float_matrix(node.inputs[0])
    )


def _is_float_matrix(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or not value.is_initializer():
        return False
    tensor = value.const_value
    return len(tensor.shape) == 2 and tensor.dtype.is_floating_point() and tensor.size > 0


def _constant(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
