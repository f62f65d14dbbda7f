"""What this machine has: packages and their floors, devices, memory, disk. Reads only; nothing is fixed.

Which packages are needed, and from which version on, is read from the installed package's own metadata, so there is no
second list to keep. An onnxruntime build under another name counts as onnxruntime: all of them install one module.
"""

import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from hra_export.errors import FormatError
from hra_export.kernels.operator_library import REBUILD, VARIABLE, OperatorLibrary, find

logger = logging.getLogger(__name__)

DISTRIBUTION = "hra-export"
# Extras that are for working on hra-export itself, not for using it.
DEVELOPMENT_EXTRAS = ("dev",)
# Distributions that install the module `onnxruntime`.
ONNXRUNTIME_BUILDS = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-directml", "onnxruntime-openvino")
# Beside onnxruntime-gpu only the CUDA build works, also on CPUs; macOS has neither.
ONNXRUNTIME_GENAI = "onnxruntime-genai" if sys.platform == "darwin" else "onnxruntime-genai-cuda"
# What is used where it is there, and what for.
OPTIONAL = {
    "gguf": "a .gguf file as base",
    ONNXRUNTIME_GENAI: "directories for ONNX Runtime GenAI",
    "peft": "training, and PEFT as the judge in tests",
    "trl": "training",
    "accelerate": "training",
    "datasets": "training data",
    "matplotlib": "training: the loss curve",
    "scikit-learn": "training: metrics of classification",
    "bitsandbytes": "training on a quantized base",
    "diffusers": "diffusion models",
}
# Named in the report when set; never a token.
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", VARIABLE)
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Package:
    """One distribution.

    Attributes:
        name: as it is installed; for onnxruntime the build that was found.
        required: version specifier, empty for any.
        installed: version, None when it is missing.
        purpose: what it is for; empty for the core.
        install: the command that installs it.
    """

    name: str
    required: str
    installed: str | None
    purpose: str
    install: str

    @property
    def is_ok(self) -> bool:
        """Whether it is there and new enough."""
        return self.installed is not None and SpecifierSet(self.required).contains(self.installed, prereleases=True)

    @property
    def status(self) -> str:
        """`ok`, `missing` or `too old`."""
        return "ok" if self.is_ok else "missing" if self.installed is None else f"needs {self.required}"


@dataclass(frozen=True)
class Devices:
    """What work can run on.

    Attributes:
        cuda: a line for each CUDA device.
        cuda_missing: why there is none; empty when there is one.
        providers: ONNX Runtime's execution providers as built; empty when it cannot be imported.
        providers_missing: why not.
    """

    cuda: tuple[str, ...]
    cuda_missing: str
    providers: tuple[str, ...]
    providers_missing: str


@dataclass(frozen=True)
class NativeOperator:
    """ONNX Runtime's kernels of our own operators.

    Attributes:
        library: that sessions use; None when there is none.
        missing: why there is none.
        fault: what is wrong with the one that is there; it stops sessions that ask for it.
    """

    library: OperatorLibrary | None
    missing: str = ""
    fault: str = ""

    @property
    def text(self) -> str:
        """One line: the library, or how to get one."""
        return str(self.library) if self.library is not None else f"none: {self.missing}"


@dataclass(frozen=True)
class Machine:
    """Cores that this process may use, memory and free disk, in bytes; None where the system does not say."""

    system: str
    cores: int
    memory_bytes: int | None
    available_bytes: int | None
    free_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Environment:
    """Everything `hra-export doctor` shows."""

    core: tuple[Package, ...]
    optional: tuple[Package, ...]
    devices: Devices
    operator: NativeOperator
    machine: Machine
    variables: Mapping[str, str]

    @property
    def problems(self) -> tuple[Package, ...]:
        """What of the core is missing or too old."""
        return tuple(package for package in self.core if not package.is_ok)

    @property
    def is_complete(self) -> bool:
        """Whether the core is there."""
        return not self.problems

    def warnings(self) -> list[str]:
        """What the user should act on although nothing is missing."""
        found = [self.operator.fault] if self.operator.fault else []
        builds = [name for name in ONNXRUNTIME_BUILDS if _version(name) is not None]
        if len(builds) > 1:
            names = " ".join(builds)
            remedy = f"`pip uninstall {names}`, then install one of them"
            found.append(f"{' and '.join(builds)} overwrite each other's files: {remedy}")
        return found

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "ok": self.is_complete,
            "warnings": self.warnings(),
            "core": [{**asdict(package), "status": package.status} for package in self.core],
            "optional": [{**asdict(package), "status": package.status} for package in self.optional],
            "devices": asdict(self.devices),
            "operator": {
                "library": None if self.operator.library is None else self.operator.library.to_json(),
                "missing": self.operator.missing,
            },
            "machine": asdict(self.machine),
            "environment": dict(self.variables),
        }


def read_environment(variables: Mapping[str, str], folders: Mapping[str, Path]) -> Environment:
    """Look around.

    Args:
        variables: the process's environment; only `VARIABLES` are kept and looked at.
        folders: label → a path whose disk is asked for its free space; it need not exist yet.
    """
    requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    return Environment(
        core=(_python(), _itself(), *(_core(each) for each in requirements if _is_core(each))),
        optional=tuple(_optional(name, purpose, requirements) for name, purpose in OPTIONAL.items()),
        devices=_devices(),
        operator=_operator(variables),
        machine=_machine(folders),
        variables={name: variables[name] for name in VARIABLES if name in variables},
    )


def _python() -> Package:
    required = metadata.metadata(DISTRIBUTION).json.get("requires_python", "")
    return Package("python", str(required), platform.python_version(), "", "https://www.python.org/downloads")


def _itself() -> Package:
    return Package(DISTRIBUTION, "", metadata.version(DISTRIBUTION), "", f"pip install {DISTRIBUTION}")


def _is_core(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _core(requirement: Requirement) -> Package:
    name, installed = requirement.name, _version(requirement.name)
    if name in ONNXRUNTIME_BUILDS and installed is None:
        name = next((build for build in ONNXRUNTIME_BUILDS if _version(build) is not None), name)
        installed = _version(name)
    return Package(
        name, str(requirement.specifier), installed, "", f"pip install '{requirement.name}{requirement.specifier}'"
    )


def _optional(name: str, purpose: str, requirements: list[Requirement]) -> Package:
    """An optional package; the extra that brings it says its floor and how to install it, if there is one."""
    extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    required, install = "", f"pip install {name}"
    for extra in sorted(extras, key=lambda extra: extra in DEVELOPMENT_EXTRAS):
        found = [each for each in requirements if each.name == name and not _is_core(each) and _is_in(each, extra)]
        if found:
            required = str(found[0].specifier)
            is_for_users = extra not in DEVELOPMENT_EXTRAS
            install = f"pip install '{DISTRIBUTION}[{extra}]'" if is_for_users else f"pip install '{name}{required}'"
            break
    return Package(name, required, _version(name), purpose, install)


def _is_in(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return str(Version(metadata.version(name)))
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Devices:
    cuda, cuda_missing = _cuda()
    try:
        from hra_export.graph.session import available_providers

        providers, providers_missing = available_providers(), ""
    except (ImportError, OSError) as error:
        providers, providers_missing = (), f"onnxruntime cannot be imported: {error}"
    return Devices(cuda, cuda_missing, providers, providers_missing)


def _operator(variables: Mapping[str, str]) -> NativeOperator:
    try:
        library = find(variables)
    except FormatError as error:
        return NativeOperator(None, error.message, str(error))
    return NativeOperator(library, "" if library is not None else f"graphs run the operators' bodies; {REBUILD}")


def _cuda() -> tuple[tuple[str, ...], str]:
    """The CUDA devices that torch sees, and why there are none."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return (), f"torch cannot be imported: {error}"
    if torch.version.cuda is None and torch.version.hip is None:
        return (), f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:  # torch says by a warning that the driver is too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        reason = str(caught[-1].message) if caught else "no NVIDIA driver or no device"
        return (), f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but finds none: {reason}"
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return tuple(
        f"cuda:{index} {each.name}, {each.total_memory / 1e9:.1f} GB, compute {each.major}.{each.minor}"
        for index, each in enumerate(found)
    ), ""


def _machine(folders: Mapping[str, Path]) -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = {f"{label} {path}": shutil.disk_usage(_nearest(path)).free for label, path in folders.items()}
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return Machine(system, cores, _memory(), _available_memory(), free)


def _nearest(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _memory() -> int | None:
    """Physical memory, or a container's limit where that is smaller."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def _available_memory() -> int | None:
    if sys.platform != "linux" or not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    value = lines.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value else None
