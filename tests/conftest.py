"""What every test run shares: no network through the Hub, one thread a worker, and the versions in the header."""

import os
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import hypothesis
import pytest

# Before any test imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before any test imports torch: several workers with a thread for each core slow each other down.
    os.environ["OMP_NUM_THREADS"] = "1"

if not Path("/dev/nvidiactl").exists():
    # Before any test imports kernels: without an NVIDIA GPU they run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A deadline measures the machine, not the code.
hypothesis.settings.register_profile("hra-export", deadline=None)
hypothesis.settings.load_profile("hra-export")

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime", "peft")


def pytest_report_header() -> str:
    """The versions that the numbers depend on."""
    installed = {item.metadata["Name"].lower(): item.version for item in metadata.distributions()}
    return "versions: " + ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: tests that sync thousands of times take seconds there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    folder = memory / f"hra-export-test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def native_library() -> Path:
    """The file of the operator library, with CPU kernels alone."""
    from tests.native_operator import built_library  # it imports torch, and that only after the settings above

    return built_library()
