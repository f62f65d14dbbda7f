"""What a machine reaches at most: bandwidth, peak of a matrix product, seconds of a launch, all measured.

    bandwidth     the better of a copy (read and write), a triad, and a matrix-vector product (reads alone)
    peak          the largest of some square products, random numbers: zeros run faster than anybody's weights
    launch        a chain of kernels on one number, launched by a loop; or replayed as a CUDA graph

Each is the best of several turns, for a ceiling is not an average. It takes about two seconds on a GPU.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.roofline import ITEM_BYTES, Machine

TURNS = 5
GPU_COPY_BYTES, CPU_ARRAY_BYTES = 2**30, 2**28
GPU_SIDE, CPU_SIDE = 8192, 1536
LAUNCHES = 500


def measured(device: torch.device) -> Machine:
    """The ceilings of a device; those of a CPU are for as many threads as torch has."""
    return _gpu(device) if device.type == "cuda" else _cpu()


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the GPU: clocks, power, temperature, driver; nothing where it is not there."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu",
              "driver_version", "clocks_event_reasons.active")  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (field.strip() for field in answer.splitlines()[0].split(",")), strict=False))


def _gpu(device: torch.device) -> Machine:
    peaks = {name: _product_rate(GPU_SIDE, getattr(torch, name), device) for name in ITEM_BYTES}
    launch, replay = _launches(device)
    return Machine(torch.cuda.get_device_name(device), _copy_rate(device), peaks, launch, replay, "measured")


def _cpu() -> Machine:
    device = torch.device("cpu")
    count = CPU_ARRAY_BYTES // 4
    a, b, c = (torch.ones(count) for _ in range(3))
    triad = 3 * CPU_ARRAY_BYTES / _best(lambda: torch.add(b, c, alpha=3.0, out=a), device)
    copy = 2 * CPU_ARRAY_BYTES / _best(lambda: a.copy_(b), device)
    matrix, vector = a.view(2**13, -1), torch.ones(count // 2**13)
    reads = CPU_ARRAY_BYTES / _best(lambda: matrix @ vector, device)
    peak = _product_rate(CPU_SIDE, torch.float32, device)
    # Half precision is computed in float32 there.
    return Machine(_processor(), max(triad, copy, reads), dict.fromkeys(ITEM_BYTES, peak), source="measured")


def _copy_rate(device: torch.device) -> float:
    source, target = (torch.empty(GPU_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * GPU_COPY_BYTES / _best(lambda: target.copy_(source), device)


def _product_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


def _launches(device: torch.device) -> tuple[float, float]:
    number = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(LAUNCHES):
            number.add_(1.0)

    eager = _best(chain, device) / LAUNCHES
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return eager, _best(graph.replay, device) / LAUNCHES


def _best(call: Callable[[], object], device: torch.device) -> float:
    """The least seconds of a call."""
    call()
    return min(_turn(call, device) for _ in range(TURNS))


def _turn(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return event_seconds([call])
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def event_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds that the current GPU takes for calls, one after the other, between two events."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it
    first.record()
    for call in calls:
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"
