"""HRA adapters made of other changes of weights: the nearest chain for each target, and how far it is off.

What the converters from LoRA and from whole models share: they say what changed and what is kept beside the chains;
here each target gets its chain, and the adapter is written with the distances in its manifest.

Limits: one rank for all targets, as PEFT's file has it. All chains are in memory until they are written.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from hra_export import modelcard, publish
from hra_export.adapter import HraAdapter, adapter_files
from hra_export.checkpoint import MANIFEST_NAME, Checkpoint
from hra_export.converted import HRA_FORMAT, ConvertedTarget, ConvertReport, manifest_bytes
from hra_export.errors import ConversionError, NumericalError
from hra_export.filesystem import as_output_error
from hra_export.householder import compact_wy
from hra_export.nearest import procrustes
from hra_export.nearest.procrustes import Floor
from hra_export.nearest.weight_change import Change, Dense, Matrix
from hra_export.rotation import padded, shortest_chain
from hra_export.target_weights import TargetWeight

# Weights up to 128 MB of float64 are held while their chain is sought; larger ones are read again for every product.
HELD_ELEMENTS = 1 << 24
# Above this a chain of odd length is off because of the direction that it has to mirror.
VISIBLE_ERROR = 1e-3
# Below this it is the rounding of float32 vectors, of float32 weights or factors before them.
ROUNDING_ERROR = 1e-5
# What stock PEFT's HRA has layers for; ours take embeddings and Conv1D too.
PEFT_KINDS = ("linear", "conv2d")


@dataclass(frozen=True)
class NearestPlan:
    """What is to become an HRA adapter.

    Attributes:
        conversion: the converter's name, for the manifest.
        weights: the targets in the base.
        idle: targets that are not changed, which get a chain that cancels.
        change: what was added to a target; called once for each, when its turn comes.
        parameters: parameter name → value, kept beside the chains; `bias` and `modules_to_save` say it to PEFT.
        entries: how the manifest names the sources.
        paths: the sources' files, which no output may replace.
        companions: files to carry along, such as the tokenizer: name → path.
    """

    conversion: str
    base: Checkpoint
    rank: int
    weights: Mapping[str, TargetWeight]
    idle: frozenset[str]
    change: Callable[[TargetWeight], Change]
    entries: Sequence[Mapping[str, object]]
    paths: tuple[Path, ...]
    companions: Mapping[str, Path] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    base_name: str | None = None
    task: str | None = None
    model_class: str | None = None
    model_library: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """Of every target in the output."""
        return dict.fromkeys(self.weights, self.rank)

    @property
    def size_bytes(self) -> int:
        """Of the targets' weights, which progress counts."""
        return sum(weight.size_bytes for weight in self.weights.values())


@dataclass(frozen=True)
class NearestChain:
    """The chain of one target.

    Attributes:
        vectors: U (d, rank), float32, as written.
        delta_norm: ‖ΔW‖ that was asked for.
        error: ‖W R − W'‖ / ‖ΔW‖ of these very vectors; 0 where there is no ΔW.
        floor: how near any rotation comes.
    """

    vectors: Tensor
    delta_norm: float
    error: float
    floor: Floor


def check_ranks(rank: int, weights: Mapping[str, TargetWeight], idle: frozenset[str]) -> None:
    """Refuse what no chain of this length can be.

    Raises:
        ValueError: a rank below 1.
        ConversionError: nothing changes, more reflections than features, or an odd chain that should do nothing; all.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if idle >= weights.keys():
        raise ConversionError("nothing changes: no target's ΔW differs from zero", hint="is this the base itself?")
    findings = [
        f"{module}: {rank} reflections, but {weight.shape[1]} features"
        for module, weight in weights.items()
        if rank > weight.shape[1]
    ]
    if rank % 2:
        findings += [f"{module}: does not change, and no odd number of reflections is the identity" for module in idle]
    if findings:
        raise ConversionError(f"{len(findings)} targets cannot have chains of rank {rank}", findings=findings)


def held(weight: TargetWeight) -> Matrix:
    """The weight in memory where it is small, read by each product where it is not.

    Raises:
        NumericalError: NaN or Inf in it.
    """
    if math.prod(weight.shape) > HELD_ELEMENTS:
        return weight
    return Dense(torch.cat([block for _, block in weight.blocks()]))


def nearest_chain(change: Change, rank: int) -> NearestChain:
    """The chain of `rank` reflections that was found nearest to a change, measured as it is written."""
    features = change.weight.shape[1]
    if not change.norm:
        return NearestChain(cancelling(features, rank), 0.0, 0.0, Floor(0.0, is_exact=True))
    vectors = shortest_chain(procrustes.nearest_rotation(change, rank))
    vectors = padded(vectors, rank) if vectors.shape[1] else cancelling(features, rank)
    written = vectors.float()
    error = procrustes.distance(change, compact_wy(written))
    floor = procrustes.rotation_floor(change)
    # Singular values cost half of float64's digits: a chain that was found is a better bound than they are.
    return NearestChain(written, change.norm, error, Floor(min(floor.distance, error), floor.is_exact))


def cancelling(features: int, rank: int) -> Tensor:
    """A chain that is the identity exactly: pairs of equal vectors (d, rank), float32."""
    return torch.full((features, rank), features**-0.5)


def write_nearest(
    plan: NearestPlan,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Find the chain of every target and write the adapter.

    The output path is absent, the old directory, or complete at every instant.

    Args:
        plan: of a converter.
        output: directory to be made.
        overwrite: replace an earlier output of ours.
        progress: called with the bytes of each target's weight that was done.

    Raises:
        NumericalError: a weight holds NaN or Inf, or the norm of a ΔW overflows.
        OutputError: the output exists, the disk is full or cannot be written.
    """
    protected = [plan.base.root, *plan.paths]
    publish.check_output(output, overwrite=overwrite, protected=protected)
    with as_output_error(f"read base `{plan.base.root}`"):
        fingerprint = plan.base.fingerprint()
    chains: dict[str, NearestChain] = {}
    for module, weight in plan.weights.items():
        change = plan.change(weight)
        if not math.isfinite(change.norm):
            raise NumericalError(f"the ΔW of `{module}` is too large to be measured: its norm overflows")
        chains[module] = nearest_chain(change, plan.rank)
        if progress is not None:
            progress(weight.size_bytes)
    files = {**adapter_files(_adapter(plan, chains)), "README.md": _card(plan).encode(errors="replace")}
    size = sum(map(len, files.values())) + sum(path.stat().st_size for path in plan.companions.values())
    report = _report(plan, output, chains, size)
    key = hashlib.sha256(b"".join(files.values())).hexdigest()
    with publish.stage(output, key=key, size_bytes=size, overwrite=overwrite, protected=protected) as stage:
        for name, data in files.items():
            stage.write_bytes(name, data)
        for name, path in plan.companions.items():
            stage.copy(path, name)
        stage.publish(MANIFEST_NAME, _manifest(plan, report, chains, fingerprint))
    return report


def _adapter(plan: NearestPlan, chains: Mapping[str, NearestChain]) -> HraAdapter:
    return HraAdapter(
        chains={module: chain.vectors for module, chain in chains.items()},
        rank=plan.rank,
        parameters=plan.parameters,
        bias=plan.bias,
        modules_to_save=plan.modules_to_save,
        base=plan.base_name,
        task=plan.task,
        model_class=plan.model_class,
        model_library=plan.model_library,
    )


def _report(plan: NearestPlan, output: Path, chains: Mapping[str, NearestChain], size_bytes: int) -> ConvertReport:
    targets = tuple(
        ConvertedTarget(module, plan.rank, chain.delta_norm, chain.error) for module, chain in chains.items()
    )
    report = ConvertReport(HRA_FORMAT, output, size_bytes, targets, plan.notes, total_floor(chains))
    return replace(report, notes=(*plan.notes, *_notes(plan, chains, report.error)))


def total_floor(chains: Mapping[str, NearestChain]) -> float:
    """√Σ(floor · ‖ΔW‖)² / √Σ‖ΔW‖²: how near rotations of all targets come together."""
    missed = math.sqrt(sum((chain.floor.distance * chain.delta_norm) ** 2 for chain in chains.values()))
    return missed / math.sqrt(sum(chain.delta_norm**2 for chain in chains.values()))


def _notes(plan: NearestPlan, chains: Mapping[str, NearestChain], error: float) -> list[str]:
    """What a user should know about the distances, one sentence each."""
    floor, bounds = total_floor(chains), sum(not chain.floor.is_exact for chain in chains.values())
    least = f" (at least: {bounds} targets are too large for the exact figure)" if bounds else ""
    if error < ROUNDING_ERROR:
        notes = [f"ΔW is a rotation: {plan.rank} reflections differ from it by {error:.1g}, which is rounding"]
    else:
        reached = f"{plan.rank} reflections leave {error:.2g}"
        notes = [f"no rotation of any rank comes nearer to ΔW than {floor:.2g} of it{least}: {reached}"]
    if plan.idle:
        notes.append(f"{len(plan.idle)} of {len(chains)} targets change nothing: their reflections cancel")
    if plan.rank % 2 and error > VISIBLE_ERROR:
        notes.append(
            "an odd number of reflections has to mirror one direction of every target: an even one fits better"
        )
    foreign = [weight.module for weight in plan.weights.values() if weight.kind not in PEFT_KINDS]
    if foreign:
        notes.append(
            f"{len(foreign)} targets are embeddings or Conv1D (`{foreign[0]}`): stock PEFT has no HRA for them, "
            "`hra-export` takes them"
        )
    return notes


def _card(plan: NearestPlan) -> str:
    """README.md: what the chains are, and for which base."""
    front = modelcard.adapter_front_matter(plan.base_name, {"library_name": "peft", "tags": ["hra"]})
    sources = ", ".join(f"`{entry.get('name')}`" for entry in plan.entries)
    return (
        f"{front}# {len(plan.weights)} chains of rank {plan.rank}\n\n"
        f"The Householder reflections that come nearest to {sources} on this base. `{MANIFEST_NAME}` says how near "
        "each target comes, and how near any rotation could. Made with `hra-export convert`.\n"
    )


def _manifest(plan: NearestPlan, report: ConvertReport, chains: Mapping[str, NearestChain], fingerprint: str) -> bytes:
    """What was done and how far it is off."""
    content = {
        "format": report.format,
        "conversion": plan.conversion,
        "base": {"name": plan.base.root.name, "component": plan.base.component, "fingerprint": fingerprint},
        "sources": [dict(entry) for entry in plan.entries],
        "rank": plan.rank,
        "notes": list(report.notes),
        "totals": {
            "size_bytes": report.size_bytes,
            "delta_norm": report.delta_norm,
            "error": report.error,
            "floor": report.floor,
        },
        "kept_whole": sorted(plan.parameters),
        "targets": {
            module: {
                "shape": list(plan.weights[module].shape),
                "delta_norm": chain.delta_norm,
                "error": chain.error,
                "floor": chain.floor.distance,
                "floor_is_exact": chain.floor.is_exact,
            }
            for module, chain in chains.items()
        },
    }
    return manifest_bytes("adapter", content)
