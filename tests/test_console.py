"""What a terminal shows while long work goes on."""

import io
import re
import sys
import time

import pytest

from hra_export.cli.console import Console

RUNNING = re.compile(r"… 00:(?!00)\d\d")  # a busy machine may leave out a second


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_stages_are_lines_with_a_clock_behind_the_last_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().stages() as begin:
        begin("loading")
        begin("tracing \x1b[31m")
        deadline = time.monotonic() + 20
        while not RUNNING.search(terminal.getvalue()) and time.monotonic() < deadline:
            time.sleep(0.05)
    shown = terminal.getvalue()
    running = RUNNING.search(shown)
    assert running is not None
    assert shown.index("loading\n") < shown.index("tracing \\x1b[31m\n") < running.start()


@pytest.mark.parametrize(("quiet", "shown"), [(False, "loading\n"), (True, "")])
def test_stages_are_plain_lines_without_a_terminal(quiet: bool, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Console(quiet=quiet).stages() as begin:
        begin("loading")
    assert capsys.readouterr().err == shown
