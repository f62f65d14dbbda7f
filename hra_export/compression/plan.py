"""Fewer reflections for nearly the same rotation: what to keep of each chain, and the error that this will have.

A chain is taken apart into turned planes and mirrored directions (`rotation`), what each of them counts is measured
(`components`), the rest is left out (`selection`), and what remains is written as the shortest chain.

What counts as an error is told from what there is to measure with:

    rotation    nothing but the adapter: ‖R − R'‖ / ‖R − I‖
    weights     a base: ‖ΔW − ΔW'‖ / ‖ΔW‖
    outputs     a base and a text to read: the same on ΔW x, over the inputs x of a target; over several targets the
                root mean square of theirs, since outputs of different layers have no common scale. The chains that
                are left are then refined: their vectors turn until the error is least.

Limits: all targets of an HRA file have one rank and one determinant. An even rank therefore keeps even numbers of
mirrored directions everywhere, an odd one odd numbers; both are tried. Where the ranks differ, the file has the
largest.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.composition import reflectors
from hra_export.compression.calibration import Calibration
from hra_export.compression.components import Components, Deviation, Measure, components, mirror_axes
from hra_export.compression.selection import chains_of_rank, chains_within
from hra_export.errors import ConversionError
from hra_export.low_rank import HraSource, locate
from hra_export.rotation import Rotation, decompose
from hra_export.target_weights import TargetWeight

Aspect = Literal["rotation", "weights", "outputs"]

# Fewer inputs than this for each direction of a chain leave second moments to chance.
TOKENS_PER_DIRECTION = 16


@dataclass(frozen=True)
class CompressedTarget:
    """One target, and the chain that is kept of it.

    Attributes:
        module: module path.
        parts: the components of its rotation R, under the measure that decides.
        measures: every measure there is.
        chain: (k, r') float64, the kept reflection vectors in coordinates of the rotation's basis.
        weight: where W lies; None without a base.
    """

    module: str
    parts: Components
    measures: Mapping[Aspect, Measure]
    chain: Tensor
    weight: TargetWeight | None = None

    @property
    def kind(self) -> str:
        """The last word of the module path: `q_proj`, and `to_out` for `to_out.0`."""
        return next((part for part in reversed(self.module.split(".")) if not part.isdigit()), self.module)

    @property
    def rank(self) -> int:
        """How many reflections are kept; 0 for a target that is left out."""
        return self.chain.shape[1]

    @property
    def shortest(self) -> int:
        """How many the shortest chain of R has."""
        return self.parts.rotation.rank

    def vectors(self) -> Tensor:
        """(d, r') float64, unit columns."""
        return self.parts.rotation.basis @ self.chain

    def predicted(self, aspect: Aspect) -> Deviation:
        """How far R' will be from R."""
        return replace(self.parts, measure=self.measures[aspect]).deviation(self.chain)


@dataclass(frozen=True)
class CompressionPlan:
    """What will be written.

    Attributes:
        adapter: to be compressed.
        base: that was measured in, if any.
        by: the error that decided.
        targets: all that do anything, in the adapter's order.
        asked: `rank` or `tolerance`, with its value.
        calibration: what was read; None without a text.
        notes: what a user should know, one sentence each.
    """

    adapter: HraAdapter
    base: Checkpoint | None
    by: Aspect
    targets: tuple[CompressedTarget, ...]
    asked: tuple[Literal["rank", "tolerance"], float]
    calibration: Calibration | None
    notes: tuple[str, ...]

    @property
    def kept(self) -> tuple[CompressedTarget, ...]:
        """The targets that keep a chain."""
        return tuple(target for target in self.targets if target.rank)

    @property
    def rank(self) -> int:
        """r' of the file: the largest."""
        return max(target.rank for target in self.kept)

    @property
    def aspects(self) -> tuple[Aspect, ...]:
        """The errors that can be told, the deciding one last."""
        return tuple(self.targets[0].measures)

    @property
    def predicted(self) -> dict[Aspect, float]:
        """Relative errors over all targets."""
        totals = {aspect: [target.predicted(aspect) for target in self.targets] for aspect in self.aspects}
        return {aspect: sum(each, Deviation()).relative for aspect, each in totals.items()}

    def targets_by_kind(self) -> dict[str, list[CompressedTarget]]:
        """The targets by the last word of their path, in the order of first appearance."""
        groups: dict[str, list[CompressedTarget]] = {}
        for target in self.targets:
            groups.setdefault(target.kind, []).append(target)
        return groups

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        asked, value = self.asked
        return {
            "adapter": self.adapter.label,
            "base": None if self.base is None else str(self.base.root),
            asked: value,
            "by": self.by,
            "calibration_tokens": None if self.calibration is None else self.calibration.tokens,
            "rank_before": self.adapter.rank,
            "rank_after": self.rank,
            "predicted": self.predicted,
            "notes": list(self.notes),
            "targets": [
                {
                    "module": target.module,
                    "shortest": target.shortest,
                    "kept": target.rank,
                    "error": target.predicted(self.by).relative,
                }
                for target in self.targets
            ],
        }


def plan_compression(
    adapter: HraAdapter,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    base: Checkpoint | None = None,
    calibration: Calibration | None = None,
    refine: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> CompressionPlan:
    """Choose what to keep. Nothing is written.

    Args:
        adapter: as read; a Gram–Schmidt one is compressed to a plain chain.
        rank: at most so many reflections for each target.
        tolerance: the largest relative error over all targets together, with the fewest reflections in all.
        base: measure errors of ΔW; its targets are read once, row by row.
        calibration: measure errors of outputs on what was read; needs the base.
        refine: turn the vectors that are left until the error of outputs is least; without a text nothing is gained.
        tell: is told what is being done.

    Raises:
        ValueError: not exactly one of `rank` and `tolerance`, one that is out of range, or a text without a base.
        ConversionError: nothing would be left.
        NumericalError: chains that cannot be computed; all of them. Or the base holds NaN or Inf in a target.
        MismatchError: the adapter does not fit the base.
        UnsupportedModelError: as `find_targets`.
    """
    _check_arguments(rank, tolerance, has_base=base is not None, has_text=calibration is not None)
    rotations = {module: decompose(reflector) for module, reflector in reflectors([adapter]).items()}
    rotations = {module: rotation for module, rotation in rotations.items() if rotation.rank}
    if not rotations:
        raise ConversionError(f"adapter `{adapter.label}`: every chain is the identity, so nothing would be left")
    weights = locate(HraSource([adapter]), base) if base is not None else {}
    tell(f"measuring what {sum(rotation.rank for rotation in rotations.values())} reflections count")
    measured = [_measure(module, rotation, weights.get(module), calibration) for module, rotation in rotations.items()]
    by = tuple(measured[0].measures)[-1]
    tell("choosing")
    parts = [target.parts for target in measured]
    refine = refine and by == "outputs"
    if rank is not None:
        chains = chains_of_rank(parts, rank, refine=refine)
    else:
        chains = chains_within(parts, tolerance or 0.0, refine=refine)
    targets = tuple(
        CompressedTarget(target.module, target.parts, target.measures, chain, target.weight)
        for target, chain in zip(measured, chains, strict=True)
    )
    if not any(target.rank for target in targets):
        raise ConversionError(_nothing_left(adapter, rank), hint=_nothing_left_hint(targets, rank))
    asked: tuple[Literal["rank", "tolerance"], float]
    asked = ("rank", rank) if rank is not None else ("tolerance", tolerance or 0.0)
    notes = tuple(_notes(adapter, targets, rank, calibration))
    return CompressionPlan(adapter, base, by, targets, asked, calibration, notes)


def _check_arguments(rank: int | None, tolerance: float | None, *, has_base: bool, has_text: bool) -> None:
    if (rank is None) == (tolerance is None):
        raise ValueError("expected either a rank or a tolerance")
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a number between 0 and 1, got {tolerance}")
    if has_text and not has_base:
        raise ValueError("a calibration text needs a base to read it")


def _measure(
    module: str, rotation: Rotation, weight: TargetWeight | None, seen: Calibration | None
) -> CompressedTarget:
    """A target with all of its rotation kept, under every measure; the last of them decides."""
    measures: dict[Aspect, Measure] = {"rotation": Measure()}
    if weight is not None:
        measures["weights"] = Measure(torch.linalg.qr(weight.times(rotation.basis)).R)
    if weight is not None and seen is not None:
        root = seen.roots[module] @ rotation.basis if module in seen.roots else None
        is_looked_up = module in seen.looked_up
        outputs = root if is_looked_up else measures["weights"].outputs
        measures["outputs"] = _relative(Measure(outputs, None if is_looked_up else root), rotation)
    deciding = tuple(measures)[-1]
    axes = mirror_axes(rotation, measures[deciding])
    rotation = Rotation(rotation.basis @ axes, rotation.angles)
    turned = {aspect: measure.turned(axes) for aspect, measure in measures.items()}
    parts = components(rotation, turned[deciding])
    return CompressedTarget(module, parts, turned, parts.chain(range(len(parts.form))), weight)


def _relative(measure: Measure, rotation: Rotation) -> Measure:
    """The same measure in units of what it says of R − I."""
    whole = measure.squared(rotation.core())
    if measure.outputs is None or whole == 0:
        return measure
    return replace(measure, outputs=measure.outputs / math.sqrt(whole))


def _nothing_left(adapter: HraAdapter, rank: int | None) -> str:
    asked = f"with at most {rank} reflections" if rank is not None else "within this tolerance"
    return f"adapter `{adapter.label}`: {asked} nothing would be left of any target"


def _nothing_left_hint(targets: Sequence[CompressedTarget], rank: int | None) -> str:
    if rank is not None and not any(target.parts.rotation.mirrors for target in targets):
        return "every target turns planes, which take two reflections each: `--rank 2` keeps one of them"
    return "allow more reflections, or a smaller error"


def _notes(
    adapter: HraAdapter, targets: Sequence[CompressedTarget], rank: int | None, seen: Calibration | None
) -> Iterator[str]:
    idle = len(adapter.chains) - len(targets)
    if idle:
        yield f"{idle} targets are the identity and are left out"
    empty = [target.module for target in targets if not target.rank]
    if empty:
        yield f"{len(empty)} targets keep nothing and are left out (first: `{empty[0]}`)"
    ranks = sorted({target.rank for target in targets if target.rank})
    if all(target.rank == target.shortest for target in targets):
        yield f"nothing is dropped: the shortest chains have at most {ranks[-1]} reflections, of {adapter.rank} stored"
    elif rank is not None and ranks[-1] < min(rank, max(target.shortest for target in targets)):
        yield f"{ranks[-1]} reflections are kept, not {rank}: all chains of an HRA file have one determinant"
    if len(ranks) > 1:
        yield (
            f"targets keep {ranks[0]} to {ranks[-1]} reflections; an HRA file has one rank, so shorter chains are "
            f"filled to {ranks[-1]} with pairs that cancel. `hra-export convert` to gguf, ort-adapter or, with "
            "`--mixed-ranks`, lora stores each at its own"
        )
    shortest = max(target.shortest for target in targets)
    if seen is not None and seen.tokens < TOKENS_PER_DIRECTION * shortest:
        yield (
            f"the text has {seen.tokens} tokens, for chains of up to {shortest} directions: "
            "what it does not show is not kept. Take a longer one"
        )
    if seen is not None and seen.unseen:
        yield f"{len(seen.unseen)} targets saw no input, there every direction counts (first: `{seen.unseen[0]}`)"
