"""What `hra-export train` shows: the plan with one row, the progress, the report."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from hra_export.cli.console import Console, size_text

if TYPE_CHECKING:
    from hra_export.training.callbacks import Progress
    from hra_export.training.loop import TrainPlan, TrainReport
    from hra_export.training.publishing import Published

# Figures that are shown: word and format.
SHOWN = {
    "loss": ("loss", ".4f"),
    "eval_loss": ("held-out loss", ".4f"),
    "eval_accuracy": ("accuracy", ".3f"),
    "eval_f1": ("macro F1", ".3f"),
    "eval_matthews": ("Matthews", ".3f"),
    "angle": ("degrees a step", ".2f"),
}
SAMPLE_CHARACTERS = 600


class Display:
    """The progress of a run on a terminal, and its evaluations without one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._held = ExitStack()
        self._update: Callable[[int, str], bool] = lambda step, text: False
        self._figures: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def begin(self, plan: "TrainPlan") -> None:
        """Show the plan, then the bar."""
        for line in _plan_lines(plan):
            self._console.say(line)
        show_sample(plan, self._console)
        self._update = self._held.enter_context(self._console.steps_bar("train", plan.steps))

    def tell(self, progress: "Progress") -> None:
        """Move the bar; without one, say what was evaluated."""
        self._figures |= progress.figures
        text = _figures_text(self._figures)
        is_shown = self._update(progress.step, text)
        if not is_shown and "eval_loss" in progress.figures:
            self._console.say(f"step {progress.step} of {progress.steps}: {text}")


def _figures_text(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{word} {figures[key]:{form}}" for key, (word, form) in SHOWN.items() if key in figures)


def show_sample(plan: "TrainPlan", console: Console) -> None:
    """One row with its mask."""
    console.say("one row; what stands in [[ ]] is read, the rest is learned:")
    console.say_masked([(_shortened(part.text), part.is_learned) for part in plan.sample])


def _shortened(text: str) -> str:
    half = SAMPLE_CHARACTERS // 2
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _plan_lines(plan: "TrainPlan") -> list[str]:
    settings = plan.settings
    saved = f", {_listed(plan.saved_modules)} whole" if plan.saved_modules else ""
    chains = f"{len(plan.targets)} chains of rank {settings.rank}{saved}"
    parameters = f"{plan.trainable:,} of {plan.total:,} parameters are trained ({plan.trainable / plan.total:.2%})"
    packed = f" packed into {plan.rows_used:,}" if settings.packing else ""
    unit = "tokens" if settings.task == "causal-lm" else "labels"
    rows = f"{plan.rows:,} rows{packed} with {plan.learned:,} {unit} to learn, {plan.held_out:,} rows held out"
    steps = f"{plan.steps:,} steps at a learning rate of {settings.learning_rate:g}"
    return [f"{chains}: {parameters}", f"{rows}; {steps}"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def plan_text(plan: "TrainPlan") -> str:
    """What would be done."""
    return "\n".join([*_plan_lines(plan), f"would write `{plan.settings.output}`"])


def plan_data(plan: "TrainPlan") -> dict[str, object]:
    """The same as one JSON object."""
    return {
        # JSON has no infinity
        "settings": {name: "inf" if value == math.inf else value for name, value in plan.settings.to_mapping().items()},
        "targets": list(plan.targets),
        "saved_modules": list(plan.saved_modules),
        "trainable_parameters": plan.trainable,
        "parameters": plan.total,
        "rows": plan.rows,
        "sequences": plan.rows_used,
        "held_out": plan.held_out,
        "learned": plan.learned,
        "steps": plan.steps,
        "sample": [{"text": part.text, "is_learned": part.is_learned} for part in plan.sample],
    }


def report_data(report: "TrainReport", published: "Published") -> dict[str, object]:
    """The same as one JSON object."""
    return {
        **plan_data(report.plan),
        "output": str(report.plan.settings.output),
        "adapter_digest": published.digest,
        "step": published.step,
        "steps_taken": published.steps,
        "resumed_from": report.resumed_from,
        "loss": published.final_loss,
        "figures": dict(published.figures),
        "seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
    }


def report_text(report: "TrainReport", published: "Published") -> str:
    """What was done, what came out, and where it is."""
    settings = report.plan.settings
    since = f" from step {report.resumed_from}" if report.resumed_from else ""
    chains = f"{published.chains} chains of rank {settings.rank} in {published.steps:,} steps{since}"
    lines = [f"trained {chains}, {report.seconds:.0f} s, {size_text(report.peak_bytes)} of memory at most"]
    if published.final_loss is not None:
        best = f"; step {published.step} is published: {_figures_text(published.figures)}" if published.figures else ""
        lines.append(f"loss {published.final_loss:.4f} at the end{best}")
    lines.append(f"wrote `{settings.output}`")
    return "\n".join(lines)
