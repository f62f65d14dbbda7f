"""Sequence classification, through transformers' `Trainer`: accuracy, macro F1 and Matthews correlation."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn

from hra_export.training.arguments import make_arguments
from hra_export.training.loading import AdaptedBase
from hra_export.training.rows import TaskRows
from hra_export.training.settings import Settings
from hra_export.training.trainer import hra_trainer


def make_trainer(base: AdaptedBase, tokenizer: Any, rows: TaskRows, settings: Settings, folder: Path) -> Any:
    """A trainer with its rows tokenized."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    arguments = make_arguments(TrainingArguments, settings, base, folder, label_names=["labels"])
    base.model.config.pad_token_id = tokenizer.pad_token_id  # a decoder finds the last token by it

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[settings.text_column]]
        if settings.text_pair_column is not None:
            texts.append(batch[settings.text_pair_column])
        tokens = tokenizer(*texts, truncation=True, max_length=settings.max_length)
        return {**tokens, "labels": batch[settings.label_column]}

    def tokenized(dataset: Any) -> Any:
        return None if dataset is None else dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)

    with arguments.main_process_first(local=True):
        train, held_out = tokenized(rows.train), tokenized(rows.held_out)
    return hra_trainer(Trainer, settings)(
        model=base.model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=mean_cross_entropy,
        compute_metrics=lambda prediction: metrics(prediction.predictions, prediction.label_ids),
    )


def mean_cross_entropy(outputs: Any, labels: Tensor, *, num_items_in_batch: Any = None) -> Tensor:
    """Over the rows of a step, all its batches and processes together, or over those of one batch.

    Models compute a loss themselves, but not all of them know of the other batches of a step.
    """
    total = nn.functional.cross_entropy(outputs["logits"].float(), labels, reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def metrics(scores: Any, labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation of the classes with the highest scores.

    Args:
        scores: (b, classes), or a tuple that begins with them.
        labels: (b,) numbers of classes.
    """
    first = scores[0] if isinstance(scores, tuple) else scores
    predicted = np.argmax(first, axis=-1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }
