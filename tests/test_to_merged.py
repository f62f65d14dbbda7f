"""Chains that HRA cannot hold, merged: their logits are those of the code that trained them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.errors import MismatchError, UnsupportedModelError
from hra_export.low_rank import locate
from hra_export.official.soft_chain import SoftSource
from hra_export.registry import load_converter
from tests import official_layouts as code
from tests import tiny_models
from tests.official_scenes import EPSILON, RANK, Scene, llama, save_base

to_lora = load_converter("to_lora")
to_merged = load_converter("to_merged")

# Both sides compute in float64, over sums of fewer than a hundred terms.
RTOL = 1e-12
# Logits of two layers in float64; those of factors in float32.
LOGITS_ATOL = 1e-9
FLOAT32_ATOL = 1e-5
# Twice one rounding to an 8-bit significand.
RTOL_BF16 = 2**-7


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(**inputs).logits
    return answer


def loaded(directory: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float64)
    return model.eval()


def read_all(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in safetensors.torch.load_file(path).items()}


def test_merged_computes_what_their_model_computes(tmp_path: Path) -> None:
    made = llama(tmp_path)
    inputs = tiny_models.token_inputs()
    before = logits(loaded(made.base.root), inputs)
    report = to_merged.convert(made.read().adapter, tmp_path / "output", base=made.base)
    expected = logits(made.model, inputs)
    assert (expected - before).abs().max() > 1e-3  # the adapter does something
    assert torch.allclose(logits(loaded(tmp_path / "output"), inputs), expected, rtol=0, atol=LOGITS_ATOL)
    assert report.delta_norm > 0
    assert report.error < RTOL
    assert {target.rank for target in report.targets} == {RANK}
    assert len(report.targets) == len(made.layers)


def test_lora_of_the_same_source_computes_what_their_model_computes(tmp_path: Path) -> None:
    made = llama(tmp_path)
    to_lora.convert(made.read().adapter, tmp_path / "lora", base=made.base)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    factors = read_all(tmp_path / "lora")
    model = loaded(made.base.root)
    for module in made.layers:
        key = f"base_model.model.{module}.lora_{{}}.weight".format
        delta = factors[key("B")].double() @ factors[key("A")].double() * (config["lora_alpha"] / config["r"])
        model.get_parameter(f"{module}.weight").data += delta
    inputs = tiny_models.token_inputs()
    assert torch.allclose(logits(model, inputs), logits(made.model, inputs), rtol=0, atol=FLOAT32_ATOL)


def test_merged_names_its_source_and_keeps_the_rest_of_the_base(tmp_path: Path) -> None:
    made = llama(tmp_path)
    official = made.read()
    to_merged.convert(official.adapter, tmp_path / "output", base=made.base)
    manifest = json.loads((tmp_path / "output" / "hra_export_manifest.json").read_text())
    (entry,) = manifest["adapters"]
    assert (entry["layout"], entry["side"], entry["epsilon"]) == ("llama", "output", EPSILON)
    assert set(official.notes) <= set(manifest["notes"])
    before, after = read_all(made.base.root), read_all(tmp_path / "output")
    folded = {f"{module}.weight" for module in made.layers}
    assert {name for name in before if not torch.equal(before[name], after[name])} == folded
    assert (tmp_path / "output" / "config.json").is_file()


@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0])
def test_strength_is_that_part_of_the_change(strength: float, tmp_path: Path) -> None:
    made = llama(tmp_path)
    source = replace(made.read().adapter, strength=strength)
    to_merged.convert(source, tmp_path / "output", base=made.base)
    before, after = read_all(made.base.root), read_all(tmp_path / "output")
    for module, layer in made.layers.items():
        base, expected = before[f"{module}.weight"], layer.folded().detach()
        assert torch.allclose(after[f"{module}.weight"], base + strength * (expected - base), rtol=0, atol=RTOL)


def test_bfloat16_is_rounded_to_once(tmp_path: Path) -> None:
    made = llama(tmp_path)
    report = to_merged.convert(made.read().adapter, tmp_path / "output", base=made.base, dtype="bfloat16")
    after = read_all(tmp_path / "output")
    for module, layer in made.layers.items():
        assert torch.equal(after[f"{module}.weight"], layer.folded().detach().bfloat16())
    assert report.error > RTOL_BF16 / 100  # told, not hidden


def chains(model: nn.Module, make: Callable[[nn.Linear], nn.Module], chosen: Callable[[str], bool]) -> dict[str, Any]:
    torch.manual_seed(1)
    return code.replace_linears(model, make, chosen)


def soft(layers: dict[str, Any], **options: Any) -> SoftSource:
    return SoftSource({m: layer.oft_r.detach() for m, layer in layers.items()}, "output", EPSILON, **options)


def after_layer(linear: nn.Linear) -> nn.Module:
    return code.LlamaLinear(linear, RANK, epsilon=EPSILON)


def test_a_tied_head_is_untied(tmp_path: Path) -> None:
    model = tiny_models.build("llama-tied").double()
    base = save_base(model, tmp_path / "base")
    layers = chains(model, after_layer, lambda path: path == "lm_head")
    to_merged.convert(soft(layers, task="CAUSAL_LM"), tmp_path / "output", base=base)
    inputs = tiny_models.token_inputs()
    assert torch.allclose(logits(loaded(tmp_path / "output"), inputs), logits(model, inputs), rtol=0, atol=LOGITS_ATOL)
    assert json.loads((tmp_path / "output" / "config.json").read_text())["tie_word_embeddings"] is False


def gpt2(folder: Path) -> tuple[Checkpoint, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).double()
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight").detach()
    return save_base(model, folder / "base"), weight.clone()


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_weight_that_is_stored_the_other_way_round(side: Any, tmp_path: Path) -> None:
    """GPT-2's Conv1D keeps (d, o), so that a chain after the layer acts on the columns on disk."""
    base, stored = gpt2(tmp_path)
    u = 0.02 * torch.randn(stored.shape[1 if side == "output" else 0], RANK, dtype=torch.float64)
    chain = code.dense_chain(u, epsilon=EPSILON)
    source = SoftSource({"transformer.h.0.mlp.c_fc": u}, side, EPSILON, task="CAUSAL_LM")
    to_merged.convert(source, tmp_path / "output", base=base)
    expected = stored @ chain if side == "output" else chain.T @ stored
    after = next(value for name, value in read_all(tmp_path / "output").items() if name.endswith("c_fc.weight"))
    assert torch.allclose(after, expected, rtol=0, atol=RTOL)


def save_as_in_memory(model: nn.Module, folder: Path) -> Checkpoint:
    """A base whose tensors have the names and shapes of the model's parameters: experts stacked, projections split."""
    model.save_pretrained(folder, save_original_format=False)
    return open_checkpoint(folder)


def test_an_expert_of_a_stack(tmp_path: Path) -> None:
    """A chain after the projection of one expert acts on its rows, which are some of one matrix of the stack."""
    base = save_as_in_memory(tiny_models.build("qwen3-moe").double(), tmp_path / "base")
    before = read_all(tmp_path / "base")["model.layers.0.mlp.experts.gate_up_proj"]
    u = 0.02 * torch.randn(24, RANK, dtype=torch.float64)
    source = SoftSource({"model.layers.0.mlp.experts.1.up_proj": u}, "output", EPSILON, task="CAUSAL_LM")
    to_merged.convert(source, tmp_path / "output", base=base)
    expected = before.clone()
    expected[1, 24:] = code.dense_chain(u, epsilon=EPSILON).T @ before[1, 24:]
    after = read_all(tmp_path / "output")["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.allclose(after, expected, rtol=0, atol=RTOL)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    return Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **sizes)).double()


def test_rows_of_a_fused_tensor(tmp_path: Path) -> None:
    """The base keeps two projections in one tensor, and each has a chain of its own."""
    base = save_base(dinov2(), tmp_path / "base")
    fused = "encoder.layer.0.mlp.weights_in.weight"
    before = read_all(tmp_path / "base")[fused]
    half = len(before) // 2
    gate, up = (0.02 * torch.randn(half, RANK, dtype=torch.float64) for _ in range(2))
    modules = {"encoder.layer.0.mlp.gate_proj": gate, "encoder.layer.0.mlp.up_proj": up}
    to_merged.convert(SoftSource(modules, "output", EPSILON), tmp_path / "output", base=base)
    expected = [
        code.dense_chain(u, epsilon=EPSILON).T @ rows for u, rows in zip((gate, up), before.split(half), strict=True)
    ]
    assert torch.allclose(read_all(tmp_path / "output")[fused], torch.cat(expected), rtol=0, atol=RTOL)


def test_rows_that_lie_in_several_tensors_are_refused_and_named(tmp_path: Path) -> None:
    """A chain after a fused projection mixes rows that this base keeps in two tensors."""
    base = save_as_in_memory(dinov2(), tmp_path / "base")
    rows = sum(
        len(v) for k, v in read_all(tmp_path / "base").items() if k.endswith(("gate_proj.weight", "up_proj.weight"))
    )
    module = "encoder.layer.0.mlp.weights_in"
    source = SoftSource({module: torch.ones(rows, RANK)}, "output", EPSILON)
    with pytest.raises(UnsupportedModelError, match="mix its rows") as caught:
        to_merged.convert(source, tmp_path / "output", base=base)
    assert caught.value.findings[0].startswith(module)
    assert not (tmp_path / "output").exists()
    assert source.misfit(locate(source, base)[module]) is None  # a LoRA of it is no matter


def test_chains_of_another_width_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    made = llama(tmp_path)
    source = SoftSource({module: torch.ones(20, RANK) for module in made.layers}, "output", EPSILON)
    with pytest.raises(MismatchError, match="have another shape") as caught:
        to_merged.convert(source, tmp_path / "output", base=made.base)
    assert len(caught.value.findings) == len(made.layers)
    assert not (tmp_path / "output").exists()


def test_an_adapter_is_merged_as_by_the_command_of_that_name(tmp_path: Path) -> None:
    made: Scene = llama(tmp_path)
    module = "model.layers.0.mlp.down_proj"
    u = torch.randn(48, 2, dtype=torch.float64)
    to_merged.convert(HraAdapter({module: u}, 2), tmp_path / "output", base=made.base)
    before, after = read_all(made.base.root)[f"{module}.weight"], read_all(tmp_path / "output")[f"{module}.weight"]
    assert torch.allclose(after, before @ code.dense_chain(u), rtol=0, atol=RTOL)
