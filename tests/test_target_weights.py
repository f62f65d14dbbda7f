"""The weights of targets on disk against those of the loaded model."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hra_export.checkpoint import open_checkpoint
from hra_export.errors import MismatchError, NumericalError, UnsupportedModelError
from hra_export.pieces import concatenate, deinterleave, regions_of, take, transpose, whole
from hra_export.target_weights import TargetWeight, find_targets
from hra_export.tensorfile import read_header
from tests.tiny_models import MODELS

# Sums of 50 products in float64.
ATOL64 = 1e-13
KINDS = {"Linear": "linear", "NonDynamicallyQuantizableLinear": "linear", "Conv1D": "conv1d", "Conv2d": "conv2d"}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name].build()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=24)
    return transformers.GPT2LMHeadModel(config)


def as_matrix(module: nn.Module) -> Tensor:
    weight = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight.reshape(weight.shape[0], -1)


def targets_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if type(module).__name__ in KINDS}


@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
def test_every_target_of_a_model_is_found_as_the_model_has_it(name: str, tmp_path: Path) -> None:
    model = gpt2() if name == "gpt2" else built(name)
    modules = targets_of(model)
    found = find_targets(open_checkpoint(saved(model, tmp_path)), modules)
    assert found.keys() == modules.keys()
    for path, weight in found.items():
        expected = as_matrix(modules[path])
        assert torch.equal(weight.matrix(), expected), path
        assert weight.shape == tuple(expected.shape)
        assert weight.kind == KINDS[type(modules[path]).__name__], path


def test_products_are_those_of_the_whole_matrix(tmp_path: Path) -> None:
    model = gpt2()
    found = find_targets(open_checkpoint(saved(model, tmp_path)), ["transformer.h.0.mlp.c_fc", "lm_head"])
    for weight in found.values():
        exact = weight.matrix().double()
        right, left = torch.randn(exact.shape[1], 3).double(), torch.randn(exact.shape[0], 3).double()
        torch.testing.assert_close(weight.times(right), exact @ right, rtol=0, atol=ATOL64)
        torch.testing.assert_close(weight.transposed_times(left), exact.T @ left, rtol=0, atol=ATOL64)


def test_long_matrices_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hra_export.target_weights.BLOCK_ELEMENTS", 100)
    weight = find_targets(open_checkpoint(saved(built("llama"), tmp_path)), ["lm_head"])["lm_head"]
    runs = [run for run, _ in weight.blocks()]
    assert len(runs) > 2
    assert torch.equal(torch.cat([block for _, block in weight.blocks()]), weight.matrix().double())


def test_embeddings_are_told_from_layers(tmp_path: Path) -> None:
    base = open_checkpoint(saved(built("llama-tied"), tmp_path))
    found = find_targets(base, ["model.embed_tokens", "lm_head"])
    assert {path: weight.kind for path, weight in found.items()} == {
        "model.embed_tokens": "embedding",
        "lm_head": "linear",
    }
    assert found["lm_head"].names == found["model.embed_tokens"].names == ("model.embed_tokens.weight",)


def test_experts_are_found_by_the_names_that_they_have_on_disk(tmp_path: Path) -> None:
    model = built("mixtral")
    up = model.model.layers[0].mlp.experts.gate_up_proj.detach()  # (experts, 2 · inner, d)
    found = find_targets(
        open_checkpoint(saved(model, tmp_path)),
        ["model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.block_sparse_moe.experts.2.w3"],
    )
    first, second = (weight.matrix() for weight in found.values())
    inner = up.shape[1] // 2
    assert torch.equal(first, up[3, :inner])
    assert torch.equal(second, up[2, inner:])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_that_lie_in_another_order_on_disk_come_in_the_modules(is_transposed: bool, tmp_path: Path) -> None:
    stored = torch.randn(6, 8) if is_transposed else torch.randn(8, 6)
    block = whole("w", tuple(stored.shape))
    block = transpose(block, 0, 1) if is_transposed else block
    mixed = deinterleave(concatenate([take(block, 0, range(4, 8)), take(block, 0, range(4))], 0), 0)
    (region,) = regions_of("p", mixed, 1)
    rows = stored.T if is_transposed else stored
    swapped = torch.cat([rows[4:], rows[:4]])
    safetensors.torch.save_file({"w": stored}, tmp_path / "w.safetensors")
    files = {"w": read_header(tmp_path / "w.safetensors")}
    matrix = TargetWeight("p", "linear", (8, 6), None, "F32", (region,), files).matrix()
    assert torch.equal(matrix, torch.cat([swapped[::2], swapped[1::2]]))
    assert torch.equal(region.part(matrix), stored)


def test_missing_targets_are_all_named(tmp_path: Path) -> None:
    base = open_checkpoint(saved(built("llama"), tmp_path))
    with pytest.raises(MismatchError) as caught:
        find_targets(base, ["model.layers.0.self_attn.q_proj", "nowhere", "model.layers.7.mlp.up_proj"])
    assert [line.partition(":")[0] for line in caught.value.findings] == ["nowhere", "model.layers.7.mlp.up_proj"]


def test_norms_and_quantized_bases_are_refused(tmp_path: Path) -> None:
    model = built("llama")
    base = open_checkpoint(saved(model, tmp_path / "plain"))
    with pytest.raises(UnsupportedModelError, match="no chain"):
        find_targets(base, ["model.norm"])
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError, match="gptq"):
        find_targets(open_checkpoint(saved(model, tmp_path / "quantized")), ["lm_head"])


def test_nan_in_a_target_is_an_error(tmp_path: Path) -> None:
    model = built("llama")
    model.lm_head.weight.data[3, 4] = float("nan")
    weight = find_targets(open_checkpoint(saved(model, tmp_path)), ["lm_head"])["lm_head"]
    with pytest.raises(NumericalError, match=r"model.safetensors.*lm_head.*NaN"):
        weight.times(torch.ones(weight.shape[1], 1, dtype=torch.float64))
