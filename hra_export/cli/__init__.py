"""The command line: one file a verb, imported when the verb is used.

Exit codes are those of `hra_export.errors`, plus 2 for usage, 3 for parity that fails, 130 and 143 for interrupts.
"""

import atexit
import os
import signal
import sys
import traceback
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

from hra_export import __version__
from hra_export.cli.console import make_streams_safe, print_error, print_json_error
from hra_export.errors import HraExportError

# verb: (module, one line of help). Listing them imports none.
VERBS = {
    "train": ("hra_export.cli.train", "Train an HRA adapter on a frozen base."),
    "merge": ("hra_export.cli.merge", "Fold adapters into the base weights and write safetensors."),
    "onnx": ("hra_export.cli.onnx", "Write ONNX graphs, folded or with the reflection as an operator."),
    "convert": ("hra_export.cli.convert", "Turn adapters into LoRA, GGUF, ONNX Runtime's files, and into HRA."),
    "compress": ("hra_export.cli.compress", "Fewer reflections for nearly the same rotation."),
    "validate": ("hra_export.cli.validate", "Prove that an output computes what PyTorch computes."),
    "bench": ("hra_export.cli.bench", "Measure how fast graphs run, beside PyTorch."),
    "inspect": ("hra_export.cli.inspect", "Show what an adapter does: targets, ranks, angles."),
    "build-op": ("hra_export.cli.build_op", "Build native kernels for ONNX Runtime, which graphs then use."),
    "doctor": ("hra_export.cli.doctor", "Show versions and devices, and what is missing."),
}


class LazyGroup(click.Group):
    """A group whose verbs are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order a user meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(import_module(VERBS[cmd_name][0]), "command")  # noqa: B009  typed on this line
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of verbs, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hra-export")
def cli() -> None:
    """Train, fold, export, convert and validate Householder Reflection Adaptation (HRA) adapters.

    Example: hra-export merge runs/adapter --base models/base --output merged
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    make_streams_safe()
    try:
        sys.exit(_run(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as error:
        if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(error.code, int):
            _exit_at_once(error.code)
        raise


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        code = cli.main(args=arguments, prog_name="hra-export", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        if as_json:
            print_json_error(type(error).__name__, error.exit_code, error.format_message())
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the output is as it was, or complete", err=True)
        return 130
    except HraExportError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print_error(error, as_json=as_json)
        return error.exit_code
    return code if isinstance(code, int) else 0


def _exit_at_once(code: int) -> NoReturn:
    """End one of several processes without tearing the interpreter down.

    DTensor's caches keep gloo's threads alive after the process group was destroyed, and one of them that drops its
    last tensor while the interpreter shuts down aborts the process: https://github.com/pytorch/pytorch/issues/190489.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    click.echo("terminated; the output is as it was, or complete", err=True)
    raise SystemExit(128 + number)
