"""A table of options from a dataclass: what `--help`, a TOML file and the checks need to know about each field.

Standard library only.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


@dataclass(frozen=True)
class About:
    """What stands beside a field's type, in `Annotated`.

    Attributes:
        help: one line for `--help`.
        group: the heading in `--help`.
        low: the smallest number allowed.
        high: the largest number allowed.
        shown_default: what `--help` says of a default that depends on something.
        may_be_infinite: `inf` is a number here.
        is_control: it steers this call and is no property of the run; not written back.
        may_change: an interrupted run may be taken up with another value, and ends with the same adapter.
    """

    help: str
    group: str
    low: float | None = None
    high: float | None = None
    shown_default: str | None = None
    may_be_infinite: bool = False
    is_control: bool = False
    may_change: bool = False


@dataclass(frozen=True)
class Option:
    """A field as the outside sees it.

    Attributes:
        attribute: the field's name.
        kind: the type of a value, or of an item where several are allowed.
        is_many: several values are allowed.
        is_optional: None is allowed.
        choices: the words that are allowed; empty when any is.
        is_required: it has no default.
        default: None for a required option, too.
    """

    attribute: str
    kind: type
    is_many: bool
    is_optional: bool
    choices: tuple[str, ...]
    is_required: bool
    default: Any
    about: About

    @property
    def name(self) -> str:
        """As it is typed: in kebab-case."""
        return self.attribute.replace("_", "-")

    def parse(self, value: object) -> Any:
        """A checked value of the field's own type.

        Raises:
            ValueError: wrong type, word or size.
        """
        if value is None and self.is_optional:
            return None
        if self.is_many:
            parts = value if isinstance(value, list | tuple) else [value]
            return tuple(self._parse_one(part) for part in _split(parts))
        return self._parse_one(value)

    def plain(self, value: object) -> object:
        """The value in the types that TOML has."""
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) else value

    def _parse_one(self, value: object) -> object:
        parsed = self._convert(value)
        if parsed is None:
            raise ValueError(f"expected {_KIND_NAMES[self.kind]}, got {value!r}")
        if self.choices and parsed not in self.choices:
            raise ValueError(f"expected one of {', '.join(self.choices)}, got {value!r}")
        if isinstance(parsed, int | float) and not isinstance(parsed, bool):
            self._check_number(parsed)
        if isinstance(parsed, str) and not parsed:
            raise ValueError("expected a text, got an empty one")
        return parsed

    def _check_number(self, number: float) -> None:
        low, high = self.about.low, self.about.high
        if math.isnan(number) or (math.isinf(number) and not self.about.may_be_infinite):
            raise ValueError(f"expected a finite number, got {number}")
        if (low is not None and number < low) or (high is not None and number > high):
            expected = f"at least {low:g}" if high is None else f"{low or 0:g} to {high:g}"
            raise ValueError(f"expected {expected}, got {number:g}")

    def _convert(self, value: object) -> object:
        """The value in the option's type; None when it is of another."""
        if self.kind is bool or isinstance(value, bool):
            return value if self.kind is bool and isinstance(value, bool) else None
        if self.kind is float and isinstance(value, int | float):
            return float(value)
        if self.kind is Path and isinstance(value, str):
            return Path(value)
        if self.kind is int and isinstance(value, str) and self.is_many:  # out of a list with commas
            return int(value) if value.lstrip("-").isdecimal() else None
        return value if isinstance(value, self.kind) else None


def is_pattern(name: str) -> bool:
    """Whether a module name is meant as a regular expression; a dot alone is part of many names."""
    return any(character in name for character in "*+?()[]{}|^$\\")


def _split(parts: list[object] | tuple[object, ...]) -> Iterator[object]:
    """Take lists with commas apart, but no regular expression."""
    for part in parts:
        if isinstance(part, str) and "," in part and not is_pattern(part):
            yield from (word.strip() for word in part.split(",") if word.strip())
        else:
            yield part


def make_table(cls: type) -> Mapping[str, Option]:
    """The options of a dataclass whose fields are all `Annotated` with an `About`, by name."""
    hints = get_type_hints(cls, include_extras=True)
    options = []
    for item in fields(cls):
        hint, about = get_args(hints[item.name])
        is_optional = get_origin(hint) in (Union, UnionType)
        if is_optional:
            (hint,) = (part for part in get_args(hint) if part is not NoneType)
        is_many = get_origin(hint) is tuple
        if is_many:
            hint = get_args(hint)[0]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        options.append(
            Option(
                attribute=item.name,
                kind=str if choices else hint,
                is_many=is_many,
                is_optional=is_optional,
                choices=choices,
                is_required=item.default is MISSING,
                default=None if item.default is MISSING else item.default,
                about=about,
            )
        )
    return {option.name: option for option in options}


def parse_mapping(table: Mapping[str, Option], values: Mapping[str, object]) -> dict[str, Any]:
    """Field names and checked values, from option names and values as a TOML file or the command line has them.

    Raises:
        ValueError: unknown, missing or wrong options; a line for each.
    """
    findings = [_unknown(name, table) for name in values if name not in table]
    parsed: dict[str, Any] = {}
    for option in table.values():
        value = values.get(option.name)
        if option.name not in values or (value is None and option.is_required):
            findings += [f"{option.name}: missing"] if option.is_required else []
            continue
        try:
            parsed[option.attribute] = option.parse(value)
        except ValueError as error:
            findings.append(f"{option.name}: {error}")
    if findings:
        raise ValueError("\n".join(findings))
    return parsed


def _unknown(name: str, table: Mapping[str, Option]) -> str:
    close = get_close_matches(name, table, n=1)
    return f"{name}: no option of this name" + (f"; did you mean `{close[0]}`?" if close else "")
