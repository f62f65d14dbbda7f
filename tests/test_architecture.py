"""The shape of the code: floors, doors, and what every file has. Read from the imports, with `ast`.

Limits: `import_module` with a string is not seen. The command line and the registry load their modules that way, on
purpose; both only ever reach down.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "hra_export"

# Top floor first; an import only goes down. A floor is a list of rooms, which do not import one another. A room is a
# tuple of files or folders, its entrance first; inside it, an import goes from left to right. Files of one folder may
# import one another. A room of the plan may be named here before it is built.
FLOORS: list[list[tuple[str, ...]]] = [
    # speaks to people: arguments, tables, exit codes
    [("__main__", "cli")],
    # finds a converter by its name
    [("registry",)],
    # one job of a verb each
    [
        ("validation",),
        ("compression",),
        ("inspection", "effect"),
        ("environment",),
        ("training",),
        ("converters",),
        ("export",),
        ("bench", "contenders", "workload"),
    ],
    # carries a plan out as a graph, of merged weights for one
    [("graph",)],
    # carries a plan out as weights; reads and writes adapters of other kinds, and finds chains for what is none
    [("merge",), ("lora",), ("nearest",), ("official",)],
    # makes a plan, streams planned tensors, describes them; makes a model of a checkpoint
    [
        ("planning", "placement"),
        ("stream",),
        ("modelcard",),
        ("companions",),
        ("loading",),
        ("low_rank", "target_weights"),
    ],
    # what becomes of every tensor: in files, in a live model
    [("plan",), ("attachment", "layer"), ("locator",)],
    # makes adapters of adapters
    [("strength", "composition")],
    # knows one kind of thing each: adapters, bases, output directories, models' names and shapes, the torch operator
    [
        ("adapter", "peft_directory"),
        ("checkpoint",),
        ("publish", "replacement", "places"),
        ("file_output",),
        ("gguf_files",),
        ("llama_cpp",),
        ("layout", "conversions"),
        ("reflection",),
    ],
    # knows nothing of its neighbours: algebra, names, measures, containers, file systems, model classes
    [
        ("rotation", "householder"),
        ("names",),
        ("converted",),
        ("parity", "tolerance"),
        ("tensorfile",),
        ("journal", "filesystem"),
        ("pieces",),
        ("ggml", "codebook", "quantization"),
        ("architecture",),
        ("kernels",),
    ],
    # everybody's
    [("errors",)],
]

# One door for each third-party package: the only rooms, or files in them, that import it.
DOORS: dict[str, tuple[str, ...]] = {
    "accelerate": ("training",),
    "click": ("cli",),
    "datasets": ("training",),
    "gguf": ("gguf_files",),
    "matplotlib": ("training", "bench"),
    "onnx": ("graph",),
    "onnx_ir": ("graph",),
    "onnxruntime": ("graph.runtime", "graph.quantize"),
    "onnxruntime_genai": ("graph.genai",),
    "onnxscript": ("graph",),
    "peft": ("training",),
    "sklearn": ("training",),
    "tomli_w": ("training",),
    "tqdm": ("cli",),
    "triton": ("kernels",),
    "trl": ("training",),
}
TRAINING_PACKAGES = {name for name, rooms in DOORS.items() if rooms == ("training",)}
NEVER_AT_MODULE_LEVEL = {"transformers", "diffusers"}
DRAWERS = {"utils", "util", "helpers", "common", "misc"}


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        name: with dots; `from a import b` is `a.b`.
        line: where it stands.
        at_start: it runs when the file is imported, so neither in a function nor for type checkers alone.
    """

    name: str
    line: int
    at_start: bool

    @property
    def package(self) -> str:
        """What comes before the first dot."""
        return self.name.partition(".")[0]


def imports_of(source: str) -> Iterator[Import]:
    """Every import of a file, wherever it stands."""
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while waiting:
        node, at_start = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_start) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (Import(f"{origin}.{alias.name}", node.lineno, at_start) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += [*((child, False) for child in node.body), *((child, at_start) for child in node.orelse)]
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            waiting += [(child, at_start and not inside) for child in ast.iter_child_nodes(node)]


def place(name: str) -> tuple[int, int, int] | None:
    """Floor, room and seat of a file or folder; None when it has none."""
    for floor, rooms in enumerate(FLOORS):
        for room, seats in enumerate(rooms):
            if name in seats:
                return floor, room, seats.index(name)
    return None


def may_import(here: tuple[int, int, int], there: tuple[int, int, int]) -> bool:
    """Whether the arrow goes down: to a lower floor, or to a later seat of the same room."""
    return there[0] > here[0] or (there[:2] == here[:2] and there[2] >= here[2])


def misplaced(module: str, source: str) -> Iterator[str]:
    """Imports of our own that do not go down."""
    here = place(seat(module))
    if here is None:
        yield f"{module} is on no floor"
        return
    for found in imports_of(source):
        where = f"{module}:{found.line} imports {found.name}"
        if found.name.startswith("."):
            yield f"{where}: write the whole name"
        elif found.package == PACKAGE and found.name != f"{PACKAGE}.__version__":
            there = place(seat(found.name))
            if there is None:
                yield f"{where}: on no floor; import a name from the file that defines it"
            elif found.name.startswith(f"{PACKAGE}.converters"):
                yield f"{where}: load it through {PACKAGE}.registry"
            elif not may_import(here, there):
                yield f"{where}: not below it"


def through_walls(module: str, source: str) -> Iterator[str]:
    """Third-party packages imported elsewhere than through their door."""
    for found in imports_of(source):
        rooms = [f"{PACKAGE}.{room}" for room in DOORS.get(found.package, ())]
        if rooms and not any(f"{module}.".startswith(f"{room}.") for room in rooms):
            yield f"{module}:{found.line} imports {found.name}: only {' and '.join(rooms)} may"


def heavy_at_start(module: str, source: str) -> Iterator[str]:
    """Packages that are too slow for the top of a file."""
    for found in imports_of(source):
        if found.at_start and found.package in NEVER_AT_MODULE_LEVEL:
            yield f"{module}:{found.line} imports {found.package} at the top of the file"


def undeclared(module: str, source: str) -> Iterator[str]:
    """Third-party packages that an installation for users need not have."""
    declared, distributions = declared_distributions(), installed_distributions()
    for found in imports_of(source):
        if found.package in sys.stdlib_module_names or found.package in (PACKAGE, "__future__"):
            continue
        names = {normalized(name) for name in distributions.get(found.package, [found.package])}
        if not names & declared:
            yield f"{module}:{found.line} imports {found.package}, which pyproject.toml does not list for users"


def unseemly(module: str, source: str) -> Iterator[str]:
    """Files without a docstring, files that print, drawers for anything."""
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield f"{module} has no docstring"
    if drawers := DRAWERS & set(module.split(".")):
        yield f"{module}: name the file after its concept, not {drawers.pop()}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{module}:{node.lineno} prints; return the text, and let the command line show it"


RULES = [misplaced, through_walls, heavy_at_start, undeclared, unseemly]


def seat(module: str) -> str:
    """The file or folder directly under the package: `hra_export.cli.merge` sits in `cli`."""
    return module.split(".")[1] if "." in module else module


def normalized(distribution: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@cache
def installed_distributions() -> Mapping[str, list[str]]:
    """The distributions that install each importable name."""
    return metadata.packages_distributions()


@cache
def declared_distributions() -> set[str]:
    """What `pyproject.toml` lists for users: the core and every extra but `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    return {normalized(re.split(r"[^\w.-]", line)[0]) for line in lines}


def library() -> dict[str, Path]:
    """Every file that is installed, under the name it is imported by; the front door `hra_export/__init__.py` apart."""
    files = {}
    for folder, name in ((ROOT / PACKAGE, PACKAGE), (ROOT / "converters", f"{PACKAGE}.converters")):
        for path in folder.rglob("*.py"):
            parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
            files[".".join([name, *parts])] = path
    del files[PACKAGE]
    return files


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_library_keeps(rule: Callable[[str, str], Iterator[str]]) -> None:
    """All findings of a rule at once."""
    findings = [finding for module, path in library().items() for finding in rule(module, path.read_text())]
    assert not findings, "\n".join(["", *findings])


def test_front_door_imports_nothing_of_ours_at_run_time() -> None:
    """Its names are for type checkers; they are loaded on first use."""
    source = (ROOT / PACKAGE / "__init__.py").read_text()
    started = {found.package for found in imports_of(source) if found.at_start}
    assert started <= sys.stdlib_module_names


def test_only_the_oracle_imports_peft_among_the_tests() -> None:
    """PEFT is the judge in tests/oracle; elsewhere a test would compare PEFT with itself."""
    findings = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.name}"
        for path in (ROOT / "tests").rglob("*.py")
        if "oracle" not in path.parts
        for found in imports_of(path.read_text())
        if found.package in TRAINING_PACKAGES
    ]
    assert not findings, "\n".join(["", *findings])


def test_no_name_is_on_two_floors() -> None:
    names = [name for rooms in FLOORS for room in rooms for name in room]
    assert sorted(names) == sorted(set(names))


def test_contributing_names_every_room_and_door() -> None:
    """Its two tables are for people; these are the ones that hold."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    built = {seat(module) for module in library()} - {"__main__"}
    missing = [name for name in built if f"`{name}`" not in text]
    used = {found.package for path in library().values() for found in imports_of(path.read_text())}
    assert not missing + [name for name in used & DOORS.keys() if name not in text]


PLANTED = {
    "up a floor": (misplaced, "hra_export.errors", "from hra_export import merge"),
    "up a floor, inside a function": (misplaced, "hra_export.plan", "def f():\n    import hra_export.merge"),
    "up a floor, for types alone": (
        misplaced,
        "hra_export.names",
        "if TYPE_CHECKING:\n    from hra_export.plan import MergePlan",
    ),
    "next room": (misplaced, "hra_export.adapter", "from hra_export.checkpoint import Checkpoint"),
    "up a seat": (misplaced, "hra_export.filesystem", "from hra_export.journal import Journal"),
    "through the front door": (misplaced, "hra_export.merge", "from hra_export import HraAdapter"),
    "relative": (misplaced, "hra_export.merge", "from . import plan"),
    "converter": (misplaced, "hra_export.cli.merge", "from hra_export.converters import from_gguf"),
    "new file": (misplaced, "hra_export.novelty", ""),
    "click in the library": (through_walls, "hra_export.merge", "import click"),
    "onnxruntime beside its door": (through_walls, "hra_export.graph.export", "from onnxruntime import quantization"),
    "a door's longer name": (through_walls, "hra_export.client", "import click"),
    "gguf in another converter": (through_walls, "hra_export.converters.to_lora", "def f():\n    import gguf"),
    "transformers at the top": (heavy_at_start, "hra_export.layer", "from transformers import AutoModel"),
    "transformers in a class": (heavy_at_start, "hra_export.layer", "class A:\n    import transformers.utils"),
    "diffusers in a try": (heavy_at_start, "hra_export.layer", "try:\n    import diffusers\nfinally:\n    pass"),
    "not declared": (undeclared, "hra_export.merge", "import pytest"),
    "no docstring": (unseemly, "hra_export.merge", "import os"),
    "print": (unseemly, "hra_export.merge", '"""Doc."""\nprint("done")'),
    "drawer": (unseemly, "hra_export.cli.utils", '"""Doc."""'),
}


@pytest.mark.parametrize(("rule", "module", "source"), PLANTED.values(), ids=PLANTED)
def test_rule_finds_what_breaks_it(rule: Callable[[str, str], Iterator[str]], module: str, source: str) -> None:
    assert list(rule(module, source))


FINE = {
    "down a floor": (misplaced, "hra_export.merge", "from hra_export import plan"),
    "down to the ground": (misplaced, "hra_export.merge", "from hra_export.errors import HraExportError"),
    "down a seat": (misplaced, "hra_export.publish", "from hra_export.places import Places"),
    "same folder": (misplaced, "hra_export.cli.merge", "from hra_export.cli import options"),
    "version": (misplaced, "hra_export.cli", "from hra_export import __version__"),
    "door": (through_walls, "hra_export.graph.runtime", "import onnxruntime"),
    "folder's door": (through_walls, "hra_export.cli", "import click"),
    "transformers in a function": (heavy_at_start, "hra_export.layer", "def f():\n    import transformers"),
    "transformers for types": (heavy_at_start, "hra_export.layer", "if TYPE_CHECKING:\n    import transformers"),
    "core dependency": (undeclared, "hra_export.merge", "import torch.nn\nimport json\nimport hra_export.plan"),
    "printing method": (unseemly, "hra_export.merge", '"""Doc."""\nreport.print()'),
}


@pytest.mark.parametrize(("rule", "module", "source"), FINE.values(), ids=FINE)
def test_rule_lets_pass(rule: Callable[[str, str], Iterator[str]], module: str, source: str) -> None:
    assert not list(rule(module, source))
