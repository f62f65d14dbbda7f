"""What an adapter does: ranks, angles, orthogonality; with a base also ‖ΔW‖ and what each storage dtype loses of it.

Everything is computed in float64. Angles come from norms of sums and differences: acos would lose every angle below
1e-8 rad, and lightly trained adapters are made of small ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from hra_export import householder
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.effect import Effect, measure_effects
from hra_export.errors import NumericalError
from hra_export.householder import GRAM_SCHMIDT_MIN_PIVOT, BlockReflector
from hra_export.merge import VISIBLE_LOSS

# A chain that turns nothing further than this is the identity: float32 columns differ by 6e-8 from rounding alone.
IDENTITY_DEGREES = math.degrees(2**-22)
# Within this factor of a refused pivot, a share of 1e-5 or more of an orthogonalized direction is rounding noise.
PIVOT_MARGIN = 100


@dataclass(frozen=True)
class TargetReport:
    """One chain. Angles are in degrees.

    Attributes:
        module: module path.
        features: d.
        rank: r.
        pair_angles: of the vectors (2k, 2k+1), folded to [0°, 90°]. A pair turns its plane by twice its angle, and
            parallel vectors not at all. With odd r the last vector stands alone, and det R = −1.
        rotation_angles: the r eigen-angles of R on the span of its vectors, largest first, in [0°, 180°]; a plane
            that is turned has two of them, a mirrored direction one of 180°.
        column_penalty: ‖ÛᵀÛ − I‖_F over unit columns, what the HRA paper penalizes in training.
        orthogonality_error: ‖RᵀR − I‖_F, rounding only.
        smallest_pivot: of the Gram-Schmidt process; None for a plain chain.
        effect: in the base; None without one.
    """

    module: str
    features: int
    rank: int
    pair_angles: tuple[float, ...]
    rotation_angles: tuple[float, ...]
    column_penalty: float
    orthogonality_error: float
    smallest_pivot: float | None = None
    effect: Effect | None = None

    @property
    def kind(self) -> str:
        """The last word of the module path: `q_proj`, and `to_out` for `to_out.0`."""
        return next((part for part in reversed(self.module.split(".")) if not part.isdigit()), self.module)

    @property
    def rotation(self) -> float:
        """The largest angle by which R turns anything."""
        return self.rotation_angles[0]

    @property
    def is_identity(self) -> bool:
        """Whether the chain does nothing."""
        return self.rotation < IDENTITY_DEGREES

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "module": self.module,
            "kind": self.kind,
            "features": self.features,
            "rank": self.rank,
            "determinant": -1 if self.rank % 2 else 1,
            "pair_angles_degrees": list(self.pair_angles),
            "rotation_angles_degrees": list(self.rotation_angles),
            "column_penalty": self.column_penalty,
            "orthogonality_error": self.orthogonality_error,
            "smallest_pivot": self.smallest_pivot,
            "is_identity": self.is_identity,
            "effect": self.effect.to_json() if self.effect is not None else None,
        }


@dataclass(frozen=True)
class KindReport:
    """All targets of one kind, such as every `q_proj`."""

    kind: str
    targets: tuple[TargetReport, ...]

    @property
    def features(self) -> tuple[int, ...]:
        """The different d, ascending."""
        return tuple(sorted({target.features for target in self.targets}))

    @property
    def pair_angles(self) -> tuple[float, float, float] | None:
        """Smallest, median and largest pair angle; None when there is no pair."""
        angles = [angle for target in self.targets for angle in target.pair_angles]
        return (min(angles), median(angles), max(angles)) if angles else None

    @property
    def effect(self) -> Effect | None:
        """Of all of them together."""
        return _total(self.targets)

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "kind": self.kind,
            "targets": len(self.targets),
            "features": list(self.features),
            "pair_angles_degrees": dict(zip(("min", "median", "max"), self.pair_angles or (None,) * 3, strict=True)),
            "rotation_degrees": max(target.rotation for target in self.targets),
            "effect": self.effect.to_json() if self.effect is not None else None,
        }


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter is made of and does.

    Attributes:
        label: its path, for people.
        base: the base it names itself, if any.
        measured_in: the base that effects were measured in; None without one.
        files: name → bytes, of everything in its directory.
        parameters: name → shape, of what was trained beside the chains.
    """

    label: str
    digest: str
    rank: int
    orthogonalize: bool
    base: str | None
    measured_in: Path | None
    bias: str
    modules_to_save: tuple[str, ...]
    files: Mapping[str, int]
    parameters: Mapping[str, tuple[int, ...]]
    targets: tuple[TargetReport, ...]

    @property
    def chain_size(self) -> int:
        """Trained numbers in the chains."""
        return sum(target.features * target.rank for target in self.targets)

    @property
    def parameter_size(self) -> int:
        """Trained numbers beside the chains."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    @property
    def kinds(self) -> tuple[KindReport, ...]:
        """The targets by the last word of their path, in the order of first appearance."""
        groups: dict[str, list[TargetReport]] = {}
        for target in self.targets:
            groups.setdefault(target.kind, []).append(target)
        return tuple(KindReport(kind, tuple(targets)) for kind, targets in groups.items())

    @property
    def effect(self) -> Effect | None:
        """Of all targets together; None when no base was given."""
        return _total(self.targets)

    def warnings(self) -> list[str]:
        """What the user should act on, one sentence each."""
        return [*self._chain_warnings(), *self._loss_warnings()]

    def _chain_warnings(self) -> Iterator[str]:
        idle = [target.module for target in self.targets if target.is_identity]
        if len(idle) == len(self.targets):
            yield "every chain is the identity: this adapter changes nothing but its other parameters"
        elif idle:
            yield f"{len(idle)} of {len(self.targets)} chains are the identity: untrained (first: `{idle[0]}`)"
        if self.rank % 2:
            yield (
                f"rank {self.rank} is odd: every chain mirrors (det R = -1), is never the identity, "
                "and has no fractional strength as a rotation"
            )
        pivots = {target.module: target.smallest_pivot for target in self.targets if target.smallest_pivot is not None}
        near = {name: pivot for name, pivot in pivots.items() if pivot < PIVOT_MARGIN * GRAM_SCHMIDT_MIN_PIVOT}
        if near:
            worst = min(near, key=near.__getitem__)
            yield (
                f"Gram-Schmidt is near its breakdown in {len(near)} of {len(self.targets)} chains (worst: `{worst}`, "
                f"pivot {near[worst]:.1e}): part of the rotation is rounding noise, different on every device"
            )

    def _loss_warnings(self) -> Iterator[str]:
        effect = self.effect
        losses = {} if effect is None else {dtype: effect.loss(dtype) or 0.0 for dtype in ("bfloat16", "float16")}
        for dtype, loss in losses.items():
            if math.isinf(loss):
                yield f"merged weights overflow in {dtype}"
            elif loss >= VISIBLE_LOSS:
                yield (
                    f"storing the merged weights as {dtype} loses {loss:.1%} of ΔW: the adapter is small beside their "
                    "last bit. `hra-export merge --dtype float32` keeps it"
                )

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "adapter": self.label,
            "digest": self.digest,
            "rank": self.rank,
            "apply_GS": self.orthogonalize,
            "base": self.base,
            "measured_in": str(self.measured_in) if self.measured_in is not None else None,
            "bias": self.bias,
            "modules_to_save": list(self.modules_to_save),
            "files": dict(self.files),
            "totals": {
                "targets": len(self.targets),
                "chain_size": self.chain_size,
                "parameter_size": self.parameter_size,
                "effect": self.effect.to_json() if self.effect is not None else None,
            },
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "kinds": [kind.to_json() for kind in self.kinds],
            "targets": [target.to_json() for target in self.targets],
            "warnings": self.warnings(),
        }


def inspect_adapter(adapter: HraAdapter, base: Checkpoint | None = None) -> AdapterReport:
    """Describe an adapter; nothing is written or changed.

    Args:
        adapter: as read.
        base: also measure ΔW in it. Its targets are read block by block, so memory does not grow with the model.

    Raises:
        NumericalError: chains cannot be computed; all of them. Or the base holds NaN or Inf in a target.
        MismatchError: an adapter tensor has no place in the base, or the wrong shape; all of them.
        UnsupportedModelError: quantized base, grouped convolution, a layout that mixes input features.
        CheckpointError: the base was changed while being read.
    """
    effects = measure_effects(adapter, base) if base is not None else {}
    targets, findings, hint = [], [], None
    for module in adapter.chains:
        try:
            reflector = adapter.reflector(module)
        except NumericalError as error:
            findings.append(error.message)
            hint = error.hint
            continue
        targets.append(_target(adapter, module, reflector, effects.get(module)))
    if findings:
        raise NumericalError(f"{len(findings)} chains cannot be computed", findings=findings, hint=hint)
    return AdapterReport(
        label=adapter.label,
        digest=adapter.digest,
        rank=adapter.rank,
        orthogonalize=adapter.orthogonalize,
        base=adapter.base,
        measured_in=base.root if base is not None else None,
        bias=adapter.bias,
        modules_to_save=adapter.modules_to_save,
        files=_files(adapter.path),
        parameters={name: tuple(value.shape) for name, value in adapter.parameters.items()},
        targets=tuple(targets),
    )


def pair_angles(units: Tensor) -> tuple[float, ...]:
    """Angles in degrees between the unit columns (2k, 2k+1) of (d, r), as lines: in [0°, 90°]."""
    even = units.shape[1] // 2 * 2
    first, second = units[:, 0:even:2], units[:, 1:even:2]
    norms = [torch.linalg.vector_norm(each, dim=0) for each in (first - second, first + second)]
    near, far = torch.minimum(*norms), torch.maximum(*norms)
    return tuple(torch.rad2deg(2 * torch.atan2(near, far)).tolist())


def rotation_angles(reflector: BlockReflector) -> tuple[float, ...]:
    """The r eigen-angles in degrees of R on the span of its vectors, largest first, in [0°, 180°].

    With U = Q L, R acts on the span as M = I − L T Lᵀ. M is orthogonal, so ‖(M − I)v‖ and ‖(M + I)v‖ are twice the
    sine and cosine of half the angle by which v's plane is turned: their singular values give it without cancellation.
    """
    triangle = torch.linalg.qr(reflector.u).R
    change = triangle @ reflector.t @ triangle.T  # (r, r), I − M
    identity = torch.eye(reflector.rank, dtype=change.dtype, device=change.device)
    sines, cosines = torch.linalg.svdvals(change), torch.linalg.svdvals(2 * identity - change).flip(0)
    return tuple(torch.rad2deg(2 * torch.atan2(sines, cosines)).tolist())


def _target(adapter: HraAdapter, module: str, reflector: BlockReflector, effect: Effect | None) -> TargetReport:
    units = householder.unit_columns(adapter.chains[module])
    identity = torch.eye(units.shape[1], dtype=units.dtype)
    pivots = torch.linalg.qr(units).R.diagonal().abs() if adapter.orthogonalize else None
    return TargetReport(
        module=module,
        features=reflector.features,
        rank=reflector.rank,
        pair_angles=pair_angles(units),
        rotation_angles=rotation_angles(reflector),
        column_penalty=float(torch.linalg.matrix_norm(units.T @ units - identity)),
        orthogonality_error=householder.orthogonality_error(reflector),
        smallest_pivot=float(pivots.min()) if pivots is not None else None,
        effect=effect,
    )


def _total(targets: Sequence[TargetReport]) -> Effect | None:
    effects = [target.effect for target in targets if target.effect is not None]
    return sum(effects, Effect()) if effects else None


def _files(directory: Path | None) -> dict[str, int]:
    if directory is None:
        return {}
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
