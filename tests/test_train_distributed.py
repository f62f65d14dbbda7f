"""Training in two processes, on gloo: plain data parallelism and FSDP 2 end as one process does, and one speaks."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hra_export.adapter import HraAdapter, read_adapter
from hra_export.training.checkpoints import RunDirectory
from tests.command_line import ENVIRONMENT, run
from tests.synthetic import names_beside
from tests.train_scene import opinions, save_base, save_encoder, sums, tree, write_jsonl

EXITING = Path(__file__).with_name("exit_sharded.py")
WORKER = Path(__file__).with_name("train_sharded.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
PATIENCE_S = 250
# Rounding of sums in another order is a few units of 2⁻²⁴ of a gradient. ε in Adam's denominator, far above the root
# of the gradients' squares, keeps a step proportional to the gradient, so the vectors differ by about as much of the
# way they went; a thousandth of it is far above that, and far below what one wrong row in eight would do.
SAME = 1e-3
STEADY = ["--adam-epsilon", "0.01", "--learning-rate", "0.05", "--warmup", "0"]
CAUSAL = ["--base", "llama", "--data", "sums.jsonl", "--max-steps", "4", "--eval-split", "0.2", "--eval-every", "2"]
LABELLED = [
    *("--base", "bert", "--data", "opinions.jsonl", "--max-steps", "3", "--regularization", "0.01", "--bias", "all"),
    *("--eval-split", "0.25"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_base(folder / "llama")
    encoder = save_encoder(folder / "bert")
    config = encoder / "config.json"
    config.write_text(config.read_text().replace('_dropout_prob": 0.1', '_dropout_prob": 0.0'))
    write_jsonl(folder / "sums.jsonl", sums(40))
    write_jsonl(folder / "opinions.jsonl", opinions(40))
    return folder


def launch(
    folder: Path, launcher: Sequence[str], options: Sequence[str], output: Path, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Train in two processes, each with half of the rows of a step."""
    command = [*launcher, "train", *options, *STEADY, "--batch-size", "4", "--output", str(output), *more]
    return subprocess.run(
        command,
        cwd=folder,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def train_alone(folder: Path, options: Sequence[str], output: Path, *more: str) -> HraAdapter:
    before = Path.cwd()
    os.chdir(folder)
    try:
        outcome = run("train", *options, *STEADY, "--batch-size", "8", "--output", output, *more)
    finally:
        os.chdir(before)
    assert outcome.code == 0, outcome.stderr
    return read_adapter(output)


def distance(one: HraAdapter, other: HraAdapter) -> float:
    """Over chains and saved parameters alike."""
    left, right = ({**adapter.chains, **adapter.parameters} for adapter in (one, other))
    assert left.keys() == right.keys()
    assert {name: value.shape for name, value in left.items()} == {name: value.shape for name, value in right.items()}
    return float(torch.stack([(left[name] - right[name]).square().sum() for name in left]).sum().sqrt())


def check_same(folder: Path, options: Sequence[str], output: Path, tmp_path: Path) -> None:
    alone = train_alone(folder, options, tmp_path / "alone")
    still = train_alone(folder, options, tmp_path / "still", "--learning-rate", "0")
    moved = distance(alone, still)
    assert moved > 0.01
    assert distance(read_adapter(output), alone) < SAME * moved
    assert names_beside(output) == ["alone", "still"]


@pytest.mark.parametrize("options", [CAUSAL, LABELLED], ids=["causal", "labelled"])
def test_data_parallel_run_ends_as_one_process_does(folder: Path, tmp_path: Path, options: list[str]) -> None:
    done = launch(folder, [*ACCELERATE, "-m", "hra_export"], options, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote `") == 1
    assert done.stderr.count("one row; what stands in [[ ]]") == 1
    check_same(folder, options, tmp_path / "out", tmp_path)


@pytest.mark.parametrize("options", [CAUSAL, LABELLED], ids=["causal", "labelled"])
def test_dry_run_of_several_processes_shows_one_plan(folder: Path, tmp_path: Path, options: list[str]) -> None:
    before = tree(tmp_path)
    done = launch(folder, [*ACCELERATE, "-m", "hra_export"], options, tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("would write") == 1
    assert done.stderr.count("one row; what stands in [[ ]]") == 1
    assert tree(tmp_path) == before


def test_sharded_run_is_stopped_and_resumed_and_ends_as_one_process_does(folder: Path, tmp_path: Path) -> None:
    """The signal reaches one process only; all save the same step."""
    output = tmp_path / "out"
    worker = [*TORCHRUN, str(WORKER)]
    done = launch(folder, worker, CAUSAL, output, **FSDP, STOP_AT="3")
    assert done.returncode != 0
    assert done.stderr.count("stopped after step 3") == 1
    last = RunDirectory.of(output).last()
    assert last is not None
    assert last.step == 3
    assert all(vectors.numel() for vectors in read_adapter(last.path).chains.values())
    done = launch(folder, worker, CAUSAL, output, "--resume", **FSDP)
    assert done.returncode == 0, done.stderr
    assert "in 4 steps from step 3" in done.stdout
    check_same(folder, CAUSAL, output, tmp_path)


def test_penalty_with_sharded_vectors_is_refused_by_one_voice(folder: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    worker = [*TORCHRUN, str(WORKER)]
    done = launch(folder, worker, CAUSAL, tmp_path / "out", "--regularization", "0.1", **FSDP)
    assert done.returncode != 0
    assert done.stderr.count("error: the orthogonality penalty needs whole reflection vectors") == 1
    assert "exitcode  : 8" in done.stderr  # of the processes, as torchrun tells it
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="threads are starved through /proc")
def test_process_that_ends_while_gloo_tidies_up_keeps_its_exit_code() -> None:
    done = subprocess.run(
        [*TORCHRUN, str(EXITING)], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("version") == 2
