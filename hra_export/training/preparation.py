"""Everything before the first step: base, rows, adapter and trainer, checked and put together."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.errors import DeviceError, FormatError
from hra_export.training import causal, classification, processes
from hra_export.training.arguments import pace_
from hra_export.training.labels import trained_head
from hra_export.training.loading import AdaptedBase, adapt_base, base_reference, load_tokenizer
from hra_export.training.publishing import versions
from hra_export.training.rows import TaskRows, read_rows
from hra_export.training.samples import Segment, causal_sample, labelled_sample
from hra_export.training.settings import Settings

Note = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A run that can begin.

    Attributes:
        settings: resolved.
        checkpoint: the base.
        tokenizer: the base's.
        rows: checked.
        base: with the adapter in it.
        trainer: with its rows tokenized.
        steps: optimizer steps of the whole run.
        rows_used: sequences to train on; fewer than rows when they are packed, or have nothing to be learned.
        learned: tokens, or labels, that count in the loss of one pass.
        sample: one row with what is learned of it.
    """

    settings: Settings
    checkpoint: Checkpoint
    tokenizer: Any
    rows: TaskRows
    base: AdaptedBase
    trainer: Any
    steps: int
    rows_used: int
    learned: int
    sample: tuple[Segment, ...]

    def record(self) -> dict[str, Any]:
        """What is trained, for `run.json`: equal records end as equal adapters."""
        return {
            "settings": self.settings.trajectory(),
            "rows": dict(self.rows.digests),
            "base": {"name": base_reference(self.settings.base), "fingerprint": self.checkpoint.fingerprint()},
            "processes": processes.count(),
            "versions": versions(),
            "facts": {
                "targets": len(self.base.targets),
                "trainable_parameters": self.base.trainable,
                "rows": {
                    "train": len(self.rows.train),
                    "held_out": 0 if self.rows.held_out is None else len(self.rows.held_out),
                },
            },
        }


def prepare(settings: Settings, base: Path, cache: Path, folder: Path, *, has_weights: bool, note: Note) -> Prepared:
    """Check everything, and put it together.

    Sets the seeds of Python, numpy and torch, which transformers' `Trainer` does again.

    Args:
        settings: as given.
        base: directory of the base.
        cache: folder for Arrow files.
        folder: for checkpoints; nothing is written to it.
        has_weights: False leaves the weights out, for a plan.
        note: told what was decided.

    Raises:
        HraExportError: anything that is wrong with base, rows, or the two together.
        ValueError: a tracker that does not exist.
    """
    from transformers import set_seed

    check_trackers(settings.report_to)
    checkpoint = open_checkpoint(base)
    tokenizer = load_tokenizer(base, settings)
    rows = read_rows(settings, cache, known_classes=trained_head(checkpoint.config), render=causal.renderer(tokenizer))
    if settings.task == "auto":
        note(f"task: {rows.task}, from the columns of `{settings.data}`")
    settings = replace(settings, task=rows.task)
    if rows.task == "causal-lm":
        causal.check_tokenizer(tokenizer, rows, settings)
    set_seed(settings.seed)
    adapted = adapt_base(checkpoint, settings, classes=rows.classes, has_weights=has_weights)
    for text in adapted.notes:
        note(text)
    make = causal.make_trainer if rows.task == "causal-lm" else classification.make_trainer
    trainer = make(adapted, tokenizer, rows, settings, folder)
    steps = count_steps(trainer)
    settings = settings.resolved(task=rows.task, labels=rows.classes, total_steps=steps)
    pace_(trainer.args, settings)
    rows_used = len(trainer.train_dataset)
    if rows_used < len(rows.train) and not settings.packing:
        note(f"{len(rows.train) - rows_used} rows are left out: --max-length cuts them before what is to be learned")
    if not settings.has_held_out:
        note("no held-out rows: the last step is published; `--eval-split 0.05` would keep the best")
    if rows.task == "causal-lm":
        learned, sample = causal.count_learned(trainer.train_dataset), causal_sample(tokenizer, trainer.train_dataset)
    else:
        texts = [settings.text_column, *filter(None, [settings.text_pair_column])]
        learned = rows_used
        sample = labelled_sample(rows.train, texts, settings.label_column, rows.classes)
    return Prepared(settings, checkpoint, tokenizer, rows, adapted, trainer, steps, rows_used, learned, sample)


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker that transformers does not know, or whose package is missing.

    Raises:
        DeviceError: its package is missing.
        ValueError: no such tracker.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    for name in names:
        try:
            (kind,) = get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ValueError(f"report-to: {error}") from error
        try:
            kind()
        except (RuntimeError, ImportError) as error:
            raise DeviceError(f"report-to: {error}", hint=f"install the package of {name}, or leave it out") from error


def count_steps(trainer: Any) -> int:
    """Optimizer steps of the whole run, as transformers counts them."""
    if len(trainer.train_dataset) == 0:
        raise FormatError("no row is left to train on")
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])
