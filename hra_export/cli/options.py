"""Options that several verbs share, each defined once."""

import math
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from hra_export.cli.console import make_console

P = ParamSpec("P")
R = TypeVar("R")

DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)


class DeviceWord(click.ParamType[str]):
    """A word that can name a device; whether it is there is seen later, and no matter of usage."""

    name = "device"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word as it is."""
        word = str(value)
        if DEVICE.fullmatch(word) is None:
            self.fail(f"expected auto, cpu, cuda or cuda:N, got {word!r}", param, ctx)
        return word


class OperatorWord(click.ParamType[Path | str]):
    """`auto`, `none`, another word that a verb knows, or a library's file, which is looked at later."""

    name = "operator"

    def __init__(self, *words: str) -> None:
        self.words = ("auto", "none", *words)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """A path where it is none of the words."""
        return str(value) if value in self.words else Path(str(value))


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a finite number, got {value}", ctx, param)
    return value


adapters = click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
adapter = click.argument("adapter", metavar="ADAPTER")
base = click.option(
    "--base", metavar="BASE", help="Model directory, Hub id or .gguf file.  [default: the adapter's own base]"
)
output = click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to write.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace an output that hra-export wrote.")
dry_run = click.option("--dry-run", is_flag=True, help="Print the plan, from headers only, and write nothing.")
device = click.option(
    "--device", type=DeviceWord(), default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
strength = click.option(
    "--strength",
    type=float,
    default=1.0,
    show_default=True,
    callback=_finite,
    help="T: 0 is the base, 1 the adapters, -1 their inverse.",
)
strength_asked = click.option(
    "--strength",
    type=float,
    callback=_finite,
    help="Weights: at which they were merged.  [default: the manifest's, else 1]",
)
interpolation = click.option(
    "--interpolation",
    type=click.Choice(["geodesic", "linear"]),
    default="geodesic",
    show_default=True,
    help="Of --strength: R^T, which stays a rotation and needs an even rank, or W + T (W R - W).",
)
interpolation_asked = click.option(
    "--interpolation",
    type=click.Choice(["geodesic", "linear"]),
    help="Weights: of that strength.  [default: the manifest's, else geodesic]",
)
provider = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where the graph runs.",
)


operator = click.option(
    "--operator",
    metavar="auto|none|FILE",
    type=OperatorWord(),
    default="auto",
    show_default=True,
    help="Library with kernels for the reflections; auto takes the one that is found.",
)


def strength_lines(strength: float, interpolation: str) -> list[str]:
    """What a plan says of the adapters' strength; nothing where they act whole."""
    return [] if strength == 1 else [f"adapters at strength {strength:g}, {interpolation}"]


def talk(command: Callable[P, R]) -> Callable[..., R]:
    """`--json`, `-q`, `-v` and `--debug`, turned into the command's `console`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress.")
    @click.option("-v", "--verbose", count=True, help="More on stderr; twice for every tensor.")
    @click.option("--debug", is_flag=True, help="Show tracebacks of refused input.")
    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        as_json, quiet = bool(kwargs.pop("as_json")), bool(kwargs.pop("quiet"))
        debug, verbose = kwargs.pop("debug"), kwargs.pop("verbose")
        level = 2 if debug or not isinstance(verbose, int) else verbose
        kwargs["console"] = make_console(as_json=as_json, quiet=quiet, verbose=level)
        return command(*args, **kwargs)

    return wrapped
