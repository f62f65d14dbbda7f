"""`hra-export train`."""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hra_export.cli import options
from hra_export.cli.console import Console
from hra_export.cli.interruption import stopping
from hra_export.cli.settings import GroupedCommand, options_of
from hra_export.cli.train_report import Display, plan_data, plan_text, report_data, report_text, show_sample
from hra_export.errors import DeviceError, HraExportError
from hra_export.training.settings import OPTIONS, Settings, read_toml

if TYPE_CHECKING:
    from hra_export.training.loop import TrainPlan

# What the extra `train` installs, by the names they are imported by.
EXTRA = ("accelerate", "datasets", "matplotlib", "peft", "sklearn", "tomli_w", "trl")


class TrainCommand(GroupedCommand):
    """`train`, with the options of its table."""

    table = OPTIONS


@click.command("train", cls=TrainCommand)
@options_of(OPTIONS)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="TOML file with options of these names; the command line wins over it.",
)
@options.dry_run
@options.talk
def command(given: dict[str, object], config: Path | None, dry_run: bool, console: Console) -> None:
    """Train an HRA adapter on a frozen base, in PEFT's layout.

    Rows may hold `messages`, `prompt` and `completion`, plain `text`, or `text` with a `label`. OUTPUT appears when it
    is complete; until then checkpoints lie beside it, and --resume goes on from the last one, to the same adapter.
    Several processes: accelerate launch -m hra_export train ...

    Example: hra-export train --base models/base --data rows.jsonl --eval-split 0.05 --output runs/adapter
    """
    settings = _settings(given, config)
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise DeviceError(f"training needs {', '.join(missing)}", hint="pip install 'hra-export[train]'")
    from hra_export.training.silence import quiet_libraries

    with quiet_libraries():
        _train(_on_device(settings), dry_run=dry_run, console=console)


def _settings(given: Mapping[str, object], config: Path | None) -> Settings:
    try:
        from_file = {} if config is None else read_toml(config)
        return Settings.from_mapping({**from_file, **given})
    except ValueError as error:
        where = f" (in `{config}` or on the command line)" if config is not None else ""
        raise click.UsageError(f"options{where}:\n{error}") from error


def _on_device(settings: Settings) -> Settings:
    """Show torch only the GPU that was named: transformers takes the first it sees."""
    if not settings.device.startswith("cuda"):
        return settings
    from hra_export.cli.devices import resolve_device

    number = resolve_device(settings.device).index
    if number is None:
        return settings
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    return replace(settings, device="cuda")


def _train(settings: Settings, *, dry_run: bool, console: Console) -> None:
    from hra_export.training import processes
    from hra_export.training.preparation import check_trackers

    try:
        check_trackers(settings.report_to)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    processes.join(settings.device)
    try:
        if processes.is_main():
            _speak(settings, dry_run=dry_run, console=console)
        else:
            _work(settings, dry_run=dry_run)
    finally:
        processes.leave()


def _speak(settings: Settings, *, dry_run: bool, console: Console) -> None:
    """The part of the main process."""
    from hra_export.training.loop import plan_training, train

    base = _resolve_base(settings, console)

    def note(text: str) -> None:
        console.say(f"note: {text}")

    if dry_run:
        plan = plan_training(settings, base=base, note=note)
        show_sample(plan, console)
        console.result(plan_text(plan), {"verb": "train", "dry_run": True, **plan_data(plan)})
        return
    with stopping() as stop, Display(console) as display:

        def begin(plan: "TrainPlan") -> None:
            display.begin(plan)
            stop.is_armed = True

        report = train(settings, base=base, tell=display.tell, note=note, begin=begin, should_stop=stop.is_asked)
    if report.published is None:
        console.warn(f"stopped after step {report.stopped_at}; the same command with `--resume` goes on from there")
        sys.exit(stop.exit_code)
    console.result(report_text(report, report.published), {"verb": "train", **report_data(report, report.published)})


def _work(settings: Settings, *, dry_run: bool) -> None:
    """The part of any other process: the same work, and not a word."""
    from hra_export.training.loop import plan_training, train

    try:
        base = _resolve_base(settings, Console(quiet=True))
        if dry_run:
            plan_training(settings, base=base)
            return
        with stopping() as stop:
            stop.is_armed = True
            report = train(settings, base=base, should_stop=stop.is_asked)
        if report.stopped_at is not None:
            sys.exit(stop.exit_code)
    except HraExportError as error:
        sys.exit(error.exit_code)


def _resolve_base(settings: Settings, console: Console) -> Path:
    """The main process fetches what must be fetched; the others find it then."""
    from hra_export.cli.sources import resolve_base
    from hra_export.training import processes

    processes.from_main(lambda: resolve_base(settings.base, [], console))
    return resolve_base(settings.base, [], Console(quiet=True))
