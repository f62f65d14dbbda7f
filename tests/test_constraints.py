"""The tested set: exact, complete, and within the floors."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def pins() -> dict[str, str]:
    """Version by name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def needed(distribution: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> None:
    """Add a distribution and what it needs here to `seen`."""
    seen[distribution] = seen.get(distribution, frozenset()) | extras
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
        if applies and (name not in seen or not wanted <= seen[name]):
            needed(name, wanted, seen)


def test_constraints_pin_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    loose = [line for line in lines if line and not re.fullmatch(r"#.*|[a-z0-9-]+==\d[\w.]*", line)]
    assert not loose


def test_constraints_pin_everything_that_is_installed() -> None:
    seen: dict[str, frozenset[str]] = {}
    needed("hra-export", frozenset({"dev"}), seen)
    assert len(seen) > 50
    assert seen.keys() - pins().keys() == {"hra-export"}


def test_constraints_are_within_the_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    requirements = [Requirement(line) for line in lines if not line.startswith("hra-export")]
    outside = [str(each) for each in requirements if not each.specifier.contains(pins()[canonicalize_name(each.name)])]
    assert not outside
