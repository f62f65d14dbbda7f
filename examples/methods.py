"""Ways to adapt one model: HRA, LoRA at equal trainable parameters, full fine-tuning, or its head alone.

`sentiment.py` and `compare_orders.py` share this: which parameters train, at which rate, and for how long. All train
with `transformers.Trainer`, in float32 weights; with bfloat16, the products alone are rounded.

Limits: one rank of HRA and one schedule; the CPU alone.
"""

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from comparison import Run
from peft import HRAConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hra_export.training.tuner import get_hra_model

HRA_RANK = 8
LORA_SCALE = 2.0  # α / rank, whatever the rank
EQUAL = 0.01  # LoRA's trainable parameters are within this share of HRA's
WEIGHT_DECAY = 0.01
WARMUP = 0.1  # share of the steps


def adapt(model: nn.Module, method: str, targets: Sequence[str], head: Sequence[str] = ()) -> Any:
    """Make a model ready to train by one method; `model` is changed.

    Args:
        model: in float32.
        method: `hra`, `lora`, `full` or `head`.
        targets: full names of the linear layers that HRA and LoRA adapt.
        head: names of the modules that train in full under every method.

    Returns:
        A `PeftModel` for HRA and LoRA, otherwise `model`.

    Raises:
        ValueError: no ranks of LoRA come close to HRA's parameters.
    """
    if method in ("full", "head"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or in_head(name, head))
        return model
    whole = {"modules_to_save": list(head) or None}
    if method == "hra":
        return get_hra_model(model, HRAConfig(r=HRA_RANK, target_modules=list(targets), **whole))
    shapes = shapes_of(model, targets)
    ranks = lora_ranks(shapes, sum(HRA_RANK * features for features, _ in shapes.values()))
    patterns = {re.escape(name): rank for name, rank in ranks.items()}
    scales = {name: LORA_SCALE * rank for name, rank in patterns.items()}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=patterns, alpha_pattern=scales, **whole)
    return get_peft_model(model, config)


def linear_names(model: nn.Module, pattern: str) -> list[str]:
    """Full names of the linear layers that a regular expression finds something in."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(pattern, name)]


def shapes_of(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of linear layers."""
    modules = {name: model.get_submodule(name) for name in names}
    return {name: (m.in_features, m.out_features) for name, m in modules.items() if isinstance(m, nn.Linear)}


def lora_ranks(shapes: Mapping[str, tuple[int, int]], parameters: int) -> dict[str, int]:
    """The rank of each LoRA target, so that all together have as close to `parameters` parameters as can be.

    Layers of one kind, those whose names differ in numbers alone, get one rank; two kinds differ by one at most. A
    target of rank 0 is left out.

    Args:
        shapes: (in_features, out_features) of each target by its full name.
        parameters: how many to spend; a rank costs in_features + out_features.

    Raises:
        ValueError: the closest is off by more than a hundredth.
    """
    kinds = {name: re.sub(r"\d+", "*", name) for name in shapes}
    cost = dict.fromkeys(kinds.values(), 0)
    for name, shape in shapes.items():
        cost[kinds[name]] += sum(shape)
    rank = parameters // sum(cost.values())

    def excess(extra: Sequence[int]) -> int:
        return sum((rank + one) * each for one, each in zip(extra, cost.values(), strict=True)) - parameters

    best = min(product((0, 1), repeat=len(cost)), key=lambda extra: (abs(excess(extra)), sum(extra)))
    if abs(excess(best)) > EQUAL * parameters:
        raise ValueError(f"no LoRA ranks give {parameters} parameters: the closest give {parameters + excess(best)}")
    rank_of = {kind: rank + one for kind, one in zip(cost, best, strict=True)}
    return {name: rank_of[kind] for name, kind in kinds.items() if rank_of[kind]}


def in_head(name: str, head: Sequence[str]) -> bool:
    """Whether a parameter belongs to a module of the head, wrapped by PEFT or not."""
    return any(module in name.split(".") for module in head)


def count_trainable(model: nn.Module, head: Sequence[str] = ()) -> tuple[int, int]:
    """How many parameters train: outside the head, and in it."""
    trained = [(in_head(name, head), p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(count for inside, count in trained if not inside), sum(count for inside, count in trained if inside)


def parameter_groups(model: nn.Module, run: Run, head: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What AdamW trains: the head at its own rate; reflection vectors, biases and norms without weight decay.

    R does not depend on the length of a reflection vector, so decay would only raise the angle of each step.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = run.head_rate if in_head(name, head) else run.learning_rate
            decay = 0.0 if parameter.ndim < 2 or ".hra_u." in name else WEIGHT_DECAY
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


class Stopwatch(TrainerCallback):  # type: ignore[misc]  # transformers is Any to mypy
    """Seconds of the training steps alone, and what the evaluations between them found.

    Attributes:
        seconds: of the steps so far.
        evaluations: (step, metrics), in order.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends, the optimizer's part included."""
        self.seconds += time.perf_counter() - self._started

    def on_evaluate(self, _: Any, state: Any, __: Any, metrics: dict[str, float], **___: Any) -> None:
        """The development rows were scored."""
        self.evaluations.append((state.global_step, dict(metrics)))


def fit(
    model: Any,
    run: Run,
    *,
    rows: tuple[Sequence[Any], Sequence[Any]],
    collate: Callable[[list[Any]], dict[str, Any]],
    head: Sequence[str] = (),
    evaluations: int = 4,
    trainer_type: type[Trainer] = Trainer,
    **options: Any,
) -> tuple[Any, Stopwatch]:
    """Train with `transformers.Trainer`: AdamW, a tenth of warm-up and a cosine, the same for every method.

    Args:
        model: from `adapt`; changed.
        run: steps, rows a step, rates, seed and precision.
        rows: encoded rows to train on, and development rows to score in between.
        collate: makes a batch of rows.
        head: the modules that `run.head_rate` is for.
        evaluations: how often the development rows are scored; the last time is after the last step.
        trainer_type: `Trainer`, or one with a loss of its own.
        options: further arguments of the trainer.

    Returns:
        The trainer, and the stopwatch with seconds and evaluations.
    """
    watch = Stopwatch()
    optimizer = torch.optim.AdamW(parameter_groups(model, run, head), betas=(0.9, 0.99), fused=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=run.steps,
            per_device_train_batch_size=run.rows_per_step,
            per_device_eval_batch_size=32,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(WARMUP * run.steps)),
            eval_strategy="steps",
            eval_steps=-(-run.steps // evaluations),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            train_sampling_strategy="group_by_length",  # padding is time
            dataloader_pin_memory=False,
            use_cpu=True,
            bf16=run.bf16,
            seed=run.seed,
            data_seed=run.seed,
        )
        trainer = trainer_type(
            model=model,
            args=arguments,
            train_dataset=rows[0],
            eval_dataset=rows[1],
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=[watch],
            **options,
        )
        trainer.remove_callback(PrinterCallback)  # stdout is the table's
        trainer.train()
        if watch.evaluations[-1][0] != run.steps:
            trainer.evaluate()
    return trainer, watch
