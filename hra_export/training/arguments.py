"""Settings in the words of transformers' `TrainingArguments`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from hra_export.training.callbacks import FALLING
from hra_export.training.loading import AdaptedBase
from hra_export.training.settings import Settings

UNTIL_KNOWN = 10**9  # steps; replaced once the length of the run is known


def make_arguments(kind: type[Any], settings: Settings, base: AdaptedBase, folder: Path, **more: Any) -> Any:
    """The arguments of a trainer; how often it logs, evaluates and saves is set by `pace_`.

    Args:
        kind: `TrainingArguments`, or a subclass of it.
        settings: of the run.
        base: decides on autocast.
        folder: for checkpoints.
        more: what only this kind has.

    Raises:
        ValueError: a tracker that transformers does not know.
    """
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    # transformers 5.23 renamed it, and warns of the old name.
    recompute = next(
        name
        for name in ("activation_checkpointing", "gradient_checkpointing")
        if name in {field.name for field in fields(kind)}
    )
    arguments = kind(
        output_dir=str(folder),
        use_cpu=on_cpu,
        bf16=base.autocast == "bfloat16",
        fp16=base.autocast == "float16" and not on_cpu,  # on a CPU there is no scaler for gradients
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.chosen_learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        optim="adamw_torch_fused",
        logging_steps=UNTIL_KNOWN,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide what must end the run
        eval_strategy="steps" if settings.has_held_out else "no",
        eval_steps=UNTIL_KNOWN,
        save_strategy="steps",
        save_steps=UNTIL_KNOWN,
        metric_for_best_model=settings.metric if settings.has_held_out else None,
        greater_is_better=settings.metric not in FALLING if settings.has_held_out else None,
        seed=settings.seed,
        data_seed=settings.seed,
        torch_compile=settings.compile,
        report_to=list(settings.report_to) or "none",
        run_name=settings.run_name,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        **{recompute: settings.gradient_checkpointing},
        **more,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes, not for `nn.DataParallel`
    return arguments


def pace_(arguments: Any, settings: Settings) -> None:
    """Set how often to log, evaluate and save, from settings that are resolved."""
    arguments.logging_steps = settings.log_every
    arguments.eval_steps = settings.eval_every
    arguments.save_steps = settings.save_every
