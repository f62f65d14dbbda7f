"""`hra-export doctor`: what is there, what is missing, and the exit code."""

import json
import os
import subprocess
import sys
import types
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hra_export import environment
from hra_export.cli.doctor import INCOMPLETE, command
from hra_export.environment import Environment, Package, read_environment
from hra_export.kernels import operator_library
from hra_export.kernels.operator_library import VARIABLE


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that some distributions have these versions, or are missing; `_` stands for `-`."""
    real = metadata.version

    def version(name: str) -> str:
        found = versions.get(name.replace("-", "_"), "")
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(metadata, "version", version)


def required(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: list(lines))


def invoke(*arguments: str) -> Result:
    """Run the command; its return value is the exit code, as in `main`."""
    return CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False)


def look(tmp_path: Path) -> Environment:
    return read_environment({}, {"here": tmp_path})


def find(packages: tuple[Package, ...], name: str) -> Package:
    return next(package for package in packages if package.name == name)


def test_doctor_lists_the_whole_core_with_the_floors_of_the_package_metadata(tmp_path: Path) -> None:
    core = look(tmp_path).core
    names = [package.name for package in core]
    assert names[:2] == ["python", "hra-export"]
    assert {"torch", "transformers", "safetensors", "onnx"} <= set(names)
    assert any(name.startswith("onnxruntime") for name in names)
    declared = next(line for line in metadata.requires("hra-export") or [] if line.startswith("torch"))
    assert f"torch{find(core, 'torch').required}" == declared
    assert find(core, "torch").installed == metadata.version("torch")


def test_doctor_ends_with_0_when_the_core_is_complete() -> None:
    result = invoke()
    assert result.return_value == 0
    assert "the core is complete" in result.stdout


@pytest.mark.parametrize(("version", "status"), [(None, "missing"), ("0.1", "needs >=0.7")])
def test_doctor_ends_with_7_when_something_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, version: str | None, status: str
) -> None:
    required(monkeypatch, "safetensors>=0.7")
    installed(monkeypatch, safetensors=version)
    result = invoke()
    assert result.return_value == INCOMPLETE
    assert f"safetensors {status}: `pip install 'safetensors>=0.7'`" in result.stdout
    parsed = json.loads(invoke("--json").stdout)
    assert parsed["ok"] is False
    assert next(each for each in parsed["core"] if each["name"] == "safetensors")["status"] == status


def test_doctor_takes_another_build_of_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    required(monkeypatch, "onnxruntime-gpu>=1.30")
    installed(monkeypatch, onnxruntime_gpu=None, onnxruntime="1.31.0", onnxruntime_directml=None)
    found = look(tmp_path)
    assert find(found.core, "onnxruntime").is_ok
    assert found.warnings() == []


def test_doctor_warns_of_two_builds_of_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, onnxruntime_gpu="1.31.0", onnxruntime="1.31.0")
    (warning,) = look(tmp_path).warnings()
    assert warning.startswith("onnxruntime-gpu and onnxruntime overwrite each other's files")


def test_doctor_says_how_to_install_optional_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the extra that brings them, and by their own name where only developers need them or no extra has them."""
    required(
        monkeypatch, "gguf>=0.17; extra == 'gguf'", "hra-export[gguf]; extra == 'dev'", "peft>=0.21; extra == 'dev'"
    )
    installed(monkeypatch, gguf=None, peft="0.20", trl=None)
    optional = look(tmp_path).optional
    assert find(optional, "gguf").install == "pip install 'hra-export[gguf]'"
    assert (find(optional, "peft").status, find(optional, "peft").install) == (
        "needs >=0.21",
        "pip install 'peft>=0.21'",
    )
    assert (find(optional, "trl").status, find(optional, "trl").install) == ("missing", "pip install trl")
    assert look(tmp_path).is_complete


def test_doctor_takes_a_build_of_one_version_for_that_version() -> None:
    """`2.13.0+cpu` satisfies `>=2.11`, and so does a release candidate."""
    assert Package("torch", ">=2.11", "2.13.0+cpu", "", "").is_ok
    assert Package("torch", ">=2.11", "2.14.0rc1", "", "").is_ok
    assert not Package("torch", ">=2.11", "2.10.1", "", "").is_ok


def test_doctor_says_why_there_is_no_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert environment._cuda() == ((), f"torch {torch.__version__} is built without CUDA")

    def warn() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", warn)
    _, reason = environment._cuda()
    assert reason.endswith("built for CUDA 13.0, but finds none: The NVIDIA driver on your system is too old")


def test_doctor_names_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(name="NVIDIA X", total_memory=80_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert environment._cuda() == (("cuda:0 NVIDIA X, 80.0 GB, compute 9.0",), "")


@pytest.mark.parametrize("module", ["torch", "onnxruntime"])
def test_doctor_survives_a_package_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    devices = look(tmp_path).devices
    missing = devices.cuda_missing if module == "torch" else devices.providers_missing
    assert missing.startswith(f"{module} cannot be imported")


def test_doctor_lists_execution_providers(tmp_path: Path) -> None:
    assert "CPUExecutionProvider" in look(tmp_path).devices.providers


def test_doctor_shows_the_native_operator(monkeypatch: pytest.MonkeyPatch, native_library: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(native_library))
    library = json.loads(invoke("--json").stdout)["operator"]["library"]
    assert (library["path"], library["providers"]) == (str(native_library), ["cpu"])
    line = f"operator      {library['path']}, version {library['version']}, cpu, {library['instructions']}"
    assert line in invoke().stdout


def test_doctor_says_how_to_get_the_native_operator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(operator_library, "DEFAULT_FOLDER", tmp_path)
    found = look(tmp_path)
    assert found.operator.text == "none: graphs run the operators' bodies; `hra-export build-op` builds it"
    assert found.warnings() == []
    assert found.is_complete


def test_doctor_warns_of_a_native_operator_that_cannot_be_used(tmp_path: Path) -> None:
    found = read_environment({VARIABLE: str(tmp_path / "none.so")}, {})
    (warning,) = found.warnings()
    assert f"{VARIABLE}=`{tmp_path / 'none.so'}`: no such operator library" in warning
    assert found.operator.library is None
    assert found.variables == {VARIABLE: str(tmp_path / "none.so")}


def test_doctor_measures_the_machine(tmp_path: Path) -> None:
    machine = look(tmp_path / "not" / "made" / "yet").machine
    assert machine.cores >= 1
    assert machine.memory_bytes is None or machine.memory_bytes > 1 << 28
    assert all(free > 0 for free in machine.free_bytes.values())


def test_doctor_respects_a_containers_memory_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "CGROUP_LIMIT", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text("1048576\n")
    assert environment._memory() == 1048576
    (tmp_path / "memory.max").write_text("max\n")
    assert (environment._memory() or 0) > 1048576


def test_doctor_shows_chosen_variables_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for result in (invoke(), invoke("--json"), invoke("--debug")):
        assert "hf_secret" not in result.output
    shown = invoke().stdout
    assert "HF_HUB_OFFLINE=1" in shown
    assert f"Hub cache {tmp_path}" in shown


def test_doctor_exits_with_its_code_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hra_export", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["schema_version"] == 1
