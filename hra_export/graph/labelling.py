"""Names after tracing: reflections by target, axes by meaning."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx_ir as ir

from hra_export.errors import GraphError, UnsupportedModelError
from hra_export.graph.operator import is_reflection
from hra_export.graph.ports import GraphSpec

SYMBOL = re.compile(r"\b[a-z]+\d+\b")
TOTAL = frozenset(("past_sequence", "sequence"))


def check_reflections(models: Sequence[ir.Model], targets: Collection[str]) -> None:
    """Check that every target made it into the graphs of a model.

    Args:
        models: all graphs of one model, reflections not yet lowered.
        targets: module paths that must be there; a target may be at work in several places.

    Raises:
        GraphError: targets without a node, and nodes without a target; all of them.
    """
    found = {str(path) for model in models for path in _reflected(model)}
    findings = [f"{path}: no reflection in the graph" for path in targets if path not in found]
    findings += [f"{path}: a reflection that no target asks for" for path in sorted(found - set(targets))]
    if findings:
        raise GraphError(
            "the graph does not hold the reflections that it should",
            findings=findings,
            hint="a target whose result no output depends on is dropped by the tracer",
        )


def name_reflections_(model: ir.Model) -> None:
    """Name each node `<target>/hra`, after the operand U; a second node of a target gets a number."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        if is_reflection(node):
            target = _target(node)
            seen[target] += 1
            node.name = f"{target}/hra" if seen[target] == 1 else f"{target}/hra.{seen[target]}"


def name_axes_(model: ir.Model, spec: GraphSpec) -> None:
    """Replace the tracer's symbols by the names of axes, in every shape of the graph.

    Raises:
        UnsupportedModelError: the trace holds for one size of an axis only.
    """
    names = _symbols(model, spec)
    for value in _values(model.graph):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([_named(dim, names) for dim in value.shape])


def _target(node: ir.Node) -> str:
    operand = node.inputs[1]
    assert operand is not None
    return str(operand.name).removesuffix(".hra_U")


def _reflected(model: ir.Model) -> Iterator[str]:
    """Targets at work in a graph: operands of nodes, and kernels of convolutions."""
    for node in model.graph.all_nodes():
        if is_reflection(node):
            yield _target(node)
    for name in model.graph.initializers:
        if name.endswith(".hra_A"):
            yield name.removesuffix(".hra_A")


def _symbols(model: ir.Model, spec: GraphSpec) -> Mapping[str, str]:
    """The tracer's symbol → the name of the axis."""
    names: dict[str, str] = {}
    findings = []
    for value, port in zip(model.graph.inputs, spec.inputs, strict=True):
        assert value.shape is not None
        for dim, axis in zip(value.shape, port.axes, strict=True):
            symbol = str(dim)
            if not isinstance(axis, str):
                continue
            if symbol.isdigit():
                findings.append(f"{port.name}: expected `{axis}` to be free, got {symbol}")
            elif names.setdefault(symbol, axis) != axis:
                findings.append(f"{port.name}: expected `{axis}` to be free, got the size of `{names[symbol]}`")
    if findings:
        raise UnsupportedModelError(f"the trace of `{spec.name}` holds for some sizes only", findings=findings)
    return {symbol: axis for symbol, axis in names.items() if SYMBOL.fullmatch(symbol)}


def _named(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    text = SYMBOL.sub(lambda match: names.get(match[0], match[0]), str(dim.value))
    if text.isdigit():
        return int(text)
    return ir.SymbolicDim("total_sequence" if frozenset(text.split(" + ")) == TOTAL else text)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
