"""Parity: how far a candidate's outputs are from the reference's, and whether that is far enough to fail.

Arrays in, a report out. The metric that matters is the adapter's effect, ‖(cand − base) − (ref − base)‖ / ‖ref − base‖:
0 is a perfect candidate, 1 is the base itself. A dropped adapter can pass every test on logits, never this one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

# Two float32 runs of one model differ by this share of their outputs when only the order of sums changes.
NOISE = 1e-6
# Rounding moves outputs about as much, relative to the adapter's effect, as it changes ΔW; layers that weigh their
# targets unevenly raise that by a small factor.
EFFECT_PER_ROUNDING = 4.0


@dataclass(frozen=True)
class Tolerance:
    """What a candidate stored in one dtype may differ by, and why.

    Attributes:
        effect: bound on the relative error of the adapter's effect.
        kl: bound on the mean KL divergence of next-token distributions, in nats.
        reason: where the bounds come from.
    """

    effect: float
    kl: float
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "float64": Tolerance(1e-4, 1e-6, "the reference itself runs in float32, whose own noise is the bound"),
    "float32": Tolerance(
        1e-3,
        1e-6,
        "one rounding of 2⁻²⁴ for each weight and about 10 layers of float32 sums give 1e-6 of the logits; an adapter "
        "that moves them by a thousandth still shows to 1e-3",
    ),
    "float16": Tolerance(
        0.05,
        1e-4,
        "one rounding of 2⁻¹² for each folded weight: an adapter whose effect is off by more than this is better kept "
        "in float32; where the merge measured what rounding cost, four times that",
    ),
    "bfloat16": Tolerance(
        0.25,
        1e-3,
        "one rounding of 2⁻⁹ for each folded weight: an adapter whose effect is off by more than this is better kept "
        "in float32; where the merge measured what rounding cost, four times that",
    ),
}


@dataclass(frozen=True)
class OutputParity:
    """One output on one input.

    Attributes:
        name: the input and the output, such as `7 tokens, logits`.
        max_abs: largest absolute difference.
        relative: ‖cand − ref‖ / ‖ref‖.
        cosine: of the two outputs.
        effect_error: ‖cand − ref‖ / ‖ref − base‖, which is the error of the adapter's effect.
        effect_size: ‖ref − base‖ / ‖base‖: how much the adapter does here.
        kl: mean KL(ref ‖ cand) over positions, in nats; None for outputs that are not logits.
        top1: share of positions with the same most likely entry; None likewise.
    """

    name: str
    max_abs: float
    relative: float
    cosine: float
    effect_error: float
    effect_size: float
    kl: float | None
    top1: float | None


@dataclass(frozen=True)
class ParityReport:
    """The verdict: `ok` only when something was compared and every finding list is empty."""

    dtype: str
    tolerance: Tolerance
    outputs: tuple[OutputParity, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the candidate computes what the reference computes."""
        return bool(self.outputs) and not self.findings

    @property
    def effect_error(self) -> float:
        """The largest effect error of all outputs; NaN when nothing was compared."""
        return max((output.effect_error for output in self.outputs), default=math.nan)

    def to_json(self) -> dict[str, object]:
        """The report as plain values."""
        return {
            "ok": self.ok,
            "dtype": self.dtype,
            "tolerance": asdict(self.tolerance),
            "effect_error": self.effect_error,
            "findings": list(self.findings),
            "notes": list(self.notes),
            "outputs": [asdict(output) for output in self.outputs],
        }


def compare(name: str, reference: Array, candidate: Array, base: Array, *, logits: bool) -> OutputParity:
    """Measure one output; NaN and Inf stay in the figures and fail the verdict.

    Args:
        name: for the report.
        reference: (…, n), PyTorch with live layers.
        candidate: (…, n), what is judged.
        base: (…, n), without the adapter.
        logits: the last axis holds scores over classes or a vocabulary.

    Raises:
        ValueError: shapes differ, or there is nothing to compare.
    """
    if not reference.shape == candidate.shape == base.shape or not reference.size:
        raise ValueError(f"{name}: expected equal, non-empty shapes, got {reference.shape} and {candidate.shape}")
    ref, cand, start = (array.astype(np.float64) for array in (reference, candidate, base))
    with np.errstate(all="ignore"):  # the verdict looks for NaN itself
        difference = cand - ref
        error, effect = _norm(difference), _norm(ref - start)
        return OutputParity(
            name=name,
            max_abs=float(np.abs(difference).max()),
            relative=error / _norm(ref),
            cosine=float(np.vdot(ref, cand) / (_norm(ref) * _norm(cand))),
            effect_error=error / effect if effect else (math.inf if error else 0.0),
            effect_size=effect / _norm(start),
            kl=_mean_kl(ref, cand) if logits else None,
            top1=float((ref.argmax(-1) == cand.argmax(-1)).mean()) if logits else None,
        )


def tolerance_for(dtype: str, rounding_loss: float | None = None) -> Tolerance:
    """The row of `TOLERANCES` for a dtype, tightened to what rounding is known to have cost.

    Args:
        dtype: that was promised.
        rounding_loss: relative error of ΔW through rounding, as the merge measured it; None when nobody did.
    """
    row = TOLERANCES[dtype]
    if rounding_loss is None or dtype in ("float32", "float64"):
        return row
    measured = max(EFFECT_PER_ROUNDING * rounding_loss, TOLERANCES["float32"].effect)
    return replace(row, effect=min(row.effect, measured))


def judge(
    outputs: Sequence[OutputParity],
    dtype: str,
    *,
    rounding_loss: float | None = None,
    findings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> ParityReport:
    """Hold measured outputs against the tolerance of a storage dtype.

    Args:
        outputs: from `compare`; none at all is a failure.
        dtype: key of `TOLERANCES`, the dtype that was promised.
        rounding_loss: as for `tolerance_for`.
        findings: failures found elsewhere, kept.
        notes: remarks that fail nothing.
    """
    tolerance = tolerance_for(dtype, rounding_loss)
    found = list(findings)
    if not outputs:
        found.append("nothing was compared")
    for output in outputs:
        figures = {key: value for key, value in asdict(output).items() if isinstance(value, float)}
        if not all(math.isfinite(value) for value in figures.values()):
            found.append(f"{output.name}: not finite ({_list_of(figures)})")
            continue
        if output.effect_size < NOISE:
            found.append(
                f"{output.name}: the adapter moves the reference by {output.effect_size:.0e} of its size, which is "
                "rounding noise: there is no effect to judge"
            )
        elif output.effect_error > tolerance.effect:
            off = f"{output.effect_error:.2%}, allowed {tolerance.effect:.2%}"
            found.append(f"{output.name}: the adapter's effect is off by {off}")
        if output.kl is not None and output.kl > tolerance.kl:
            found.append(f"{output.name}: KL divergence {output.kl:.1e} nats, allowed {tolerance.kl:.0e}")
    return ParityReport(dtype, tolerance, tuple(outputs), tuple(found), tuple(notes))


def _norm(array: Array) -> float:
    return float(np.linalg.norm(array.ravel()))


def _mean_kl(reference: Array, candidate: Array) -> float:
    """KL(ref ‖ cand) of the softmax over the last axis, averaged over positions."""
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
    return float(np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0).mean())


def _log_softmax(scores: Array) -> Array:
    shifted = scores - scores.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _list_of(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if not math.isfinite(value))
