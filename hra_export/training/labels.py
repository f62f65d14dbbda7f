"""Classes of a sequence classifier: their names, and the number of each row's class."""

from collections.abc import Iterator, Mapping, Sequence

from hra_export.errors import MismatchError
from hra_export.training.sources import refuse

Label = int | str


def trained_head(config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the classes that a base already tells apart; empty when it has no trained head.

    Args:
        config: the base's `config.json`.
    """
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        return ()
    given = config.get("id2label")
    if isinstance(given, dict) and given:
        return tuple(str(given[key]) for key in sorted(given, key=int))
    return numbered(2)  # transformers leaves its default out of the file


def numbered(count: int) -> tuple[str, ...]:
    """The names transformers gives to classes without any."""
    return tuple(f"LABEL_{number}" for number in range(count))


def find_names(name: str, values: Sequence[Label]) -> tuple[str, ...]:
    """Names for a new head: the words in order of the alphabet, or LABEL_0 to LABEL_n for numbers.

    Args:
        name: of the data, for messages.
        values: one a row.

    Raises:
        MismatchError: a single class, or numbers with a gap: one was mistyped, or the list of names is missing.
    """
    numbers = {_as_number(value) for value in values}
    if None in numbers:
        names = tuple(sorted({str(value) for value in values}))
    else:
        known = sorted(number for number in numbers if number is not None)
        absent = next((number for number in range(len(known)) if number not in numbers), None)
        if absent is not None:
            raise MismatchError(
                f"data `{name}`: labels go from {known[0]} to {known[-1]}, and no row has {absent}",
                hint="count classes from 0; or name them all, in order, with `--labels`",
            )
        names = numbered(len(known))
    if len(names) < 2:
        raise MismatchError(
            f"data `{name}`: every row has the same label", hint="`--labels` names classes without rows"
        )
    return names


def to_numbers(name: str, values: Sequence[Label], classes: tuple[str, ...], column: str) -> list[int]:
    """The number of each row's class.

    Args:
        name: of the data, for messages.
        values: one a row.
        classes: their names in order.
        column: of the labels, for messages.

    Raises:
        MismatchError: labels that are no class; each with the number of its row.
    """
    numbers = [_number_of(value, classes) for value in values]

    def findings() -> Iterator[str]:
        for row, (value, number) in enumerate(zip(values, numbers, strict=True), 1):
            if number is None:
                yield f"row {row}: `{column}` is {value!r}; expected {_choice(classes)}"

    refuse(f"data `{name}`", findings(), kind=MismatchError)
    return [number for number in numbers if number is not None]


def _as_number(value: Label) -> int | None:
    if isinstance(value, int):
        return value
    return int(value) if value.isascii() and value.removeprefix("-").isdecimal() else None


def _number_of(value: Label, classes: tuple[str, ...]) -> int | None:
    if value in classes:
        return classes.index(str(value))
    number = _as_number(value)
    return number if number is not None and 0 <= number < len(classes) else None


def _choice(classes: tuple[str, ...]) -> str:
    numbers = f"0 to {len(classes) - 1}"
    if classes == numbered(len(classes)):
        return numbers
    names = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
    return f"{numbers}, or {names}"
