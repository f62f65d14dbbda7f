"""The reflection on a GPU: our kernels against the calls of torch that they replace, and against their floors.

    python -m benchmarks.reflect_gpu [--rounds 5] [--budget 150] [--check]

Square layers, o = d, rows n of activations. The contenders:

    three calls          x U, times S, and `addmm`
    compiled             `torch.compile` of them; for r = 8 and some n, since a compilation takes seconds
    reflect              `hra::reflect`, one Triton kernel for few rows
    operator             the CUDA kernel of the ONNX operator, called directly, and a group of three that share x;
                         where its library is there
    product              x Wᵀ alone
    reflect + product    what a layer does
    product + LoRA       x Wᵀ + (x A) B in three calls
    rows                 `hra::reflect_rows`, each row with one of 8 adapters, up to 64 rows
    factor               `hra::factor`, U and S of 8 chains
    backward             `hra::reflect_backward`, from 512 rows on

Every contender is compared with float64 before it is timed. Copies of the data rotate (`benchmarks/gpu_turns.py`);
"eager" launches every kernel, "graph" replays a CUDA graph. "of floor" is the floor of `benchmarks/roofline.py`, from
the bandwidth and peak that this run measures, over the time in a graph; "with launch" adds the measured time between
two kernels of a graph for every kernel. Rows that would begin after the budget, in seconds, are left out and counted.

Without CUDA: exit code 7. A kernel with wrong numbers: 1, with all other figures. `--check` runs the Triton kernels in
their interpreter on the CPU at toy size, compares the numbers, and times nothing.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product as pairs

import torch

from benchmarks import roofline
from benchmarks.ceilings import clocks, measured
from benchmarks.cuda_operator import CudaOperator
from benchmarks.gpu_turns import Seconds, copies, take_turns
from benchmarks.harness import as_table, machine, report, say, work_folder
from benchmarks.native_library import native_library
from benchmarks.reflect_contenders import FEW_ROWS, Data, Kernel, contenders, label, works, wrong
from benchmarks.roofline import Machine, Shape, Work
from hra_export.errors import DeviceError

WIDTHS, RANKS = (4096, 14336, 2048, 8192), (8, 32, 64)
ROWS = (1, 4096, 16, 64, 4, 512)
MANY_ROWS = 1024
DECODE_BAR, PREFILL_BAR = 0.80, 0.02
TOY = (Shape(1, 64, 48, 8, "float32"), Shape(33, 96, 32, 17, "float32"), Shape(5, 257, 40, 2, "float16"))
HEADER = ["d", "n", "r", "dtype", "kernel", "eager µs", "graph µs", "floor µs", "of floor", "with launch",
          "÷ three calls", "÷ product"]  # fmt: skip


def shapes() -> Iterator[Shape]:
    """All of them, what matters most first."""
    for rank, width, rows in pairs(RANKS, WIDTHS, ROWS):
        yield Shape(rows, width, width, rank, "bfloat16")
    for dtype, rows in pairs(("float16", "float32"), (1, 4096)):
        yield Shape(rows, 4096, 4096, 8, dtype)


def measure(
    shape: Shape, rounds: int, cuda_operator: CudaOperator | None, device: torch.device
) -> tuple[dict[str, dict[str, Seconds]], list[str]]:
    """Contender → mode → seconds, and what was wrong; who is wrong is not timed."""
    count = copies(roofline.reflect(shape).bytes)
    data = Data(shape, device, count, min(count, copies(shape.item * shape.features * shape.outputs)))
    calls = contenders(data, shape, cuda_operator)
    findings = wrong(shape, data, calls)
    right = {name: call for name, call in calls.items() if not any(f", {name}: " in each for each in findings)}
    taken, failures = take_turns(right, count, rounds)
    torch.compiler.reset()
    return taken, [*findings, *(f"{label(shape)}, {failure}" for failure in failures)]


def table(shape: Shape, taken: Mapping[str, Mapping[str, Seconds]], ceilings: Machine) -> list[list[str]]:
    """The rows of one shape."""
    rows, work = [], works(shape)
    for name, modes in taken.items():
        eager, graph = (modes[mode].median for mode in ("eager", "graph"))
        floor = ceilings.floor(work[name], shape.dtype)
        shares = [_share(ceilings, work[name], shape.dtype, modes, launches=each) for each in (False, True)]
        ratios = [_ratio(graph, taken, other) for other in ("three calls", "product")]
        rows.append(
            [
                *(str(each) for each in (shape.features, shape.rows, shape.rank, shape.dtype)),
                name,
                *(f"{1e6 * each:.2f}" for each in (eager, graph, floor)),
                *(f"{each:.0%}" for each in shares),
                *ratios,
            ]
        )
    return rows


def _ratio(seconds: float, taken: Mapping[str, Mapping[str, Seconds]], other: str) -> str:
    return f"{seconds / taken[other]['graph'].median:.3f}" if other in taken else ""


def judged(done: Mapping[Shape, Mapping[str, Mapping[str, Seconds]]], ceilings: Machine) -> list[list[str]]:
    """The bars: what is asked, the worst and the best shape, and what the floors allow."""
    rows = []
    few = {shape: taken["reflect"] for shape, taken in done.items() if shape.rows <= FEW_ROWS and "reflect" in taken}
    many = {shape: taken for shape, taken in done.items() if shape.rows >= MANY_ROWS and "reflect + product" in taken}
    if few:
        work = {shape: roofline.reflect(shape) for shape in few}
        for what, launches in (("memory floor", False), ("floor with one launch", True)):
            shares = [_share(ceilings, work[each], each.dtype, few[each], launches=launches) for each in few]
            holds = min(shares) >= DECODE_BAR
            rows.append(_bar(f"n ≤ 64: of the {what}", "≥ 80%", min(shares), max(shares), holds))
    if many:
        own = [_on_top(taken) for taken in many.values()]
        allowed = [roofline.on_top(ceilings, roofline.reflect(shape), shape) for shape in many]
        rows.append(_bar("n ≥ 1024: on top of the product", "≤ 2%", max(own), min(own), max(own) <= PREFILL_BAR))
        rows.append(_bar("n ≥ 1024: what reading and writing x costs", "", max(allowed), min(allowed), None))
    return rows


def _share(ceilings: Machine, work: Work, dtype: str, modes: Mapping[str, Seconds], *, launches: bool) -> float:
    floor = ceilings.with_launches(work, dtype, recorded=True) if launches else ceilings.floor(work, dtype)
    return floor / modes["graph"].median


def _on_top(taken: Mapping[str, Mapping[str, Seconds]]) -> float:
    return taken["reflect + product"]["graph"].median / taken["product"]["graph"].median - 1


def _bar(what: str, bar: str, worst: float, best: float, holds: bool | None) -> list[str]:
    verdict = "" if holds is None else "holds" if holds else "FAILS"
    return [what, bar, f"{worst:.1%}", f"{best:.1%}", verdict]


def check(device: torch.device) -> int:
    """Compare all contenders with float64 at toy size, the Triton kernels among them; returns the exit code."""
    findings = []
    for shape in TOY:
        data = Data(shape, device, 2, 2)
        calls = contenders(data, shape, None)
        if device.type == "cpu":
            calls["reflect in the interpreter"] = interpreted(data)
        findings += wrong(shape, data, calls)
        say(f"{label(shape)}: {', '.join(calls)}")
    say("\n".join(findings) or "all agree with float64")
    return int(bool(findings))


def interpreted(data: Data) -> Kernel:
    """The forward kernel by itself: the operator of torch takes the plain version on a CPU."""
    from hra_export.kernels import forward

    return lambda i: forward.reflect(data.x[i], data.u[i], data.s[i])[0]


def run(rounds: int, budget: float, device: torch.device) -> int:
    """Measure shapes until the budget is spent, and report those done, whatever happens; returns the exit code."""
    machine()
    began = time.monotonic()
    ceilings, before = measured(device), clocks()
    with work_folder(None) as work:
        library, origin = native_library(work, cuda="auto")
        has_cuda = library is not None and "cuda" in library.providers
        cuda_operator = CudaOperator(library.path) if library is not None and has_cuda else None
    say(origin if cuda_operator is not None else f"the CUDA operator is left out: {origin}")
    done: dict[Shape, dict[str, dict[str, Seconds]]] = {}
    failures: list[str] = []
    every = list(shapes())
    try:
        for shape in every:
            if time.monotonic() - began > budget:
                break
            try:
                done[shape], findings = measure(shape, rounds, cuda_operator, device)
            except Exception as error:  # out of memory, compilers; Triton's are no RuntimeError
                findings = [f"{label(shape)}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"]
            failures += findings
            say("\n".join([f"{label(shape)}: done", *findings]))
    finally:
        left_out = [label(shape) for shape in every if shape not in done]
        rows = [row for shape, taken in done.items() for row in table(shape, taken, ceilings)]
        seconds = {label(shape): {name: {mode: each.turns for mode, each in modes.items()}
                                  for name, modes in taken.items()} for shape, taken in done.items()}  # fmt: skip
        about = {"ceilings": asdict(ceilings), "clocks": {"before": before, "after": clocks()}, "rounds": rounds}
        bars = judged(done, ceilings)
        report("reflect_gpu", HEADER, rows, {**about, "bars": bars, "left_out": left_out, "failures": failures,
                                             "seconds": seconds})  # fmt: skip
        sys.stdout.write(as_table(["bar", "", "worst", "best", ""], bars) if bars else "")
    say("\n".join([*failures, f"{len(left_out)} of {len(every)} shapes are left out"]))
    return int(bool(failures))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no shape is begun")
    parser.add_argument("--check", action="store_true", help="compare the numbers at toy size in Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.check:
        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which nobody has done yet
        sys.exit(check(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    if not torch.cuda.is_available():
        error = DeviceError("this benchmark needs an NVIDIA GPU, and torch sees none", hint="`hra-export doctor`")
        say(f"error: {error}")
        sys.exit(error.exit_code)
    sys.exit(run(arguments.rounds, arguments.budget, torch.device("cuda")))


if __name__ == "__main__":
    main()
