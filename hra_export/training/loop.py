"""Train an HRA adapter: check, run or go on, publish. `hra-export train` calls this; so may a script.

    report = train(Settings(base="models/base", data="rows.jsonl", output=Path("runs/a")))

The output appears when it is complete. Until then, checkpoints lie beside it, and `Settings(..., resume=True)` goes on
from the last whole one, to the same adapter.

Changes torch's global state as transformers' `Trainer` does: it sets seeds. Under `accelerate launch` every process
calls `train`, or `plan_training`; the main one writes.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hra_export import publish
from hra_export.errors import NumericalError
from hra_export.training import processes
from hra_export.training.callbacks import Progress, Watch, as_callback, ignore, never
from hra_export.training.checkpoints import RunDirectory
from hra_export.training.preparation import Note, Prepared, prepare
from hra_export.training.publishing import Published, is_published, publish_adapter
from hra_export.training.samples import Segment
from hra_export.training.settings import Settings


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do.

    Attributes:
        settings: resolved: every default worked out.
        targets: module paths that carry a chain.
        saved_modules: modules that are trained whole.
        trainable: number of parameters that are trained.
        total: number of parameters in all.
        rows: to train on.
        rows_used: sequences they make; fewer when packed or cut.
        held_out: rows to evaluate on.
        learned: tokens, or labels, that count in the loss of one pass.
        steps: optimizer steps.
        sample: one row with what is learned of it.
    """

    settings: Settings
    targets: tuple[str, ...]
    saved_modules: tuple[str, ...]
    trainable: int
    total: int
    rows: int
    rows_used: int
    held_out: int
    learned: int
    steps: int
    sample: tuple[Segment, ...]


@dataclass(frozen=True)
class TrainReport:
    """What a run did.

    Attributes:
        plan: what it set out to do.
        published: what lies at the output; None when the run was stopped before, and in processes that do not write.
        stopped_at: the step whose checkpoint a stopped run left.
        resumed_from: the step it went on from, if it did.
        seconds: from the first step of this call to the last.
        peak_bytes: of memory: of the GPU where one was used, else of the process.
    """

    plan: TrainPlan
    published: Published | None
    stopped_at: int | None
    resumed_from: int | None
    seconds: float
    peak_bytes: int


def plan_training(settings: Settings, *, base: Path | None = None, note: Note = lambda _: None) -> TrainPlan:
    """Check everything that can be checked without the weights of the base, and write nothing.

    Args:
        settings: the run's.
        base: directory of the base; left out, it is `settings.base`.
        note: told what was decided, in the main process.

    Raises:
        HraExportError: anything that is wrong.
        ValueError: settings that contradict each other.
    """
    settings.check()
    processes.join(settings.device)
    root = base or Path(settings.base).expanduser()
    processes.from_main(lambda: _check_output(settings, root))
    heard = note if processes.is_main() else lambda _: None
    with tempfile.TemporaryDirectory() as folder:
        cache, run = Path(folder, "data"), Path(folder, "run")
        return _plan(processes.together(lambda: prepare(settings, root, cache, run, has_weights=False, note=heard)))


def train(
    settings: Settings,
    *,
    base: Path | None = None,
    tell: Callable[[Progress], None] = ignore,
    note: Note = lambda _: None,
    begin: Callable[[TrainPlan], None] = lambda _: None,
    should_stop: Callable[[], bool] = never,
) -> TrainReport:
    """Train, or go on with, an adapter, and publish it.

    Args:
        settings: the run's.
        base: directory of the base; left out, it is `settings.base`.
        tell: told after every step, in the main process.
        note: told what was decided, in the main process.
        begin: told the plan before the first step, in the main process.
        should_stop: asked after every step; when it says yes, a checkpoint is saved and the run ends.

    Raises:
        HraExportError: anything that is wrong; nothing is left behind but whole checkpoints.
        ValueError: settings that contradict each other.
    """
    settings.check()
    processes.join(settings.device)
    root = base or Path(settings.base).expanduser()
    directory = RunDirectory.of(settings.output)
    processes.from_main(lambda: _make_way(settings, directory, root))
    speaks = processes.is_main()
    with _held(directory, settings):
        heard = note if speaks else lambda _: None
        prepared = processes.together(
            lambda: prepare(settings, root, directory.cache, directory.path, has_weights=True, note=heard)
        )
        record = prepared.record()
        start, is_ended = processes.from_main(lambda: _start(directory, settings, record, note))
        plan = _plan(prepared)
        if speaks:
            begin(plan)
        seconds = 0.0
        if not is_ended:
            watch = Watch(prepared.settings, directory, prepared.trainer, tell, should_stop)
            seconds = _run(prepared, watch, start)
            is_ended = watch.is_ended(prepared.trainer.state)
        published: list[Published] = []
        if is_ended:
            processes.from_main(lambda: published.append(_publish(prepared, directory, record)))
        return TrainReport(
            plan=plan,
            published=published[0] if published else None,
            stopped_at=None if is_ended else prepared.trainer.state.global_step,
            resumed_from=start,
            seconds=seconds,
            peak_bytes=_peak_bytes(prepared.trainer.args.device),
        )


def _inputs(settings: Settings, base: Path) -> list[Path]:
    files = [Path(name).expanduser() for name in (settings.data, settings.eval_data) if name]
    return [base, *(path for path in files if path.exists())]


def _make_way(settings: Settings, directory: RunDirectory, base: Path) -> None:
    """Refuse an output that cannot be written, before any work; clean up after a run that was published already."""
    if is_published(directory):
        directory.remove()
    _check_output(settings, base)


def _check_output(settings: Settings, base: Path) -> None:
    publish.check_output(settings.output, overwrite=settings.overwrite, protected=_inputs(settings, base))


@contextmanager
def _held(directory: RunDirectory, settings: Settings) -> Iterator[None]:
    """The main process holds the run's directory."""
    with ExitStack() as held:

        def hold() -> None:
            held.enter_context(directory.held(resume=settings.resume, overwrite=settings.overwrite))

        processes.from_main(hold)
        yield


def _start(directory: RunDirectory, settings: Settings, record: dict[str, Any], note: Note) -> tuple[int | None, bool]:
    """The step to go on from, None at the beginning; and whether only publishing is left."""
    last = directory.last()
    if last is None or not settings.resume:
        if settings.resume:
            note("there is no checkpoint to go on from: starting at the beginning")
        directory.begin(record)
        return None, False
    for text in directory.check_same(record):
        note(f"{text}: the last digits may differ")
    return last.step, last.is_last


def _run(prepared: Prepared, watch: Watch, start: int | None) -> float:
    """Take the steps; the seconds they took."""
    from transformers import PrinterCallback

    trainer = prepared.trainer
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.add_callback(as_callback(watch))
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=None if start is None else str(watch.directory.at(start)))
    except NumericalError as error:
        last = watch.directory.last()
        kept = f"; `{last.path}` is whole, and an adapter as it is" if last is not None else ""
        raise NumericalError(
            error.message,
            findings=error.findings,
            hint=f"start over with a smaller `--learning-rate`, or with `--dtype float32`{kept}",
        ) from error
    return time.perf_counter() - began


def _publish(prepared: Prepared, directory: RunDirectory, record: dict[str, Any]) -> Published:
    published = publish_adapter(directory, prepared.settings, record, prepared.tokenizer, targets=prepared.base.targets)
    directory.remove()
    return published


def _plan(prepared: Prepared) -> TrainPlan:
    rows = prepared.rows
    return TrainPlan(
        settings=prepared.settings,
        targets=prepared.base.targets,
        saved_modules=prepared.base.saved_modules,
        trainable=prepared.base.trainable,
        total=sum(parameter.numel() for parameter in prepared.base.model.parameters()),
        rows=len(rows.train),
        rows_used=prepared.rows_used,
        held_out=0 if rows.held_out is None else len(rows.held_out),
        learned=prepared.learned,
        steps=prepared.steps,
        sample=prepared.sample,
    )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
