"""What is asked of a candidate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hra_export.graph.native import Operator


@dataclass(frozen=True)
class Question:
    """How to judge.

    Attributes:
        provider: that must run every compute node.
        per_layer: also compare what every layer gives.
        text: a file to score, or None.
        prompts: to decode; None for a few neutral ones.
        timeout: seconds for each child.
        operator: library with kernels for the reflections, `auto` for the one that is found, None for none.
    """

    provider: str
    per_layer: bool
    text: Path | None
    prompts: Sequence[str] | None
    timeout: float
    operator: Operator = "auto"
