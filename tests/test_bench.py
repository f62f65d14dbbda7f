"""`hra-export bench` on tiny graphs: what is run, with which feeds, and what is told of it."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hra_export.adapter import HraAdapter, write_adapter
from hra_export.bench import take_turns
from hra_export.contenders import Contender
from hra_export.errors import GraphError
from hra_export.graph.values import TensorSpec
from hra_export.workload import Load, feeds_of, loads_of
from tests import tiny_models
from tests.command_line import run

IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("attention_mask", "int64", ("batch", "total_sequence"))
POSITIONS = TensorSpec("position_ids", "int64", ("batch", "sequence"))
KEYS = TensorSpec("past_key_values.0.key", "float32", ("batch", 2, "past_sequence", 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer, an adapter, the two as a swappable graph, and a copy of it."""
    folder = tmp_path_factory.mktemp("bench")
    model: Any = tiny_models.build("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder / "base")
    vectors = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    adapter = HraAdapter({"model.layers.0.self_attn.q_proj": vectors}, 4, base=str(folder / "base"), task="CAUSAL_LM")
    write_adapter(adapter, folder / "adapter")
    written = run("onnx", folder / "adapter", "--output", folder / "graph", "--swappable", "--no-validate")
    assert written.code == 0, written.stderr
    shutil.copytree(folder / "graph", folder / "copy")
    return folder


def test_bench_measures_every_contender_and_load(folder: Path) -> None:
    graph, copy, drawn = folder / "graph", folder / "copy", folder / "figure.svg"
    options: list[str | Path] = ["--tokens", "5", "--rounds", "1", "--threads", "1", "--plot", drawn]
    outcome = run("bench", graph, copy, *options, "--adapter", folder / "adapter", "--json")
    assert outcome.code == 0, outcome.stderr
    names = [str(graph), f"{graph} + adapter", str(copy), f"{copy} + adapter", "PyTorch"]
    timings = outcome.json["timings"]
    assert [(each["load_name"], each["contender"]) for each in timings] == [
        (load, name) for load in ("prefill", "decode") for name in names
    ]
    assert all(each["median_seconds"] > 0 for each in timings)
    assert [each["ratio"] for each in timings if each["contender"] == names[0]] == [1.0, 1.0]
    prefill, decode = timings[0], timings[len(names)]
    assert prefill["per_second"] == pytest.approx(5 / prefill["median_seconds"])
    assert decode["per_second"] == pytest.approx(1 / decode["median_seconds"])
    assert drawn.read_text().startswith("<?xml")


def test_bench_prints_a_table(folder: Path) -> None:
    outcome = run("bench", folder / "graph", "--tokens", "3", "--rounds", "1", "--threads", "1")
    assert outcome.code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].split("  ")[0] == "load"
    assert [line.split()[0] for line in lines[2:6]] == ["prefill", "prefill", "decode", "decode"]
    assert "reflect, fp32" in lines[-1]


REFUSED = {
    "no graph": (["base"], 4, "model.onnx"),
    "no directory": (["missing"], 4, "missing"),
    "base without adapter": (["graph", "--base", "base"], 2, "--adapter"),
    "unknown figure": (["graph", "--plot", "figure.doc"], 2, ".png"),
    "no provider": (["graph", "--provider", "cuda"], 7, "CUDAExecutionProvider"),
}


@pytest.mark.parametrize(("arguments", "code", "word"), REFUSED.values(), ids=REFUSED)
def test_bench_refuses(folder: Path, arguments: list[str], code: int, word: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    paths = [folder / each if each in ("base", "graph", "missing") else each for each in arguments]
    outcome = run("bench", *paths)
    assert outcome.code == code, outcome.stderr
    assert word in outcome.stderr
    assert not outcome.stdout


def test_bench_error_is_json_too(folder: Path) -> None:
    assert json.loads(run("bench", folder / "base", "--json").stdout)["error"]["exit_code"] == 4


def test_decoder_has_prefill_and_decode() -> None:
    loads = loads_of({"model": [IDS, MASK, POSITIONS, KEYS]}, batch=3, tokens=7)
    assert loads == [Load("prefill", "model", 3, 7), Load("decode", "model", 3, 1, past=7)]


def test_encoder_decoder_has_encode_and_decode() -> None:
    loads = loads_of({"encoder_model": [IDS], "decoder_model": [IDS, KEYS]}, batch=1, tokens=7)
    assert [(load.name, load.graph, load.past, load.source) for load in loads] == [
        ("encode", "encoder_model", 0, 7),
        ("decode", "decoder_model", 7, 7),
    ]


def test_feeds_continue_the_cache() -> None:
    feeds = feeds_of([IDS, MASK, POSITIONS, KEYS], Load("decode", "model", 3, 1, past=7), widths={})
    assert {name: array.shape for name, array in feeds.items()} == {
        "input_ids": (3, 1),
        "attention_mask": (3, 8),
        "position_ids": (3, 1),
        "past_key_values.0.key": (3, 2, 7, 8),
    }
    assert np.all(feeds["attention_mask"] == 1)
    assert np.all(feeds["position_ids"] == 7)
    assert feeds["past_key_values.0.key"].std() > 0.5


def test_feeds_name_every_size_they_do_not_know() -> None:
    odd = [TensorSpec("pixels", "float32", ("batch", "channels")), TensorSpec("noise", "float32", (None, "s12"))]
    with pytest.raises(GraphError) as caught:
        feeds_of([IDS, *odd], Load("forward", "model", 1, 7), widths={})
    assert [finding.partition(":")[0] for finding in caught.value.findings] == ["`pixels`", "`noise`"]


def test_turns_alternate_and_do_not_count_their_first_run() -> None:
    runs: list[str] = []

    def runner(name: str, pause: float) -> Contender:
        def step() -> None:
            runs.append(name)
            time.sleep(pause)

        return Contender(name, step)

    seconds = take_turns([runner("a", 0.02), runner("b", 0.0)], rounds=2, turn_seconds=0.01)
    assert len(seconds["a"]) == 2
    assert min(seconds["a"]) >= 0.02
    order = [name for index, name in enumerate(runs) if index == 0 or runs[index - 1] != name]
    assert order == ["a", "b", "a", "b", "a"]  # once each, then there and back
    assert runs.count("a") == 1 + 2 * 2
