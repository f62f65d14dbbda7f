"""Training on a GPU: llamas of 1B, 3B and 8B size in bfloat16 with our HRA, and PEFT's LoRA, OFT and HRA.

    python -m benchmarks.train_gpu [--rounds 5] [--only CASE …] [--layers N] [--budget 420] [--check]

"ours" runs our Triton kernels, "ours-plain" the same layers on torch's own. The models have the shapes of Llama 3.2 1B
and 3B and of Llama 3.1 8B at their whole depth, or N blocks of it, and random weights.
As in
PEFT's MetaMathQA comparison: 4 rows of 768 tokens, r = 32, adapters in float32, and no gradient checkpointing but in
cases named after it. Cases named "qv" have its targets, q_proj and v_proj; in the others every linear layer of the
blocks is adapted. LoRA has alpha = r and no dropout; OFT the block size that brings it nearest to HRA's number of
parameters. A step is forward, backward, AdamW and zero_grad.

In "compiled" cases every block is compiled by itself, so that one graph serves all blocks whose input wants a gradient,
and another the first. PEFT's HRA is left out there: its loop over dense (d, d) matrices would unroll. In other cases it
comes last, and takes no turns where a step takes 2 s or more. Where memory runs out, the table says so.

All contenders of a case live in one process and share the base's weights, each in a module tree of its own; they take
turns of several steps between two CUDA events, after steps that are not counted. Memory is what a contender would take
alone: the weights, what stays allocated for it from step to step, and how far a step goes beyond all that is allocated
before it, all in tensors that torch's allocator has handed out (`max_memory_allocated`).

Cases that would begin after the budget, in seconds, are left out and named. Without CUDA: exit code 7. A contender that
fails, PEFT's HRA apart: exit code 1, with all other figures.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.ceilings import clocks
from benchmarks.harness import machine, report, say
from benchmarks.llamas import SIZES, Size, build_base, checkpoint_gradients_, sharing_copy
from benchmarks.train import BLOCK_LINEARS
from benchmarks.trainee import LEARNING_RATE, METHODS, Method, adapt, trainable
from hra_export import kernels
from hra_export.errors import DeviceError

Name = Method | Literal["ours-plain"]
PLAIN: Literal["ours-plain"] = "ours-plain"
BATCH, TOKENS, RANK = 4, 768, 32
STEPS_A_TURN = 3
SLOW_SECONDS = 2.0
TARGETS = {"all": BLOCK_LINEARS, "qv": ("q_proj", "v_proj")}


TOY = Size(64, 96, layers=2, heads=4, key_heads=2, head_width=16, tied=True, vocabulary=96)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        size, targets: keys of `SIZES` and `TARGETS`.
        backend: torch.compile's, or None for none.
    """

    size: str
    targets: str
    backend: str | None = None
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """As on the command line: `1B-all-compiled`."""
        ends = [word for word, holds in (("compiled", self.backend), ("checkpointed", self.checkpointing)) if holds]
        return "-".join([self.size, self.targets, *(ends or ["eager"])])

    @property
    def methods(self) -> list[Name]:
        """Who takes part, in order; without a GPU there are no kernels to do without."""
        names: list[Name] = [method for method in METHODS if not (self.backend and method == "peft-hra")]
        return ["ours", PLAIN, *names[1:]] if torch.cuda.is_available() else names


# What matters most comes first, for the budget's sake.
CASES = [
    *(Case(size, "all", backend) for size in SIZES for backend in (None, "inductor")),
    Case("3B", "qv"),
    Case("1B", "all", checkpointing=True),
    Case("1B", "qv"),
    Case("3B", "all", checkpointing=True),
]


@dataclass
class Figures:
    """One contender's part in one case; `failure` says why there is less.

    Attributes:
        parameters: how many are trained.
        seconds: of a step, the mean of each turn that counts.
        held_bytes: what stays allocated for it alone.
        transient_bytes: how much further a step goes.
        base_bytes: the weights.
        graphs, graph_breaks: of torch.compile.
    """

    base_bytes: int
    parameters: int = 0
    seconds: list[float] = field(default_factory=list)
    held_bytes: int = 0
    transient_bytes: int = 0
    graphs: int = 0
    graph_breaks: int = 0
    failure: str | None = None

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)

    @property
    def peak_bytes(self) -> int:
        """What it would take alone."""
        return self.base_bytes + self.held_bytes + self.transient_bytes


class Contender:
    """An adapted model that shares its frozen weights with others, and an optimizer."""

    def __init__(self, base: nn.Module, case: Case, method: Name, ids: torch.Tensor) -> None:
        model: Any = sharing_copy(base)
        if case.checkpointing:
            checkpoint_gradients_(model)
        self._is_plain = method == PLAIN
        self.model = adapt(model, "ours" if method == PLAIN else method, RANK, TARGETS[case.targets]).train()
        if case.backend:
            for block in model.model.layers:
                block.compile(backend=case.backend)
        self._ids = ids
        self._optimizer = torch.optim.AdamW(trainable(self.model), lr=LEARNING_RATE, weight_decay=0.0)

    def step(self) -> None:
        """Forward, backward, AdamW, zero_grad."""
        with without_kernels() if self._is_plain else nullcontext():
            self._step()

    def _step(self) -> None:
        self.model(input_ids=self._ids, labels=self._ids).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def turn(self, steps: int = STEPS_A_TURN) -> float:
        """Mean seconds of a step."""
        if self._ids.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(steps):
                self.step()
            return (time.perf_counter() - began) / steps
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it
        first.record()
        for _ in range(steps):
            self.step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / steps


@contextmanager
def without_kernels() -> Iterator[None]:
    """Have the operators of torch run their plain versions, in this process, on a GPU too."""
    with patch.object(kernels, "take", lambda x, rank: False):
        yield


def measure(base: nn.Module, case: Case, ids: torch.Tensor, rounds: int) -> dict[Name, Figures]:
    """All contenders of a case, interleaved; one that fails is out, and its figures say why."""
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    figures: dict[Name, Figures] = {}
    contenders: dict[Name, Contender] = {}
    for method in case.methods:
        figures[method] = Figures(base_bytes)
        contender = _warm_up(base, case, method, ids, figures[method])
        if contender:
            contenders[method] = contender
        del contender
        _forget_garbage()
    for _ in range(rounds):
        for method, contender in contenders.items():
            figures[method].seconds.append(contender.turn())
    for method, each in figures.items():
        say(f"  {method}: {each.failure or f'{each.median:.4f} s, {each.peak_bytes / 1e9:.2f} GB'}")
    return figures


def _warm_up(base: nn.Module, case: Case, method: Name, ids: torch.Tensor, figures: Figures) -> Contender | None:
    """Make a contender, let it step, and note its memory; None if it failed, or is too slow to take turns."""
    _forget_garbage()
    before, (graphs, breaks) = _allocated(), _compilations()
    try:
        contender = Contender(base, case, method, ids)
        figures.parameters = sum(parameter.numel() for parameter in trainable(contender.model))
        seconds = contender.turn(1)
        is_slow = method == "peft-hra" and seconds >= SLOW_SECONDS
        if not is_slow:
            contender.turn(1)
        _forget_garbage()
        figures.held_bytes = _allocated() - before
        figures.transient_bytes = _transient(contender)
    except Exception as error:  # out of memory, compilers; Triton's are no RuntimeError
        figures.failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        return None
    figures.graphs, figures.graph_breaks = _compilations()[0] - graphs, _compilations()[1] - breaks
    if is_slow:
        figures.seconds.append(seconds)
        return None
    return contender


def _transient(contender: Contender) -> int:
    """How many bytes a step allocates beyond those before it, at its peak."""
    if not torch.cuda.is_available():
        contender.step()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.step()
    return torch.cuda.max_memory_allocated() - before


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _forget_garbage() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _compilations() -> tuple[int, int]:
    """Graphs that torch.compile has made so far in this process, and the breaks between them."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0, 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


HEADER = ["case", "adapter", "parameters", "s a step", "steps/s", "÷ LoRA", "PEFT HRA ÷", "peak GB", "÷ LoRA",
          "beyond weights GB", "÷ LoRA", "graphs", "breaks"]  # fmt: skip


def table(case: Case, figures: Mapping[Name, Figures]) -> list[list[str]]:
    """The rows of one case. "÷ LoRA" divides by LoRA's figure, "PEFT HRA ÷" PEFT HRA's time by this one's."""
    rows = []
    nothing = Figures(0)
    lora, peft = figures.get("lora", nothing), figures.get("peft-hra", nothing)
    for method, each in figures.items():
        row = [case.name, method, f"{each.parameters:,}"]
        if each.failure:
            rows.append([*row, each.failure, *[""] * (len(HEADER) - 4)])
            continue
        beyond, loras = (figure.held_bytes + figure.transient_bytes for figure in (each, lora))
        rows.append(
            [
                *row,
                f"{each.median:.4f}",
                f"{1 / each.median:.2f}",
                _ratio(each.median, lora.median) if lora.seconds else "",
                _ratio(peft.median, each.median) if peft.seconds else "",
                f"{each.peak_bytes / 1e9:.2f}",
                _ratio(each.peak_bytes, lora.peak_bytes),
                f"{beyond / 1e9:.2f}",
                _ratio(beyond, loras),
                *([str(each.graphs), str(each.graph_breaks)] if case.backend else ["", ""]),
            ]
        )
    return rows


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else ""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks of every model; all by default")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no case is begun")
    parser.add_argument("--check", action="store_true", help="one step of everybody at toy size, on any machine")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(check(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    if not torch.cuda.is_available():
        error = DeviceError("this benchmark needs an NVIDIA GPU, and torch sees none", hint="`hra-export doctor`")
        say(f"error: {error}")
        sys.exit(error.exit_code)
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    say(f"on {torch.cuda.get_device_name()}:")
    rounds, budget, layers = arguments.rounds, arguments.budget, arguments.layers
    sys.exit(run_cases(chosen, torch.device("cuda"), rounds=rounds, budget=budget, layers=layers))


def check(device: torch.device) -> int:
    """Let every contender step at toy size; returns the exit code."""
    ids = torch.randint(TOY.vocabulary, (2, 8), device=device)
    figures = measure(build_base(TOY, device), Case("1B", "all"), ids, rounds=1)
    return int(any(each.failure for each in figures.values()))


def run_cases(
    chosen: Sequence[Case], device: torch.device, *, rounds: int, budget: float, layers: int | None = None
) -> int:
    """Measure cases until the budget is spent, and report those done, whatever happens; returns the exit code."""
    machine()  # a package that it misses is better missed before than after
    began = time.monotonic()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    about: dict[str, Any] = {"device": name, "rank": RANK, "batch": BATCH, "tokens": TOKENS, "rounds": rounds,
             "layers": layers, "clocks": clocks()}  # fmt: skip
    rows: list[list[str]] = []
    done: dict[str, dict[Name, Figures]] = {}
    size, base = "", nn.Module()
    try:
        for case in chosen:
            if time.monotonic() - began > budget:
                break
            say(f"{case.name}:")
            if case.size != size:
                base = nn.Module()  # the memory of the last one is needed
                _forget_garbage()
                size, whole = case.size, SIZES[case.size]
                base = build_base(replace(whole, layers=layers or whole.layers), device)
            ids = torch.randint(SIZES[size].vocabulary, (BATCH, TOKENS), device=device)
            Contender(base, Case(size, "qv"), "lora", ids).step()  # libraries take buffers of their own
            done[case.name] = measure(base, case, ids, rounds)
            rows += table(case, done[case.name])
            torch.compiler.reset()
    finally:
        figures = {name: {method: asdict(each) for method, each in case.items()} for name, case in done.items()}
        left_out = [case.name for case in chosen if case.name not in done]
        report("train_gpu", HEADER, rows, {**about, "left_out": left_out, "cases": figures})
    if left_out:
        say(f"left out after {budget:.0f} s: {', '.join(left_out)}")
    return int(any(each.failure for case in done.values() for name, each in case.items() if name != "peft-hra"))


if __name__ == "__main__":
    main()
