"""The wheel: what is in it, and that it works where the checkout is not."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = metadata.version("hra-export")


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it.

    Attributes:
        binaries: its `bin` folder.
        elsewhere: an empty directory to run from.
    """

    binaries: Path
    elsewhere: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs away from the checkout."""
        command = [str(self.binaries / program), *arguments]
        return subprocess.run(command, cwd=self.elsewhere, env={}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy: setuptools leaves its traces beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("hra_export", "converters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # What `hra-export build-op` leaves beside the package must stay behind.
    (source / "hra_export" / "kernels" / "build").mkdir(exist_ok=True)
    (source / "hra_export" / "kernels" / "build" / "libhra_export_ort_op.so").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a virtual environment that borrows this one's packages, but not its editable installation."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    binaries = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    # A path in a .pth file is appended to sys.path, and .pth files in it are not read: the wheel comes first.
    (packages,) = folder.glob("lib/python*/site-packages")
    packages.joinpath("borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return Installed(binaries, tmp_path_factory.mktemp("elsewhere"))


def test_wheel_holds_one_package_and_its_papers(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    papers = f"hra_export-{VERSION}.dist-info"
    assert {name.partition("/")[0] for name in files} == {"hra_export", papers}
    assert {"hra_export/py.typed", "hra_export/converters/__init__.py", f"{papers}/licenses/LICENSE"} <= files


def test_wheel_holds_every_file_of_the_library(wheel: Path) -> None:
    """A new folder must be named in `packages`, or it is left out without a word."""
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "hra_export").rglob("*.py")}
    sources |= {f"hra_export/converters/{path.name}" for path in (ROOT / "converters").glob("*.py")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == sources


def test_wheel_holds_the_sources_of_the_operator_library_and_no_library(wheel: Path) -> None:
    """`hra-export build-op` compiles them where the wheel is installed."""
    prefix = "hra_export/kernels/ort/"
    packed = {name.removeprefix(prefix) for name in zipfile.ZipFile(wheel).namelist() if name.startswith(prefix)}
    assert packed == {path.name for path in (ROOT / prefix).iterdir()}
    assert {"CMakeLists.txt", "operators.cc", "task.h"} <= packed
    endings = {Path(name).suffix for name in zipfile.ZipFile(wheel).namelist()}
    assert not endings & {".so", ".dylib", ".dll"}


def test_wheel_says_what_pyproject_says(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read(f"hra_export-{VERSION}.dist-info/METADATA").decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\nRequires-Python: {project['requires-python']}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text


def test_installed_command_answers(installed: Installed) -> None:
    version, usage = installed.run("hra-export", "--version"), installed.run("hra-export", "--help")
    assert (version.returncode, version.stdout) == (0, f"hra-export, version {VERSION}\n")
    assert usage.returncode == 0
    assert "merge" in usage.stdout


def test_installed_package_is_the_wheels(installed: Installed) -> None:
    """Neither the checkout nor an editable installation of it answers instead."""
    run = installed.run("python", "-c", "import hra_export; print(hra_export.__file__)")
    assert Path(run.stdout.strip()).is_relative_to(installed.binaries.parent)


def test_converters_are_imported_under_the_package_alone(installed: Installed) -> None:
    assert installed.run("python", "-c", "import hra_export.converters").returncode == 0
    assert "No module named 'converters'" in installed.run("python", "-c", "import converters").stderr


def test_converters_refuse_their_bare_name_in_the_checkout() -> None:
    command = [sys.executable, "-c", "import converters"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "import this folder as `hra_export.converters`, not as `converters`" in run.stderr
