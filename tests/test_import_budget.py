"""What starting the command line may import. How long that takes is measured in benchmarks/startup.py."""

import json
import subprocess
import sys

import pytest

from hra_export.cli import VERBS

# Each costs from a tenth of a second to seconds.
HEAVY = {"diffusers", "gguf", "huggingface_hub", "numpy", "onnx", "onnxruntime", "peft", "torch", "transformers"}

RUN_AND_LIST_MODULES = """
import atexit, json, sys
atexit.register(lambda: sys.stderr.write("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules}))))
"""


def imported_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after running some code."""
    command = [sys.executable, "-c", RUN_AND_LIST_MODULES + code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(run.stderr.splitlines()[-1]))


def command_line(*arguments: str) -> str:
    """Code that runs the command line as the installed script does."""
    return f"from hra_export.cli import main; main({list(arguments)!r})"


def test_imported_by_sees_a_heavy_import() -> None:
    assert "numpy" in imported_by("import numpy")


def test_import_of_the_package_pulls_in_no_third_party_package() -> None:
    assert not imported_by("import hra_export") & {*HEAVY, "click"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not imported_by(command_line(*arguments)) & HEAVY


def test_public_names_are_all_there() -> None:
    """The table of public names is strings; each must lead somewhere."""
    import hra_export

    assert all(hasattr(hra_export, name) for name in hra_export.__all__)
