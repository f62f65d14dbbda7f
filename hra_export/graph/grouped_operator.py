"""Reflections that share an input as one node: `hra::HouseholderReflectionGroup{k}`, version 1, k = 2 … 8.

    HouseholderReflectionGroup{k}        X, U_1, V_1, …, U_k, V_k → Y_1, …, Y_k        Y_i = X + (X U_i) V_i
    HouseholderReflectionRowsGroup{k}    X, A, U_1, V_1, …, U_k, V_k → Y_1, …, Y_k     the same of rows that name theirs

X, A, U_i, V_i and Y_i are as of one reflection (operator.py, rows.py); ranks may differ, and may be 0. In a file they
are model-local functions of the very nodes that k single reflections are made of, so inlining gives the same graph. A
kernel of this domain and name does a layer's query, key and value in one launch.

`members` and `is_operator` are for readers of graphs: they know every operator of the domain, grouped or single.

Letters: a adapters, d in_features, k reflections, r rank.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from hra_export.errors import GraphError
from hra_export.graph import operator, rows
from hra_export.graph.operator import DOMAIN, VERSION

GROUP_SIZES = range(2, 9)
OPERATORS = re.compile(rf"{operator.OPERATOR}(?P<rows>Rows)?(?:Group(?P<count>[{GROUP_SIZES[0]}-{GROUP_SIZES[-1]}]))?")


@dataclass(frozen=True)
class Member:
    """One reflection of a node.

    Attributes:
        node: of any operator of the domain.
        x: (…, d).
        index: A (b,), where rows name their adapters; else None.
        u, v: (d, r) and (r, d), or (a, d, r) and (a, r, d) with an index.
        y: (…, d), an output of the node.
    """

    node: ir.Node
    x: ir.Value
    index: ir.Value | None
    u: ir.Value
    v: ir.Value
    y: ir.Value

    @property
    def target(self) -> str:
        """The adapter's module path, by the name of U."""
        return str(self.u.name).removesuffix(".hra_U")


def is_operator(node: ir.Node) -> bool:
    """Whether a node is one reflection or several."""
    return node.domain == DOMAIN and OPERATORS.fullmatch(node.op_type) is not None


def is_group(node: ir.Node) -> bool:
    """Whether a node is several reflections."""
    return is_operator(node) and "Group" in node.op_type


def members(node: ir.Node) -> tuple[Member, ...]:
    """The reflections of a node; none when it is no operator of the domain.

    Raises:
        GraphError: it has not the inputs and outputs of its operator.
    """
    kind = OPERATORS.fullmatch(node.op_type) if node.domain == DOMAIN else None
    if kind is None:
        return ()
    count, shared = int(kind["count"] or 1), 2 if kind["rows"] else 1
    inputs = [value for value in node.inputs if value is not None]
    wanted, got = (shared + 2 * count, count), (len(inputs), len(node.outputs))
    if got != wanted or len(node.inputs) != len(inputs):
        raise GraphError(f"`{node.name}`: {node.op_type} has {wanted} inputs and outputs, this one {got}")
    index = inputs[1] if kind["rows"] else None
    pairs = zip(inputs[shared::2], inputs[shared + 1 :: 2], node.outputs, strict=True)
    return tuple(Member(node, inputs[0], index, u, v, y) for u, v, y in pairs)


def joint_node(reflections: Sequence[Member], *, name: str) -> ir.Node:
    """One node of several reflections that share X and A; its outputs have no names, types and shapes yet.

    Args:
        reflections: 2 to 8.
        name: of the node.
    """
    first = reflections[0]
    kind = f"{operator.OPERATOR if first.index is None else rows.OPERATOR}Group{len(reflections)}"
    shared = [first.x] if first.index is None else [first.x, first.index]
    pairs = [value for each in reflections for value in (each.u, each.v)]
    made = ir.node(kind, [*shared, *pairs], domain=DOMAIN, version=VERSION, num_outputs=len(reflections), name=name)
    made.metadata_props.update(first.node.metadata_props)
    return made


def single_node(reflection: Member, *, name: str) -> ir.Node:
    """The node of one reflection; its output has no name, type and shape yet."""
    x, index, u, v = reflection.x, reflection.index, reflection.u, reflection.v
    kind, inputs = (operator.OPERATOR, [x, u, v]) if index is None else (rows.OPERATOR, [x, index, u, v])
    made = ir.node(kind, inputs, domain=DOMAIN, version=VERSION, name=name)
    made.metadata_props.update(reflection.node.metadata_props)
    return made


def function(name: str, opset: int) -> ir.Function:
    """The body of an operator of the domain.

    Args:
        name: of the operator, grouped or single.
        opset: version of the ONNX domain in the model that carries it.
    """
    kind = OPERATORS.fullmatch(name)
    assert kind is not None
    if kind["count"] is None:
        return rows.row_function(opset) if kind["rows"] else operator.function(opset)
    x, index = ir.Value(name="X"), ir.Value(name="A")
    inputs = [x, index] if kind["rows"] else [x]
    nodes: list[ir.Node] = []
    outputs = []
    for i in range(1, int(kind["count"]) + 1):
        u, v = ir.Value(name=f"U_{i}"), ir.Value(name=f"V_{i}")
        steps = rows.steps(x, index, u, v) if kind["rows"] else operator.steps(x, u, v)
        for step, label in zip(steps, rows.STEPS if kind["rows"] else operator.STEPS, strict=True):
            step.outputs[0].name = f"{label}_{i}"
        inputs += [u, v]
        nodes += steps
        outputs.append(steps[-1].outputs[0])
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset}, name=name)
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])


def declare_used_(model: ir.Model) -> None:
    """Give a model the bodies of exactly the operators that it uses, and their domain.

    To be called after every optimizer, which would inline them.
    """
    used = {node.op_type for node in _all_nodes(model) if is_operator(node)}
    for identifier in [each for each in model.functions if each[0] == DOMAIN and OPERATORS.fullmatch(each[1])]:
        del model.functions[identifier]
    for name in sorted(used):
        body = function(name, model.graph.opset_imports[""])
        model.functions[body.identifier()] = body
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Of the graph, the graphs in it, and the functions."""
    for graph in (model.graph, *(body.graph for body in model.functions.values())):
        yield from ir.traversal.RecursiveGraphIterator(graph)
