"""What every test run shares: no network through the Hub, one thread a worker, and the versions in the header."""

import os
from importlib import metadata

import hypothesis

# Before any test imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before any test imports torch: several workers with a thread for each core slow each other down.
    os.environ["OMP_NUM_THREADS"] = "1"

# A deadline measures the machine, not the code.
hypothesis.settings.register_profile("hra-export", deadline=None)
hypothesis.settings.load_profile("hra-export")

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime", "peft")


def pytest_report_header() -> str:
    """The versions that the numbers depend on."""
    installed = {item.metadata["Name"].lower(): item.version for item in metadata.distributions()}
    return "versions: " + ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
