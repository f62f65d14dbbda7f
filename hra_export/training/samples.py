"""One row as the model sees it, with what is learned of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hra_export.training.causal import IGNORED


@dataclass(frozen=True)
class Segment:
    """A stretch of a row.

    Attributes:
        text: decoded, special tokens included.
        is_learned: whether its tokens count in the loss; the others are only read.
    """

    text: str
    is_learned: bool


def causal_sample(tokenizer: Any, dataset: Any) -> tuple[Segment, ...]:
    """The first row of tokenized rows for a causal language model."""
    row = dataset[0]
    return segments(tokenizer, row["input_ids"], row["labels"])


def segments(tokenizer: Any, tokens: Sequence[int], labels: Sequence[int]) -> tuple[Segment, ...]:
    """Neighbouring tokens that are alike, together; the first token has nothing to be told from.

    Each text is what its tokens add to those before: decoded alone, many tokenizers would drop its first space.
    """
    learned = [position > 0 and label != IGNORED for position, label in enumerate(labels)]
    found: list[Segment] = []
    begin, before = 0, ""
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or learned[end] != learned[begin]:
            whole = tokenizer.decode(tokens[:end])
            found.append(Segment(whole[len(before) :], learned[begin]))
            begin, before = end, whole
    return tuple(found)


def labelled_sample(
    rows: Any, text_columns: Sequence[str], label_column: str, classes: Sequence[str]
) -> tuple[Segment, ...]:
    """The first row of labelled rows; its class is what is learned."""
    row = rows[0]
    text = " ".join(row[column] for column in text_columns)
    return (Segment(text, is_learned=False), Segment(classes[row[label_column]], is_learned=True))
