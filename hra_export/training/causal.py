"""Causal language models, through TRL's `SFTTrainer`: messages, prompts with completions, plain text."""

import json
import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import trl
from torch import nn
from trl.chat_template_utils import get_training_chat_template

from hra_export.errors import FormatError, MismatchError
from hra_export.training.arguments import make_arguments
from hra_export.training.loading import AdaptedBase
from hra_export.training.rows import Render, Row, TaskRows
from hra_export.training.settings import Settings
from hra_export.training.trainer import hra_trainer

IGNORED = -100
MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_tokenizer(tokenizer: Any, rows: TaskRows, settings: Settings) -> None:
    """Refuse a tokenizer that cannot render these rows.

    Raises:
        MismatchError: no chat template, none that marks the assistant's words, or no end token.
    """
    if is_chat(rows) and not tokenizer.chat_template:
        raise MismatchError(
            f"data `{settings.data}` holds messages, and the tokenizer of base `{settings.base}` has no chat template",
            hint="take an instruction-tuned base, put a chat_template.jinja into it, or give the rows as text",
        )
    if settings.assistant_only_loss:
        if not is_chat(rows):
            raise MismatchError(f"assistant-only-loss: the rows of data `{settings.data}` are no messages")
        if not MARKS_ASSISTANT.search(tokenizer.get_chat_template()):
            try:
                get_training_chat_template(tokenizer)
            except ValueError as error:
                raise MismatchError(
                    f"assistant-only-loss: the chat template of base `{settings.base}` does not mark what the "
                    "assistant says",
                    hint="put {% generation %} and {% endgeneration %} around it in chat_template.jinja",
                ) from error
    if not is_chat(rows) and tokenizer.eos_token is None:
        raise MismatchError(f"the tokenizer of base `{settings.base}` has no end token to close a row with")


def renderer(tokenizer: Any) -> Render | None:
    """Puts the messages of a row into the tokenizer's chat template; None without a template."""
    if not tokenizer.chat_template:
        return None

    def render(messages: list[Any], row: Row) -> object:
        tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    return render


def is_chat(rows: TaskRows) -> bool:
    """Whether rows are messages."""
    return rows.layout == "messages" or (
        rows.layout == "prompt-completion" and isinstance(rows.train[0]["completion"], list)
    )


def make_trainer(base: AdaptedBase, tokenizer: Any, rows: TaskRows, settings: Settings, folder: Path) -> Any:
    """A trainer with its rows tokenized.

    Raises:
        FormatError: a row that the chat template cannot render, or no token that is learned.
        UnsupportedModelError: a penalty with sharded vectors, or a chain on the head.
    """
    arguments = make_arguments(
        trl.SFTConfig,
        settings,
        base,
        folder,
        max_length=settings.max_length,
        packing=settings.packing,
        completion_only_loss=settings.completion_only_loss and rows.layout == "prompt-completion",
        assistant_only_loss=settings.assistant_only_loss,
        dataset_text_field=settings.text_column,
    )
    on_cpu = (
        arguments.device.type == "cpu" and "logits_to_keep" in signature(base.model.get_base_model().forward).parameters
    )
    trainer = hra_trainer(PlainHeadTrainer if on_cpu else trl.SFTTrainer, settings)(
        model=base.model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=tokenizer,
    )
    for name, dataset in (("train on", trainer.train_dataset), ("evaluate on", trainer.eval_dataset)):
        if dataset is not None and count_learned(dataset) == 0:
            raise FormatError(
                f"data `{settings.data}`: no token of the rows to {name} is learned",
                hint=f"`--max-length {settings.max_length}` may cut every row before what is to be learned",
            )
    return trainer


class PlainHeadTrainer(trl.SFTTrainer):
    """TRL's trainer with the same loss from logits where one of the rows learns a token.

    TRL's own head is made for GPUs. On a CPU it takes as long as the rest of the model: it goes through the vocabulary
    several times in float32.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the learned tokens of a step."""
        following = inputs["labels"][:, 1:]  # (b, t - 1)
        positions = (following != IGNORED).any(dim=0).nonzero().squeeze(1)  # (k,)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest, use_cache=False, logits_to_keep=positions)
        targets = following[:, positions]  # (b, k)
        is_learned = targets != IGNORED
        scores = outputs.logits[is_learned].float()  # (learned, vocabulary)
        total = nn.functional.cross_entropy(scores, targets[is_learned], reduction="sum")
        loss = total / torch.as_tensor(is_learned.sum() if num_items_in_batch is None else num_items_in_batch).clamp(
            min=1
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def count_learned(dataset: Any) -> int:
    """Tokens of tokenized rows that count in the loss; the first of a row has nothing to be told from."""
    total = 0
    for batch in dataset.select_columns(["labels"]).iter(1000):
        total += sum(label != IGNORED for labels in batch["labels"] for label in labels[1:])
    return total
