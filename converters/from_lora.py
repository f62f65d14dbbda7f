"""LoRA → the nearest HRA adapter: for each target the chain of R reflections whose W R comes nearest to W + ΔW.

A LoRA that was made of an HRA adapter comes back as that adapter, to the last digits of float32. Any other changes
lengths of W's rows and angles between them, which no rotation of the input does: that part is reported as a number.

Limits: those of `lora/file.py`; a target whose own weight was trained too, such as a resized vocabulary.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from hra_export.checkpoint import MANIFEST_NAME, Checkpoint
from hra_export.companions import tokenizer_files
from hra_export.converted import ConvertReport
from hra_export.errors import ConversionError
from hra_export.lora.file import LoraAdapter, read_lora
from hra_export.low_rank import kept_parameters, locate
from hra_export.nearest import chains as nearest
from hra_export.nearest.chains import NearestPlan
from hra_export.nearest.weight_change import Change, low_rank_change
from hra_export.target_weights import TargetWeight


def convert(
    source: Path,
    output: Path,
    *,
    base: Checkpoint,
    rank: int,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write the HRA adapter of rank `rank` that is nearest to a LoRA adapter.

    Args:
        source: a LoRA directory of PEFT.
        output: directory to be made; PEFT loads it as HRA.
        base: what the LoRA was trained on, and the only base that the chains are nearest for.
        rank: reflections of each target; even, as a rule.
        overwrite: replace an earlier output of ours.
        progress: called with the bytes of each target's weight that was done.

    Returns:
        The report; `error` is ‖W R − W'‖ / ‖ΔW‖ over all targets.

    Raises:
        AdapterError, MismatchError, UnsupportedModelError, ConversionError, NumericalError: as for `plan`.
        NumericalError: a weight of the base holds NaN or Inf.
        OutputError: the output exists, the disk is full or cannot be written.
    """
    return nearest.write_nearest(plan(source, base=base, rank=rank), output, overwrite=overwrite, progress=progress)


def plan(source: Path, *, base: Checkpoint, rank: int) -> NearestPlan:
    """Read the adapter and find its targets in the base; no weight is read.

    Raises:
        AdapterError: not a LoRA adapter, malformed, or config and tensors disagree.
        MismatchError: targets that the base does not have, or of another shape; all of them.
        UnsupportedModelError: a variant of LoRA, or a base that cannot be read; named.
        ConversionError: nothing changes, or no chain of this rank fits a target; all of them.
        NumericalError: a factor is not finite.
        ValueError: a rank below 1.
    """
    adapter = read_lora(source)
    weights = locate(adapter, base)
    idle = frozenset(module for module in weights if not adapter.rank(module))
    nearest.check_ranks(rank, weights, idle)

    def change(weight: TargetWeight) -> Change:
        return low_rank_change(nearest.held(weight), *adapter.factors(weight))

    return NearestPlan(
        conversion="from_lora",
        base=base,
        rank=rank,
        weights=weights,
        idle=idle,
        change=change,
        entries=adapter.entries(),
        paths=adapter.paths,
        companions=tokenizer_files(source),
        parameters=_kept(adapter, weights),
        bias=adapter.bias,
        modules_to_save=adapter.modules_to_save,
        base_name=adapter.base,
        task=adapter.task,
        model_class=adapter.model_class,
        model_library=adapter.model_library,
        notes=(*adapter.notes, *_base_notes(source, base)),
    )


def _base_notes(source: Path, base: Checkpoint) -> tuple[str, ...]:
    """That the factors were made of other weights, where a manifest of `--to lora` says so."""
    try:
        stated = json.loads((source / MANIFEST_NAME).read_bytes())["base"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or none of ours
        return ()
    if stated == base.fingerprint():
        return ()
    return (
        f"`{source}` was made for other weights than those of `{base.root}`, by its manifest: ΔW is not of this base",
    )


def _kept(adapter: LoraAdapter, weights: Mapping[str, TargetWeight]) -> dict[str, Tensor]:
    kept, retrained = kept_parameters(adapter, weights)
    if retrained:
        raise ConversionError(
            f"{adapter.label} brings its own weight for {len(retrained)} targets: its ΔW is not one of the base",
            findings=[f"{name}: differs from the base's" for name in retrained],
            hint="merge it with PEFT, and convert the whole: `--from full-model`",
        )
    return kept
