"""The CPU kernels of the ONNX Runtime operator alone, by the program in `tests/native`: numbers, bounds, threads."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import hra_export

SOURCES = Path(hra_export.__file__).parent / "kernels" / "ort"
PROGRAMS = Path(__file__).parent / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# As in CMakeLists.txt: what each file may use is in its name.
INSTRUCTIONS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the flags of a compiler on Linux"),
]


def _flags_of(file: Path) -> tuple[str, ...] | None:
    """What a file is compiled with; None if this processor has no such instructions."""
    for name, flags in INSTRUCTIONS.items():
        if file.stem.endswith(name):
            return flags if IS_X86 else None
    return ()


def _build(folder: Path, program: str, *flags: str) -> Path:
    """Compile a program of `tests/native` with the kernels, two files at a time."""
    common = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", *(["-DHRA_X86"] if IS_X86 else []), *flags]

    def compiled(file: Path) -> str | None:
        special = _flags_of(file)
        if special is None:
            return None
        made = folder / f"{file.stem}.o"
        _run([str(COMPILER), *common, *special, "-c", str(file), "-o", str(made)])
        return str(made)

    files = [*SOURCES.glob("cpu_*.cc"), PROGRAMS / f"{program}.cc"]
    with ThreadPoolExecutor(2) as pool:
        objects = [made for made in pool.map(compiled, files) if made]
    _run([str(COMPILER), *common, *objects, "-pthread", "-o", str(folder / program)])
    return folder / program


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_cpu_kernels_match_float64_and_stay_in_bounds_with_every_instruction_set(tmp_path: Path) -> None:
    """Types, odd sizes, ranks, groups, rows and threads, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    program = _build(
        tmp_path, "cpu_kernel_check", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )
    assert "baseline" in _run([str(program), "100"])


@pytest.mark.slow
def test_cpu_kernels_have_no_data_races(tmp_path: Path) -> None:
    """The same under ThreadSanitizer."""
    program = _build(tmp_path, "cpu_kernel_check", "-O1", "-g1", "-fsanitize=thread")
    _run([str(program), "300"], TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.slow
def test_cpu_kernels_match_float64_when_optimized(tmp_path: Path) -> None:
    """As the library is built: other code than the sanitizers see."""
    program = _build(tmp_path, "cpu_kernel_check", "-O3", "-fno-math-errno", "-fno-trapping-math")
    _run([str(program), "2000"])


@pytest.mark.slow
def test_cpu_kernel_speed_prints_a_roofline(tmp_path: Path) -> None:
    """The benchmark of the kernels runs; its numbers are not judged."""
    program = _build(tmp_path, "cpu_kernel_speed", "-O3", "-fno-math-errno", "-fno-trapping-math")
    assert "GB/s" in _run([str(program), "1", "1"])
