"""Training runs that are interrupted, or killed at bad moments, and taken up: byte for byte the same adapter.

The run that is signalled is a fork of this process: what takes seconds to import is there already.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from hra_export import cli
from hra_export.errors import OutputError
from hra_export.training.checkpoints import MARKER_NAME, RunDirectory
from tests.command_line import Outcome, run
from tests.killing import lives
from tests.synthetic import names_beside
from tests.train_scene import opinions, save_base, save_encoder, sums, tree, write_jsonl

STEP = ("hra_export.training.callbacks", "Watch", "after_step")
SEAL = ("hra_export.training.checkpoints", "RunDirectory", "seal")
BEGIN = ("hra_export.training.checkpoints", "RunDirectory", "begin")
PUBLISH = ("hra_export.publish", "Stage", "publish")
CLEAN_UP = ("hra_export.training.checkpoints", "RunDirectory", "remove")

# Two passes and a bit, batches that add up, a best checkpoint that is not the last, a penalty, everything logged.
CAUSAL = [
    *("--data", "sums.jsonl", "--base", "llama", "--max-steps", "11", "--batch-size", "4", "--log-every", "1"),
    *("--gradient-accumulation", "2", "--eval-split", "0.2", "--save-every", "3", "--eval-every", "2"),
    *("--regularization", "0.01"),
]
# Dropout draws random numbers at every step; a head and biases are trained beside the chains.
LABELLED = [
    *("--data", "opinions.jsonl", "--base", "bert", "--epochs", "2.5", "--batch-size", "8", "--log-every", "1"),
    *("--eval-split", "0.2", "--metric", "accuracy", "--save-every", "3", "--bias", "all"),
]
TASKS = {"causal": CAUSAL, "labelled": LABELLED}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads do not survive a fork, and sums over another number of them end on other digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruption")
    save_base(folder / "llama")
    save_encoder(folder / "bert")
    write_jsonl(folder / "sums.jsonl", sums(40))
    write_jsonl(folder / "opinions.jsonl", opinions(40))
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as current directory, so that equal commands write equal files."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Callable[[str], dict[str, bytes]]:
    """The files of a run that nothing disturbed."""
    made: dict[str, dict[str, bytes]] = {}

    def of(task: str) -> dict[str, bytes]:
        if task not in made:
            output = folder / "whole" / "out"
            outcome = train(folder, TASKS[task], output)
            assert outcome.code == 0, outcome.stderr
            made[task] = tree(output)
            shutil.rmtree(output.parent)
        return made[task]

    return of


def train(folder: Path, options: Sequence[str], output: Path, *more: str) -> Outcome:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return run("train", *options, "--output", output, *more)
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Ended:
    """How a forked run ended: its exit code, or the negative number of the signal that killed it."""

    code: int
    stdout: str
    stderr: str


def train_signalled(
    folder: Path,
    options: Sequence[str],
    output: Path,
    number: signal.Signals,
    where: tuple[str, str, str],
    count: int,
    *more: str,
    at_seal_too: bool = False,
) -> Ended:
    """Train in a fork that sends itself a signal as it calls the named method for the `count`-th time."""
    files = [folder / f"signalled.{name}" for name in ("stdout", "stderr")]
    child = os.fork()
    if child == 0:
        for descriptor, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        code: Any = 1
        try:
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout, sys.stderr = (os.fdopen(descriptor, "w") for descriptor in (1, 2))
            send_at(number, where, count)
            if at_seal_too:
                send_at(number, SEAL, 5)  # after those of steps 2, 3, 4 and 6
            cli.main(["train", *options, "--output", str(output), *more])
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    _, status = os.waitpid(child, 0)
    texts = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return Ended(os.waitstatus_to_exitcode(status), *texts)


def send_at(number: signal.Signals, where: tuple[str, str, str], count: int) -> None:
    """Patch a method to send this process a signal when it is called for the `count`-th time."""
    module, owner, method = where
    cls = getattr(import_module(module), owner)
    real, calls = getattr(cls, method), []

    def signalled(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return real(*arguments, **named)

    setattr(cls, method, signalled)


def same_but_for_the_output(left: dict[str, bytes], right: dict[str, bytes]) -> None:
    """Byte for byte; the configuration names its output."""

    def plain(files: dict[str, bytes]) -> dict[str, bytes]:
        lines = files["train_config.toml"].splitlines(keepends=True)
        return {**files, "train_config.toml": b"".join(line for line in lines if not line.startswith(b"output"))}

    assert left.keys() == right.keys()
    assert plain(left) == plain(right)


def steps_kept(output: Path) -> list[int]:
    return [checkpoint.step for checkpoint in RunDirectory.of(output).checkpoints()]


def test_whole_run_publishes_a_checkpoint_before_the_last(whole: Callable[[str], dict[str, bytes]]) -> None:
    """Otherwise a resumed run could forget which was the best, and no test below would see it."""
    training = json.loads(whole("labelled")["hra_export_manifest.json"])["training"]
    assert training["step"] < training["steps"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_interrupted_run_saves_its_step_and_goes_on_to_the_same_adapter(
    folder: Path, tmp_path: Path, whole: Callable[[str], dict[str, bytes]], number: signal.Signals, code: int
) -> None:
    output = tmp_path / "out"
    done = train_signalled(folder, CAUSAL, output, number, STEP, 7)
    assert done.code == code, done.stderr
    assert "stopped after step 7; the same command with `--resume` goes on from there" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not output.exists()
    assert 7 in steps_kept(output)

    outcome = train(folder, CAUSAL, output)
    assert outcome.code == 6
    assert "has got to step 7" in outcome.stderr
    assert "`--resume` goes on from there, `--overwrite` starts over" in outcome.stderr

    outcome = train(folder, CAUSAL, output, "--resume", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["resumed_from"] == 7
    same_but_for_the_output(tree(output), whole("causal"))
    assert names_beside(output) == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("where", "count", "resumed_from"),
    [(STEP, 8, 6), (SEAL, 2, 3)],
    ids=["between checkpoints", "in the middle of a checkpoint"],
)
def test_killed_run_goes_on_from_the_last_whole_checkpoint_to_the_same_adapter(
    folder: Path,
    tmp_path: Path,
    whole: Callable[[str], dict[str, bytes]],
    task: str,
    where: tuple[str, str, str],
    count: int,
    resumed_from: int,
) -> None:
    output = tmp_path / "out"
    options = [*TASKS[task], "--eval-every", "100"] if where == SEAL else TASKS[task]  # so that only steps save
    done = train_signalled(folder, options, output, signal.SIGKILL, where, count)
    assert done.code == -signal.SIGKILL, done.stderr
    assert not output.exists()
    assert max(steps_kept(output)) == resumed_from
    if where == SEAL:
        assert RunDirectory.of(output).at(6).is_dir()  # torn: there, and not whole

    outcome = train(folder, options, output, "--resume", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["resumed_from"] == resumed_from
    if where != SEAL:
        same_but_for_the_output(tree(output), whole(task))
    assert names_beside(output) == []


@pytest.mark.parametrize("where", [PUBLISH, CLEAN_UP], ids=["before it is published", "before it is cleaned up"])
def test_run_killed_at_its_end_is_published_once(
    folder: Path, tmp_path: Path, whole: Callable[[str], dict[str, bytes]], where: tuple[str, str, str]
) -> None:
    output = tmp_path / "out"
    done = train_signalled(folder, CAUSAL, output, signal.SIGKILL, where, 1)
    assert done.code == -signal.SIGKILL, done.stderr
    outcome = train(folder, CAUSAL, output, "--resume", "--json")
    if where == PUBLISH:
        assert outcome.code == 0, outcome.stderr
        assert outcome.json["seconds"] == 0  # no step was repeated
    else:
        assert outcome.code == 6
        assert "exists" in outcome.json["error"]["message"]
    same_but_for_the_output(tree(output), whole("causal"))
    assert names_beside(output) == []


def test_run_interrupted_before_its_first_step_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    done = train_signalled(folder, CAUSAL, tmp_path / "a" / "out", signal.SIGTERM, BEGIN, 1)
    assert done.code == 143, done.stderr
    assert "terminated; the output is as it was" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_second_interrupt_ends_at_once(folder: Path, tmp_path: Path) -> None:
    """The first comes in step 7, the second while its checkpoint is saved."""
    done = train_signalled(folder, CAUSAL, tmp_path / "out", signal.SIGINT, STEP, 7, at_seal_too=True)
    assert done.code == 130, done.stderr
    assert "interrupted; the output is as it was" in done.stderr
    assert max(steps_kept(tmp_path / "out")) == 6
    assert train(folder, CAUSAL, tmp_path / "out", "--resume").code == 0


def test_resumed_run_must_be_the_same_run(inside: Path, tmp_path: Path) -> None:
    """Every difference is named, nothing is lost, and the right command still goes on."""
    output = tmp_path / "out"
    done = train_signalled(inside, CAUSAL, output, signal.SIGTERM, STEP, 4)
    assert done.code == 143, done.stderr
    shutil.copy(inside / "sums.jsonl", tmp_path / "changed.jsonl")
    write_jsonl(tmp_path / "changed.jsonl", sums(41)[1:])
    other = ["--rank", "2", "--seed", "5", "--learning-rate", "0.1", "--data", str(tmp_path / "changed.jsonl")]
    before = tree(tmp_path)
    outcome = run("train", *CAUSAL, *other, "--output", output, "--resume")
    assert outcome.code == 4, outcome.stderr
    for name in ("rank was 8, is 2", "seed was 0, is 5", "learning-rate was 0.005, is 0.1", "rows: data was "):
        assert name in outcome.stderr
    left = {name: content for name, content in tree(tmp_path).items() if "/data/" not in name}
    assert left == {name: content for name, content in before.items() if "/data/" not in name}
    free = ["--save-every", "5", "--save-limit", "1", "--run-name", "other", "--log-every", "2"]
    outcome = run("train", *CAUSAL, *free, "--output", output, "--resume", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["resumed_from"] == 4


def test_overwrite_starts_an_interrupted_run_over(inside: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train_signalled(inside, CAUSAL, output, signal.SIGTERM, STEP, 4).code == 143
    outcome = run("train", *CAUSAL, "--max-steps", "3", "--output", output, "--overwrite", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["resumed_from"] is None
    assert names_beside(output) == []


def test_interrupted_run_keeps_the_old_output_until_the_end(inside: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run("train", *CAUSAL, "--max-steps", "1", "--output", output).code == 0
    old = tree(output)
    assert train_signalled(inside, CAUSAL, output, signal.SIGTERM, STEP, 4, "--overwrite").code == 143
    assert tree(output) == old
    outcome = run("train", *CAUSAL, "--output", output, "--overwrite", "--resume", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["resumed_from"] == 4
    assert tree(output) != old


def test_resume_without_anything_to_resume_starts(inside: Path, tmp_path: Path) -> None:
    outcome = run("train", *CAUSAL, "--max-steps", "1", "--output", tmp_path / "out", "--resume")
    assert outcome.code == 0, outcome.stderr
    assert "there is no checkpoint to go on from" in outcome.stderr


# The directory of checkpoints


def test_two_runs_cannot_train_one_output(tmp_path: Path) -> None:
    directory = RunDirectory.of(tmp_path / "out")
    with (
        directory.held(resume=False, overwrite=False),
        pytest.raises(OutputError, match="another run is training"),
        RunDirectory.of(tmp_path / "out").held(resume=False, overwrite=True),
    ):
        pass
    assert not directory.path.exists()


def test_second_run_does_not_clear_away_the_first(tmp_path: Path) -> None:
    """The first has no checkpoint yet, only the lock and what it is working on."""
    directory = RunDirectory.of(tmp_path / "out")
    with directory.held(resume=False, overwrite=False):
        directory.begin({"settings": {}})
        with pytest.raises(OutputError), directory.held(resume=False, overwrite=True):
            pass
        assert (directory.path / "run.json").is_file()


def test_parents_that_were_made_go_when_nothing_came_of_the_run(tmp_path: Path) -> None:
    directory = RunDirectory.of(tmp_path / "a" / "b" / "out")
    with pytest.raises(KeyboardInterrupt), directory.held(resume=False, overwrite=False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def write_checkpoint(directory: RunDirectory, step: int) -> None:
    """What transformers writes, with no care."""
    folder = directory.at(step)
    (folder / "sub").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "trainer_state.json", "sub/shard"):
        (folder / name).write_text(f"{name} of {step}")


def is_whole(folder: Path) -> bool:
    step = folder.name.removeprefix("checkpoint-")
    names = ("adapter_model.safetensors", "trainer_state.json", "sub/shard")
    return all((folder / name).is_file() and (folder / name).read_text() == f"{name} of {step}" for name in names)


def test_kill_at_any_call_leaves_a_whole_checkpoint_to_go_on_from(fast_folder: Path) -> None:
    """While one is sealed and older ones are removed; the best one, after step 1, is never touched."""

    def prepare() -> RunDirectory:
        shutil.rmtree(fast_folder / ".out.hra-export-train", ignore_errors=True)
        directory = RunDirectory.of(fast_folder / "out")
        directory.path.mkdir()
        directory.begin({"settings": {}})
        for step in (1, 2, 3):
            write_checkpoint(directory, step)
            directory.seal(step, is_last=False)
        write_checkpoint(directory, 4)
        return directory

    def work(directory: RunDirectory) -> Any:
        def save() -> None:
            directory.seal(4, is_last=True)
            directory.rotate(keep=1, best=1)

        return save

    point, seen = 0, set()
    while True:
        point += 1
        directory = prepare()
        survived = lives(work(directory), point=point)
        kept = directory.checkpoints()
        assert all(is_whole(checkpoint.path) for checkpoint in kept), point
        steps = [checkpoint.step for checkpoint in kept]
        assert 1 in steps
        assert steps[-1] in (3, 4)
        seen.add(tuple(steps))
        if survived:
            break
    assert steps == [1, 4]
    assert kept[-1].is_last
    assert seen == {(1, 2, 3), (1, 2, 3, 4), (1, 3, 4), (1, 4)}  # the oldest goes first
    assert point > 15


def test_checkpoint_without_its_mark_is_none(tmp_path: Path) -> None:
    directory = RunDirectory.of(tmp_path / "out")
    write_checkpoint(directory, 3)
    assert directory.last() is None
    (directory.at(3) / MARKER_NAME).mkdir()
    assert directory.last() is None
