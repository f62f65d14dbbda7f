"""Compile the operator library with CMake and a C++ compiler, and with nvcc where there is one.

The tools are those of the machine, or their packages from PyPI beside this one (`pip install 'hra-export[native]'`).
"""

import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from hra_export.errors import DeviceError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "ort"
INSTALL = "pip install 'hra-export[native]'"
Cuda = Literal["auto", "on", "off"]
SHOWN_LINES = 40  # of a compiler that failed
NVCC = Path("cu13") / "bin" / "nvcc"


@dataclass(frozen=True)
class Options:
    """What to build.

    Attributes:
        cuda: with CUDA kernels: `auto` where nvcc is found.
        cuda_architectures: as CMake names them, `80-real` or `90`; those of `CMakeLists.txt` when empty.
        ort_include_dir: folder with `onnxruntime_c_api.h`, which our declarations are then checked against.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, for tests.
    """

    cuda: Cuda = "auto"
    cuda_architectures: tuple[str, ...] = ()
    ort_include_dir: Path | None = None
    sanitize: bool = False


def compile_library(work: Path, options: Options, file_name: str) -> Path:
    """Configure and build in an empty folder.

    Returns:
        The library in it.

    Raises:
        DeviceError: CMake or a compiler is missing, or failed; what it said is in the findings.
    """
    cmake = _tool("cmake")
    if cmake is None:
        raise DeviceError("building the operator library needs CMake", hint=INSTALL)
    _run([cmake, "-S", str(SOURCES), "-B", str(work), *_settings(options)], "CMake cannot configure the build")
    _run([cmake, "--build", str(work), "--config", "Release", "--parallel"], "the operator library does not compile")
    found = [path for path in (work / file_name, work / "Release" / file_name) if path.is_file()]
    if not found:
        raise DeviceError(f"the build made no `{file_name}`", findings=sorted(path.name for path in work.iterdir()))
    return found[0]


def _settings(options: Options) -> list[str]:
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "HRA_EXPORT_VERSION": metadata.version("hra-export"),
        "HRA_CUDA": options.cuda.upper(),
        "HRA_SANITIZE": "ON" if options.sanitize else "OFF",
    }
    if options.cuda_architectures:
        settings["HRA_CUDA_ARCHITECTURES"] = ";".join(options.cuda_architectures)
    if options.ort_include_dir is not None:
        settings["ORT_INCLUDE_DIR"] = str(options.ort_include_dir.resolve())
    nvcc = _packaged_nvcc()
    if nvcc is not None and options.cuda != "off" and shutil.which("nvcc") is None:
        settings["CMAKE_CUDA_COMPILER"] = str(nvcc)
        settings["CMAKE_CUDA_FLAGS"] = f"-L{nvcc.parent.parent / 'lib'}"  # it looks for its own libraries in lib64
    ninja = _tool("ninja")
    generator = [] if ninja is None else ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return [*generator, *(f"-D{name}={value}" for name, value in settings.items())]


def _tool(name: str) -> str | None:
    """A program beside this Python, where pip puts it, else one on the path."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _packaged_nvcc() -> Path | None:
    """NVIDIA's compiler from PyPI, which is in no folder for programs."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else found.submodule_search_locations or []
    return next((Path(folder) / NVCC for folder in folders if (Path(folder) / NVCC).is_file()), None)


def _run(command: Sequence[str], failure: str) -> None:
    logger.info("%s", " ".join(command))
    try:
        code, said = _completed(command)
    except OSError as error:
        raise DeviceError(failure, findings=[f"{command[0]}: {error}"], hint=INSTALL) from error
    logger.debug("%s", said)
    if code == 0:
        return
    lines = [line for line in said.splitlines() if line.strip()]
    if "No CMAKE_CXX_COMPILER could be found" in said or "CMAKE_CXX_COMPILER not set" in said:
        raise DeviceError(
            "building the operator library needs a C++ compiler",
            findings=lines[-SHOWN_LINES:],
            hint="on Debian and Ubuntu: apt install g++; on macOS: xcode-select --install",
        )
    raise DeviceError(failure, findings=lines[-SHOWN_LINES:], hint="`-v` shows the commands, `-vv` all they said")


def _completed(command: Sequence[str]) -> tuple[int, str]:
    """Exit code of a tool and all it said; an interruption ends it and the compilers that it started."""
    with subprocess.Popen(  # noqa: S603  a tool of the machine, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            _end(process)
            raise
    return process.returncode, said


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill a process with all that it started, as far as the system knows groups of processes."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
