"""The reflections that a graph holds, by target, wherever they came from: an export or an insertion.

A target's constants are initializers of its name: U (d, r) and V (r, d) of the operator, or A (r, in, kh, kw) and
B (o, r, 1, 1) of the two small convolutions beside a convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from hra_export.graph.grouped_operator import is_operator, members
from hra_export.graph.sites import LOOKUPS

U, V, A, B = ".hra_U", ".hra_V", ".hra_A", ".hra_B"


@dataclass(frozen=True)
class Reflection:
    """The reflection of one target as it stands in a graph.

    Attributes:
        nodes: the operators, one for each input of the target, perhaps with other targets in them; for a convolution,
            the first of its small ones.
        rank: a name where it is symbolic.
        form: `front` of a product, `behind` a lookup, `beside` a convolution.
    """

    target: str
    nodes: tuple[ir.Node, ...]
    rank: int | str | None
    dtype: ir.DataType | None
    form: str


def reflection_sites(model: ir.Model) -> dict[str, Reflection]:
    """Every reflection of a graph by its target, wherever it came from: an export or an insertion."""
    found: dict[str, list[tuple[ir.Node, ir.Value]]] = {}
    for candidate in ir.traversal.RecursiveGraphIterator(model.graph):
        constants = [each.u for each in members(candidate)]
        suffix = U if constants else A
        if not constants and len(candidate.inputs) > 1 and candidate.inputs[1] is not None:
            constants = [candidate.inputs[1]]
        for constant in constants:
            if constant.name is not None and constant.name.endswith(suffix):
                found.setdefault(constant.name.removesuffix(suffix), []).append((candidate, constant))
    return {target: _described(target, *zip(*places, strict=True)) for target, places in found.items()}


def _described(target: str, nodes: Sequence[ir.Node], constants: Sequence[ir.Value]) -> Reflection:
    first, constant = nodes[0], constants[0]
    if not is_operator(first):
        size, form = constant.shape[0] if constant.shape is not None else None, "beside"
    else:
        size = constant.shape[-1] if constant.shape is not None else None
        before = first.inputs[0].producer() if first.inputs[0] is not None else None
        form = "behind" if before is not None and before.op_type in LOOKUPS else "front"
    rank = size if isinstance(size, int) or size is None else size.value
    return Reflection(target, tuple(nodes), rank, constant.dtype, form)
