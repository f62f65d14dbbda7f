"""HRA → a LoRA adapter of the same ΔW, for PEFT, diffusers and the servers that read PEFT's files.

ΔW = B A is exact for one base. Each target is read once and computed in float64; its factors are balanced and rounded
once. Nothing but the targets' weights is read, and one target's factors are in memory at a time.

Limits: those of `lora/layout.py`; a target whose own weight was trained too, such as a resized vocabulary.
"""

import hashlib
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from hra_export import filesystem, publish
from hra_export.checkpoint import MANIFEST_NAME, Checkpoint
from hra_export.companions import tokenizer_files
from hra_export.converted import ConvertedTarget, ConvertReport, manifest_bytes
from hra_export.errors import NumericalError
from hra_export.filesystem import as_output_error
from hra_export.lora import layout as lora_layout
from hra_export.lora.plan import Dtype, LayoutChoice, LoraPlan, plan_lora
from hra_export.low_rank import DeltaSource, rounded
from hra_export.peft_directory import CONFIG_NAME
from hra_export.tensorfile import TensorLayout

# How reports call the outputs.
FORMATS = {"peft": "LoRA of PEFT", "diffusers": "LoRA of diffusers"}


def convert(
    source: DeltaSource,
    output: Path,
    *,
    base: Checkpoint,
    dtype: Dtype = "float32",
    mixed_ranks: bool = False,
    layout: LayoutChoice = "auto",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write a directory that PEFT or diffusers loads as a LoRA adapter.

    The output path is absent, the old directory, or complete at every instant.

    Args:
        source: what changes the weights.
        output: directory to be made.
        base: whose weights the factors are computed from, and for which alone they hold.
        dtype: of the factors.
        mixed_ranks: every target in its own rank, where PEFT or diffusers is the only reader; servers take one rank.
        layout: `auto` is diffusers' for a denoiser of diffusers, PEFT's for everything else.
        overwrite: replace an earlier output of ours.
        progress: called with the bytes of each target's weight that was read.

    Raises:
        MismatchError: targets that the base does not have, or of another shape; all of them.
        UnsupportedModelError: a quantized base, or a weight that no LoRA stands for.
        ConversionError: the layout has no place for something that was trained; all of it.
        NumericalError: a weight of the base holds NaN or Inf, a chain has no direction, or factors overflow the
            dtype; nothing is written.
        OutputError: the output exists, the disk is full or cannot be written.
    """
    plan = plan_lora(source, base=base, dtype=dtype, mixed_ranks=mixed_ranks, layout=layout)
    with as_output_error(f"read base `{base.root}`"):
        fingerprint = base.fingerprint()
    files = _small_files(plan)
    tokenizer = {} if plan.component else {n: path for own in source.paths for n, path in tokenizer_files(own).items()}
    size = plan.size_bytes + sum(map(len, files.values())) + sum(path.stat().st_size for path in tokenizer.values())
    protected = [base.root, *source.paths]
    key = _key(plan, fingerprint)
    with publish.stage(output, key=key, size_bytes=size, overwrite=overwrite, protected=protected) as stage:
        targets = _write_weights(plan, stage, progress)
        for name, data in files.items():
            stage.write_bytes(name, data)
        for name, path in tokenizer.items():
            stage.copy(path, name)
        report = ConvertReport(FORMATS[plan.layout], output, size, targets, plan.notes)
        stage.publish(MANIFEST_NAME, _manifest(plan, report, fingerprint))
    return report


def _write_weights(
    plan: LoraPlan, stage: publish.Stage, progress: Callable[[int], None] | None
) -> tuple[ConvertedTarget, ...]:
    """The weights file, or what an interrupted run measured when it finished it."""
    name = plan.weights_name
    if stage.is_finished(name):
        measured: dict[str, tuple[float, float]] = json.loads(stage.note(name))
        if progress is not None:
            progress(plan.read_bytes)
    else:
        measured = {}
        with stage.create(name, plan.file.size_bytes, note=lambda: json.dumps(measured)) as descriptor:
            filesystem.write_all(descriptor, plan.file.header, 0)
            for key, value in plan.parameters.items():
                _write_tensor(plan.file, descriptor, key, value.detach().to("cpu").contiguous())
            _write_factors(plan, descriptor, measured, progress)
    return tuple(
        ConvertedTarget(module, rank, *measured.get(module, (0.0, 0.0))) for module, rank in plan.ranks.items()
    )


def _write_factors(
    plan: LoraPlan,
    descriptor: int,
    measured: dict[str, tuple[float, float]],
    progress: Callable[[int], None] | None,
) -> None:
    """The factors of every target; ‖ΔW‖ and its relative error go into `measured`."""
    dtype = getattr(torch, plan.dtype)
    overflown = []
    for module, weight in plan.weights.items():
        if module in plan.idle:  # a file is zeros where nothing was written
            continue
        b, a, error, norm = rounded(*plan.source.factors(weight), plan.ranks[module], dtype)
        if not error < float("inf"):
            overflown.append(f"{module}: ‖ΔW‖ is {norm:.3g}")
        keys = lora_layout.factor_keys(weight, plan.component)
        for key, value in zip(keys, lora_layout.as_stored(weight, b, a), strict=True):
            _write_tensor(plan.file, descriptor, key, value)
        measured[module] = (norm, error)
        if progress is not None:
            progress(weight.size_bytes)
    if overflown:
        raise NumericalError(
            f"the factors of {len(overflown)} targets are beyond {plan.dtype}",
            findings=overflown,
            hint="`--dtype bfloat16` and `float32` reach further; or training diverged",
        )


def _write_tensor(file: TensorLayout, descriptor: int, key: str, value: Tensor) -> None:
    filesystem.write_all(descriptor, value.reshape(-1).view(torch.uint8).numpy().data, file.tensors[key].start)


def _small_files(plan: LoraPlan) -> dict[str, bytes]:
    """The model card, and for PEFT the configuration."""
    source = plan.source
    card = lora_layout.model_card(plan.base.root.name, source.base, source.entries(), library=plan.layout)
    files = {"README.md": card.encode(errors="replace")}
    if plan.component is None:
        config = lora_layout.peft_config(
            plan.arguments,
            bias=source.bias,
            modules_to_save=source.modules_to_save,
            base=source.base,
            task=source.task,
            model_class=source.model_class,
            model_library=source.model_library,
        )
        files[CONFIG_NAME] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(errors="replace")
    return files


def _key(plan: LoraPlan, fingerprint: str) -> str:
    """What makes two conversions the same work: inputs, options and tool."""
    described = {
        "version": metadata.version("hra-export"),
        "base": fingerprint,
        "source": plan.source.digest,
        "header": hashlib.sha256(plan.file.header).hexdigest(),
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _manifest(plan: LoraPlan, report: ConvertReport, fingerprint: str) -> bytes:
    """What was done, and for which base it holds."""
    base = plan.base
    content = {
        "layout": plan.layout,
        "base": {"name": base.root.name, "component": base.component, "fingerprint": fingerprint},
        "adapters": plan.source.entries(),
        "source": plan.source.digest,
        "dtype": plan.dtype,
        **report.measured(),
    }
    return manifest_bytes("lora", content)
