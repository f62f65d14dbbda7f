"""The operator library for tests: built once for each state of its sources, by whichever worker comes first.

The fixture `native_library` of conftest.py gives its file.
"""

import hashlib
import shutil
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from filelock import FileLock

from hra_export.kernels import operator_build, operator_library
from hra_export.kernels.operator_build import Options
from hra_export.kernels.operator_library import FILE_NAME

CACHE = Path(__file__).parent.parent / "build" / "operator"  # git does not see it
KEPT = 6  # states of the sources; older ones are removed


CPU_ALONE = Options(cuda="off")


def built_library(options: Options = CPU_ALONE) -> Path:
    """The library with these options, from the cache or built now; the test is skipped where there is no compiler."""
    for tools in (["cmake"], ["c++", "g++", "clang++", "cl"]):
        if not any(shutil.which(tool) or shutil.which(tool, path=sysconfig.get_path("scripts")) for tool in tools):
            pytest.skip(f"no {' or '.join(tools)}")
    folder = CACHE / _digest(options)
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{folder.name}.lock"):
        if not (folder / FILE_NAME).is_file():
            _build(folder, options)
            _prune(folder)
    return folder / FILE_NAME


def _build(folder: Path, options: Options) -> None:
    """With sanitizers it is not loaded here: AddressSanitizer ends a process that it is not first in."""
    if not options.sanitize:
        operator_library.build(folder, options)
        return
    folder.mkdir(exist_ok=True)
    with TemporaryDirectory() as work:
        shutil.copy(operator_build.compile_library(Path(work), options, FILE_NAME), folder)


def _digest(options: Options) -> str:
    digest = hashlib.sha256(repr(options).encode())
    for path in sorted(operator_build.SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _prune(newest: Path) -> None:
    others = [path for path in CACHE.iterdir() if path.is_dir() and path != newest]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT - 1 :]:
        shutil.rmtree(path, ignore_errors=True)  # another worker may do the same
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
