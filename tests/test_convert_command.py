"""`hra-export convert` through the command line: what it prints, what it writes, and what it refuses.

Every refusal is checked against the folder, byte for byte: nothing is written, the inputs are untouched.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command_line import Outcome, run
from tests.refusals import Case, Refusals
from tests.synthetic import (
    dense_chain,
    linear_modules,
    random_chains,
    random_tensor,
    read_tensors,
    read_tree,
    toy_tensors,
    write_adapter_files,
    write_base,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"
PREFIX = "base_model.model."
WIDTH = 32
# Values near 1 are computed in float64 and rounded to float32 once or twice, 6e-8 each; measured: 5e-8. The margin is
# for products of two written chains and entries that add up many roundings.
RTOL32 = 1e-6


@dataclass(frozen=True)
class Scene:
    """A folder with a good `base`, a good `adapter`, and the `output` still to be made."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def put_adapter(self, name: str, *, rank: int = 4, modules: tuple[str, ...] = (Q_PROJ, UP_PROJ)) -> Path:
        chains = random_chains(dict.fromkeys(modules, WIDTH), rank=rank, seed=len(name))
        return write_adapter_files(self.folder / name, chains, rank=rank)

    def convert(self, *arguments: str | Path) -> Outcome:
        given = [*arguments] if "--output" in arguments else [*arguments, "--output", self.output]
        return run("convert", *given)


refused: Refusals[Scene] = Refusals()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path)
    write_base(scene.base, toy_tensors(dtype="F32"))
    scene.put_adapter("adapter")
    return scene


def vectors(adapter: Path, module: str) -> np.ndarray[Any, Any]:
    return read_tensors(adapter)[f"{PREFIX}{module}.hra_u"].values()


def test_lora_factors_are_the_change_of_the_weight(scene: Scene) -> None:
    outcome = scene.convert(scene.adapter, "--base", scene.base, "--to", "lora", "--json")
    assert outcome.code == 0, outcome.stderr
    assert (outcome.json["verb"], outcome.json["to"], outcome.json["ranks"]) == (
        "convert",
        "lora",
        {Q_PROJ: 4, UP_PROJ: 4},
    )
    assert 0 < outcome.json["error"] < RTOL32
    written = read_tensors(scene.output)
    weight = read_tensors(scene.base)[f"{Q_PROJ}.weight"].values()
    exact = weight @ dense_chain(vectors(scene.adapter, Q_PROJ)) - weight
    got = written[f"{PREFIX}{Q_PROJ}.lora_B.weight"].values() @ written[f"{PREFIX}{Q_PROJ}.lora_A.weight"].values()
    assert np.linalg.norm(got - exact) < RTOL32 * np.linalg.norm(exact)


def test_the_tokenizer_that_was_trained_with_travels_along(scene: Scene) -> None:
    (scene.adapter / "tokenizer.json").write_text("{}")
    for target in ("lora", "hra"):
        output = scene.folder / target
        outcome = scene.convert(scene.adapter, "--base", scene.base, "--to", target, "--output", output)
        assert outcome.code == 0, outcome.stderr
        assert (output / "tokenizer.json").read_text() == "{}"


def test_what_was_done_is_told_to_people(scene: Scene) -> None:
    outcome = scene.convert(scene.adapter, "--base", scene.base, "--to", "lora")
    assert "2 targets of rank 4, LoRA of PEFT" in outcome.stdout
    assert "ΔW is off by" in outcome.stdout
    assert f"wrote `{scene.output}`" in outcome.stdout


def test_a_dry_run_tells_the_plan_and_writes_nothing(scene: Scene) -> None:
    before = read_tree(scene.folder)
    for target in ("lora", "hra", "gguf"):
        outcome = scene.convert(scene.adapter, "--base", scene.base, "--to", target, "--dry-run")
        assert (outcome.code, "2 targets of rank 4" in outcome.stdout) == (0, True), outcome.stderr
    assert read_tree(scene.folder) == before


def test_adapters_compose_in_the_order_given(scene: Scene) -> None:
    other = scene.put_adapter("other", rank=2)
    assert scene.convert(scene.adapter, other, "--to", "hra").code == 0
    product = dense_chain(vectors(scene.adapter, Q_PROJ)) @ dense_chain(vectors(other, Q_PROJ))
    np.testing.assert_allclose(dense_chain(vectors(scene.output, Q_PROJ)), product, atol=RTOL32)
    assert json.loads((scene.output / "adapter_config.json").read_text())["r"] == 6


def test_half_of_a_rotation_twice_is_the_whole(scene: Scene) -> None:
    assert scene.convert(scene.adapter, "--to", "hra", "--strength", "0.5").code == 0
    half = dense_chain(vectors(scene.output, Q_PROJ))
    np.testing.assert_allclose(half @ half, dense_chain(vectors(scene.adapter, Q_PROJ)), atol=RTOL32)


def test_a_linear_part_of_a_change_is_a_lora_adapter_of_so_much(scene: Scene) -> None:
    linear = ("--strength", "0.25", "--interpolation", "linear", "--json")
    outcome = scene.convert(scene.adapter, "--base", scene.base, "--to", "lora", *linear)
    whole = scene.convert(scene.adapter, "--base", scene.base, "--to", "lora", "--json", "--overwrite")
    assert outcome.json["delta_norm"] == pytest.approx(whole.json["delta_norm"] / 4, rel=RTOL32)


def test_there_and_back_through_lora(scene: Scene) -> None:
    assert scene.convert(scene.adapter, "--base", scene.base, "--to", "lora").code == 0
    back = scene.folder / "back"
    nearest = ("--from", "lora", "--to", "hra", "--rank", "4", "--base", scene.base, "--json")
    outcome = scene.convert(scene.output, *nearest, "--output", back)
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["error"] < RTOL32
    for module in (Q_PROJ, UP_PROJ):
        exact = dense_chain(vectors(scene.adapter, module))
        np.testing.assert_allclose(dense_chain(vectors(back, module)), exact, atol=RTOL32)


def test_from_a_merged_model_back_to_the_adapter(scene: Scene) -> None:
    merged = scene.folder / "merged"
    assert run("merge", scene.adapter, "--base", scene.base, "--output", merged).code == 0
    nearest = ("--from", "full-model", "--to", "hra", "--rank", "4", "--base", scene.base, "--json")
    outcome = scene.convert(merged, *nearest)
    assert outcome.code == 0, outcome.stderr
    assert sorted(outcome.json["ranks"]) == [Q_PROJ, UP_PROJ]
    assert outcome.json["error"] < RTOL32  # these chains are far from parallel: ΔW is as large as W


def test_a_gguf_adapter_is_one_file(scene: Scene) -> None:
    output = scene.folder / "folder" / "adapter.gguf"
    outcome = scene.convert(scene.adapter, "--base", scene.base, "--to", "gguf", "--output", output)
    assert outcome.code == 0, outcome.stderr
    first = output.read_bytes()
    assert first[:4] == b"GGUF"
    assert [path.name for path in output.parent.iterdir()] == ["adapter.gguf"]
    again = scene.convert(scene.adapter, "--base", scene.base, "--to", "gguf", "--output", output, "--overwrite")
    assert (again.code, output.read_bytes() == first) == (0, True)


def put_llama_layout(scene: Scene) -> Path:
    """An adapter as the authors' LLaMA code writes it: softened reflections after the layer."""
    folder = scene.folder / "official"
    chains = {f"{PREFIX}{Q_PROJ}.oft_r": random_tensor(WIDTH, 4, scale=0.01)}
    return write_adapter_files(folder, chains, peft_type="OFT", eps=1e-4)


def softened(u: np.ndarray[Any, Any], epsilon: float) -> np.ndarray[Any, Any]:
    """H_1 H_2 … with û = u / √(‖u‖² + ε)."""
    product = np.eye(len(u))
    for column in (u / np.sqrt((u**2).sum(axis=0) + epsilon)).T:
        product = product @ (np.eye(len(u)) - 2 * np.outer(column, column))
    return product


@pytest.mark.parametrize("target", ["lora", "merged"])
def test_the_authors_llama_layout_becomes_weights_or_lora(scene: Scene, target: str) -> None:
    official = put_llama_layout(scene)
    outcome = scene.convert(official, "--from", "official", "--base", scene.base, "--to", target)
    assert outcome.code == 0, outcome.stderr
    assert "read as `llama`" in outcome.stderr
    weight = read_tensors(scene.base)[f"{Q_PROJ}.weight"].values()
    written, u = read_tensors(scene.output), read_tensors(official)[f"{PREFIX}{Q_PROJ}.oft_r"].values()
    if target == "lora":
        b, a = (written[f"{PREFIX}{Q_PROJ}.lora_{part}.weight"].values() for part in "BA")
        got = weight + b @ a
    else:
        got = written[f"{Q_PROJ}.weight"].values()
    np.testing.assert_allclose(got, softened(u, 1e-4).T @ weight, rtol=0, atol=RTOL32)


def test_a_part_of_softened_chains_is_named_in_the_manifest(scene: Scene) -> None:
    part = ("--strength", "0.5", "--interpolation", "linear")
    official = put_llama_layout(scene)
    outcome = scene.convert(official, "--from", "official", "--base", scene.base, "--to", "lora", *part)
    assert outcome.code == 0, outcome.stderr
    (entry,) = json.loads((scene.output / "hra_export_manifest.json").read_text())["adapters"]
    assert (entry["strength"], entry["interpolation"]) == (0.5, "linear")
    weight = read_tensors(scene.base)[f"{Q_PROJ}.weight"].values()
    u, written = read_tensors(official)[f"{PREFIX}{Q_PROJ}.oft_r"].values(), read_tensors(scene.output)
    b, a = (written[f"{PREFIX}{Q_PROJ}.lora_{letter}.weight"].values() for letter in "BA")
    np.testing.assert_allclose(b @ a, (softened(u, 1e-4).T @ weight - weight) / 2, rtol=0, atol=RTOL32)


@refused(4, "is not HRA", "--to lora", "llama")
def softened_chains_as_hra(scene: Scene) -> list[str | Path]:
    return [put_llama_layout(scene), "--from", "official", "--to", "hra"]


@refused(4, "no rotation", "--interpolation linear")
def half_of_softened_chains(scene: Scene) -> list[str | Path]:
    official = put_llama_layout(scene)
    return [official, "--from", "official", "--base", scene.base, "--to", "lora", "--strength", "0.5"]


@refused(2, "--layout", "nlu", "v-list")
def an_unknown_layout(scene: Scene) -> list[str | Path]:
    return [put_llama_layout(scene), "--from", "official", "--to", "hra", "--layout", "unknown"]


@refused(2, "'--epsilon'", "nan")
def an_epsilon_that_is_no_number(scene: Scene) -> list[str | Path]:
    return [put_llama_layout(scene), "--from", "official", "--to", "hra", "--epsilon", "nan"]


@refused(2, "--from official", "one SOURCE")
def two_official_files(scene: Scene) -> list[str | Path]:
    return [scene.adapter, scene.adapter, "--from", "official", "--to", "hra"]


@refused(4, "pickle", "--allow-pickle")
def a_pickle(scene: Scene) -> list[str | Path]:
    path = scene.folder / "checkpoint.bin"
    path.write_bytes(b"not even one")
    return [path, "--from", "official", "--to", "hra"]


@refused(2, "'--to'")
def no_target(scene: Scene) -> list[str | Path]:
    return [scene.adapter]


@refused(2, "--rank", "not for --from hra --to lora")
def a_rank_for_lora(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--base", scene.base, "--to", "lora", "--rank", "4"]


@refused(2, "--mixed-ranks", "--graph", "not for --from hra --to hra")
def options_of_other_targets(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--to", "hra", "--mixed-ranks", "--graph", "model.onnx"]


@refused(2, "--strength", "not for --from lora --to hra")
def a_strength_for_a_nearest_chain(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--from", "lora", "--to", "hra", "--rank", "2", "--strength", "0.5"]


@refused(2, "'--strength'", "nan")
def a_strength_that_is_no_number(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--to", "hra", "--strength", "nan"]


@refused(2, "--rank")
def no_rank(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--from", "lora", "--to", "hra", "--base", scene.base]


@refused(2, "--to hra")
def lora_to_lora(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--from", "lora", "--to", "lora", "--base", scene.base]


@refused(2, "--base")
def a_whole_model_without_a_base(scene: Scene) -> list[str | Path]:
    return [scene.base, "--from", "full-model", "--to", "hra", "--rank", "2"]


@refused(2, "--graph")
def no_graph(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--to", "ort-adapter"]


@refused(2, "hra-export merge")
def merging(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--base", scene.base, "--to", "merged"]


@refused(4, "does not exist")
def no_adapter(scene: Scene) -> list[str | Path]:
    return [scene.folder / "nowhere", "--base", scene.base, "--to", "lora"]


@refused(4, "no base", "--base")
def no_base(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--to", "lora"]


@refused(4, Q_PROJ, UP_PROJ)
def another_base(scene: Scene) -> list[str | Path]:
    tensors = {f"{PREFIX}{module}.hra_u": random_tensor(24, 4, scale=1.0) for module in (Q_PROJ, UP_PROJ)}
    other = write_adapter_files(scene.folder / "other", tensors)
    return [other, "--base", scene.base, "--to", "lora"]


@refused(4, "not an HRA adapter", "LORA")
def lora_for_hra(scene: Scene) -> list[str | Path]:
    config = scene.adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "LORA"}))
    return [scene.adapter, "--base", scene.base, "--to", "lora"]


@refused(4, "HRA")
def hra_for_lora(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--from", "lora", "--to", "hra", "--rank", "4", "--base", scene.base]


@refused(4, "determinant", Q_PROJ, UP_PROJ, "--interpolation linear")
def half_of_an_odd_chain(scene: Scene) -> list[str | Path]:
    return [scene.put_adapter("odd", rank=3), "--to", "hra", "--strength", "0.5"]


@refused(4, "0.5", "no rotation", "--to lora")
def a_linear_part_as_hra(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--to", "hra", "--strength", "0.5", "--interpolation", "linear"]


@refused(4, UP_PROJ, "--to lora")
def ranks_that_no_padding_evens_out(scene: Scene) -> list[str | Path]:
    return [scene.adapter, scene.put_adapter("odd", rank=3, modules=(Q_PROJ,)), "--to", "hra"]


@refused(6, "not written by hra-export")
def an_output_that_is_someone_elses(scene: Scene) -> list[str | Path]:
    scene.output.mkdir()
    (scene.output / "notes.txt").write_text("mine")
    return [scene.adapter, "--base", scene.base, "--to", "lora", "--overwrite"]


@refused(6, "exists", "--overwrite")
def a_file_that_exists(scene: Scene) -> list[str | Path]:
    scene.output.write_text("mine")
    return [scene.adapter, "--base", scene.base, "--to", "gguf"]


@refused(6, "no adapter of llama.cpp")
def a_file_that_is_no_adapter(scene: Scene) -> list[str | Path]:
    scene.output.write_text("mine")
    return [scene.adapter, "--base", scene.base, "--to", "gguf", "--overwrite"]


@refused(6, "adapter")
def an_output_inside_an_input(scene: Scene) -> list[str | Path]:
    return [scene.adapter, "--base", scene.base, "--to", "gguf", "--output", scene.adapter / "a.gguf"]


@refused(8, "bloom")
def an_architecture_that_llama_cpp_was_not_tried_with(scene: Scene) -> list[str | Path]:
    config = scene.base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "bloom"}))
    return [scene.adapter, "--base", scene.base, "--to", "gguf"]


@refused(8, "gptq")
def a_base_in_codes(scene: Scene) -> list[str | Path]:
    config = scene.base / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **quantized}))
    return [scene.adapter, "--base", scene.base, "--to", "lora"]


@pytest.mark.parametrize("case", refused.cases, ids=lambda case: case.damage.__name__)
def test_what_cannot_be_converted_is_refused_and_nothing_is_written(case: Case[Scene], scene: Scene) -> None:
    arguments = case.damage(scene)
    assert arguments is not None
    before = read_tree(scene.folder)
    outcome = scene.convert(*arguments)
    assert outcome.code == case.code, outcome.stderr
    for word in case.says:
        assert word in outcome.stderr
    assert read_tree(scene.folder) == before


def test_a_second_run_replaces_its_own_output_only_when_asked(scene: Scene) -> None:
    arguments = (scene.adapter, "--base", scene.base, "--to", "lora")
    assert scene.convert(*arguments).code == 0
    first = read_tree(scene.output)
    assert scene.convert(*arguments).code == 6
    assert scene.convert(*arguments, "--overwrite").code == 0
    assert read_tree(scene.output) == first


def test_every_linear_layer_is_a_target_that_gguf_has(scene: Scene) -> None:
    chains = random_chains(linear_modules(), rank=2)
    whole = write_adapter_files(scene.folder / "whole", chains, rank=2)
    output = scene.folder / "whole.gguf"
    outcome = scene.convert(whole, "--base", scene.base, "--to", "gguf", "--output", output, "--json")
    assert (outcome.code, len(outcome.json["targets"])) == (0, len(chains)), outcome.stderr
