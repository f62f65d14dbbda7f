"""The reflection of rows that name their adapters: `hra::HouseholderReflectionRows`, version 1.

    Y[i] = X[i] + (X[i] U[A[i]]) V[A[i]]
    X (b, t, d), A (b,) int64, U (a, d, r), V (a, r, d), Y (b, t, d); X, U, V, Y of one float type; no attributes

Every A[i] lies between 0 and a − 1. In a file it is a model-local function of Gather, Gather, MatMul, MatMul, Add, so
a kernel of this domain and name can read U and V where they lie instead of gathering them.

An X (b, d) passes as (b, 1, d), an X (b, h, w, d) as (b, h w, d). Anything whose first size is not the batch is
refused: after `Flatten` or the routing of experts, a row of X no longer says which row of the batch it came from.
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from hra_export.errors import GraphError
from hra_export.graph.operator import DOMAIN, is_reflection
from hra_export.graph.swap_sites import ADAPTER_INDEX, Site

OPERATOR = "HouseholderReflectionRows"
VERSION = 1
RANKS = (2, 3, 4)
STEPS = ("UA", "VA", "XU", "XUV", "Y")  # what the body's nodes compute


def is_row_reflection(candidate: ir.Node) -> bool:
    """Whether a node is the operator."""
    return candidate.domain == DOMAIN and candidate.op_type == OPERATOR


def place_rows_(model: ir.Model, sites: Sequence[Site], batch: str | int | None) -> None:
    """Replace reflections of the whole batch by reflections of its rows, and add the input `adapter_index` (b,).

    The operator gets its body at once: no optimizer may come after, which would inline it.

    Args:
        model: with opaque reflections whose X has a known shape.
        sites: all of them; their U and V are not changed.
        batch: the size that counts rows; the first size of the first input when left out.

    Raises:
        GraphError: a site without its operator, or an X whose first size is not the batch; all findings at once.
    """
    nodes = [node for node in model.graph if is_reflection(node)]
    size = _batch(model) if batch is None else batch
    placed = {str(node.inputs[1].name) for node in nodes if node.inputs[1] is not None}
    findings = [f"{site.target}: its operator is taken apart already" for site in sites if site.u not in placed]
    findings += [finding for node in nodes for finding in _flaws(node, size)]
    if findings:
        raise GraphError(
            "rows of this graph cannot name their adapters",
            findings=findings,
            hint="make one adapter swappable for the whole batch instead",
        )
    index = ir.Value(
        name=ADAPTER_INDEX,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([ir.SymbolicDim(size) if isinstance(size, str) else size]),
    )
    model.graph.inputs.append(index)
    brought: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        made = list(_row_nodes(model.graph, node, index, brought))
        old, new = node.outputs[0], made[-1].outputs[0]
        new.type, new.shape, new.name = old.type, old.shape, old.name
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, [old], [new])
    model.graph.opset_imports[DOMAIN] = VERSION
    body = row_function(model.graph.opset_imports[""])
    model.functions[body.identifier()] = body


def row_function(opset: int) -> ir.Function:
    """The operator's body.

    Args:
        opset: version of the ONNX domain in the model that carries it.
    """
    x, index, u, v = (ir.Value(name=name) for name in ("X", "A", "U", "V"))
    nodes = steps(x, index, u, v)
    for made, name in zip(nodes, STEPS, strict=True):
        made.outputs[0].name = name
    graph = ir.Graph([x, index, u, v], [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": opset}, name=OPERATOR)
    return ir.Function(DOMAIN, OPERATOR, graph=graph, attributes=[])


def lower_rows_(model: ir.Model) -> None:
    """Replace single operators by plain nodes, and take their body out, in place."""
    for node in [node for node in model.graph if is_row_reflection(node)]:
        x, index, u, v = (value for value in node.inputs if value is not None)
        made = steps(x, index, u, v)
        for part, name in zip(made, ("U", "V", "XU", "XUV", "Y"), strict=True):
            part.name = f"{node.name}/{name}"
            part.outputs[0].name = f"{part.name}_output"
        old, new = node.outputs[0], made[-1].outputs[0]
        new.type, new.shape, new.name = old.type, old.shape, old.name
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, [old], [new])
    model.functions.pop((DOMAIN, OPERATOR, ""), None)


def steps(x: ir.Value, index: ir.Value, u: ir.Value, v: ir.Value) -> list[ir.Node]:
    """The plain nodes of one reflection of rows; the last one's output is Y, and no output has a name yet."""
    own_u = ir.node("Gather", [u, index], attributes={"axis": 0})  # (b, d, r)
    own_v = ir.node("Gather", [v, index], attributes={"axis": 0})  # (b, r, d)
    coefficients = ir.node("MatMul", [x, own_u.outputs[0]])  # (b, t, r)
    change = ir.node("MatMul", [coefficients.outputs[0], own_v.outputs[0]])  # (b, t, d)
    return [own_u, own_v, coefficients, change, ir.node("Add", [x, change.outputs[0]])]


def _row_nodes(graph: ir.Graph, node: ir.Node, index: ir.Value, brought: dict[ir.Value, ir.Value]) -> Iterator[ir.Node]:
    """The operator, between nodes that bring X to rank 3 and back; an X that several read is brought once."""
    x, u, v = node.inputs
    assert x is not None
    assert x.shape is not None
    rank, name = len(x.shape), str(node.name)
    if rank == 3:
        yield ir.node(OPERATOR, [x, index, u, v], domain=DOMAIN, version=VERSION, name=name)
        return
    if x not in brought:
        before = _to_rank_3(graph, x, name)
        yield before
        brought[x] = before.outputs[0]
    made = ir.node(OPERATOR, [brought[x], index, u, v], domain=DOMAIN, version=VERSION, name=name)
    made.outputs[0].type = x.type
    yield made
    if rank == 2:
        axis = _constant(graph, f"{name}/axis", [1])
        yield ir.node("Squeeze", [made.outputs[0], axis], name=f"{name}/squeeze")
    else:
        shape = ir.node("Shape", [x], name=f"{name}/shape")
        yield from (shape, ir.node("Reshape", [made.outputs[0], shape.outputs[0]], name=f"{name}/shape_of_x"))


def _to_rank_3(graph: ir.Graph, x: ir.Value, name: str) -> ir.Node:
    assert x.shape is not None
    if len(x.shape) == 2:
        node = ir.node("Unsqueeze", [x, _constant(graph, f"{name}/new_axis", [1])], name=f"{name}/unsqueeze")
    else:
        width = x.shape[-1]
        assert isinstance(width, int)
        sizes = _constant(graph, f"{name}/rows", [0, -1, width])
        node = ir.node("Reshape", [x, sizes], name=f"{name}/rows_of_batch")
    node.outputs[0].type = x.type  # (b, 1, d) or (b, h w, d)
    return node


def _constant(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    tensor = ir.tensor(numbers, dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(numbers)]), const_value=tensor)
    graph.register_initializer(value)
    return value


def _batch(model: ir.Model) -> str | int:
    first = model.graph.inputs[0]
    if not first.shape:
        raise GraphError(f"`{first.name}` has no size that could be the batch", hint="say which size counts the rows")
    return _size(first.shape[0])


def _flaws(node: ir.Node, batch: str | int) -> Iterator[str]:
    x = node.inputs[0]
    if x is None or x.shape is None:
        yield f"{node.name}: the shape of X is not known; infer shapes first"
        return
    sizes = [_size(size) for size in x.shape]
    if len(sizes) not in RANKS:
        yield f"{node.name}: expected X of rank 2, 3 or 4, got {x.shape}"
    elif sizes[0] != batch:
        yield f"{node.name}: expected X ({batch}, …), got {x.shape}"
    elif len(sizes) == 4 and not isinstance(sizes[-1], int):
        yield f"{node.name}: expected a fixed last size of X, got {x.shape}"


def _size(size: ir.SymbolicDimProtocol | int) -> str | int:
    return size if isinstance(size, int) else str(size.value)
