"""Merge: execute a plan into a directory that transformers or diffusers load, with a manifest of what was done."""

import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

import torch

from hra_export import modelcard, publish
from hra_export.checkpoint import MANIFEST_NAME
from hra_export.companions import changed_config, companion_files
from hra_export.filesystem import as_output_error
from hra_export.plan import MergePlan, Shard
from hra_export.stream import Progress, Streamer, TensorTally
from hra_export.tensorfile import TensorLayout, lay_out

logger = logging.getLogger(__name__)

# Above this share of ΔW lost to rounding a user sees it: the adapter's effect is off in its second digit.
VISIBLE_LOSS = 0.05
# Shards written at a time: one waits for the disk to be flushed while the next is computed.
SHARDS_AT_ONCE = 2


@dataclass(frozen=True)
class TensorReport:
    """What happened to one tensor that was not merely copied.

    Attributes:
        delta_norm: ‖ΔW‖_F of the fold; 0 where nothing was folded.
        rounding_norm: ‖stored − exact‖_F, what the storage dtype cost.
    """

    name: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    delta_norm: float
    rounding_norm: float

    @property
    def loss(self) -> float | None:
        """Relative error of ΔW in the stored tensor; None where nothing was folded."""
        return self.rounding_norm / self.delta_norm if self.delta_norm else None


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote; `tensors` leaves out those that were copied as they are."""

    output: Path
    tensors: tuple[TensorReport, ...]
    copied: int
    size_bytes: int
    notes: tuple[str, ...]

    @property
    def folded(self) -> list[TensorReport]:
        """The tensors that a chain was folded into."""
        return [tensor for tensor in self.tensors if tensor.action == "fold"]

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖_F over all folded tensors."""
        return float(sum(tensor.delta_norm**2 for tensor in self.folded) ** 0.5)

    @property
    def loss(self) -> float:
        """Relative error of ΔW through rounding, over all folded tensors."""
        rounding = float(sum(tensor.rounding_norm**2 for tensor in self.folded) ** 0.5)
        return rounding / self.delta_norm if self.delta_norm else 0.0

    def warnings(self) -> list[str]:
        """What the user should act on."""
        if self.loss < VISIBLE_LOSS:
            return []
        worst = max(self.folded, key=lambda tensor: tensor.loss or 0.0)
        share = f"{self.loss:.1%} (worst: `{worst.name}`, {worst.loss or 0.0:.0%})"
        reason = "the adapter is small beside the last bit of these weights. `--dtype float32` keeps it"
        return [f"rounding to {worst.dtype} changed ΔW by {share}: {reason}"]


def merge_checkpoint(
    plan: MergePlan,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the merged checkpoint that `plan` describes.

    The output path is absent, the old directory, or complete at every instant. A merge that was killed leaves its
    finished shards beside the output, and the same merge started again takes them up.

    Args:
        plan: from `plan_merge`.
        output: directory to be made.
        overwrite: replace an earlier merge of ours.
        device: where folds are computed; the CPU by default, since the work is memory traffic.
        workers: threads; the cores at hand by default.
        progress: called with the bytes of each block written, from any thread.

    Raises:
        OutputError: the output exists, the disk is full or cannot be written, another run holds the lock.
        NumericalError: a folded or cast tensor is not finite; nothing is published.
    """
    layouts = {shard.name: _lay_out(shard) for shard in plan.shards}
    with as_output_error(f"read base `{plan.base.root}`"):
        fingerprint = plan.base.fingerprint()
    companions = _companions(plan)
    size = sum(layout.size_bytes for layout in layouts.values()) + sum(p.stat().st_size for p in companions.values())
    protected = [plan.base.root, *(adapter.path for adapter in plan.sources if adapter.path is not None)]
    key = _key(plan, fingerprint)
    with publish.stage(output, key=key, size_bytes=size, overwrite=overwrite, protected=protected) as stage:
        tallies = _write_shards(plan, stage, layouts, device or torch.device("cpu"), workers, progress)
        for name, source in companions.items():
            stage.copy(source, name)
        for name, data in _generated_files(plan).items():
            stage.write_bytes(name, data)
        report = _report(plan, output, tallies)
        stage.publish(MANIFEST_NAME, _manifest(plan, report, fingerprint))
    return report


def _lay_out(shard: Shard) -> TensorLayout:
    return lay_out(((tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors), shard.metadata)


def _write_shards(
    plan: MergePlan,
    stage: publish.Stage,
    layouts: Mapping[str, TensorLayout],
    device: torch.device,
    workers: int | None,
    progress: Progress | None,
) -> dict[str, TensorTally]:
    """Every shard, finished ones of an interrupted run excepted; what was measured comes from its journal for those."""
    streamer = Streamer(
        plan.base, plan.adapters, strength=plan.linear, device=device, workers=workers, progress=progress
    )

    turn = threading.Lock()  # to compute; a shard that is only being flushed lets the next one begin

    def write(shard: Shard) -> dict[str, TensorTally]:
        name = str(PurePosixPath(plan.base.component, shard.name))
        if stage.is_finished(name):
            if progress is not None:
                progress(sum(tensor.size_bytes for tensor in shard.tensors))
            return {key: TensorTally(*sums) for key, sums in json.loads(stage.note(name)).items()}
        tallies: dict[str, TensorTally] = {}
        size = layouts[shard.name].size_bytes
        with stage.create(name, size, note=lambda: _tallies_note(tallies)) as descriptor, turn:
            tallies.update(streamer.write_shard(shard, layouts[shard.name], descriptor))
        return tallies

    # The streamer is left first: an interrupt cancels its blocks, and with them the shards that wait for them.
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as shards, streamer:
        pending = [shards.submit(write, shard) for shard in plan.shards]
        try:
            return {key: tally for future in pending for key, tally in future.result().items()}
        except BaseException:
            for future in pending:
                future.cancel()
            raise


def _tallies_note(tallies: Mapping[str, TensorTally]) -> str:
    return json.dumps({name: (tally.delta, tally.rounding) for name, tally in tallies.items()})


def _report(plan: MergePlan, output: Path, tallies: Mapping[str, TensorTally]) -> MergeReport:
    tensors = tuple(
        TensorReport(
            tensor.name,
            tensor.action,
            tensor.dtype,
            tensor.shape,
            tallies[tensor.name].delta ** 0.5,
            tallies[tensor.name].rounding ** 0.5,
        )
        for tensor in plan.tensors
        if tensor.action != "copy"
    )
    return MergeReport(output, tensors, plan.count("copy"), plan.size_bytes, plan.notes)


def _companions(plan: MergePlan) -> dict[str, Path]:
    """Output name → file to copy, of those that are not generated."""
    generated = _generated_files(plan)
    return {name: path for name, path in companion_files(plan).items() if name not in generated}


def _generated_files(plan: MergePlan) -> dict[str, bytes]:
    """The files that are not copied: the shard index, a configuration that must change, the model card."""
    files = {"README.md": modelcard.merged_card(plan).encode(errors="replace"), **changed_config(plan)}
    if len(plan.shards) > 1 or plan.base.index_name is not None:
        stem = plan.base.files[0].path.name.removesuffix(".safetensors").split("-0")[0]
        index = {
            "metadata": {"total_size": plan.size_bytes},
            "weight_map": {tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors},
        }
        name = plan.base.index_name or f"{stem}.safetensors.index.json"
        files[str(PurePosixPath(plan.base.component, name))] = (json.dumps(index, indent=2) + "\n").encode()
    return files


def _key(plan: MergePlan, fingerprint: str) -> str:
    """What makes two merges the same work: inputs, options and tool."""
    described = {
        "version": metadata.version("hra-export"),
        "base": fingerprint,
        "adapters": [adapter.identity for adapter in plan.sources],
        "strength": [plan.strength, plan.interpolation],
        "dtype": plan.dtype,
        "shards": [[shard.name, *(tensor.name for tensor in shard.tensors)] for shard in plan.shards],
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _manifest(plan: MergePlan, report: MergeReport, fingerprint: str) -> bytes:
    """What was done, for people and for `hra-export validate`. No times and no machine: equal inputs, equal bytes."""
    manifest = {
        "schema_version": 1,
        "tool": {"name": "hra-export", "version": metadata.version("hra-export")},
        "base": {"name": plan.base.root.name, "component": plan.base.component, "fingerprint": fingerprint},
        "adapters": [adapter.entry() for adapter in plan.sources],
        "strength": plan.strength,
        "interpolation": plan.interpolation,
        "dtype": plan.dtype,
        "config_changes": dict(plan.config_changes),
        "notes": list(plan.notes),
        "totals": {
            "size_bytes": report.size_bytes,
            "folded": len(report.folded),
            "copied": report.copied,
            "delta_norm": report.delta_norm,
            "rounding_loss": report.loss,
        },
        "tensors": {
            tensor.name: {
                "action": tensor.action,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "delta_norm": tensor.delta_norm,
                "rounding_norm": tensor.rounding_norm,
                "rounding_loss": tensor.loss,
            }
            for tensor in report.tensors
        },
    }
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(errors="replace")
