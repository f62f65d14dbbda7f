"""A comparison of training runs: the search for a learning rate, several seeds, a table, JSON and a picture.

`sentiment.py` and `compare_orders.py` share this. Every run is a process of its own, because its peak memory is the
process's; its result is kept in a file, so that an interrupted comparison goes on where it stopped.

Limits: a kept result does not know the code and the data it came from; delete the folder after changing either.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
import torch
from demo import say
from matplotlib.figure import Figure

METHODS = {"hra": "HRA", "lora": "LoRA", "full": "full fine-tuning", "head": "head alone"}
COLORS = {"hra": "#0072b2", "lora": "#d55e00", "full": "#009e73", "head": "#777777"}  # told apart by the color-blind
PACKAGES = ("hra-export", "torch", "transformers", "peft")
EXTRA_RATES = 2  # how many values a search may add to its grid


@dataclass(frozen=True)
class Run:
    """One training run: all that makes it differ from another of the same script.

    Attributes:
        head_rate: learning rate of the head, the same for every method; 0 where there is no head.
        bf16: multiply in bfloat16 under autocast; the weights stay float32.
    """

    method: str
    learning_rate: float
    seed: int
    steps: int
    rows_per_step: int
    head_rate: float
    bf16: bool

    @property
    def file(self) -> str:
        """The name its result is kept under; two different runs have different names."""
        rates = f"{self.learning_rate:g}-head-{self.head_rate:g}"
        precision = "bf16" if self.bf16 else "fp32"
        return f"{self.method}-{rates}-{self.steps}x{self.rows_per_step}-{precision}-seed{self.seed}.json"


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        trainable: parameters that train, those of the head apart.
        head: parameters of the head.
        seconds: of the training steps; evaluations, loading and the start of Python are not in it.
        peak_bytes: the most resident memory of the process, its evaluations included.
        curve: (step, score of the development rows) in the course of training.
        dev_loss: mean loss of the development rows after the last step; a search minimizes it.
        test: scores of the test rows, by name.
    """

    run: Run
    trainable: int
    head: int
    seconds: float
    peak_bytes: int
    curve: tuple[tuple[int, float], ...]
    dev_loss: float
    test: dict[str, float]


@dataclass(frozen=True)
class Score:
    """A score by its name in `Result.test`, as the table and the picture call it, and whether it is a share."""

    key: str
    title: str
    is_share: bool = True

    def text(self, values: Sequence[float]) -> str:
        """Mean and, of several values, standard deviation."""
        scale, unit = (100, "%") if self.is_share else (1, "")
        spread = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{scale * statistics.mean(values):.1f}{spread}{unit}"


@dataclass(frozen=True)
class Outcome:
    """One method: the rates that were tried with their development losses, and a result for each seed at the best."""

    searched: dict[float, float]
    results: tuple[Result, ...]


def parse_options(description: str, output: Path, steps: int, rows_per_step: int) -> argparse.Namespace:
    """The command line of a comparison."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=output, help="where the results go")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each method; with 1, no learning rate is searched"
    )
    parser.add_argument("--steps", type=int, default=steps, help="training steps of every run")
    parser.add_argument("--rows-per-step", type=int, default=rows_per_step, help="rows of every step")
    cache = Path(platformdirs.user_cache_dir("hra-export"))
    parser.add_argument("--cache", type=Path, default=cache, help="where what was fetched is kept between runs")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)  # a process of ours, for one run
    options = parser.parse_args()
    if min(options.seeds, options.steps, options.rows_per_step) < 1:
        parser.error("--seeds, --steps and --rows-per-step must be at least 1")
    return options


def compare(
    grids: Mapping[str, Sequence[float]], first: Run, seeds: int, execute: Callable[[Run], Result]
) -> dict[str, Outcome]:
    """Search each method's learning rate with the first seed, then run the best with every seed.

    Args:
        grids: ascending learning rates of each method. With one seed, or one rate, the middle one is taken.
        first: what all runs share; its method, rate and seed are replaced.
        seeds: 0, 1, … of them.
        execute: trains and tests one run. A run is asked for again, so it had better be kept.
    """
    outcomes = {}
    for method, grid in grids.items():
        run = replace(first, method=method, seed=0)
        if seeds == 1 or len(grid) == 1:
            rate = grid[len(grid) // 2]
            searched: dict[float, float] = {}
        else:
            searched = search(grid, partial(dev_loss, execute, run))
            rate = min(searched, key=lambda each: searched[each])
        runs = [replace(run, learning_rate=rate, seed=seed) for seed in range(seeds)]
        outcomes[method] = Outcome(searched, tuple(execute(each) for each in runs))
    return outcomes


def dev_loss(execute: Callable[[Run], Result], run: Run, rate: float) -> float:
    """What a search asks: the loss of a run at another rate."""
    return execute(replace(run, learning_rate=rate)).dev_loss


def search(grid: Sequence[float], loss: Callable[[float], float]) -> dict[float, float]:
    """Losses of the rates of a grid, and of up to `EXTRA_RATES` beyond it while the best lies at an end.

    Args:
        grid: two or more rates, each a fixed multiple of the one before.
        loss: trains at a rate. NaN, from a run that diverged, loses against everything.
    """
    factor = grid[1] / grid[0]

    def finite_loss(rate: float) -> float:
        value = loss(rate)
        return value if value == value else float("inf")

    losses = {rate: finite_loss(rate) for rate in grid}
    for _ in range(EXTRA_RATES):
        best = min(losses, key=lambda rate: losses[rate])
        if best == min(losses):
            beyond = best / factor
        elif best == max(losses):
            beyond = best * factor
        else:
            break
        beyond = float(f"{beyond:.3g}")
        losses[beyond] = finite_loss(beyond)
    return dict(sorted(losses.items()))


def kept(script: Path, output: Path, arguments: Sequence[str], run: Run) -> Result:
    """The result of a run: read where it is kept, or else from a process of the script.

    Raises:
        SystemExit: the process failed; what it said is on stderr.
    """
    path = output / "runs" / run.file
    if not path.exists():
        started = time.perf_counter()
        python = [sys.executable, "-W", "ignore::FutureWarning"]  # transformers asks itself for what it deprecates
        command = [*python, str(script), "--output", str(output), *arguments, "--run", json.dumps(asdict(run))]
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if code:
            sys.exit(code)
        say(f"  {run.file.removesuffix('.json')}: {time.perf_counter() - started:.0f} s")
    return read_result(path)


def keep(result: Result, output: Path) -> None:
    """Write a result where `kept` finds it; the file appears whole."""
    path = output / "runs" / result.run.file
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps(asdict(result)), encoding="utf-8")
    staged.replace(path)


def read_result(path: Path) -> Result:
    """A result that was kept."""
    data = json.loads(path.read_text(encoding="utf-8"))
    curve = tuple((step, score) for step, score in data.pop("curve"))
    return Result(run=Run(**data.pop("run")), curve=curve, **data)


def peak_bytes() -> int:
    """The most resident memory this process had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(outcomes: Mapping[str, Outcome], scores: Sequence[Score]) -> str:
    """One line a method."""
    header = ["method", "trainable", "head", "learning rate", *(s.title for s in scores), "a run", "peak memory"]
    rows = [header, []]
    for method, outcome in outcomes.items():
        results = outcome.results
        first = results[0]
        rows.append(
            [
                METHODS[method],
                f"{first.trainable:,}",
                f"{first.head:,}",
                f"{first.run.learning_rate:g}",
                *(score.text([result.test[score.key] for result in results]) for score in scores),
                f"{statistics.median(result.seconds for result in results):.0f} s",
                f"{max(result.peak_bytes for result in results) / 1e9:.2f} GB",
            ]
        )
    widths = [max(len(row[i]) for row in rows if row) for i in range(len(header))]
    rows[1] = ["-" * width for width in widths]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def write_results(outcomes: Mapping[str, Outcome], path: Path, **about: Any) -> None:
    """Every figure of every run, and what it was taken on."""
    methods = {
        method: {
            "searched": [
                {"learning_rate": rate, "dev_loss": loss if math.isfinite(loss) else None}
                for rate, loss in outcome.searched.items()
            ],
            "results": [asdict(result) for result in outcome.results],
        }
        for method, outcome in outcomes.items()
    }
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    text = json.dumps({**about, "machine": machine, "methods": methods}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def draw(outcomes: Mapping[str, Outcome], path: Path, *, curve: Score, test: Score, title: str) -> None:
    """Two panels: the development score against the steps, a band over the seeds; every seed's test score as a dot."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (method, outcome) in enumerate(outcomes.items()):
        color = COLORS[method]
        steps = [step for step, _ in outcome.results[0].curve]
        columns = list(zip(*([percent(curve, y) for _, y in r.curve] for r in outcome.results), strict=True))
        left.plot(steps, [statistics.mean(c) for c in columns], color=color, marker=".", label=METHODS[method])
        left.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, lw=0)
        values = [percent(test, result.test[test.key]) for result in outcome.results]
        right.plot([place] * len(values), values, "o", color=color, alpha=0.7)
        right.hlines(statistics.mean(values), place - 0.25, place + 0.25, color=color)
    left.set(xlabel="step", ylabel=axis_label(curve))
    left.legend(fontsize=8, frameon=False)
    right.set_xticks(range(len(outcomes)), [METHODS[method].replace(" ", "\n") for method in outcomes])
    right.set(ylabel=axis_label(test), xlim=(-0.6, len(outcomes) - 0.4))
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def percent(score: Score, value: float) -> float:
    """A score as the picture shows it."""
    return 100 * value if score.is_share else value


def axis_label(score: Score) -> str:
    """The name of a score, and its unit."""
    return f"{score.title}, %" if score.is_share else score.title
