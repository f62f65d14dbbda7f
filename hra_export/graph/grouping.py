"""Where reflections stand in a graph: which share an input, and which products consume them.

Letters: d in_features, o out_features, r rank.
"""

from dataclasses import dataclass

import onnx_ir as ir

from hra_export.graph.operator import DOMAIN, is_reflection
from hra_export.graph.products import Product

U_SUFFIX = ".hra_U"


@dataclass(frozen=True)
class ReflectionSite:
    """One reflection.

    Attributes:
        node: of the operator.
        x, u, v: its inputs (…, d), (d, r) and (r, d).
        y: its output (…, d).
        products: everything that reads y; empty when something else does, or when y is an output of the graph.
    """

    node: ir.Node
    x: ir.Value
    u: ir.Value
    v: ir.Value
    y: ir.Value
    products: tuple[Product, ...]

    @property
    def name(self) -> str:
        """Of the node."""
        return str(self.node.name)

    @property
    def target(self) -> str:
        """The adapter's module path, by the name of U."""
        return str(self.u.name).removesuffix(U_SUFFIX)

    @property
    def is_constant(self) -> bool:
        """Whether U and V are known, and nobody may feed others."""
        return is_constant(self.u) and is_constant(self.v)

    @property
    def rank(self) -> int:
        """r, of a constant site."""
        return matrix_shape(self.u)[1]

    @property
    def graph(self) -> ir.Graph:
        """That the node is in."""
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        return graph


def groups(model: ir.Model) -> list[tuple[ReflectionSite, ...]]:
    """Every reflection of a model, subgraphs included, with those that read the same value in the same graph.

    They come in the order of the graph; a reflection whose U or V can be fed comes alone. Nodes of several reflections
    must have been taken apart.
    """
    found: dict[object, list[ReflectionSite]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if is_reflection(node):
            site = _site(node)
            key = (id(site.x), id(node.graph)) if site.is_constant else id(node)
            found.setdefault(key, []).append(site)
    return [tuple(sites) for sites in found.values()]


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that no input overrides."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def matrix_shape(value: ir.Value) -> tuple[int, int]:
    """Rows and columns of a constant matrix."""
    assert value.const_value is not None
    rows, columns = value.const_value.shape.numpy()
    return int(rows), int(columns)


def forget_operator_(model: ir.Model) -> None:
    """Drop the operator's body and domain from a model without reflections."""
    for identifier in [name for name in model.functions if name[0] == DOMAIN]:
        del model.functions[identifier]
    model.graph.opset_imports.pop(DOMAIN, None)


def _site(node: ir.Node) -> ReflectionSite:
    x, u, v = node.inputs
    assert x is not None
    assert u is not None
    assert v is not None
    return ReflectionSite(node, x, u, v, node.outputs[0], _products(node))


def _products(node: ir.Node) -> tuple[Product, ...]:
    (output,) = node.outputs
    found = [_product(use.node) if use.idx == 0 and use.node.graph is node.graph else None for use in output.uses()]
    products = tuple(product for product in found if product is not None)
    return products if len(products) == len(found) and not output.is_graph_output() else ()


def _product(node: ir.Node) -> Product | None:
    """A MatMul or an unscaled Gemm with a constant matrix; a Gemm's third input may be anything."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    weight = node.inputs[1]
    if weight is None or not is_constant(weight) or len(weight.const_value.shape) != 2:  # type: ignore[union-attr]  # is_constant has looked
        return None
    if node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_int("transA"):
        return None
    return Product(node, weight, bool(node.attributes.get_int("transB")))
