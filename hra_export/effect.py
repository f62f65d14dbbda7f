"""‖ΔW‖ in a base, and what each storage dtype would lose of it: float64, streamed block by block, nothing written.

Where a chain lives (whole tensors, rows of fused or stacked ones, weights stored the other way round) is the merge
plan's answer. Limit: where two modules share one tensor, the effect belongs to the one that the plan names first.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hra_export import householder
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.errors import CheckpointError, NumericalError
from hra_export.householder import BlockReflector
from hra_export.plan import STORED_DTYPES, OutputTensor, Segment
from hra_export.planning import plan_merge
from hra_export.tensorfile import DTYPES, TensorFile

# Elements of a block: 8 MB of float64, and a few of them at a time.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Effect:
    """ΔW in a base, and what storing W + ΔW costs. Held as sums of squares, so that effects add up.

    Attributes:
        delta_squared: ‖ΔW‖_F².
        weight_squared: ‖W‖_F².
        rounding_squared: storage dtype → ‖stored − (W + ΔW)‖_F²; infinite where a value overflows.
    """

    delta_squared: float = 0.0
    weight_squared: float = 0.0
    rounding_squared: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(STORED_DTYPES, 0.0))

    def __add__(self, other: "Effect") -> "Effect":
        rounding = {dtype: self.rounding_squared[dtype] + other.rounding_squared[dtype] for dtype in STORED_DTYPES}
        return Effect(self.delta_squared + other.delta_squared, self.weight_squared + other.weight_squared, rounding)

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖_F."""
        return math.sqrt(self.delta_squared)

    @property
    def weight_norm(self) -> float:
        """‖W‖_F."""
        return math.sqrt(self.weight_squared)

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return self.delta_norm / self.weight_norm if self.weight_squared else 0.0

    def loss(self, dtype: str) -> float | None:
        """Relative error of ΔW when W + ΔW is stored as `dtype`; None where there is no ΔW."""
        return math.sqrt(self.rounding_squared[dtype]) / self.delta_norm if self.delta_squared else None

    def to_json(self) -> dict[str, object]:
        """The same as plain values; an overflow's infinite loss becomes null."""
        losses = {dtype: _finite(self.loss(dtype)) for dtype in STORED_DTYPES}
        norms = {"delta_norm": self.delta_norm, "weight_norm": self.weight_norm, "relative": self.relative}
        return {**norms, "loss": losses}


def measure_effects(adapter: HraAdapter, base: Checkpoint) -> dict[str, Effect]:
    """Module → its effect, over every run of rows that its chain folds into.

    Raises:
        NumericalError: a chain cannot be computed, or the base holds NaN or Inf in a target.
        MismatchError: an adapter tensor has no place in the base, or the wrong shape; all of them.
        UnsupportedModelError: quantized base, grouped convolution, a layout that mixes input features.
        CheckpointError: the base was changed while being read.
    """
    plan = plan_merge(base, [adapter])
    files = {name: file for file in base.files for name in file.tensors}
    effects: dict[str, Effect] = {}
    for tensor in plan.tensors:
        for segment in tensor.segments:
            if segment.chains:
                chains = [adapter.reflector(site.module) for site in segment.chains]
                module = segment.chains[0].module
                rows = _Rows(tensor, segment, files)
                effect = _effect(rows, householder.compose(chains[0], *chains[1:]))
                if not math.isfinite(effect.delta_squared):
                    raise NumericalError(f"base `{base.root}`: `{tensor.name}` holds NaN or Inf in target `{module}`")
                effects[module] = effects.get(module, Effect()) + effect
    return effects


@dataclass(frozen=True)
class _Rows:
    """The source rows of one segment, read in blocks."""

    tensor: OutputTensor
    segment: Segment
    files: Mapping[str, TensorFile]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows, counted from the segment's start, as float64."""
        count, columns = self.segment.stop - self.segment.start, self.tensor.matrix_shape[1]
        step = max(1, BLOCK_ELEMENTS // max(columns, 1))
        for start in range(0, count, step):
            run = slice(start, min(start + step, count))
            yield run, self._read(run, columns).double()

    def _read(self, run: slice, columns: int) -> Tensor:
        first, last = (self.segment.source_start + edge for edge in (run.start, run.stop))
        source = self.segment.source
        if isinstance(source, Tensor):
            return source.detach().reshape(-1, columns)[first:last]
        file, (bits, word) = self.files[source.name], DTYPES[source.dtype]
        row_bytes = columns * bits // 8
        data = bytearray((last - first) * row_bytes)
        with file.open() as descriptor:
            _read_fully(file.path, descriptor, memoryview(data), source.start + first * row_bytes)
        return torch.frombuffer(data, dtype=getattr(torch, word)).reshape(last - first, columns)


def _read_fully(path: Path, descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.preadv(descriptor, [view], offset)
        if not done:
            raise CheckpointError(f"`{path}` ended early: it was changed while being read")
        view, offset = view[done:], offset + done


def _effect(rows: _Rows, reflector: BlockReflector) -> Effect:
    ut, u_t = reflector.u @ reflector.t, reflector.u.T  # (d, r), (r, d)
    effect = Effect()
    if not rows.segment.transposed:
        for _, weight in rows.blocks():  # (n, d)
            effect += _block_effect(weight, -((weight @ ut) @ u_t))
        return effect
    # Stored (d, o), a block holds some input features of every output; the coefficients need all of them first.
    coefficients = ut.new_zeros(reflector.rank, rows.tensor.matrix_shape[1])  # (r, o)
    for run, weight in rows.blocks():
        coefficients += ut[run].T @ weight
    for run, weight in rows.blocks():
        effect += _block_effect(weight, -(reflector.u[run] @ coefficients))
    return effect


def _block_effect(weight: Tensor, delta: Tensor) -> Effect:
    exact = weight + delta
    rounding = {dtype: _squared(exact.to(getattr(torch, dtype)).double().sub_(exact)) for dtype in STORED_DTYPES}
    return Effect(_squared(delta), _squared(weight), rounding)


def _squared(values: Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
