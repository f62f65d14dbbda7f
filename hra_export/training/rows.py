"""What a row must hold for each task, and what a data set is for: told from its columns, checked row by row."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from hra_export.errors import FormatError
from hra_export.training import labels
from hra_export.training.settings import Settings, Task
from hra_export.training.sources import load_rows, refuse

Layout = Literal["messages", "prompt-completion", "text", "labelled"]
Row = Mapping[str, Any]
Render = Callable[[list[Any], Row], object]
# Beside what is learned, what chat templates may use of a row.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class TaskRows:
    """The rows of a run, checked, with only the columns that are used.

    Attributes:
        task: what is learned; never `auto`.
        layout: how a row holds it.
        train: a `datasets.Dataset`.
        held_out: the same, or None.
        classes: names of the classes, in order; empty unless rows are labelled. Labels are numbers then.
        digests: SHA-256 of the rows of each, in order.
    """

    task: Task
    layout: Layout
    train: Any
    held_out: Any | None
    classes: tuple[str, ...]
    digests: Mapping[str, str]


def read_rows(
    settings: Settings, cache: Path, *, known_classes: tuple[str, ...] = (), render: Render | None = None
) -> TaskRows:
    """Load and check the rows of a run, and hold some out if asked to.

    Args:
        settings: the run's.
        cache: folder for Arrow files.
        known_classes: those of the base's trained head, if it has one.
        render: puts messages into the chat template, and raises what the template raises; None leaves that out.

    Raises:
        FormatError: no such data, columns that no task has, rows that cannot be used; each with its number.
        MismatchError: labels that are no class; each with the number of its row.
        OutputError: it cannot be read or fetched.
    """
    train = load_rows(settings.data, split=settings.data_split, configuration=settings.data_config, cache=cache)
    task, layout = find_task(settings.data, train.column_names, settings)
    train, digest = _checked(settings.data, train, layout, settings, render)
    digests = {"data": digest}
    held_out = None
    if settings.eval_data:
        held_out = load_rows(
            settings.eval_data, split=settings.eval_data_split, configuration=settings.data_config, cache=cache
        )
        _, found = find_task(settings.eval_data, held_out.column_names, settings)
        if found != layout:
            raise FormatError(f"data `{settings.eval_data}`: its rows are {found}, and those to train on {layout}")
        held_out, digests["eval-data"] = _checked(settings.eval_data, held_out, layout, settings, render)
    classes: tuple[str, ...] = ()
    if layout == "labelled":
        train, held_out, classes = _numbered(train, held_out, settings, known_classes)
    if settings.eval_split:
        strata = train[settings.label_column] if classes else None
        kept, out = split_rows(len(train), settings.eval_split, seed=settings.seed, strata=strata)
        train, held_out = train.select(kept), train.select(out)
    return TaskRows(task, layout, train, held_out, classes, digests)


def _numbered(
    train: Any, held_out: Any | None, settings: Settings, known: tuple[str, ...]
) -> tuple[Any, Any | None, tuple[str, ...]]:
    """The rows with the numbers of their classes for labels, and the names of the classes."""
    column = settings.label_column
    classes = settings.labels or known or labels.find_names(settings.data, train[column])
    numbers = labels.to_numbers(settings.data, train[column], classes, column)
    train = train.remove_columns(column).add_column(column, numbers)
    if held_out is not None:
        numbers = labels.to_numbers(settings.eval_data or settings.data, held_out[column], classes, column)
        held_out = held_out.remove_columns(column).add_column(column, numbers)
    return train, held_out, classes


def find_task(name: str, columns: list[str], settings: Settings) -> tuple[Task, Layout]:
    """Task and layout of rows with these columns.

    Raises:
        FormatError: none, or several, fit.
    """
    text, label = settings.text_column, settings.label_column
    fits: list[tuple[Task, Layout]] = []
    if "messages" in columns:
        fits.append(("causal-lm", "messages"))
    if {"prompt", "completion"} <= set(columns):
        fits.append(("causal-lm", "prompt-completion"))
    if {text, label} <= set(columns):
        fits.append(("sequence-classification", "labelled"))
    if text in columns and (settings.task == "causal-lm" or not fits):
        fits.append(("causal-lm", "text"))
    if settings.task != "auto":
        fits = [fit for fit in fits if fit[0] == settings.task]
    if len(fits) == 1:
        return fits[0]
    found = f"found {', '.join(f'`{column}`' for column in columns)}"
    if fits:
        could = " or ".join(sorted({layout for _, layout in fits}))
        raise FormatError(
            f"data `{name}` could be {could}: {found}", hint="choose with `--task`, or leave columns out of the file"
        )
    wanted = {
        "causal-lm": f"`messages`, `prompt` and `completion`, or `{text}`",
        "sequence-classification": f"`{text}` and `{label}`",
        "auto": f"`messages`, `prompt` and `completion`, `{text}`, or `{text}` and `{label}`",
    }[settings.task]
    raise FormatError(
        f"data `{name}`: expected columns {wanted}; {found}",
        hint="`--text-column` and `--label-column` name other columns",
    )


def split_rows(
    count: int, fraction: float, *, seed: int, strata: Sequence[Any] | None = None
) -> tuple[list[int], list[int]]:
    """Row indices to train on and to hold out, in order; every stratum keeps its share.

    At least one row is held out, and at least one is kept.

    Raises:
        FormatError: there are too few rows for both.
    """
    if count < 2:
        raise FormatError(f"cannot hold out a part of {count} row", hint="pass `--eval-data`, or `--eval-split 0`")
    groups: dict[Any, list[int]] = {}
    for index in range(count):
        groups.setdefault(None if strata is None else strata[index], []).append(index)
    generator = Random(seed)  # noqa: S311  a seeded order, no secret
    held_out: list[int] = []
    owed = 0.0  # what rounding has left for the groups to come, so that shares of small groups add up
    for indices in groups.values():
        owed += len(indices) * fraction
        taken = min(round(owed), len(indices))
        owed -= taken
        held_out += generator.sample(indices, taken)
    if not held_out:
        held_out = [generator.randrange(count)]
    out = set(held_out[: count - 1])
    return [index for index in range(count) if index not in out], sorted(out)


def _checked(name: str, rows: Any, layout: Layout, settings: Settings, render: Render | None) -> tuple[Any, str]:
    """The rows with only the columns that are used, and their digest."""
    columns = _columns(layout, settings)
    rows = rows.select_columns([column for column in rows.column_names if column in columns])
    if missing := [column for column in columns if column not in (*rows.column_names, *TEMPLATE_COLUMNS)]:
        raise FormatError(f"data `{name}` has no column `{missing[0]}`")
    if len(rows) == 0:
        raise FormatError(f"data `{name}` has no rows")
    digest = hashlib.sha256()
    check = _CHECKS[layout]

    def findings() -> Iterator[str]:
        for number, row in enumerate(rows, 1):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            reason = check(row, settings)
            if reason is None and render is not None:
                reason = _unrenderable(row, render)
            if reason is not None:
                yield f"row {number}: {reason}"

    refuse(f"data `{name}`", findings())
    return rows, digest.hexdigest()


def _columns(layout: Layout, settings: Settings) -> tuple[str, ...]:
    if layout == "labelled":
        pair = (settings.text_pair_column,) if settings.text_pair_column else ()
        return (settings.text_column, *pair, settings.label_column)
    return {
        "messages": ("messages", *TEMPLATE_COLUMNS),
        "prompt-completion": ("prompt", "completion", *TEMPLATE_COLUMNS),
        "text": (settings.text_column,),
    }[layout]


def _check_messages(row: Row, settings: Settings) -> str | None:
    messages = row["messages"]
    if (reason := _wrong_messages("messages", messages)) is not None:
        return reason
    if settings.assistant_only_loss and all(message["role"] != "assistant" for message in messages):
        return "no message of the assistant, and nothing else is to be learned"
    return None


def _check_prompt_completion(row: Row, settings: Settings) -> str | None:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return _wrong_messages("prompt", prompt) or _wrong_messages("completion", completion)
    if not isinstance(prompt, str):
        return f"`prompt` is {_got(prompt)}; expected text"
    return _wrong_text("completion", completion)


def _check_text(row: Row, settings: Settings) -> str | None:
    return _wrong_text(settings.text_column, row[settings.text_column])


def _check_labelled(row: Row, settings: Settings) -> str | None:
    for column in (settings.text_column, settings.text_pair_column):
        if column is not None and (reason := _wrong_text(column, row[column])) is not None:
            return reason
    label = row[settings.label_column]
    if label is None or (isinstance(label, str) and not label.strip()):
        return f"`{settings.label_column}` is missing"
    if isinstance(label, bool) or not isinstance(label, int | str):
        return f"`{settings.label_column}` is {label!r}; expected a whole number or a name"
    return None


_CHECKS: dict[Layout, Callable[[Row, Settings], str | None]] = {
    "messages": _check_messages,
    "prompt-completion": _check_prompt_completion,
    "text": _check_text,
    "labelled": _check_labelled,
}


def _unrenderable(row: Row, render: Render) -> str | None:
    """What the chat template says against the messages of a row."""
    messages = row.get("messages") or row.get("prompt")
    if not isinstance(messages, list):
        return None
    try:
        render([*messages, *(row.get("completion") or [])], row)
    except Exception as error:
        return f"the chat template refuses it: {error}"  # a template may raise anything
    return None


def _wrong_text(column: str, value: object) -> str | None:
    if not isinstance(value, str):
        return f"`{column}` is {_got(value)}; expected text"
    return None if value.strip() else f"`{column}` is empty"


def _wrong_messages(column: str, messages: object) -> str | None:
    if not isinstance(messages, list):
        return f"`{column}` is {_got(messages)}; expected a list of messages"
    if not messages:
        return f"`{column}` is empty"
    for position, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {position} of `{column}` has no role"
        if not (message.get("content") or message.get("tool_calls")):
            return f"message {position} of `{column}` is empty"
    return None


def _got(value: object) -> str:
    return "missing" if value is None else f"{str(value)[:40]!r}"
