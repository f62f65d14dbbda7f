"""What the command line prints: results to stdout, everything else to stderr."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import click

from hra_export.errors import HraExportError

SCHEMA_VERSION = 1
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Console:
    """How talkative a run is, and in which form it answers."""

    as_json: bool = False
    quiet: bool = False

    def say(self, text: str) -> None:
        """A line of progress on stderr; none when quiet."""
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """A line the user should act on, on stderr, quiet or not."""
        click.echo(f"{click.style('warning:', bold=True)} {text}", err=True)

    def result(self, text: str, data: dict[str, object]) -> None:
        """The result on stdout: a text for people, or one JSON object."""
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **data}, ensure_ascii=False) if self.as_json else text)

    @contextmanager
    def bytes_bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar by bytes with the time left; silent when quiet or without a terminal."""
        from tqdm import tqdm

        hidden = self.quiet or not sys.stderr.isatty()
        with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=hidden, file=sys.stderr) as bar:
            yield bar.update


def make_console(*, as_json: bool, quiet: bool, verbose: int) -> Console:
    """The console of one run; sets up logging to stderr, which the library never does."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    return Console(as_json=as_json, quiet=quiet)


def print_error(error: HraExportError, *, as_json: bool) -> None:
    """An error on stderr, and as one object on stdout when JSON was asked for."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
    if as_json:
        body = {"kind": type(error).__name__, "exit_code": error.exit_code, "message": error.message}
        details = {"findings": list(error.findings), "hint": error.hint}
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "error": {**body, **details}}, ensure_ascii=False))


def size_text(size_bytes: float) -> str:
    """Bytes for people, in powers of 1000: 538.1 MB."""
    for unit in UNITS[:-1]:
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} {UNITS[-1]}"


def table(rows: Sequence[Sequence[str]], *, header: bool = True, right: Sequence[int] = ()) -> str:
    """Rows in columns two spaces apart; the first row is underlined when it is a header, `right` columns align right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
