"""Parity: how far a candidate's outputs are from the reference's, and whether that is far enough to fail.

Arrays in, a report out. The metric that matters is the adapter's effect, ‖(cand − base) − (ref − base)‖ / ‖ref − base‖:
0 is a perfect candidate, 1 is the base itself. A dropped adapter can pass every test on logits, never this one.

A quantized candidate errs in its base too, often by more than the adapter does. That error has no direction, so what
is asked there is the share of the effect that arrived, ⟨cand − base, ref − base⟩ / ‖ref − base‖²: 1 is the adapter, 0
is none. Where the candidate also runs without the adapter, its own base takes the base's place.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from hra_export.tolerance import Tolerance, tolerance_for

Array = NDArray[np.floating]

# Two float32 runs of one model differ by this share of their outputs when only the order of sums changes.
NOISE = 1e-6


@dataclass(frozen=True)
class OutputParity:
    """One output on one input.

    Attributes:
        name: the input and the output, such as `7 tokens, logits`.
        max_abs: largest absolute difference.
        relative: ‖cand − ref‖ / ‖ref‖.
        cosine: of the two outputs.
        effect_error: ‖(cand − start) − (ref − base)‖ / ‖ref − base‖, where start is the candidate without the adapter
            if it runs so, and the base otherwise.
        effect_size: ‖ref − base‖ / ‖base‖: how much the adapter does here.
        effect_share: ⟨cand − start, ref − base⟩ / ‖ref − base‖²: how much of the adapter's effect arrived.
        kl: mean KL(ref ‖ cand) over positions, in nats; None for outputs that are not logits.
        top1: share of positions with the same most likely entry; None likewise.
        base_error: ‖start − base‖ / ‖base‖, the error of the candidate's own base; None where it does not run.
        base_kl: mean KL(base ‖ start), of logits.
    """

    name: str
    max_abs: float
    relative: float
    cosine: float
    effect_error: float
    effect_size: float
    effect_share: float
    kl: float | None
    top1: float | None
    base_error: float | None = None
    base_kl: float | None = None


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding of one prompt on both sides.

    Attributes:
        prompt: as text, or what it is made of.
        count: tokens that were decoded.
        agreed: of them, how many are the same before the first that differs.
        gap: at the first that differs, by how much the reference prefers its own token, in logits; 0 without one.
        reference: the reference's tokens as text; empty without a tokenizer.
        candidate: the candidate's.
        runtime: that decoded.
    """

    prompt: str
    count: int
    agreed: int
    gap: float = 0.0
    reference: str = ""
    candidate: str = ""
    runtime: str = "ONNX Runtime"


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a text's tokens."""

    tokens: int
    base: float
    reference: float
    candidate: float


@dataclass(frozen=True)
class RoundingCost:
    """What rounded weights do to PyTorch's own outputs, over all inputs together: how good they are, not how right.

    Attributes:
        effect: ‖rounded − exact‖, relative to the adapter's effect.
        kl: mean KL(exact ‖ rounded), in nats; None without logits.
        base_effect: the same without the adapter; None where it is part of the weights.
        base_kl: the same without the adapter.
    """

    effect: float
    kl: float | None
    base_effect: float | None = None
    base_kl: float | None = None

    def __str__(self) -> str:
        """As a sentence without its stop."""
        whole = f"rounding the weights costs {_cost(self.effect, self.kl)}"
        if self.base_effect is None:
            return whole
        return f"{whole}; {_cost(self.base_effect, self.base_kl)} without the adapter"


@dataclass(frozen=True)
class OperatorRun:
    """What ran the reflections of one graph: a library's kernels, or the operators' bodies.

    Attributes:
        runtime: that ran the graph.
        graph: name of its file.
        nodes: operators that it holds.
        library: path of the library, None for the bodies.
        version: of the library.
        reason: why it was the bodies; empty otherwise.
    """

    runtime: str
    graph: str
    nodes: int
    library: str | None = None
    version: str | None = None
    reason: str = ""

    def __str__(self) -> str:
        """As a sentence without its stop."""
        how = f"inlined, {self.reason}" if self.library is None else f"native, `{self.library}` {self.version}"
        return f"{self.runtime} ran the {self.nodes} reflection nodes of `{self.graph}` {how}"


@dataclass(frozen=True)
class ParityReport:
    """The verdict: `ok` only when something was compared and there are no findings.

    Attributes:
        dtype: what was promised: a storage dtype, or a graph's precision.
        layers: outputs of single layers, in the order they run, when asked for.
        provider: the execution provider that ran every node of a graph; None for weights.
        exact: the outputs again, of the graph with its activations not rounded; only where it rounds them.
        cost: what rounding the weights cost; None where the reference has no rounded weights.
        operators: what ran the reflections of the graphs that hold any.
    """

    dtype: str
    tolerance: Tolerance
    outputs: tuple[OutputParity, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    layers: tuple[OutputParity, ...] = ()
    decodings: tuple[Decoding, ...] = ()
    perplexity: Perplexity | None = None
    provider: str | None = None
    exact: tuple[OutputParity, ...] = ()
    cost: RoundingCost | None = None
    operators: tuple[OperatorRun, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the candidate computes what the reference computes."""
        return bool(self.outputs) and not self.findings

    @property
    def effect_error(self) -> float:
        """The largest effect error of all outputs; NaN when nothing was compared."""
        return max((output.effect_error for output in self.outputs), default=math.nan)

    @property
    def first_departure(self) -> OutputParity | None:
        """The first layer that is further off than the tolerance allows."""
        return next((layer for layer in self.layers if is_departure(layer, self.tolerance)), None)

    def to_json(self) -> dict[str, object]:
        """The report as plain values; null for what is not finite, which JSON has no word for."""
        first = self.first_departure
        plain: dict[str, object] = {
            "ok": self.ok,
            "dtype": self.dtype,
            "provider": self.provider,
            "operators": [asdict(run) for run in self.operators],
            "tolerance": asdict(self.tolerance),
            "effect_error": self.effect_error,
            "findings": list(self.findings),
            "notes": list(self.notes),
            "outputs": [asdict(output) for output in self.outputs],
            "exact": [asdict(output) for output in self.exact],
            "rounding_cost": None if self.cost is None else asdict(self.cost),
            "layers": [asdict(layer) for layer in self.layers],
            "first_departure": None if first is None else first.name,
            "decodings": [asdict(decoding) for decoding in self.decodings],
            "perplexity": None if self.perplexity is None else asdict(self.perplexity),
        }
        return {key: _finite(value) for key, value in plain.items()}


def compare(
    name: str, reference: Array, candidate: Array, base: Array, *, logits: bool, start: Array | None = None
) -> OutputParity:
    """Measure one output; NaN and Inf stay in the figures and fail the verdict.

    Args:
        name: for the report.
        reference: (…, n), PyTorch with live layers.
        candidate: (…, n), what is judged.
        base: (…, n), without the adapter.
        logits: the last axis holds scores over classes or a vocabulary.
        start: (…, n), the candidate without the adapter; None where it does not run so.

    Raises:
        ValueError: shapes differ, or there is nothing to compare.
    """
    shapes = {array.shape for array in (reference, candidate, base, *([] if start is None else [start]))}
    if len(shapes) != 1 or not reference.size:
        raise ValueError(f"{name}: expected equal, non-empty shapes, got {reference.shape} and {candidate.shape}")
    ref, cand, origin = (array.astype(np.float64) for array in (reference, candidate, base))
    own = origin if start is None else start.astype(np.float64)
    with np.errstate(all="ignore"):  # the verdict looks for NaN itself
        moved, arrived = ref - origin, cand - own
        error, effect = _norm(arrived - moved), _norm(moved)
        return OutputParity(
            name=name,
            max_abs=float(np.abs(cand - ref).max()),
            relative=float(_norm(cand - ref) / _norm(ref)),
            cosine=float(np.vdot(ref, cand) / (_norm(ref) * _norm(cand))),
            effect_error=float(error / effect) if effect else (math.inf if error else 0.0),
            effect_size=float(effect / _norm(origin)),
            effect_share=float(np.vdot(arrived, moved) / effect**2) if effect else 1.0,
            kl=mean_kl(ref, cand) if logits else None,
            top1=float((ref.argmax(-1) == cand.argmax(-1)).mean()) if logits else None,
            base_error=None if start is None else float(_norm(own - origin) / _norm(origin)),
            base_kl=mean_kl(origin, own) if logits and start is not None else None,
        )


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
    return ParityReport(dtype, tolerance, tuple(outputs), (*findings, *departed(outputs, tolerance)), tuple(notes))


def departed(outputs: Sequence[OutputParity], tolerance: Tolerance) -> list[str]:
    """What is wrong with measured outputs, all of it; nothing measured is wrong too."""
    found = [] if outputs else ["nothing was compared"]
    judged = judged_of(outputs, tolerance)
    return found + [f"{output.name}: {text}" for output in judged for text in departures(output, tolerance)]


def judged_of(outputs: Sequence[OutputParity], tolerance: Tolerance) -> list[OutputParity]:
    """The outputs that a tolerance is for: all, or the better half and whatever is not finite."""
    if not tolerance.is_typical:
        return list(outputs)
    finite = [output for output in outputs if math.isfinite(output.effect_error)]
    better = sorted(finite, key=lambda output: output.effect_error)[: (len(finite) + 1) // 2]
    return [output for output in outputs if output in better or output not in finite]


def departures(output: OutputParity, tolerance: Tolerance) -> Iterator[str]:
    """In what an output is further off than a tolerance allows."""
    figures = {key: value for key, value in asdict(output).items() if isinstance(value, float)}
    if not all(math.isfinite(value) for value in figures.values()):
        yield f"not finite ({_list_of(figures)})"
        return
    allowed = tolerance.allowed_effect(output.effect_size)
    if output.effect_size < NOISE:
        yield (
            f"the adapter moves the reference by {output.effect_size:.0e} of its size, which is "
            "rounding noise: there is no effect to judge"
        )
    elif allowed is not None and output.effect_error > allowed:
        yield f"the adapter's effect is off by {output.effect_error:.2%}, allowed {allowed:.2%}"
    elif tolerance.share is not None and abs(output.effect_share - 1) > tolerance.share:
        low, high = 1 - tolerance.share, 1 + tolerance.share
        yield f"{output.effect_share:.0%} of the adapter's effect arrived, allowed {low:.0%} to {high:.0%}"
    if output.base_error is not None and tolerance.effect is not None and output.base_error > tolerance.noise:
        yield f"without the adapter it is off from the base by {output.base_error:.1e}, allowed {tolerance.noise:.0e}"
    allowed_kl = tolerance.allowed_kl(output.base_kl)
    if output.kl is not None and output.kl > allowed_kl:
        yield f"KL divergence {output.kl:.1e} nats, allowed {allowed_kl:.0e}"
    if output.base_kl is not None and output.base_kl > tolerance.kl:
        yield f"without the adapter, KL divergence {output.base_kl:.1e} nats, allowed {tolerance.kl:.0e}"


def is_departure(layer: OutputParity, tolerance: Tolerance) -> bool:
    """Whether a layer is further off than its tolerance, relative to what the adapter does to it, or to its size."""
    allowed = tolerance.allowed_effect(layer.effect_size)
    if allowed is None:  # a quantized layer errs by itself; only its share can say that the adapter is not there
        return layer.effect_size > NOISE and abs(layer.effect_share - 1) > (tolerance.share or math.inf)
    return not layer.relative <= max(tolerance.noise, allowed * layer.effect_size)


def mean_kl(reference: Array, candidate: Array) -> float:
    """KL(ref ‖ cand) of the softmax over the last axis, averaged over positions."""
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    return float(np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0).mean())


def log_softmax(scores: Array) -> Array:
    """Logarithms of the softmax over the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value


def _cost(effect: float, kl: float | None) -> str:
    return f"{effect:.0%} of the adapter's effect" + ("" if kl is None else f" (KL {kl:.1e} nats)")


def _norm(array: Array) -> np.float64:
    """NumPy's own float, which divides by zero without an exception."""
    return np.float64(np.linalg.norm(array.ravel()))


def _list_of(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if not math.isfinite(value))
