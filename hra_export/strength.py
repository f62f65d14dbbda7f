"""How much of an adapter: R^t, or W + t (W R − W).

geodesic    every plane that R turns by θ turns by t θ: stays orthogonal; R^s R^t = R^(s+t), and t = −1 is the inverse
linear      so much of ΔW: for any R, and between 0 and 1 no rotation

Both are the base at t = 0 and the adapter at t = 1, bit for bit. R^t is a change of the adapters themselves, in
float64 and in memory; what is linear remains a factor of ΔW.

Limits: a chain with det R = −1 has no R^t (t other than −1, 0 and 1). Directions that R mirrors are paired into half
turns, of which there is a choice: R is the same for every choice, R^t is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hra_export.adapter import HraAdapter
from hra_export.composition import check_agreement, columns, joined, reflectors
from hra_export.errors import ConversionError, NumericalError
from hra_export.householder import BlockReflector
from hra_export.rotation import Rotation, decompose, power, shortest_chain

Interpolation = Literal["geodesic", "linear"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("geodesic", "linear")
# Beyond it float64 holds t θ to fewer digits than float32 vectors hold a direction.
LARGEST_POWER = 1e8


@dataclass(frozen=True)
class Strengthened:
    """Adapters at a strength.

    Attributes:
        adapters: in order; those that were given, or one in their place whose chains differ in length.
        linear: the factor of ΔW that is left to whoever folds or runs them.
        notes: what a user should know, one sentence each.
    """

    adapters: tuple[HraAdapter, ...]
    linear: float
    notes: tuple[str, ...] = ()


def take_strength(adapters: Sequence[HraAdapter], strength: float, interpolation: Interpolation) -> Strengthened:
    """Adapters at a strength; biases and saved modules stay the adapters' own.

    Args:
        adapters: composed in the order given: R^t is that of their whole product.
        strength: t, any finite number.
        interpolation: what lies between 0 and 1, and beyond.

    Raises:
        ValueError: t is not finite, or no such interpolation.
        ConversionError: R^t of targets whose determinant is −1; all of them.
        MismatchError: several adapters that are not for one model.
        NumericalError: chains that cannot be computed; all of them. Or R^t for a t beyond `LARGEST_POWER`.
    """
    check_strength(strength, interpolation)
    notes = _notes(adapters, strength)
    linear = linear_part(strength, interpolation)
    if linear != 1 or strength == 1 or interpolation == "linear":
        return Strengthened(tuple(adapters), linear, notes)
    check_agreement(adapters)
    chains, paired = _inverse(adapters) if strength == -1 else _power(adapters, strength)
    if paired:
        notes = (*notes, _pairing_note(paired, len(chains)))
    return Strengthened((joined(adapters, chains, strength=strength),), 1.0, notes)


def check_strength(strength: float, interpolation: str) -> None:
    """Refuse values that mean nothing.

    Raises:
        ValueError: t is not finite, or no such interpolation.
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength: expected a finite number, got {strength}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")


def linear_part(strength: float, interpolation: Interpolation) -> float:
    """The factor of ΔW that is left when the adapters are at a strength: t if linear, else 1, and 0 for no adapter."""
    return strength if interpolation == "linear" or strength == 0 else 1.0


def _notes(adapters: Sequence[HraAdapter], strength: float) -> tuple[str, ...]:
    if strength == 1 or not any(adapter.parameters for adapter in adapters):
        return ()
    return ("biases and saved modules are the adapters' own at any strength",)


def _pairing_note(paired: Sequence[str], count: int) -> str:
    which = f"{len(paired)} of {count} targets mirror directions (`{paired[0]}`)"
    return f"{which}, which have no order: what they do at this strength is one choice of several"


def _inverse(adapters: Sequence[HraAdapter]) -> tuple[dict[str, Tensor], list[str]]:
    """R⁻¹ of every target: the reflections backwards, or as few of them as there are features. There is no choice."""
    chains = {}
    for module, block in reflectors(adapters).items():
        if block.rank <= block.features:
            chains[module] = columns(adapters, module).flip(1)
        else:
            chains[module] = _chain(decompose(block), block).flip(1)
    return chains, []


def _power(adapters: Sequence[HraAdapter], strength: float) -> tuple[dict[str, Tensor], list[str]]:
    """R^t of every target, and the targets for which there was a choice."""
    if abs(strength) > LARGEST_POWER:
        raise NumericalError(
            f"strength {strength:g}: planes turn by so many times their angle that nothing is left of its digits",
            hint=f"geodesic strengths end at {LARGEST_POWER:g}",
        )
    rotations = {module: (decompose(block), block) for module, block in reflectors(adapters).items()}
    odd = [module for module, (rotation, _) in rotations.items() if rotation.mirrors % 2]
    if odd:
        labels = ", ".join(f"`{adapter.label}`" for adapter in adapters)
        raise ConversionError(
            f"{labels} at strength {strength:g}: the determinant of {len(odd)} targets is -1, and no path of rotations "
            "leads to them",
            findings=[f"{module}: an odd number of reflections, {rotations[module][1].rank}" for module in odd],
            hint="`--interpolation linear` takes a part of ΔW instead, which is no rotation",
        )
    chains = {module: _chain(power(rotation, strength), block) for module, (rotation, block) in rotations.items()}
    return chains, [module for module, (rotation, _) in rotations.items() if rotation.mirrors]


def _chain(rotation: Rotation, block: BlockReflector) -> Tensor:
    """U (d, k) float64; for the identity, which has no shortest one, a pair of equal vectors."""
    return shortest_chain(rotation) if rotation.rank else block.u[:, :1].repeat(1, 2)
