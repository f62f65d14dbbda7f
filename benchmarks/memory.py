"""Memory: the resident peak of `hra-export merge` on checkpoints of growing size, beyond an interpreter with torch.

    python -m benchmarks.memory [--work DIR] [--largest]

Checkpoints have the shapes of an 8B llama and a 6.7B GPT-2 in bfloat16, written as holes that take no space; the merged
ones are written in full, and deleted. Every linear layer is adapted, r = 8. `--largest` adds all 16 GB of the llama.
The bound is max(1 GiB, 3 × the largest tensor in float32 + 300 MiB), whatever the size of the model.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness import report, say
from tests.synthetic import (
    Sizes,
    hole,
    linear_modules,
    llama_config,
    llama_shapes,
    random_chains,
    write_adapter_files,
    write_base,
)

RANK = 8
SHARDS = 4
# Bytes of disk to be left when a merged checkpoint has been written.
SPARE_DISK_BYTES = 8 * 10**9
# The peak of this image alone: `ru_maxrss` would count the process that started it, before its exec.
PEAK = """
import pathlib, sys
for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        pathlib.Path(sys.argv[1]).write_text(str(int(line.split()[1]) * 1024))
"""
IDLE = "import hra_export.merge" + PEAK
MERGE = f"""
import sys
from hra_export.cli import main
try:
    main(sys.argv[2:])
finally:
    exec({PEAK!r})
"""


@dataclass(frozen=True)
class MemoryRun:
    """One merge: bytes of the checkpoint and of its largest tensor in float32, seconds, and bytes of resident peaks."""

    checkpoint_bytes: int
    largest_bytes: int
    seconds: float
    idle_bytes: int
    peak_bytes: int

    @property
    def beyond_bytes(self) -> int:
        """What the merge took beyond an interpreter that has imported it."""
        return self.peak_bytes - self.idle_bytes

    @property
    def bound_bytes(self) -> int:
        """What it may take."""
        return max(2**30, 3 * self.largest_bytes + 300 * 2**20)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is made of: its configuration, its tensors, and the modules to adapt with their d."""

    config: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    targets: Mapping[str, int]


def llama(layers: int = 32, vocabulary: int = 128256) -> Layout:
    """An 8B llama, or one with fewer layers and tokens."""
    sizes = Sizes(layers=layers, width=4096, inner=14336, vocabulary=vocabulary, heads=32, key_heads=8)
    return Layout(llama_config(sizes), llama_shapes(sizes), linear_modules(sizes))


def gpt2(layers: int) -> Layout:
    """Layers of a 6.7B GPT-2, as GPT-SW3 has them: weights stored (in, out), so that chains act on their columns."""
    sizes = {
        "attn.c_attn": (4096, 12288),
        "attn.c_proj": (4096, 4096),
        "mlp.c_fc": (4096, 16384),
        "mlp.c_proj": (16384, 4096),
    }
    modules = {f"transformer.h.{i}.{name}": shape for i in range(layers) for name, shape in sizes.items()}
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 4096,
        "n_layer": layers,
        "n_head": 32,
    }
    shapes = {f"{module}.weight": shape for module, shape in modules.items()}
    embeddings = {"transformer.wte.weight": (1024, 4096), "transformer.wpe.weight": (64, 4096)}
    targets = {module: shape[0] for module, shape in modules.items()}
    return Layout({**config, "vocab_size": 1024, "n_positions": 64}, {**embeddings, **shapes}, targets)


def measure(layout: Layout, work: Path, *, verb: str = "merge", options: Sequence[str] = ()) -> MemoryRun:
    """Merge a checkpoint of holes, or whatever else a verb does with one, into a folder under `work`; delete both.

    Raises:
        RuntimeError: the disk is too small, or the merge failed.
    """
    shapes = layout.shapes
    size = 2 * sum(map(math.prod, shapes.values()))
    if shutil.disk_usage(work).free < size + SPARE_DISK_BYTES:
        raise RuntimeError(f"`{work}` has no room for {size / 1e9:.1f} GB and {SPARE_DISK_BYTES / 1e9:.0f} GB to spare")
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        tensors = {name: hole(*shape, dtype="BF16") for name, shape in shapes.items()}
        base = write_base(folder / "base", tensors, shards=SHARDS, config=layout.config)
        adapter = write_adapter_files(folder / "adapter", random_chains(layout.targets, RANK), rank=RANK)
        idle, _ = _peak(IDLE, folder, [])
        arguments = [verb, str(adapter), "--base", str(base), "--output", str(folder / "made"), "-q", *options]
        peak, seconds = _peak(MERGE, folder, arguments)
    largest = 4 * max(map(math.prod, shapes.values()))
    return MemoryRun(size, largest, seconds, idle, peak)


def _peak(program: str, folder: Path, arguments: Sequence[str]) -> tuple[int, float]:
    note = folder / "peak"
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-c", program, str(note), *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"`{arguments[:1]}` ended with {done.returncode}: {done.stderr}")
    return int(note.read_text()), seconds


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="where checkpoints are made  [default: the system's temporary folder]"
    )
    parser.add_argument("--largest", action="store_true", help="also merge 16 GB")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.gettempdir())
    chosen = {f"llama, {layers} layers": llama(layers, 16384) for layers in (1, 3, 6)} | {"gpt2, 2 layers": gpt2(2)}
    if arguments.largest:
        chosen["llama, 8B"] = llama()
    rows, data = [], {}
    for name, layout in chosen.items():
        say(f"{name}:")
        run = measure(layout, work)
        data[name] = asdict(run) | {"beyond_bytes": run.beyond_bytes, "bound_bytes": run.bound_bytes}
        figures = [run.checkpoint_bytes / 1e9, run.largest_bytes / 1e6, run.seconds]
        peaks = [run.peak_bytes / 2**20, run.idle_bytes / 2**20, run.beyond_bytes / 2**20, run.bound_bytes / 2**20]
        rows.append([name, *(f"{figure:.1f}" for figure in figures), *(f"{peak:.0f}" for peak in peaks)])
    header = ["checkpoint", "GB", "largest tensor, float32 MB", "s", "peak MiB", "idle MiB", "beyond MiB", "bound MiB"]
    report("memory", header, rows, {"runs": data, "rank": RANK, "shards": SHARDS})


if __name__ == "__main__":
    main()
