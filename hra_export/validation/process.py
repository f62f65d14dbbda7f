"""Run a job in a child process and bring back what it answered, or how it ended."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hra_export import errors
from hra_export.errors import GraphError, HraExportError
from hra_export.validation.job import ANSWER, JOB, PROGRESS, Array, Job

# By path and not by name, so that the child finds this very package wherever it is started.
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from hra_export.validation.child import main; "
START += "sys.exit(main(sys.argv[1]))"
STDERR = "stderr"
TAIL = 3  # last lines of the child's stderr that a finding shows


@dataclass(frozen=True)
class Answer:
    """What became of one run.

    Attributes:
        outputs: one dictionary for each step: output → array.
        tokens: decoded greedily.
        nll: sum of negative log-likelihoods, over `count` tokens.
        error: why there is nothing; None when there is.
    """

    outputs: Sequence[Mapping[str, Array]] = ()
    tokens: Sequence[int] = ()
    nll: float = 0.0
    count: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Ending:
    """All answers of a job.

    Attributes:
        answers: by the runs' names.
        failure: how the child ended, when it ended without an answer.
        operators: role of a graph, or `genai` → how many nodes a library's kernels ran, which library, or why none.
    """

    answers: Mapping[str, Answer] = field(default_factory=dict)
    failure: str | None = None
    operators: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def run_job(job: Job, *, timeout: float) -> Ending:
    """Start a child, wait for it, and read its answers.

    Args:
        job: whose runs have different names.
        timeout: seconds, after which the child is killed.

    Raises:
        HraExportError: what the child raised: a provider that is missing or fell back, a graph that cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="hra-export-validate-") as folder:
        root = Path(folder)
        _write(root, job)
        try:
            code = run_child(root, timeout)
        except subprocess.TimeoutExpired:
            return Ending(failure=f"the runtime did not answer within {timeout:g} s, {_where(root)}")
        if code or not (root / ANSWER).is_file():
            return Ending(failure=f"the runtime ended with {_name(code)}, {_where(root)}{_last_words(root)}")
        return _read(root, job)


def run_child(root: Path, timeout: float) -> int:
    """Start the child on a directory and wait for it.

    Returns:
        Its exit code; negative for the signal that ended it.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout` seconds.
    """
    command = [sys.executable, "-c", START, str(Path(__file__).parents[2]), str(root)]
    with (root / STDERR).open("wb") as stderr:
        return subprocess.run(  # noqa: S603  our own interpreter and code; paths are arguments
            command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, timeout=timeout, check=False
        ).returncode


def _write(root: Path, job: Job) -> None:
    data = asdict(job)
    data["graphs"] = {role: str(path.absolute()) for role, path in job.graphs.items()}
    data["adapters"] = {role: str(path.absolute()) for role, path in job.adapters.items()}
    data["operator"] = str(job.operator.absolute()) if isinstance(job.operator, Path) else job.operator
    data["genai"] = None if job.genai is None else str(job.genai.absolute())
    for i, run in enumerate(data["runs"]):
        for j, step in enumerate(run["steps"]):
            name = f"feeds{i}_{j}.npz"
            np.savez(root / name, allow_pickle=False, **step["feeds"])
            step["feeds"] = name
    (root / JOB).write_text(json.dumps(data))


def _read(root: Path, job: Job) -> Ending:
    answer = json.loads((root / ANSWER).read_text())
    if "error" in answer:
        raise _raised(answer["error"])
    steps = [len(run.steps) for run in job.runs] + [0] * len(job.generations)
    answers = {
        name: _answer(root / f"run{index}.npz", count, given)
        for index, (name, count, given) in enumerate(zip(job.names, steps, answer["answers"], strict=True))
    }
    return Ending(answers, operators=answer["operators"])


def _answer(path: Path, steps: int, given: Mapping[str, Any]) -> Answer:
    if "error" in given:
        return Answer(error=given["error"])
    outputs: list[dict[str, Array]] = [{} for _ in range(steps)]
    if steps:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                step, _, name = key.partition("/")
                outputs[int(step)][name] = arrays[key]
    scores = given.get("scores", {"nll": 0.0, "tokens": 0})
    return Answer(outputs, given.get("tokens", ()), scores["nll"], scores["tokens"])


def _raised(error: Mapping[str, Any]) -> HraExportError:
    """The child's exception, of its own class."""
    kind = getattr(errors, error["kind"], GraphError)
    raised: HraExportError = kind(error["message"], findings=error["findings"], hint=error["hint"])
    return raised


def _where(root: Path) -> str:
    path = root / PROGRESS
    return f"at `{path.read_text()}`" if path.is_file() else "before it began"


def _name(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"


def _last_words(root: Path) -> str:
    lines = (root / STDERR).read_bytes().decode(errors="replace").strip().splitlines()[-TAIL:]
    return f": {' / '.join(lines)}" if lines else ""
