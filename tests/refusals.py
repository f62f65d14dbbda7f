"""A register of damages: what is done to a good scene, and how the command must then end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

S = TypeVar("S")
# Changes a scene; may return arguments of its own for the command.
Damage = Callable[[S], Sequence[str | Path] | None]


@dataclass(frozen=True)
class Case(Generic[S]):
    """A damage, the exit code, and what the message must name."""

    damage: Damage[S]
    code: int
    says: tuple[str, ...]


class Refusals(Generic[S]):
    """`@refused(code, *says)` registers a damage as a case."""

    def __init__(self) -> None:
        self.cases: list[Case[S]] = []

    def __call__(self, code: int, *says: str) -> Callable[[Damage[S]], Damage[S]]:
        def register(damage: Damage[S]) -> Damage[S]:
            self.cases.append(Case(damage, code, says))
            return damage

        return register
