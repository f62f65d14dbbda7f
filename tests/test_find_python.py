"""`.ci/find-python`, which picks the interpreter for `make .venv`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "find-python"


def find_python(path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script; `path` is all that it finds commands in."""
    environment = {**variables, "PATH": str(path) if path else os.environ["PATH"]}
    return subprocess.run(["/bin/sh", SCRIPT], env=environment, capture_output=True, text=True, check=False)


def put_python(folder: Path, name: str, *, fits: bool) -> None:
    """A command that answers the script's question about its version."""
    program = folder / name
    program.write_text(f"#!/bin/sh\nexit {0 if fits else 1}\n")
    program.chmod(0o755)


def test_find_python_takes_the_one_that_is_asked_for() -> None:
    assert find_python(PYTHON=sys.executable).stdout == f"{sys.executable}\n"


def test_find_python_prefers_python3_where_it_fits(tmp_path: Path) -> None:
    put_python(tmp_path, "python3", fits=True)
    put_python(tmp_path, "python3.14", fits=True)
    assert find_python(tmp_path).stdout == "python3\n"


def test_find_python_searches_by_version_where_python3_is_too_old(tmp_path: Path) -> None:
    put_python(tmp_path, "python3", fits=False)
    put_python(tmp_path, "python3.12", fits=True)
    put_python(tmp_path, "python3.11", fits=True)
    assert find_python(tmp_path).stdout == "python3.12\n"


@pytest.mark.parametrize("variables", [{}, {"PYTHON": "no-such-python"}], ids=["none", "asked for"])
def test_find_python_says_what_to_do_where_there_is_none(tmp_path: Path, variables: dict[str, str]) -> None:
    put_python(tmp_path, "python3", fits=False)
    run = find_python(tmp_path, **variables)
    assert (run.returncode, run.stdout) == (1, "")
    assert "error: no Python 3.11 to 3.14 found as" in run.stderr
    assert "hint: install one" in run.stderr
