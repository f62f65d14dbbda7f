"""Timing whole commands: wall, processor time and peak memory of each run, interleaved, medians, a table and JSON."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("hra-export", "torch", "triton", "transformers", "peft", "safetensors", "onnx", "onnxruntime-gpu")


@dataclass(frozen=True)
class Run:
    """One run of one command: seconds of wall and processor time, peak resident memory in bytes."""

    wall: float
    processor: float
    peak_bytes: int


@dataclass(frozen=True)
class Contender:
    """A command under test, with what must be done before each run, untimed."""

    name: str
    command: Sequence[str]
    prepare: Callable[[], None] = lambda: None


def run_once(contender: Contender) -> Run:
    """Run a command to its end, disks quiet before it.

    Raises:
        RuntimeError: the command failed; its output is in the message.
    """
    contender.prepare()
    os.sync()
    started = time.perf_counter()
    with subprocess.Popen(contender.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(
            f"{contender.name} ended with {process.returncode}:\n{text.decode(errors='replace')[-2000:]}"
        )
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def interleave(contenders: Sequence[Contender], rounds: int) -> dict[str, list[Run]]:
    """Run every contender in turn, `rounds` times, after one round that is not counted where rounds > 1."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds + (rounds > 1)):
        for contender in contenders:
            run = run_once(contender)
            say(f"  {contender.name}: {run.wall:.2f} s")
            if turn or rounds == 1:
                runs[contender.name].append(run)
    return runs


def median(runs: Sequence[Run], field: str = "wall") -> float:
    """The middle of one figure over runs."""
    return statistics.median(getattr(run, field) for run in runs)


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    names = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    return {
        "processor": ", ".join(sorted(names)) or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout that is not installed, or a bare machine
        return ""


def report(name: str, header: Sequence[str], rows: Sequence[Sequence[str]], data: Mapping[str, object]) -> None:
    """Print a table, and write it with everything behind it to `results/<name>.json`."""
    sys.stdout.write(as_table(header, rows))
    RESULTS.mkdir(exist_ok=True)
    body = {"machine": machine(), "table": [list(header), *map(list, rows)], **data}
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")
    sys.stdout.write(f"\n{RESULTS.name}/{name}.json\n")


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "".join(f"{line.rstrip()}\n" for line in aligned)


def as_data(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, float]]]:
    """Runs as plain values."""
    return {name: [asdict(run) for run in each] for name, each in runs.items()}


def say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """The folder that was chosen, made if need be and kept; or one that is deleted afterwards."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="hra-export-benchmark-") as folder:
        yield Path(folder)
