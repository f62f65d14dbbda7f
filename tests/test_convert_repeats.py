"""The same inputs give the same bytes, whatever is converted; and other inputs never take up what a run left behind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hra_export import publish
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import open_checkpoint
from hra_export.low_rank import HraSource
from hra_export.merge import merge_checkpoint
from hra_export.planning import plan_merge
from hra_export.registry import load_converter
from tests.command_line import run
from tests.synthetic import (
    linear_modules,
    random_chains,
    random_tensor,
    read_tree,
    toy_tensors,
    write_adapter_files,
    write_base,
)

RANK = 4
WIDTH = 32
EPSILON = 1e-4


def put_sources(folder: Path) -> None:
    """A base, two adapters, a LoRA made of one, a model with it, and a file of the authors' LLaMA code."""
    write_base(folder / "base", toy_tensors(dtype="F32"))
    for name, seed in (("first", 1), ("second", 2)):
        write_adapter_files(folder / name, random_chains(linear_modules(), RANK, seed=seed), rank=RANK)
    soft = {f"base_model.model.{module}.oft_r": random_tensor(WIDTH, RANK, seed=3) for module in square_modules()}
    write_adapter_files(folder / "official", soft, peft_type="OFT", eps=EPSILON)
    hard = {f"base_model.model.{module}.hra_u": random_tensor(width, RANK) for module, width in LAYERS.items()}
    write_adapter_files(folder / "draft", hard)
    for command in (
        ("convert", folder / "first", "--base", folder / "base", "--to", "lora", "-o", folder / "lora"),
        ("merge", folder / "first", "--base", folder / "base", "-o", folder / "model"),
    ):
        assert run(*command).code == 0


LAYERS = linear_modules()


def square_modules() -> list[str]:
    return [module for module in LAYERS if module.endswith(("q_proj", "o_proj"))]


COMMANDS: dict[str, tuple[str, ...]] = {
    "lora": ("first", "second", "--to", "lora", "--base", "base"),
    "half as lora": ("first", "--to", "lora", "--base", "base", "--strength", "0.5", "--dtype", "bfloat16"),
    "ranks as lora": (
        "first",
        "second",
        "--to",
        "lora",
        "--base",
        "base",
        "--mixed-ranks",
        "--interpolation",
        "linear",
    ),
    "gguf": ("first", "second", "--to", "gguf", "--base", "base"),
    "hra": ("first", "second", "--to", "hra"),
    "half as hra": ("first", "--to", "hra", "--strength", "0.5"),
    "official as lora": ("official", "--from", "official", "--to", "lora", "--base", "base"),
    "official as weights": ("official", "--from", "official", "--to", "merged", "--base", "base"),
    "official as hra": ("draft", "--from", "official", "--layout", "peft", "--no-gram-schmidt", "--to", "hra"),
    "nearest to lora": ("lora", "--from", "lora", "--to", "hra", "--rank", "2", "--base", "base"),
    "nearest to a model": ("model", "--from", "full-model", "--to", "hra", "--rank", "2", "--base", "base"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_conversion_elsewhere_gives_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files hold no time, no path of this machine, and nothing that a run leaves to chance."""
    trees = []
    for place in ("here", "there"):
        folder = tmp_path / place
        folder.mkdir()
        monkeypatch.chdir(folder)
        put_sources(folder)
        outcome = run("convert", *COMMANDS[name], "-o", "out")
        assert outcome.code == 0, outcome.stderr
        made = folder / "out"
        trees.append({"": made.read_bytes()} if made.is_file() else read_tree(made))
    assert trees[0] == trees[1]
    assert trees[0]


Work = Callable[[Path, HraAdapter], object]


def as_lora(folder: Path, adapter: HraAdapter) -> object:
    return load_converter("to_lora").convert(
        HraSource([adapter]), folder / "out", base=open_checkpoint(folder / "base")
    )


def as_merge(folder: Path, adapter: HraAdapter) -> object:
    return merge_checkpoint(plan_merge(open_checkpoint(folder / "base"), [adapter]), folder / "out")


@pytest.mark.parametrize("work", [as_lora, as_merge])
def test_adapters_in_memory_never_take_up_the_work_of_another(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no file whose digest would tell them apart."""
    write_base(tmp_path / "base", toy_tensors(dtype="F32"))
    first, second = (
        HraAdapter({module: torch.from_numpy(gaussian(d, seed)) for module, d in LAYERS.items()}, RANK)
        for seed in (1, 2)
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(publish.Stage, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path, first)
    work(tmp_path, second)
    mixed = read_tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "mixed")
    work(tmp_path, second)
    assert read_tree(tmp_path / "out") == mixed


def gaussian(d: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((d, RANK), dtype=np.float32)
