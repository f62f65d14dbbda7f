"""Training: a step with our HRA against PEFT's LoRA, OFT and HRA, in one interleaved run for each case.

    python -m benchmarks.train [--rounds 7] [--only CASE …] [--methods METHOD …] [--work DIR]

A step is forward, backward, AdamW and zero_grad, in float32 on two threads. Cases: SmolLM2-135M, every linear layer of
its blocks adapted, 2 × 256 tokens, with and without gradient checkpointing; and one square linear layer of d = 1024,
2048, 4096 on 512 tokens, whose input wants a gradient as it does inside a model. r = 8 and 32. LoRA has the same rank
and targets, alpha = r, no dropout; OFT the block size that brings it nearest to HRA's number of parameters.

Each contender has a process of its own, started once, and trains for half a second, one step at least, when its turn
comes, so that only one works at a time and none sees another's memory. The first round warms up. PEFT's HRA begins it;
where its first step takes 5 s or more, that step is its figure, and it makes room for the others. The C library of
single layers keeps what is freed.

Bars: time ≤ 1.10 × LoRA's; tensors ≤ 1.05 × LoRA's; ≥ 10 × faster than PEFT's HRA at d ≥ 2048, and never slower.
"tensors" is the peak of live tensors beyond the base's weights, exact; "beyond" is resident memory beyond a process
with the model loaded, which moves by some percent. benchmarks/trainee.py says how both are taken.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import report, say, work_folder
from benchmarks.trainee import METHODS, Case, Method

THREADS = 2
RANKS = (8, 32)
WIDTHS = (1024, 2048, 4096)
BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TIME_BAR = 1.10
MEMORY_BAR = 1.05
SPEED_BAR, SPEED_BAR_WIDTH = 10, 2048
# At this length, what is slow about a first step alone is within a percent or two.
SLOW_SECONDS = 5.0
# Of the few blocks of a single layer, chance decides which glibc gives back to the system and asks for again: some
# milliseconds of page faults in a step, whoever's it is. Within these bounds, the highest it takes, it keeps them.
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
PROGRAM = "from benchmarks.trainee import serve; serve()"


@dataclass
class Figures:
    """One contender's run of one case; `failure` says why there is none.

    Attributes:
        parameters: how many are trained.
        loaded_bytes: resident memory with the model loaded, without adapter.
        seconds: a step took, in each turn that counts.
        peak_bytes: highest resident memory of the run.
        held_bytes: tensors that outlive a step: the adapter, the optimizer's state, what layers keep.
        transient_bytes: the highest sum of other tensors within a step.
    """

    parameters: int
    loaded_bytes: int
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    held_bytes: int = 0
    transient_bytes: int = 0
    failure: str | None = None

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)

    @property
    def beyond_bytes(self) -> int:
        """Resident memory beyond the loaded model."""
        return self.peak_bytes - self.loaded_bytes

    @property
    def tensor_bytes(self) -> int:
        """The peak of live tensors beyond the base's weights."""
        return self.held_bytes + self.transient_bytes


class Worker:
    """A process with one contender in it."""

    def __init__(self, case: Case, method: Method) -> None:
        self._name = f"{case.name}, {method}"
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        if case.directory is None:
            environment |= KEEP_FREED
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(asdict(case)), method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def answer(self) -> dict[str, Any]:
        """The next line from the process.

        Raises:
            MemoryError: there was not enough for this contender.
            RuntimeError: it ended for another reason; what it wrote is in the message.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            if code == -signal.SIGKILL:
                raise MemoryError("killed by the system")
            self._errors.seek(0)
            raise RuntimeError(f"{self._name} ended with {code}:\n{self._errors.read()[-2000:]}")
        body = json.loads(line)
        if "failure" in body:
            raise MemoryError(body["failure"])
        return body

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for the answer; raises what `answer` does."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why it ended
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.terminate()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where SmolLM2 is unpacked; deleted afterwards if not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="whole names of cases, or how they begin")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    arguments = parser.parse_args()
    with work_folder(arguments.work) as work:
        chosen = choose(cases(work / "smollm2"), arguments.only)
        if not chosen:
            parser.error(f"no such case; there are: {', '.join(case.name for case in cases(work))}")
        rows: list[list[str]] = []
        data: dict[str, object] = {}
        for case in chosen:
            say(f"{case.name}:")
            if case.directory:
                _unpack_smollm2(Path(case.directory))
            figures = measure(case, arguments.methods, arguments.rounds)
            rows += table(case, figures)
            data[case.name] = {method: asdict(each) for method, each in figures.items()} | {"bars": bars(case, figures)}
    report("train", HEADER, rows, {"threads": THREADS, "rounds": arguments.rounds, "cases": data})


def cases(smollm2: Path) -> list[Case]:
    """Every case; `smollm2` is where the model is, or will be."""
    models = [
        Case(
            name=f"smollm2-r{rank}-{'checkpointed' if checkpointing else 'plain'}",
            rank=rank,
            batch=2,
            tokens=256,
            directory=str(smollm2),
            targets=BLOCK_LINEARS,
            checkpointing=checkpointing,
        )
        for rank in RANKS
        for checkpointing in (False, True)
    ]
    return models + [
        Case(name=f"layer-{width}-r{rank}", rank=rank, tokens=512, width=width) for width in WIDTHS for rank in RANKS
    ]


def choose(every: Sequence[Case], names: Sequence[str] | None) -> list[Case]:
    """The cases with one of these names, or a name that goes on after it with a dash; all of them for None."""
    return [case for case in every if names is None or any(f"{case.name}-".startswith(f"{name}-") for name in names)]


def measure(case: Case, methods: Sequence[Method], rounds: int) -> dict[Method, Figures]:
    """Step every contender in turn, `rounds` times after one that is not counted.

    Raises:
        RuntimeError: a process failed for another reason than memory; what it wrote is in the message.
    """
    ordered = sorted(methods, key=lambda method: method != "peft-hra")
    with ExitStack() as stack:
        workers: dict[Method, Worker] = {}
        for method in ordered:
            workers[method] = Worker(case, method)
            stack.callback(workers[method].close)
        figures = {method: Figures(**worker.answer()) for method, worker in workers.items()}
        for turn in range(rounds + 1):
            for method in list(workers):
                if _take_turn(workers[method], figures[method], counts=turn > 0, may_end=method == "peft-hra"):
                    workers.pop(method).close()
        for method, worker in workers.items():
            _take_memory(worker, figures[method])
    for method, each in figures.items():
        say(f"  {method}: {each.median:.3f} s" if each.seconds else f"  {method}: {each.failure}")
    return {method: figures[method] for method in methods}


def _take_turn(worker: Worker, figures: Figures, *, counts: bool, may_end: bool) -> bool:
    """Half a second of steps; whether it was the last, because it was so slow, or because memory ran out."""
    try:
        seconds = worker.ask("turn")["seconds"]
        ends = may_end and not counts and seconds >= SLOW_SECONDS
        if counts or ends:
            figures.seconds.append(seconds)
        if ends:
            _take_memory(worker, figures)
    except MemoryError as error:
        figures.failure = str(error)
        return True
    return ends


def _take_memory(worker: Worker, figures: Figures) -> None:
    answer = worker.ask("memory")
    figures.peak_bytes = answer["peak_bytes"]
    figures.held_bytes = answer["held_bytes"]
    figures.transient_bytes = answer["transient_bytes"]


def bars(case: Case, figures: Mapping[Method, Figures]) -> dict[str, bool]:
    """Which bars ours meets, of those that this run can tell."""
    ours, lora, peft = (figures.get(method) for method in ("ours", "lora", "peft-hra"))
    met: dict[str, bool] = {}
    if not ours or not ours.seconds:
        return met
    if lora and lora.seconds:
        met["time"] = ours.median <= TIME_BAR * lora.median
        met["memory"] = ours.tensor_bytes <= MEMORY_BAR * lora.tensor_bytes
    if peft and peft.seconds:
        factor = SPEED_BAR if case.width >= SPEED_BAR_WIDTH else 1
        met["speed"] = peft.median >= factor * ours.median
    return met


HEADER = ["case", "adapter", "parameters", "s a step", "steps/s", "÷ LoRA", "PEFT HRA ÷", "loaded MB", "peak MB",
          "beyond MB", "÷ LoRA", "tensors MB", "÷ LoRA", "bars"]  # fmt: skip


def table(case: Case, figures: Mapping[Method, Figures]) -> list[list[str]]:
    """The rows of one case. "÷ LoRA" divides by LoRA's figure, "PEFT HRA ÷" PEFT HRA's time by this one's."""
    lora, peft = figures.get("lora"), figures.get("peft-hra")
    rows = []
    for method, each in figures.items():
        row = [case.name, method, f"{each.parameters:,}"]
        if not each.seconds:
            rows.append([*row, each.failure or "", *[""] * (len(HEADER) - 4)])
            continue
        missed = [name for name, met in bars(case, figures).items() if not met]
        rows.append(
            [
                *row,
                f"{each.median:.4f}",
                f"{1 / each.median:.2f}",
                _ratio(each.median, lora.median if lora else 0),
                _ratio(peft.median, each.median) if peft and peft.seconds else "",
                *(f"{size / 1e6:.0f}" for size in (each.loaded_bytes, each.peak_bytes, each.beyond_bytes)),
                _ratio(each.beyond_bytes, lora.beyond_bytes if lora else 0),
                f"{each.tensor_bytes / 1e6:.1f}" if each.tensor_bytes else each.failure or "",
                _ratio(each.tensor_bytes, lora.tensor_bytes if lora else 0),
                f"missed: {', '.join(missed)}" if missed and method == "ours" else "met" if method == "ours" else "",
            ]
        )
    return rows


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if part and whole else ""


def _unpack_smollm2(directory: Path) -> None:
    from hra_export.registry import load_converter
    from tests.real_models import smollm2_gguf

    if not directory.exists():
        load_converter("from_gguf").convert(smollm2_gguf(), directory)


if __name__ == "__main__":
    main()
