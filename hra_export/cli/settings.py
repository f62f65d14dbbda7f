"""Options of the command line made from the table of `hra_export.training.settings`, shown in its groups."""

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from hra_export.training.options import Option

P = ParamSpec("P")
R = TypeVar("R")

OTHERS = "This call"
KINDS: Mapping[type, click.ParamType[Any]] = {
    int: click.INT,
    float: click.FLOAT,
    str: click.STRING,
    Path: click.STRING,
}
SHORT = {"output": "-o"}


class GroupedCommand(click.Command):
    """A command that lists its options under the headings of its table."""

    table: Mapping[str, Option] = {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a group, in the table's order; what is in no table comes last."""
        sections: dict[str, list[tuple[str, str]]] = {option.about.group: [] for option in self.table.values()}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                option = self.table.get((parameter.name or "").replace("_", "-"))
                sections.setdefault(option.about.group if option else OTHERS, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def options_of(table: Mapping[str, Option]) -> Callable[[Callable[P, R]], Callable[..., R]]:
    """Add an option for each row of the table; the command gets those that were given, by name, as `given`."""

    def decorate(command: Callable[P, R]) -> Callable[..., R]:
        @wraps(command)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            values = {option.name: kwargs.pop(option.attribute) for option in table.values()}
            kwargs["given"] = {name: value for name, value in values.items() if value not in (None, ())}
            return command(*args, **kwargs)

        decorated: Callable[..., R] = wrapped
        for option in reversed(list(table.values())):
            decorated = _click_option(option)(decorated)
        return decorated

    return decorate


def _click_option(option: Option) -> Callable[[Callable[..., R]], Callable[..., R]]:
    flags = [f"--{option.name}", option.attribute, *([SHORT[option.name]] if option.name in SHORT else [])]
    help_ = f"{option.about.help}{_default_text(option)}"
    if option.kind is bool:
        flags[0] = f"--{option.name}" if option.about.is_control else f"--{option.name}/--no-{option.name}"
        return click.option(*flags, is_flag=True, default=None, help=help_)
    kind: click.ParamType[Any] = KINDS[str if option.is_many else option.kind]
    if option.choices:
        kind = click.Choice(option.choices)
    return click.option(*flags, type=kind, multiple=option.is_many, default=None, help=help_)


def _default_text(option: Option) -> str:
    if option.is_required:
        return "  [required, here or in the file]"
    if option.about.shown_default is not None:
        return f"  [default: {option.about.shown_default}]"
    if option.default in (None, (), False):
        return ""
    if option.default is True:
        return "  [default: on]"
    default = ", ".join(map(str, option.default)) if option.is_many else f"{option.default}"
    return f"  [default: {default}]"
