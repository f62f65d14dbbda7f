"""`hra-export doctor`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hra_export.cli import options
from hra_export.cli.console import Console, size_text, table

if TYPE_CHECKING:
    from hra_export.environment import Environment, Package

INCOMPLETE = 7


@click.command("doctor")
@options.talk
def command(console: Console) -> int:
    """Show versions and devices, and what is missing.

    Ends with exit code 7 when a package of the core is missing or too old. Optional packages are listed with what they
    are for and the command that installs them.

    Example: hra-export doctor --json
    """
    from hra_export.environment import read_environment

    environment = read_environment(os.environ, _folders())
    for warning in environment.warnings():
        console.warn(warning)
    console.result(_text(environment), {"verb": "doctor", **environment.to_json()})
    return 0 if environment.is_complete else INCOMPLETE


def _folders() -> dict[str, Path]:
    """Where this tool and the Hub write."""
    import platformdirs

    hub = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return {
        "here": Path.cwd(),
        "own cache": Path(platformdirs.user_cache_dir("hra-export")),
        "Hub cache": Path(hub).expanduser(),
    }


def _text(environment: "Environment") -> str:
    problems = [f"{package.name} {package.status}: `{package.install}`" for package in environment.problems]
    verdict = f"{len(problems)} problems" if problems else "the core is complete"
    return "\n\n".join(
        [
            table([["core", "installed", "needed", ""], *map(_core_row, environment.core)]),
            table([["optional", "installed", "for", ""], *map(_optional_row, environment.optional)]),
            table(_machine_rows(environment), header=False),
            "\n".join([*problems, verdict]),
        ]
    )


def _core_row(package: "Package") -> list[str]:
    return [package.name, package.installed or "-", package.required or "any", package.status]


def _optional_row(package: "Package") -> list[str]:
    remedy = package.status if package.is_ok else f"{package.status}: {package.install}"
    return [package.name, package.installed or "-", package.purpose, remedy]


def _machine_rows(environment: "Environment") -> list[list[str]]:
    machine, devices = environment.machine, environment.devices
    available = f", {size_text(machine.available_bytes)} available" if machine.available_bytes is not None else ""
    memory = size_text(machine.memory_bytes) + available if machine.memory_bytes is not None else "unknown"
    rows = [["system", machine.system], ["CPU", f"{machine.cores} cores"], ["memory", memory]]
    rows += [["free disk", f"{size_text(free)}, {place}"] for place, free in machine.free_bytes.items()]
    rows += [["CUDA", line] for line in devices.cuda] or [["CUDA", f"none: {devices.cuda_missing}"]]
    rows.append(["ONNX Runtime", ", ".join(devices.providers) or f"none: {devices.providers_missing}"])
    rows.append(["operator", environment.operator.text])
    return rows + [["environment", f"{name}={value}"] for name, value in environment.variables.items()]
