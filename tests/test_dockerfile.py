"""The image: what its Dockerfile promises, and that its pip steps install a working command.

No Docker engine is needed: the file is read, and its pip steps run in a virtual environment with the paths moved.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECRET = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)
HEREDOC = re.compile(r"<<-?\s*\w")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: `RUN`, and what follows it on one line."""

    word: str
    text: str


def read_dockerfile(text: str) -> list[Instruction]:
    """The instructions, continued lines joined and comments left out."""
    assert not HEREDOC.search(text), "here-documents are not understood"
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def of(word: str, instructions: list[Instruction]) -> list[str]:
    """What follows one kind of instruction."""
    return [each.text for each in instructions if each.word == word]


def last_stage(instructions: list[Instruction]) -> list[Instruction]:
    """The stage that becomes the image."""
    start = max(index for index, each in enumerate(instructions) if each.word == "FROM")
    return instructions[start:]


def pip_commands(instructions: list[Instruction]) -> Iterator[str]:
    """Every single pip command of the RUN steps."""
    for step in of("RUN", instructions):
        yield from (part.strip() for part in step.split("&&") if re.search(r"\bpip\b", part))


DOCKERFILE = read_dockerfile((ROOT / "Dockerfile").read_text())
IMAGE = last_stage(DOCKERFILE)


def test_read_dockerfile_joins_lines_and_drops_comments() -> None:
    text = "# first\nFROM a AS b\nRUN one \\\n# between\n    && two\n\nUSER 1\n"
    expected = [Instruction("FROM", "a AS b"), Instruction("RUN", "one && two"), Instruction("USER", "1")]
    assert read_dockerfile(text) == expected


def test_base_is_a_cuda_13_runtime_with_cudnn() -> None:
    """What onnxruntime-gpu links: libcudart.so.13, libcublas.so.13, libcudnn.so.9. Not the compilers of `-devel-`."""
    (base,) = [text for text in of("ARG", DOCKERFILE) if text.startswith("BASE=")]
    assert re.fullmatch(r"BASE=nvidia/cuda:13\.\d+\.\d+-cudnn-runtime-ubuntu24\.04", base)


def test_every_stage_starts_from_base_or_another_stage() -> None:
    starts = [text.split(" AS ") for text in of("FROM", DOCKERFILE)]
    stages = {names[1] for names in starts if len(names) == 2}
    assert {names[0] for names in starts} <= {"${BASE}", *stages}
    assert len(starts) > 1


def test_image_runs_as_user_1000() -> None:
    assert of("USER", IMAGE) == ["1000:1000"]


def test_image_keeps_downloads_in_a_volume() -> None:
    (environment,) = of("ENV", IMAGE)
    assert {"HF_HOME=/cache", "XDG_CACHE_HOME=/cache"} <= set(environment.split())
    assert [json.loads(text) for text in of("VOLUME", IMAGE)] == [["/cache"]]


def test_image_is_the_command() -> None:
    """As a list: with a shell in between, `docker stop` would not reach the command."""
    assert [json.loads(text) for text in of("ENTRYPOINT", IMAGE)] == [["hra-export"]]


def test_image_takes_only_the_virtual_environment_from_the_build() -> None:
    assert of("COPY", IMAGE) == ["--from=build /opt/venv /opt/venv"]


def test_image_says_which_version_it_is() -> None:
    assert f"VERSION={metadata.version('hra-export')}" in of("ARG", IMAGE)
    assert 'org.opencontainers.image.version="${VERSION}"' in of("LABEL", IMAGE)[0]


def test_pip_installs_the_tested_set() -> None:
    installs = [command for command in pip_commands(DOCKERFILE) if " install " in command]
    assert installs
    assert all("--constraint constraints.txt" in command for command in installs)
    assert all("--no-cache-dir" in command for command in installs)


def test_build_compiles_the_operator_library_with_the_extras_tools() -> None:
    """After the package is installed, into it; the tools are those of the extra `native`, outside of what is copied."""
    steps = of("RUN", DOCKERFILE)
    (compile_step,) = [step for step in steps if "hra-export build-op" in step]
    (tools,) = [step for step in steps if "--target /opt/tools" in step]
    installed = next(step for step in steps if "hra_export-*.whl" in step)
    assert steps.index(installed) < steps.index(tools) < steps.index(compile_step)
    assert "/opt/venv" in installed
    assert "--output" not in compile_step
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[^\w-]", line)[0] for line in extras["native"]}
    assert set(tools.split("/opt/tools")[1].split()) == names - {"triton"}


def test_file_fetches_nothing_unpinned_and_holds_no_secret() -> None:
    assert not of("ADD", DOCKERFILE)
    assert not [text for text in of("RUN", DOCKERFILE) if re.search(r"\b(curl|wget|git)\b", text)]
    assert not [text for word in ("ARG", "ENV", "LABEL") for text in of(word, DOCKERFILE) if SECRET.search(text)]


def test_copied_files_are_there_and_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    for text in of("COPY", DOCKERFILE):
        if not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert (ROOT / source).exists()
                assert any(fnmatch.fnmatch(source, rule[1:]) for rule in rules if rule.startswith("!"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_steps_install_a_working_command(tmp_path: Path) -> None:
    """The RUN steps with pip, in order, among the files that were copied before them."""
    source = tmp_path / "source"
    source.mkdir()
    moved = {"/opt/": f"{tmp_path}/", "python3.12": shlex.quote(sys.executable)}
    variables = dict(text.split("=") for text in of("ARG", DOCKERFILE))
    variables |= dict(text.split("=") for text in of("ENV", DOCKERFILE) if text.startswith("SOURCE_DATE_EPOCH"))
    for each in DOCKERFILE:
        if each.word == "COPY" and not each.text.startswith("--from"):
            *names, target = each.text.split()
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / target)
                else:
                    shutil.copy(ROOT / name, source / target)
        if each.word == "RUN" and "pip" in each.text:
            command = each.text
            for old, new in moved.items():
                command = command.replace(old, new)
            subprocess.run(command, shell=True, cwd=source, env=os.environ | variables, check=True)
    binaries = tmp_path / "venv" / "bin"
    version = subprocess.run([binaries / "hra-export", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"hra-export, version {metadata.version('hra-export')}\n"
    subprocess.run([str(binaries / "python"), "-m", "pip", "check"], check=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    assert wheel.name.startswith("hra_export-")
