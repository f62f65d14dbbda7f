"""Search launches of the forward kernel on a GPU, and print lines for `MEASURED` in hra_export/kernels/tuning.py.

    python -m benchmarks.tune_gpu [--budget 300] [--rows 1 16 64 …] [--features …] [--ranks …] [--check]

For each case the launch that `tuning.reasoned` takes is varied in its tile, splits and exchange. Each variant is
checked against float64 first; the fastest is printed beside the reasoned one. One measurement is a CUDA graph of many
calls, each on inputs of its own, so that U comes from memory, as it does behind other layers; the best of 5 replays
counts.

Cases that would begin after the budget, in seconds, are left out and named. `--check` runs a small case without a GPU,
in Triton's interpreter, and times nothing. Without CUDA: exit code 7.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hra_export.errors import DeviceError
from hra_export.kernels import tuning

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Inputs of one graph: as many as L2 caches of 50 MB do not hold, within reason.
ROTATED_BYTES, MOST_COPIES = 64 * 2**20, 256
REPLAYS = 5
# Of the norm of z, four roundings.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(arguments)
    if options.check:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing to tune on", file=sys.stderr)
        return DeviceError.exit_code
    from hra_export.kernels import forward

    device = torch.device("cpu" if options.check else "cuda")
    gpu = forward._gpu(device)
    dtype = DTYPES[options.dtype]
    began = time.monotonic()
    for rows, features, rank in itertools.product(options.rows, options.features, options.ranks):
        shape = tuning.Shape(1, rows, features, rank, dtype.itemsize)
        case = tuning.Case.of(shape, gpu)
        if time.monotonic() - began > options.budget:
            print(f"    # {case}: left out, the budget is spent")
            continue
        reasoned = tuning.reasoned(shape, gpu)
        found = {launch: seconds_of(launch, shape, dtype, device) for launch in variants(reasoned, shape, gpu)}
        best = min(found, key=lambda launch: found[launch])
        print(f"    {case}: {best},  # {found[best] * 1e6:.2f} µs, reasoned {found[reasoned] * 1e6:.2f} µs", flush=True)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Sizes; those of `--check` are the interpreter's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 512, 4096])
    parser.add_argument("--features", type=int, nargs="+", default=[4096, 14336, 2048, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    if options.check:
        options.rows, options.features, options.ranks = [3], [48], [4]
    return options


def variants(reasoned: tuning.Launch, shape: tuning.Shape, gpu: tuning.Gpu) -> Iterator[tuning.Launch]:
    """The reasoned launch and its neighbours, one thing varied at a time, and tiles together with splits."""
    yield reasoned
    tile = reasoned.tile
    tiles = [tile]
    tiles += [replace(tile, columns=columns) for columns in (tile.columns // 2, tile.columns * 2) if columns >= 16]
    tiles += [replace(tile, warps=12 - tile.warps)]  # 4 or 8
    tiles += [replace(tile, stages=stages) for stages in (2, 3, 4) if stages != tile.stages]
    if tile.rows > 1:
        tiles += [replace(tile, rows=rows) for rows in (16, 32, 64) if rows != tile.rows]
    for other in tiles:
        for factor, exchange in itertools.product((0.5, 1, 2), ("alone", "together")):
            splits = int(reasoned.splits * factor)
            count = tuning.count_tiles(shape, other)
            fits = count * splits <= gpu.processors and count <= tuning.MOST_TILES_TOGETHER
            launch = tuning.Launch(other, splits, "together" if exchange == "together" else "alone")
            if splits >= 1 and launch != reasoned and (exchange == "alone" or (fits and splits > 1)):
                yield launch


def seconds_of(launch: tuning.Launch, shape: tuning.Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one call; infinity where the launch does not fit the GPU.

    Raises:
        AssertionError: the numbers are wrong.
    """
    from triton import TritonError

    from hra_export.kernels import forward

    copies = max(1, min(MOST_COPIES, ROTATED_BYTES // (shape.features * (shape.rows + shape.rank) * shape.itemsize)))
    inputs = [operands(shape, dtype, device) for _ in range(copies if device.type == "cuda" else 1)]
    try:
        z = forward.reflect(*inputs[0], launch=launch)[0]
    except (RuntimeError, TritonError) as error:  # too large a cooperative launch; too much shared memory
        print(f"    # {launch}: {error}", file=sys.stderr)
        return float("inf")
    x, u, s = (value.double() for value in inputs[0])
    exact = x - x @ u @ s @ u.T
    assert (z.double() - exact).norm() <= BOUNDS[dtype] * exact.norm(), launch
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for values in inputs:
            forward.reflect(*values, launch=launch)
    return min(replayed(graph) for _ in range(REPLAYS)) / len(inputs)


def operands(shape: tuning.Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, U with columns of about unit length, and S of a size that chains have."""
    x = torch.randn(shape.rows, shape.features, device=device).to(dtype)
    u = (torch.randn(shape.rank, shape.features, device=device) / shape.features**0.5).to(dtype).T
    return x, u, torch.randn(shape.rank, shape.rank, device=device).tril()


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it
    first.record()
    graph.replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


if __name__ == "__main__":
    sys.exit(main())
