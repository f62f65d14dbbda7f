"""Merges that are killed, interrupted, started again, and started twice: what is on disk, do the bytes agree."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hra_export.adapter import read_adapter
from hra_export.checkpoint import MANIFEST_NAME, open_checkpoint
from hra_export.merge import merge_checkpoint
from hra_export.places import Places, valid_record
from hra_export.planning import plan_merge
from tests.command_line import ENVIRONMENT, run
from tests.synthetic import (
    Sizes,
    linear_modules,
    names_beside,
    random_chains,
    random_tensor,
    read_tree,
    stored,
    toy_tensors,
    write_adapter_files,
    write_base,
)

CAMPAIGN = Path(__file__).with_name("merge_campaign.py")
LAST_SHARD = "model-00003-of-00003.safetensors"
# The command line with every copy into the last shard slowed down, so that an interrupt comes in the middle of it.
SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
real, first = os.copy_file_range, []
def slow(source, target, *rest):
    path = os.readlink(f"/proc/self/fd/{target}")
    if "00003-of" in path:
        time.sleep(1)
    return real(source, target, *rest)
os.copy_file_range = slow
from hra_export.cli import main
main()
"""
PATIENCE_S = 30.0

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="patches copy_file_range")


@pytest.mark.parametrize("mode", ["fresh", "overwrite"])
def test_merge_killed_at_any_call_leaves_old_or_complete_and_can_be_run_again(fast_folder: Path, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), mode, str(fast_folder)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["points"] > 120
    assert figures["resumed"] > 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base in three shards, two of them merely to be copied, and an adapter on all of its linear layers."""
    tensors = toy_tensors()
    copied = {f"model.extra.{i}.weight": random_tensor(8, 8, seed=i) for i in range(2 * len(tensors))}
    write_base(tmp_path / "base", {**tensors, **copied}, shards=3)
    write_adapter_files(tmp_path / "adapter", random_chains(linear_modules()))
    (tmp_path / "out").mkdir()
    return tmp_path


def merge_arguments(folder: Path, *more: str) -> list[str]:
    return [
        "merge",
        str(folder / "adapter"),
        "--base",
        str(folder / "base"),
        "-o",
        str(folder / "out" / "merged"),
        *more,
    ]


def finished(output: Path) -> list[str]:
    """The shards that the next run may take up."""
    record = valid_record(Places.of(output))
    return [] if record is None else [name for name in record.files if name.endswith(".safetensors")]


@needs_linux
@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["SIGINT", "SIGTERM"],
)
@pytest.mark.parametrize("has_old", [False, True], ids=["fresh", "overwrite"])
def test_merge_interrupted_leaves_the_output_as_it_was_and_goes_on_next_time(
    folder: Path, number: signal.Signals, code: int, says: str, has_old: bool
) -> None:
    output = folder / "out" / "merged"
    more = ["--overwrite"] if has_old else []
    if has_old:
        assert run(*merge_arguments(folder, "--strength", "0.5")).code == 0
    old = read_tree(output)
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *merge_arguments(folder, *more)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not finished(output):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        sent = time.monotonic()
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert time.monotonic() - sent < 8  # the copies still to be made would take 10 s
    assert stdout == ""
    assert f"{says}; the output is as it was, or complete" in stderr
    assert "Traceback" not in stderr
    assert "Exception" not in stderr
    assert read_tree(output) == old
    kept = {name: (Places.of(output).stage / name).stat() for name in finished(output)}
    assert kept
    assert LAST_SHARD not in kept

    assert run(*merge_arguments(folder, *more)).code == 0
    for name, before in kept.items():
        after = (output / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert names_beside(output) == []
    shutil.copytree(folder, folder / "again", ignore=shutil.ignore_patterns("out"))
    assert run(*merge_arguments(folder / "again")).code == 0
    assert read_tree(output) == read_tree(folder / "again" / "out" / "merged")


@needs_linux
def test_merge_with_other_options_does_not_take_up_what_an_interrupted_one_left(folder: Path) -> None:
    """The shards have the same names and sizes, and other values."""
    output = folder / "out" / "merged"
    with subprocess.Popen([sys.executable, "-c", SLOW, *merge_arguments(folder, "-q")], env=ENVIRONMENT) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not finished(output):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert run(*merge_arguments(folder, "--strength", "0.5")).code == 0
    half = read_tree(output)
    shutil.rmtree(output)
    assert run(*merge_arguments(folder, "--strength", "0.5")).code == 0
    assert read_tree(output) == half
    assert names_beside(output) == []


def merge(folder: Path, output: str, **options: Any) -> dict[str, bytes]:
    plan = plan_merge(open_checkpoint(folder / "base"), [read_adapter(folder / "adapter")])
    merge_checkpoint(plan, folder / output, **options)
    tree = read_tree(folder / output)
    assert tree is not None
    return tree


def test_merge_writes_the_same_bytes_with_one_worker_and_with_several(folder: Path) -> None:
    first = merge(folder, "first", workers=1)
    assert MANIFEST_NAME in first
    assert merge(folder, "second", workers=1) == first
    assert merge(folder, "third", workers=2) == first
    assert merge(folder, "fourth", workers=5) == first


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "GS"])
def test_merge_writes_the_same_bytes_whatever_number_of_threads_torch_was_left_with(
    tmp_path: Path, orthogonalize: bool
) -> None:
    """A QR of this size gives other last bits on two threads than on one; float32 weights show them."""
    write_base(
        tmp_path / "base", {"proj.weight": random_tensor(256, 2048), "up.weight": random_tensor(64, 512)}, config={}
    )
    chains = random_chains({"proj": 2048, "up": 512}, 32)
    write_adapter_files(tmp_path / "adapter", chains, rank=32, apply_GS=orthogonalize)
    before = torch.get_num_threads()
    try:
        trees = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            trees.append(merge(tmp_path, f"out-{threads}", workers=2))
            assert torch.get_num_threads() == threads  # it is the caller's setting, and given back
    finally:
        torch.set_num_threads(before)
    assert trees[0] == trees[1] == trees[2]


def test_merge_of_large_tensors_is_the_same_whichever_block_is_ready_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured sums of floats depend on their order, and the manifest shows them."""
    from hra_export import stream

    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 256)
    write_base(tmp_path / "base", toy_tensors(Sizes(layers=1)))
    write_adapter_files(tmp_path / "adapter", random_chains(linear_modules(Sizes(layers=1))))
    trees = [merge(tmp_path, "quiet", workers=3)]
    real, delays = stream.Streamer._run, np.random.default_rng(0)

    def late(self: stream.Streamer, block: Any) -> Any:
        tally = real(self, block)
        time.sleep(float(delays.random()) * 0.002)
        return tally

    monkeypatch.setattr(stream.Streamer, "_run", late)
    trees += [merge(tmp_path, f"late-{i}", workers=3) for i in range(2)]
    assert trees[0] == trees[1] == trees[2]


def test_merge_of_an_adapter_changed_meanwhile_starts_over(folder: Path) -> None:
    """A run with another adapter is other work, though its shards look the same."""
    output = folder / "out" / "merged"

    def stop(_: int) -> None:
        if finished(output):
            raise KeyboardInterrupt

    plan = plan_merge(open_checkpoint(folder / "base"), [read_adapter(folder / "adapter")])
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(plan, output, workers=1, progress=stop)
    assert finished(output)
    shutil.rmtree(folder / "adapter")
    write_adapter_files(folder / "adapter", random_chains(linear_modules(), seed=7))
    expected = merge(folder, "expected")
    assert merge(folder, "out/merged") == expected


def test_two_merges_at_once_end_as_one_that_wrote_and_one_that_was_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", {**toy_tensors(), "model.extra.weight": stored(np.zeros((4000, 1000)))})
    write_adapter_files(tmp_path / "adapter", random_chains(linear_modules()))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "hra_export", *merge_arguments(tmp_path, "--json")]
    processes = [
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 6, 6], outputs
    assert all("Traceback" not in stderr for _, stderr in outputs)
    assert (tmp_path / "out" / "merged" / MANIFEST_NAME).is_file()
    assert names_beside(tmp_path / "out" / "merged") == []
