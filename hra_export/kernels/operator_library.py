"""The library with ONNX Runtime's kernels of the operators of domain `hra`: find it, read what it is, build it.

Graphs run without it: ONNX Runtime then inlines the function bodies that every file carries.

`find` reads the environment: `HRA_EXPORT_ORT_OP` names the library's file.
"""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from hra_export.errors import FormatError, OutputError
from hra_export.kernels.operator_build import Options, compile_library

VARIABLE = "HRA_EXPORT_ORT_OP"
# Raised when an operator takes or gives something else than before; not when it gets faster.
OPERATOR_VERSION = 1
FILE_NAME = {"darwin": "libhra_export_ort_op.dylib", "win32": "hra_export_ort_op.dll"}.get(
    sys.platform, "libhra_export_ort_op.so"
)
# Beside the package; not among the files that are installed.
DEFAULT_FOLDER = Path(__file__).parent / "build"
REBUILD = "`hra-export build-op` builds it"
NEEDED_BYTES = 50_000_000  # of the temporary folder: objects, and with CUDA nvcc's own files


@dataclass(frozen=True)
class OperatorLibrary:
    """A library that ONNX Runtime can load.

    Attributes:
        path: of the file.
        version: of the package it was built from.
        providers: that it has kernels for, `cpu` and perhaps `cuda`.
        cuda_architectures: that its CUDA kernels were compiled for, as CMake names them.
        instructions: that its CPU kernels use on this machine: `avx512`, `avx2` or `baseline`.
    """

    path: Path
    version: str
    providers: tuple[str, ...]
    cuda_architectures: tuple[str, ...]
    instructions: str

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "path": str(self.path),
            "version": self.version,
            "providers": list(self.providers),
            "cuda_architectures": list(self.cuda_architectures),
            "instructions": self.instructions,
        }

    def __str__(self) -> str:
        """One line: where it is, its version and what it has kernels for."""
        return f"{self.path}, version {self.version}, {' and '.join(self.providers)}, {self.instructions}"


def find(variables: Mapping[str, str] | None = None) -> OperatorLibrary | None:
    """The library that `HRA_EXPORT_ORT_OP` names, else the one beside the package, else None.

    Args:
        variables: instead of the process's environment.

    Raises:
        FormatError: there is one, and it cannot be used; or the variable names no file.
    """
    named = (os.environ if variables is None else variables).get(VARIABLE)
    if named:
        return open_library(Path(named), source=f"{VARIABLE}=")
    path = DEFAULT_FOLDER / FILE_NAME
    return open_library(path) if path.is_file() else None


def open_library(path: Path, *, source: str = "") -> OperatorLibrary:
    """Load a library and read what it is.

    Args:
        path: of the file; its code runs in this process.
        source: what named it, for messages.

    Raises:
        FormatError: no file, no library of this platform, not ours, or of another version of the operators.
    """
    if not path.is_file():
        findings = [f"it is a folder; the library would be `{path / FILE_NAME}`"] if path.is_dir() else []
        raise FormatError(f"{source}`{path}`: no such operator library", findings=findings, hint=REBUILD)
    try:
        text = _info(ctypes.CDLL(str(path.resolve())))
    except OSError as error:
        raise FormatError(
            f"{source}`{path}` cannot be loaded as an operator library", findings=[str(error)], hint=REBUILD
        ) from error
    except AttributeError as error:
        raise FormatError(f"{source}`{path}` is not the operator library of hra-export", hint=REBUILD) from error
    return _parsed(path.resolve(), text, source)


def build(
    output: Path | None = None,
    options: Options | None = None,
    *,
    check: Callable[[OperatorLibrary], None] | None = None,
) -> OperatorLibrary:
    """Compile the library in a temporary folder, load and check it, and only then move it into place.

    Args:
        output: folder to put it into, beside the package when left out; an older library there is replaced.
        options: what to build, the defaults of `Options` when left out.
        check: is given the library before it is moved, and raises if it does not like it.

    Raises:
        OutputError: the folder cannot be written, or the temporary folder is full.
        DeviceError: a tool is missing, or the compiler failed.
        FormatError: what was built cannot be loaded.
    """
    folder = DEFAULT_FOLDER if output is None else output
    _check_writable(folder)
    with _work_folder() as work:
        made = compile_library(Path(work), options or Options(), FILE_NAME)
        library = open_library(made)
        if check is not None:
            check(library)
        place = folder / FILE_NAME
        try:
            _move(made, place)
        except OSError as error:
            raise _unwritable(folder, error) from error
    return OperatorLibrary(**{**vars(library), "path": place.resolve()})


def _info(loaded: ctypes.CDLL) -> str:
    function: Any = loaded.HraExportOperatorInfo
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return text.decode(errors="replace")


def _parsed(path: Path, text: str, source: str) -> OperatorLibrary:
    try:
        info = json.loads(text)
        operators = int(info["operators"])
        library = OperatorLibrary(
            path,
            str(info["version"]),
            tuple(map(str, info["providers"])),
            tuple(map(str, info["cuda_architectures"])),
            str(info["instructions"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{source}`{path}` does not say what it is", findings=[text], hint=REBUILD) from error
    if operators != OPERATOR_VERSION:
        raise FormatError(
            f"{source}`{path}` has another version of the operators: expected {OPERATOR_VERSION}, got {operators}",
            findings=[f"it was built by hra-export {library.version}"],
            hint="`hra-export build-op` builds the one that fits",
        )
    return library


def _work_folder() -> "TemporaryDirectory[str]":
    """Where it is compiled. Compilers name other reasons when the disk is full, so there must be room.

    A system may not let go of the library that was loaded from there; what cannot be removed stays.
    """
    try:
        free = shutil.disk_usage(gettempdir()).free
        if free >= NEEDED_BYTES:
            return TemporaryDirectory(prefix="hra-export-build-op-", ignore_cleanup_errors=True)
        why = f"{free / 1e6:.1f} MB are free, expected {NEEDED_BYTES / 1e6:.0f} MB"
    except OSError as error:
        why = str(error)
    raise OutputError("cannot compile in the temporary folder", findings=[why], hint="TMPDIR names another one")


def _check_writable(folder: Path) -> None:
    """Find out before the compiler runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write the operator library to `{folder}`: {error.strerror or error}",
        hint=f"`--output` names another folder; set {VARIABLE} to the file in it",
    )


def _move(made: Path, place: Path) -> None:
    """Copy to the place's own file system and rename: sessions that have the old file open keep it."""
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(made.read_bytes())
            stream.flush()
            os.fsync(stream.fileno())
        partial.chmod(made.stat().st_mode)
        partial.replace(place)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
