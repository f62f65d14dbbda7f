"""What other code trained → merged weights: a directory that transformers or diffusers load as a plain model.

For chains that no HRA file can hold. An HRA adapter goes through the same merge as by the command of that name.
"""

from pathlib import Path

import torch

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.converted import ConvertedTarget, ConvertReport
from hra_export.merge import MergeReport, merge_checkpoint
from hra_export.official.soft_chain import SoftSource
from hra_export.official.soft_merge import plan_soft_merge
from hra_export.plan import DtypeChoice, MergePlan
from hra_export.planning import plan_merge
from hra_export.stream import Progress

FORMAT = "merged weights"


def convert(
    source: HraAdapter | SoftSource,
    output: Path,
    *,
    base: Checkpoint,
    dtype: DtypeChoice = "keep",
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Fold a source into its base.

    Args:
        source: a soft source with its strength, or an adapter.
        output: directory to be made.
        base: the model that was adapted.
        dtype: of the floating-point tensors written; `keep` takes each tensor's own.
        max_shard_bytes: split the output anew; None keeps the base's shards.
        overwrite: replace an earlier output of ours.
        device: where folds are computed; the CPU by default.
        progress: called with the bytes of each block written, from any thread.

    Returns:
        A target for each tensor that was folded, under the tensor's name.

    Raises:
        MismatchError: a chain or parameter has no place in the base, or the wrong shape; all of them.
        NumericalError: a chain cannot be computed, or a stored value is not finite; nothing is published.
        OutputError: the output exists, the disk is full or cannot be written.
        UnsupportedModelError: a quantized base, or a layout of its tensors that cannot be folded into.
    """
    planned = plan_conversion(source, base, dtype=dtype, max_shard_bytes=max_shard_bytes)
    report = merge_checkpoint(planned, output, overwrite=overwrite, device=device, progress=progress)
    return ConvertReport(
        FORMAT, output, report.size_bytes, _targets(planned, report), (*planned.notes, *report.warnings())
    )


def plan_conversion(
    source: HraAdapter | SoftSource,
    base: Checkpoint,
    *,
    dtype: DtypeChoice = "keep",
    max_shard_bytes: int | None = None,
) -> MergePlan:
    """What `convert` would do, from headers only.

    Raises:
        MismatchError: as `convert`; so NumericalError and UnsupportedModelError.
    """
    if isinstance(source, SoftSource):
        return plan_soft_merge(base, source, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return plan_merge(base, [source], dtype=dtype, max_shard_bytes=max_shard_bytes)


def _targets(plan: MergePlan, report: MergeReport) -> tuple[ConvertedTarget, ...]:
    ranks = {
        tensor.name: max(
            plan.adapters[site.adapter].chains[site.module].shape[1]
            for segment in tensor.segments
            for site in segment.chains
        )
        for tensor in plan.tensors
        if tensor.action == "fold"
    }
    return tuple(
        ConvertedTarget(tensor.name, ranks[tensor.name], tensor.delta_norm, tensor.loss or 0.0)
        for tensor in report.folded
    )
