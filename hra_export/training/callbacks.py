"""What happens between optimizer steps: measuring, speaking, keeping checkpoints, and stopping in time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hra_export import adapter
from hra_export.errors import HraExportError, NumericalError
from hra_export.training import processes
from hra_export.training.checkpoints import RunDirectory
from hra_export.training.settings import Settings

# Metrics of which less is better.
FALLING = {"loss"}


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps taken.
        steps: of the whole run.
        figures: what was logged at this step: `loss`, `learning_rate`, `angle` in degrees, `eval_loss`, …; empty when
            nothing was.
    """

    step: int
    steps: int
    figures: Mapping[str, float]


def ignore(progress: Progress) -> None:
    """Say nothing."""


def never() -> bool:
    """Go on to the end."""
    return False


@dataclass
class Watch:
    """The decisions between steps, with the little they remember.

    Attributes:
        is_early: early stopping has ended the run, which counts as its end.
    """

    settings: Settings
    directory: RunDirectory
    trainer: Any
    tell: Callable[[Progress], None] = ignore
    should_stop: Callable[[], bool] = never
    is_early: bool = field(default=False, init=False)

    @property
    def metric(self) -> str:
        """The name under which the metric is logged."""
        return f"eval_{self.settings.metric}"

    def before_step(self, state: Any) -> None:
        """Remember the vectors when the coming step will be logged."""
        coming = state.global_step + 1
        if coming in (1, state.max_steps) or coming % self.trainer.args.logging_steps == 0:
            self.trainer.remember_vectors()

    def after_step(self, state: Any, control: Any) -> None:
        """Measure, speak, and stop if asked to."""
        self.trainer.measure_angle()
        control.should_log |= state.global_step == state.max_steps
        self._tell(state, {})
        self._stop_if_asked(control)

    def after_evaluation(self, state: Any, control: Any, metrics: Mapping[str, float]) -> None:
        """Save a new best; stop when there has been none for long."""
        value = metrics[self.metric]
        if not math.isfinite(value):
            raise NumericalError(f"{self.metric} is {value} after step {state.global_step}")
        if state.best_metric is None or self._is_better(value, state.best_metric):
            control.should_save = True
        patience = self.settings.early_stopping
        if patience is not None and self._evaluations_since_best(state) >= patience:
            self.is_early = control.should_save = control.should_training_stop = True
        self._stop_if_asked(control)

    def after_save(self, state: Any) -> None:
        """Check what was saved, mark it whole, and remove what is no longer needed."""
        processes.wait()
        if processes.is_main():
            step = state.global_step
            try:
                adapter.read_adapter(self.directory.at(step))
            except HraExportError as error:
                raise NumericalError(
                    f"the adapter after step {step} cannot be used: {error.message}", findings=error.findings
                ) from error
            self.directory.seal(step, is_last=self.is_ended(state))
            self.directory.rotate(keep=self.settings.save_limit, best=state.best_global_step)

    def is_ended(self, state: Any) -> bool:
        """Whether the run is at its end, and was not only asked to stop."""
        return self.is_early or state.global_step >= state.max_steps

    def after_log(self, state: Any, figures: Mapping[str, float]) -> None:
        """Speak of what was logged."""
        self._tell(state, figures)

    def _stop_if_asked(self, control: Any) -> None:
        if processes.any_of(self.should_stop()):
            control.should_save = control.should_training_stop = True

    def _tell(self, state: Any, figures: Mapping[str, float]) -> None:
        if processes.is_main():
            self.tell(Progress(state.global_step, state.max_steps, figures))

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self.settings.metric in FALLING else value > than

    def _evaluations_since_best(self, state: Any) -> int:
        """Counted in the history, which a resumed run takes over."""
        values = [row[self.metric] for row in state.log_history if self.metric in row]
        best = min(values) if self.settings.metric in FALLING else max(values)
        return len(values) - 1 - values.index(best)


def as_callback(watch: Watch) -> Any:
    """A watch as transformers calls it."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.before_step(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.after_step(state, control)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
            watch.after_evaluation(state, control, metrics)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.after_save(state)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
            watch.after_log(state, dict(logs))

    return Callback()
