"""The CUDA kernels without a GPU: on an emulated device under sanitizers, and through NVIDIA's compiler.

`tests/native_cuda` holds the emulation and the checks; each section of the check program is one test here.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from hra_export.kernels.operator_build import SOURCES, _packaged_nvcc

EMULATION = Path(__file__).parent / "native_cuda"
SECTIONS = ("formats", "ranks", "sizes", "groups", "rows", "alignment", "full_device", "edges")
KERNELS = 36  # 20 by vectors, 16 by tiles
STATIC_SHARED_LIMIT = 48 * 1024  # of every device; what is asked for at the launch is checked there


def compiled(command: Sequence[str | Path]) -> str:
    """What a compiler says; a failure is shown."""
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The check program: the kernels' source, compiled for the emulated device."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("native_cuda")
    fibers, program = folder / "fibers.o", folder / "check"
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    compiled([compiler, "-std=c++17", "-O2", *warnings, "-c", EMULATION / "fibers.cc", "-o", fibers])
    # Vector loads reinterpret elements, as CUDA code does.
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-strict-aliasing")
    includes = ("-I", SOURCES, "-I", EMULATION)
    source = ("-x", "c++", EMULATION / "check.cc", "-x", "none", fibers)
    compiled([compiler, "-std=c++17", "-O1", "-g1", *warnings, *sanitizers, *includes, *source, "-o", program])
    return program


@pytest.mark.parametrize("section", SECTIONS)
def test_kernels_hold_on_the_emulated_device(check: Path, section: str) -> None:
    run = subprocess.run([str(check), section], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("1 sections")


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_kernels_compile_without_spilling_registers(tmp_path: Path, architecture: str) -> None:
    nvcc = shutil.which("nvcc") or _packaged_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    source = SOURCES / "cuda_reflection.cu"
    said = compiled(
        [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-c", source, "-o", tmp_path / "kernels.o"]
    )
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == KERNELS
    assert {sum(map(int, each)) for each in spills} == {0}
    assert all(int(size) <= STATIC_SHARED_LIMIT for size in re.findall(r"(\d+) bytes smem", said))
