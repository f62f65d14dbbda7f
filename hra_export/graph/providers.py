"""Which execution provider ran what, and whether it was the one that was asked for.

A provider leaves a node to the CPU for two reasons: it has no kernel for it, or the node computes a shape, an index
or a mask whose values are wanted on the host. The first is a fall-back; the second is ONNX Runtime's own choice
(`GetCpuPreferredNodes`) and costs nothing.

The rule that tells them apart: a node may stay on the CPU when no floating-point input of the graph and no
floating-point weight reaches it, other than through `Shape` or `Size`. A lookup in an embedding table reaches a weight,
so it is a fall-back there; the arithmetic on token positions is not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from hra_export.graph.document import open_graph

Provider = Literal["cpu", "cuda", "tensorrt"]

EXECUTION_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

# A small initializer, in ONNX Runtime's words, does not keep a node from the CPU: a scale, the frequencies of RoPE.
SMALL_ELEMENTS = 100


@dataclass(frozen=True)
class AssignedNode:
    """A node of the graph as the runtime runs it, and the provider that runs it."""

    name: str
    op_type: str
    provider: str


def fallen_back(assigned: Sequence[AssignedNode], provider: Provider, path: Path) -> list[str]:
    """The compute nodes that another provider runs, one line each.

    Args:
        assigned: every node of the session.
        provider: the one that was asked for.
        path: the model file, which is read when some node runs elsewhere; weights are not.
    """
    strays = [node for node in assigned if node.provider != EXECUTION_PROVIDERS[provider]]
    if not strays:
        return []
    on_host = [node for node in strays if node.provider == EXECUTION_PROVIDERS["cpu"]]
    allowed = _shape_arithmetic(open_graph(path).graph) if on_host else _ShapeArithmetic(frozenset(), frozenset())
    return [
        f"{node.op_type} `{node.name or '(unnamed)'}`: {node.provider}"
        for node in strays
        if node.provider != EXECUTION_PROVIDERS["cpu"] or not allowed.has(node)
    ]


@dataclass(frozen=True)
class _ShapeArithmetic:
    """What the rule lets stay on the CPU: nodes by name, and operators that do nothing else in this graph."""

    names: frozenset[str]
    operators: frozenset[str]

    def has(self, node: AssignedNode) -> bool:
        """A node that the runtime's optimizer renamed is judged by its operator."""
        return node.name in self.names or node.op_type in self.operators


def _shape_arithmetic(graph: ir.Graph) -> _ShapeArithmetic:
    numeric = {value for value in graph.inputs if _is_float(value)}
    numeric |= {value for value in graph.initializers.values() if _is_weight(value.const_value)}
    host: list[ir.Node] = []
    compute: list[ir.Node] = []
    _divide(graph, numeric, host, compute)
    names = frozenset(node.name for node in host if node.name) - {node.name or "" for node in compute}
    operators = {"Shape", "Size"} | ({node.op_type for node in host} - {node.op_type for node in compute})
    return _ShapeArithmetic(names, frozenset(operators))


def _divide(nodes: Iterable[ir.Node], numeric: set[ir.Value], host: list[ir.Node], compute: list[ir.Node]) -> None:
    """Sort nodes, in the order they run, by whether a number of the model reaches them."""
    for node in nodes:
        bodies = [attribute.as_graph() for attribute in node.attributes.values() if _is_body(attribute)]
        for body in bodies:
            numeric |= {value for value in body.initializers.values() if _is_weight(value.const_value)}
            _divide(body, numeric, host, compute)
        reached = any(value in numeric for value in node.inputs if value is not None)
        reached |= any(value in numeric for body in bodies for value in body.outputs)
        reached |= node.op_type == "Constant" and _is_weight(ir.convenience.get_const_tensor(node.outputs[0]))
        if reached and node.op_type not in ("Shape", "Size"):
            numeric.update(node.outputs)
            compute.append(node)
        else:
            host.append(node)


def _is_body(attribute: ir.Attr) -> bool:
    return attribute.type == ir.AttributeType.GRAPH


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _is_weight(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.dtype.is_floating_point() and tensor.size > SMALL_ELEMENTS
