"""What the command line prints: results to stdout, everything else to stderr."""

import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from hra_export.errors import HraExportError

SCHEMA_VERSION = 1
UNITS = ("B", "kB", "MB", "GB", "TB")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but the newline


@dataclass(frozen=True)
class Console:
    """How talkative a run is, and in which form it answers."""

    as_json: bool = False
    quiet: bool = False

    def say(self, text: str) -> None:
        """A line of progress on stderr; none when quiet."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def warn(self, text: str) -> None:
        """A line the user should act on, on stderr, quiet or not."""
        click.echo(f"{_styled('warning:', bold=True)} {printable(text)}", err=True)

    def result(self, text: str, data: dict[str, object]) -> None:
        """The result on stdout: a text for people, or one JSON object."""
        if self.as_json:
            _print_json(data)
        else:
            click.echo(printable(text))

    @contextmanager
    def bytes_bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar by bytes with the time left; silent when quiet or without a terminal."""
        from tqdm import tqdm

        hidden = self.quiet or not sys.stderr.isatty()
        with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=hidden, file=sys.stderr) as bar:
            yield bar.update

    @contextmanager
    def steps_bar(self, title: str, total: int) -> Iterator[Callable[[int, str], bool]]:
        """A progress bar by steps with the time left; silent when quiet or without a terminal.

        Yields:
            Moves the bar to a step, with a text behind it; says whether there is a bar.
        """
        from tqdm import tqdm

        hidden = self.quiet or not sys.stderr.isatty()
        with tqdm(total=total, desc=title, unit="step", disable=hidden, file=sys.stderr) as bar:

            def move(step: int, text: str) -> bool:
                bar.set_postfix_str(text, refresh=False)
                bar.update(step - bar.n)
                return not hidden

            yield move

    @contextmanager
    def stages(self) -> Iterator[Callable[[str], None]]:
        """A line on stderr for each stage of long work; on a terminal a clock runs behind the last one.

        Yields:
            Begins a stage.
        """
        if self.quiet or not sys.stderr.isatty():
            yield self.say
            return
        from tqdm import tqdm

        ended = threading.Event()
        with tqdm(bar_format="{desc} {elapsed}", file=sys.stderr, leave=False) as clock:

            def tick() -> None:
                while not ended.wait(1.0):
                    clock.refresh()

            def begin(text: str) -> None:
                clock.write(printable(text), file=sys.stderr)
                clock.set_description_str("  …", refresh=False)
                clock.reset()

            ticking = threading.Thread(target=tick, daemon=True)
            ticking.start()
            try:
                yield begin
            finally:
                ended.set()
                ticking.join()

    def say_masked(self, parts: Sequence[tuple[str, bool]]) -> None:
        """A text on stderr of which some parts do not count: these are dimmed, and in double brackets."""
        if not self.quiet:
            shown = [
                printable(text) if counts else _styled(f"[[{printable(text)}]]", dim=True) for text, counts in parts
            ]
            click.echo("".join(shown), err=True)


def make_console(*, as_json: bool, quiet: bool, verbose: int) -> Console:
    """The console of one run; sets up logging to stderr, which the library never does."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    return Console(as_json=as_json, quiet=quiet)


def print_error(error: HraExportError, *, as_json: bool) -> None:
    """An error on stderr, and as one object on stdout when JSON was asked for."""
    click.echo(f"{_styled('error:', fg='red', bold=True)} {printable(str(error))}", err=True)
    if as_json:
        print_json_error(type(error).__name__, error.exit_code, error.message, error.findings, error.hint)


def print_json_error(
    kind: str, exit_code: int, message: str, findings: Sequence[str] = (), hint: str | None = None
) -> None:
    """An error as one object on stdout."""
    details = {"message": message, "findings": list(findings), "hint": hint}
    _print_json({"error": {"kind": kind, "exit_code": exit_code, **details}})


def _print_json(data: dict[str, object]) -> None:
    """One line of ASCII: paths may hold bytes that are no text, which JSON can only escape."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **data}))


def hide_loading_bars() -> None:
    """transformers draws a bar for each model it loads, terminal or not."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def make_streams_safe() -> None:
    """Escape what a stream cannot encode, a Greek letter in Latin-1: a merge on disk must not end as a crash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _styled(text: str, **style: Any) -> str:
    """Colour, which click drops by itself without a terminal, and we where `NO_COLOR` is set (https://no-color.org)."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)


def printable(text: str) -> str:
    """Escape control characters: a tensor name from a file must not drive the user's terminal."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def size_text(size_bytes: float) -> str:
    """Bytes for people, in powers of 1000: 538.1 MB."""
    for unit in UNITS[:-1]:
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} {UNITS[-1]}"


def table(rows: Sequence[Sequence[str]], *, header: bool = True, right: Sequence[int] = ()) -> str:
    """Rows in columns two spaces apart; a header is underlined, columns in `right` are aligned to the right."""
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
