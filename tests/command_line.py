"""Run the command line inside this process, with stdout and stderr apart."""

import contextlib
import io
import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hra_export import cli

ROOT = Path(cli.__file__).parents[2]
PROGRAM = [sys.executable, "-m", "hra_export"]
# No network, and no colours but those a test asks for.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")} | {
    "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path),
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Outcome:
    """What a user sees of a run."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.stdout)


def run(*arguments: str | Path, encoding: str = "utf-8") -> Outcome:
    """Call `main` as the installed command does; an exception that gets past it is exit code 1 with its traceback.

    `encoding` is that of the terminal. What it cannot show raises there, as it would on a real one.
    """
    out, err = _text_stream(encoding), _text_stream(encoding)
    before = signal.getsignal(signal.SIGTERM)
    code: int | str | None = 1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGTERM, before)
    assert isinstance(code, int)
    return Outcome(code, _text(out), _text(err))


def _text_stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(stream.encoding)
