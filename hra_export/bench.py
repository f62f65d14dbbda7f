"""Latency and throughput of graphs, and of PyTorch beside them, in one interleaved run.

Inputs, outputs and adapters are bound once, everything is warm, and the contenders take turns: what else the machine
does meanwhile hits all of them. A turn begins with a run that does not count, so that the caches and threads are its
own again.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hra_export.adapter import HraAdapter
from hra_export.contenders import Contender, LiveModel, OpenDirectory
from hra_export.errors import DeviceError, GraphError
from hra_export.filesystem import as_output_error
from hra_export.graph.native import Operator
from hra_export.graph.providers import Provider
from hra_export.workload import Load

TURN_SECONDS = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """What one contender took for one load.

    Attributes:
        seconds: of each run.
        units: tokens of a run, or rows where there are none.
        operator: what ran a graph's reflections, `native` kernels or `inlined` bodies; None where there are none.
    """

    contender: str
    load: Load
    seconds: tuple[float, ...]
    units: int
    operator: str | None = None

    @property
    def median(self) -> float:
        """Seconds a run."""
        return statistics.median(self.seconds)

    @property
    def slow(self) -> float:
        """Seconds that nine of ten runs stay below."""
        return statistics.quantiles(self.seconds, n=10, method="inclusive")[-1]

    @property
    def throughput(self) -> float:
        """Tokens or rows a second."""
        return self.units / self.median


@dataclass(frozen=True)
class BenchReport:
    """Every timing, the first directory's first in each load."""

    provider: Provider
    timings: tuple[Timing, ...]
    notes: tuple[str, ...]

    def of(self, load: str) -> tuple[Timing, ...]:
        """Those of one load."""
        return tuple(timing for timing in self.timings if timing.load.name == load)

    @property
    def loads(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(dict.fromkeys(timing.load.name for timing in self.timings))

    def ratio(self, timing: Timing) -> float:
        """Its median over that of the first directory."""
        return timing.median / self.of(timing.load.name)[0].median

    def to_json(self) -> dict[str, object]:
        """Every figure, single runs included."""
        timings = [
            {
                "contender": each.contender,
                "operator": each.operator,
                **{f"load_{key}" if key == "name" else key: value for key, value in asdict(each.load).items()},
                "median_seconds": each.median,
                "p90_seconds": each.slow,
                "per_second": each.throughput,
                "ratio": self.ratio(each),
                "seconds": list(each.seconds),
            }
            for each in self.timings
        ]
        return {"provider": self.provider, "timings": timings, "notes": list(self.notes)}


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    Attributes:
        directories: outputs of `hra-export onnx`; the first is what the others are compared with.
        base: for a row of PyTorch with live layers; None for none.
        adapters: at work in that row, in order.
        batch, tokens: rows, and tokens of each.
        rounds: turns of each contender.
        threads: of one operator on the CPU; all cores when left out.
        operators: what runs the reflections, as of `GraphSession.open`; each directory that has any is measured with
            every one, in this order.
    """

    directories: Sequence[Path]
    base: Path | None = None
    adapters: Sequence[HraAdapter] = ()
    provider: Provider = "cpu"
    batch: int = 1
    tokens: int = 128
    rounds: int = 10
    threads: int | None = None
    operators: Sequence[Operator] = ("auto",)


def bench(plan: BenchPlan, *, say: Say | None = None) -> BenchReport:
    """Measure every load of the directories' model.

    Args:
        plan: what is measured.
        say: told about each load.

    Raises:
        GraphError: no graph in a directory, a graph that cannot be fed, or graphs of different kinds of model.
        FormatError: the library of operators cannot be used.
        DeviceError: the provider is missing, another one would run some nodes, or there are no kernels to compare.
        CheckpointError, MismatchError: base and adapters do not fit.
    """
    tell = say or (lambda text: None)
    graphs = [each for path in plan.directories for each in _opened(path, plan)]
    loads = graphs[0].loads(plan.batch, plan.tokens)
    if odd := [each.path for each in graphs if each.loads(plan.batch, plan.tokens) != loads]:
        findings = [f"`{graphs[0].path}` and `{path}`" for path in odd]
        raise GraphError("these are graphs of different kinds of model", findings=findings)
    live = LiveModel.load(plan.base, plan.adapters, provider=plan.provider) if plan.base is not None else None
    timings: list[Timing] = []
    notes = list(dict.fromkeys(note for each in graphs for note in each.notes))
    for load in loads:
        feeds = graphs[0].feeds(load)
        told_apart = len(plan.operators) > 1
        contenders = [contender for each in graphs for contender in each.contenders(load, told_apart=told_apart)]
        operators = {each.name: each.operator for each in contenders}
        if live is not None and load.graph != "decoder_model":
            contenders.append(Contender("PyTorch", live.runner(load, feeds)))
        elif live is not None:
            notes.append("PyTorch: the decoder of an encoder-decoder is left out")
        tell(f"{load.name}: {len(contenders)} contenders, {plan.rounds} turns each")
        units = load.batch * (load.tokens if any(name.endswith("input_ids") for name in feeds) else 1)
        taken = take_turns(contenders, rounds=plan.rounds)
        timings += [Timing(name, load, tuple(seconds), units, operators.get(name)) for name, seconds in taken.items()]
    return BenchReport(plan.provider, tuple(timings), tuple(notes))


def _opened(path: Path, plan: BenchPlan) -> Iterator[OpenDirectory]:
    """A directory with everything that can run its reflections, once where it has none."""
    for operator in plan.operators:
        opened = OpenDirectory.open(path, provider=plan.provider, threads=plan.threads, operator=operator)
        if len(plan.operators) > 1 and operator is not None and opened.operator == "inlined":
            reasons = {session.operator.reason for session in opened.sessions.values()}
            hint = "`hra-export build-op` builds a library"
            raise DeviceError("there are no native kernels to compare with", findings=sorted(reasons), hint=hint)
        yield opened
        if opened.operator is None:
            return


def take_turns(
    contenders: Sequence[Contender], *, rounds: int, turn_seconds: float = TURN_SECONDS
) -> dict[str, list[float]]:
    """Seconds of every run that counts, by contender; the order of a round is that of the last one turned around.

    Args:
        contenders: of different names.
        rounds: turns of each.
        turn_seconds: how long a turn is at least, but for the run that does not count.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.run()
    for turn in range(rounds):
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            contender.run()
            began = now = time.perf_counter()
            while now - began < turn_seconds or now == began:
                contender.run()
                before, now = now, time.perf_counter()
                seconds[contender.name].append(now - before)
    return seconds


def plot(report: BenchReport, path: Path) -> None:
    """Medians as bars with a line to the ninth decile, one field a load; the file's ending says the format.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: TID251  its second door: a figure of timings

    loads = report.loads
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(report.timings)), layout="constrained")
    fields = figure.subplots(len(loads), squeeze=False)[:, 0]
    for field, load in zip(fields, loads, strict=True):
        timings = report.of(load)[::-1]
        medians = [1000 * each.median for each in timings]
        beyond = [1000 * each.slow - median for each, median in zip(timings, medians, strict=True)]
        bars = field.barh([each.contender for each in timings], medians, xerr=[[0] * len(medians), beyond])
        field.bar_label(bars, [f"{report.ratio(each):.2f}×" for each in timings], label_type="center", color="white")
        field.set_xlabel(f"{load}, ms")
    with as_output_error(f"write `{path}`"):
        figure.savefig(path)
