"""Rows from a file or the Hub, through `datasets`. What a file says is checked first, so that a bad row has a number.

Row numbers count from 1, a header not included; in a `.jsonl` file they are line numbers.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets

from hra_export.errors import FormatError, HraExportError, OutputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
MAX_FINDINGS = 20
MAX_FIELD_CHARACTERS = 2**31 - 1
JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


def load_rows(name: str, *, split: str, configuration: str | None, cache: Path) -> Any:
    """A `datasets.Dataset` of a file or of one split of a Hub data set.

    Args:
        name: a path with a suffix of `READERS`, or a Hub id.
        split: of a Hub data set.
        configuration: of a Hub data set that has several.
        cache: folder for the Arrow files of a local file; the Hub's go where `datasets` keeps them.

    Raises:
        FormatError: there is no such data, or its rows are malformed; each with its number.
        OutputError: it cannot be read or fetched.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _load_file(path, cache)
    if path.exists() or path.suffix in READERS:
        what = "is a directory; expected a file" if path.is_dir() else "does not exist"
        raise FormatError(f"data `{name}` {what}", hint=f"pass a file that ends in {_suffixes()}, or a Hub id")
    if not HUB_ID.fullmatch(name):
        raise FormatError(f"data `{name}` does not exist", hint=f"pass a file that ends in {_suffixes()}, or a Hub id")
    return _load_from_hub(name, split, configuration)


def _suffixes() -> str:
    return ", ".join(READERS)


def _load_file(path: Path, cache: Path) -> Any:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise FormatError(f"data `{path}`: `{path.suffix}` is not read", hint=f"convert it to one of {_suffixes()}")
    builder, find, options = reader
    try:
        refuse(f"data `{path}`", find(path))
        rows = datasets.load_dataset(
            builder, data_files=str(path), split="train", cache_dir=str(cache), **options(path)
        )
    except OSError as error:
        raise OutputError(f"cannot read data `{path}`: {error.strerror or error}") from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise FormatError(f"data `{path}` cannot be read: {error.__cause__ or error}") from error
    return rows


def _load_from_hub(name: str, split: str, configuration: str | None) -> Any:
    try:
        return datasets.load_dataset(name, configuration, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FormatError(f"data `{name}` is neither a file nor a data set of the Hub") from error
    except (ConnectionError, OSError) as error:
        raise OutputError(f"cannot fetch data `{name}` from the Hub: {error}") from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise FormatError(
            f"data `{name}`: {error}", hint="`--data-config` and `--data-split` choose a part of a Hub data set"
        ) from error


def refuse(what: str, findings: Iterator[str], *, kind: type[HraExportError] = FormatError) -> None:
    """Raise an error with every finding, the first ones spelled out; nothing when there is none.

    Raises:
        HraExportError: of the kind asked for.
    """
    shown: list[str] = []
    count = 0
    for count, finding in enumerate(findings, 1):  # noqa: B007  the count is used below
        if len(shown) < MAX_FINDINGS:
            shown.append(finding)
    if count > len(shown):
        shown.append(f"and {count - len(shown)} more")
    if count:
        raise kind(f"{what}: {count} row{'s are' if count > 1 else ' is'} unusable", findings=shown)


def _find_in_jsonl(path: Path) -> Iterator[str]:
    """Lines that are no object, and fields that are one thing here and another there."""
    kinds: dict[str, tuple[str, int]] = {}
    with path.open("rb") as lines:
        number = 0
        for number, line in enumerate(lines, 1):
            if not line.strip():
                yield f"row {number}: empty"
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"row {number}: not JSON: {error}"
                continue
            yield from _find_in_row(number, row, kinds)
    if number == 0:
        yield "row 1: the file is empty"


def _find_in_json(path: Path) -> Iterator[str]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        yield f"not JSON: {error}"
        return
    if not isinstance(rows, list) or not rows:
        yield "expected a list of objects"
        return
    kinds: dict[str, tuple[str, int]] = {}
    for number, row in enumerate(rows, 1):
        yield from _find_in_row(number, row, kinds)


def _find_in_row(number: int, row: object, kinds: dict[str, tuple[str, int]]) -> Iterator[str]:
    """Compare a row's types with those seen before; a column of Arrow has one type."""
    if not isinstance(row, dict):
        yield f"row {number}: expected an object, got {JSON_NAMES.get(type(row), 'null')}"
        return
    for key, value in row.items():
        if value is None:
            continue
        kind = JSON_NAMES[type(value)]
        first, where = kinds.setdefault(key, (kind, number))
        if kind != first:
            yield f"row {number}: `{key}` is {kind}, and {first} in row {where}"


def _find_in_csv(path: Path) -> Iterator[str]:
    """Rows of another length than the header."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = _csv_reader(path, lines)
            header: list[str] = next(reader, [])
            if not header or len(set(header)) != len(header):
                yield "the first row must name every column, and each once"
                return
            for number, row in enumerate(reader, 1):
                if len(row) != len(header):
                    yield (
                        f"row {number}: expected {len(header)} fields, got {len(row)}"
                        if row
                        else f"row {number}: empty"
                    )
    except (csv.Error, UnicodeDecodeError) as error:
        yield f"line {reader.line_num + 1}: {error}"


def _csv_reader(path: Path, lines: TextIO) -> Any:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    return csv.reader(lines, delimiter=_separator(path), strict=True)


def _separator(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _csv_options(path: Path) -> dict[str, Any]:
    """Every column as text: the word "null" is a word, and "007" no number."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        header = next(_csv_reader(path, lines))
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": _separator(path), "features": features, "na_filter": False, "encoding": "utf-8-sig"}


def _find_nothing(path: Path) -> Iterator[str]:
    """Parquet has a schema; what is wrong in it, its reader says."""
    if path.stat().st_size == 0:
        yield "the file is empty"


def _no_options(path: Path) -> dict[str, Any]:
    return {}


# suffix: (builder of datasets, what finds malformed rows, the builder's options)
READERS: dict[str, tuple[str, Callable[[Path], Iterator[str]], Callable[[Path], dict[str, Any]]]] = {
    ".jsonl": ("json", _find_in_jsonl, _no_options),
    ".json": ("json", _find_in_json, _no_options),
    ".csv": ("csv", _find_in_csv, _csv_options),
    ".tsv": ("csv", _find_in_csv, _csv_options),
    ".parquet": ("parquet", _find_nothing, _no_options),
}
