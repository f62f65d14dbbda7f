"""Merged tensors against the explicit chain in float64, for every way a weight can be stored."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hra_export.adapter import HraAdapter
from hra_export.attachment import attach
from hra_export.checkpoint import open_checkpoint
from hra_export.errors import MismatchError, UnsupportedModelError
from hra_export.merge import MergeReport, merge_checkpoint
from hra_export.planning import plan_merge

# One float32 rounding of values below 1, and a float32 product over at most a few hundred features before it.
ATOL_FP32 = 2e-6
RANK = 4


def explicit_chain(vectors: Tensor) -> Tensor:
    """H_1 H_2 … H_r in float64, one dense reflection after the other."""
    product = torch.eye(vectors.shape[0], dtype=torch.float64)
    for u in vectors.double().T:
        product = product - 2 * torch.outer(product @ u, u) / (u @ u)
    return product


def chains(**features: int) -> dict[str, Tensor]:
    """Random vectors (d, RANK) for each module; dots are written as two underscores."""
    generator = torch.Generator().manual_seed(3)
    return {name.replace("__", "."): torch.randn(d, RANK, generator=generator) for name, d in features.items()}


def save_model(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """Save with transformers or diffusers; the tensors as they lie on disk."""
    model.save_pretrained(directory)
    (path,) = directory.glob("*.safetensors")
    return load_file(path)


def save_tensors(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    directory.mkdir()
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    return dict(tensors)


def merge(base: Path, output: Path, *adapters: HraAdapter, **options: Any) -> tuple[dict[str, Tensor], MergeReport]:
    plan = plan_merge(open_checkpoint(base), adapters, **options)
    report = merge_checkpoint(plan, output)
    (path,) = output.glob("*.safetensors")
    return load_file(path), report


def test_linear_is_multiplied_from_the_right_by_the_chain(tmp_path: Path) -> None:
    before = save_tensors({"proj.weight": torch.randn(5, 12), "other": torch.arange(3)}, tmp_path / "base")
    adapter = HraAdapter(chains(proj=12), rank=RANK)
    after, report = merge(tmp_path / "base", tmp_path / "merged", adapter)
    exact = before["proj.weight"].double() @ explicit_chain(adapter.chains["proj"])
    torch.testing.assert_close(after["proj.weight"].double(), exact, atol=ATOL_FP32, rtol=0)
    assert torch.equal(after["other"], before["other"])
    assert report.delta_norm == pytest.approx(float((exact - before["proj.weight"]).norm()), rel=1e-5)


def test_several_adapters_compose_in_the_order_given(tmp_path: Path) -> None:
    before = save_tensors({"proj.weight": torch.randn(5, 12)}, tmp_path / "base")
    first, second = HraAdapter(chains(proj=12), rank=RANK), HraAdapter({"proj": torch.randn(12, 2)}, rank=2)
    after, _ = merge(tmp_path / "base", tmp_path / "merged", first, second)
    product = explicit_chain(first.chains["proj"]) @ explicit_chain(second.chains["proj"])
    exact = before["proj.weight"].double() @ product
    torch.testing.assert_close(after["proj.weight"].double(), exact, atol=ATOL_FP32, rtol=0)


def test_gpt2_weights_are_folded_on_their_first_axis(tmp_path: Path) -> None:
    """Conv1D stores (in, out); `c_proj` of the attention is square, so its shape does not tell."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
    before = save_model(GPT2LMHeadModel(GPT2Config(**sizes)), tmp_path / "base")
    block = "transformer.h.0."
    adapter = HraAdapter(
        {
            f"{block}{name}": vectors
            for name, vectors in chains(attn__c_attn=32, attn__c_proj=32, mlp__c_proj=128).items()
        },
        rank=RANK,
    )
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    for module, vectors in adapter.chains.items():
        name = f"{module}.weight"
        exact = explicit_chain(vectors).T @ before[name].double()
        torch.testing.assert_close(after[name].double(), exact, atol=ATOL_FP32, rtol=0)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (5, 2)])
def test_convolution_is_folded_over_its_patches(kernel: tuple[int, int], tmp_path: Path) -> None:
    before = save_tensors({"conv.weight": torch.randn(6, 3, *kernel)}, tmp_path / "base")
    adapter = HraAdapter(chains(conv=3 * math.prod(kernel)), rank=3)
    adapter = HraAdapter({"conv": adapter.chains["conv"][:, :3]}, rank=3)
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    exact = before["conv.weight"].flatten(1).double() @ explicit_chain(adapter.chains["conv"])
    torch.testing.assert_close(after["conv.weight"].flatten(1).double(), exact, atol=ATOL_FP32, rtol=0)


def test_grouped_convolution_is_refused_by_name(tmp_path: Path) -> None:
    save_tensors({"conv.weight": torch.randn(8, 2, 3, 3)}, tmp_path / "base")
    adapter = HraAdapter(chains(conv=8 * 9), rank=RANK)
    with pytest.raises(UnsupportedModelError, match="`conv` is a grouped convolution"):
        plan_merge(open_checkpoint(tmp_path / "base"), [adapter])


def test_embedding_rows_are_rotated_and_a_tied_head_is_not(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)
    before = save_model(LlamaForCausalLM(config), tmp_path / "base")
    adapter = HraAdapter(chains(model__embed_tokens=32), rank=RANK)
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    rows = before["model.embed_tokens.weight"]
    exact = rows.double() @ explicit_chain(adapter.chains["model.embed_tokens"])
    torch.testing.assert_close(after["model.embed_tokens.weight"].double(), exact, atol=ATOL_FP32, rtol=0)
    assert torch.equal(after["lm_head.weight"], rows)
    assert not LlamaForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3))


EXPERTS = "model.layers.0.mlp.experts"
OLD_EXPERTS = "model.layers.0.block_sparse_moe.experts"


def test_chain_of_a_stacked_expert_parameter_reaches_every_expert_on_disk(tmp_path: Path) -> None:
    """transformers 5 stacks experts in memory and stores them one by one."""
    before = save_model(mixtral(), tmp_path / "base")
    vectors = chains(up=32)["up"]
    after, _ = merge(
        tmp_path / "base", tmp_path / "merged", HraAdapter({f"{EXPERTS}.gate_up_proj": vectors}, rank=RANK)
    )
    for expert in range(3):
        for weight in ("w1", "w3"):
            name = f"{OLD_EXPERTS}.{expert}.{weight}.weight"
            exact = before[name].double() @ explicit_chain(vectors)
            torch.testing.assert_close(after[name].double(), exact, atol=ATOL_FP32, rtol=0)
        assert torch.equal(after[f"{OLD_EXPERTS}.{expert}.w2.weight"], before[f"{OLD_EXPERTS}.{expert}.w2.weight"])


def test_chains_of_single_experts_reach_their_rows_of_a_stacked_tensor(tmp_path: Path) -> None:
    """An adapter from transformers 4, where experts were modules, on a checkpoint that stores them stacked."""
    model = mixtral()
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert f"{EXPERTS}.gate_up_proj" in before
    adapter = HraAdapter(
        {
            f"{OLD_EXPERTS}.{name}": vectors
            for name, vectors in {
                "1.w1": torch.randn(32, RANK),
                "2.w3": torch.randn(32, RANK),
                "0.w2": torch.randn(24, RANK),
            }.items()
        },
        rank=RANK,
    )
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    expected = {name: value.double().clone() for name, value in before.items()}
    up, down = expected[f"{EXPERTS}.gate_up_proj"], expected[f"{EXPERTS}.down_proj"]
    up[1, :24] = up[1, :24] @ explicit_chain(adapter.chains[f"{OLD_EXPERTS}.1.w1"])
    up[2, 24:] = up[2, 24:] @ explicit_chain(adapter.chains[f"{OLD_EXPERTS}.2.w3"])
    down[0] = down[0] @ explicit_chain(adapter.chains[f"{OLD_EXPERTS}.0.w2"])
    for name, value in expected.items():
        torch.testing.assert_close(after[name].double(), value, atol=ATOL_FP32, rtol=0)


@torch.no_grad()
def test_transposed_experts_are_folded_on_their_own_axis_and_live_layers_agree(tmp_path: Path) -> None:
    """gpt-oss keeps experts (E, in, out), also on disk; square sizes do not tell the axes apart."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = GptOssConfig(
        **sizes, **experts, num_attention_heads=4, num_key_value_heads=2, layer_types=["full_attention"]
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():  # the released initialization leaves the experts' weights empty
        for value in model.parameters():
            value.copy_(0.2 * torch.randn_like(value))
    before = save_model(model, tmp_path / "base")
    adapter = HraAdapter(
        {f"{EXPERTS}.{name}": torch.randn(32, RANK) for name in ("gate_up_proj", "down_proj")}, rank=RANK
    )
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    for name, vectors in adapter.chains.items():
        exact = explicit_chain(vectors).T @ before[name].double()
        torch.testing.assert_close(after[name].double(), exact, atol=ATOL_FP32, rtol=0)
    tokens = torch.arange(10)[None]
    start = model(tokens).logits
    attach(model, adapter)
    live = model(tokens).logits
    merged = GptOssForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
    assert float((live - start).norm() / start.norm()) > 0.05
    torch.testing.assert_close(merged, live, atol=1e-4, rtol=1e-4)


def test_bias_and_saved_modules_replace_the_base(tmp_path: Path) -> None:
    tensors = {"proj.weight": torch.randn(5, 12), "proj.bias": torch.randn(5), "head.weight": torch.randn(3, 5)}
    save_tensors(tensors, tmp_path / "base")
    trained = {"proj.bias": torch.randn(5), "head.weight": torch.randn(3, 5)}
    adapter = HraAdapter(chains(proj=12), rank=RANK, parameters=trained, bias="hra_only", modules_to_save=("head",))
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    assert torch.equal(after["proj.bias"], trained["proj.bias"])
    assert torch.equal(after["head.weight"], trained["head.weight"])


def test_chain_acts_on_the_weight_that_the_adapter_saved(tmp_path: Path) -> None:
    """PEFT stores a targeted head's own weight in the adapter file; it is the one that the chain was trained on."""
    save_tensors({"lm_head.weight": torch.randn(5, 12)}, tmp_path / "base")
    own = torch.randn(5, 12)
    adapter = HraAdapter(chains(lm_head=12), rank=RANK, parameters={"lm_head.weight": own})
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    exact = own.double() @ explicit_chain(adapter.chains["lm_head"])
    torch.testing.assert_close(after["lm_head.weight"].double(), exact, atol=ATOL_FP32, rtol=0)


def test_new_classifier_is_added_and_named_in_the_config(tmp_path: Path) -> None:
    """MiniLM's case: a headless base without the `bert.` prefix, adapted as a classifier of three labels."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    before = save_model(BertModel(BertConfig(**sizes, num_attention_heads=4)), tmp_path / "base")
    module = "encoder.layer.0.attention.self.query"
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    adapter = HraAdapter(
        {f"bert.{module}": torch.randn(32, RANK)},
        rank=RANK,
        parameters=head,
        modules_to_save=("classifier",),
        task="SEQ_CLS",
    )
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    exact = before[f"{module}.weight"].double() @ explicit_chain(adapter.chains[f"bert.{module}"])
    torch.testing.assert_close(after[f"{module}.weight"].double(), exact, atol=ATOL_FP32, rtol=0)
    loaded, info = BertForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.num_labels == 3
    assert torch.equal(loaded.classifier.weight, head["classifier.weight"])


def test_every_misfit_is_named_at_once(tmp_path: Path) -> None:
    save_tensors({"a.weight": torch.randn(5, 12), "b.weight": torch.randn(5, 8)}, tmp_path / "base")
    adapter = HraAdapter(chains(a=12, b=12, c=12), rank=RANK, parameters={"d.bias": torch.zeros(2)})
    with pytest.raises(MismatchError) as caught:
        plan_merge(open_checkpoint(tmp_path / "base"), [adapter])
    assert len(caught.value.findings) == 3
    assert "expected U of shape (8, 4), got (12, 4)" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reported_loss_is_the_rounding_of_delta(dtype: torch.dtype, tmp_path: Path) -> None:
    before = save_tensors({"proj.weight": torch.randn(64, 48).to(dtype)}, tmp_path / "base")
    adapter = HraAdapter(chains(proj=48), rank=RANK)
    after, report = merge(tmp_path / "base", tmp_path / "merged", adapter)
    weight = before["proj.weight"].double()
    exact = weight @ explicit_chain(adapter.chains["proj"])
    loss = float((after["proj.weight"].double() - exact).norm() / (exact - weight).norm())
    assert report.loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("angle", [0.5, 0.005], ids=["trained", "lightly-trained"])
def test_bfloat16_is_the_exact_fold_rounded_once(angle: float, tmp_path: Path) -> None:
    """torch rounds float64 through float32, which may turn a tie: at most 2⁻¹⁶ of elements, by one step."""
    weight = (0.02 * torch.randn(256, 512)).bfloat16()
    half = torch.randn(512, RANK // 2).repeat_interleave(2, dim=1)
    adapter = HraAdapter({"proj": half + angle * torch.randn(512, RANK)}, rank=RANK)
    save_tensors({"proj.weight": weight}, tmp_path / "base")
    after, _ = merge(tmp_path / "base", tmp_path / "merged", adapter)
    exact = weight.double() @ explicit_chain(adapter.chains["proj"])
    got, expected = after["proj.weight"], exact.float().bfloat16()
    differ = got != expected
    assert differ.double().mean() <= 2e-4
    steps = got[differ].view(torch.int16).int() - expected[differ].view(torch.int16).int()
    assert bool((steps.abs() <= 1).all())


def test_lightly_trained_adapter_is_warned_about_in_bfloat16(tmp_path: Path) -> None:
    save_tensors({"proj.weight": torch.randn(64, 48).bfloat16()}, tmp_path / "base")
    half = torch.randn(48, RANK // 2).repeat_interleave(2, dim=1)
    adapter = HraAdapter({"proj": half + 0.002 * torch.randn(48, RANK)}, rank=RANK)
    _, lost = merge(tmp_path / "base", tmp_path / "merged", adapter)
    _, kept = merge(tmp_path / "base", tmp_path / "wide", adapter, dtype="float32")
    assert "--dtype float32" in lost.warnings()[0]
    assert not kept.warnings()


def test_pipeline_keeps_its_other_components_and_gets_its_denoiser_merged(tmp_path: Path) -> None:
    """A diffusers pipeline as base: the adapter's names are those of the UNet in its sub-folder."""
    from diffusers import UNet2DConditionModel

    from tests.tiny_models import build

    base, module = tmp_path / "base", "down_blocks.0.resnets.0.conv1"
    build("unet").save_pretrained(base / "unet")
    before = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    (base / "vae").mkdir()
    save_file({"decoder.weight": torch.ones(2)}, base / "vae" / "diffusion_pytorch_model.safetensors")
    (base / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    adapter = HraAdapter({module: torch.randn(32 * 9, RANK)}, rank=RANK)
    merge_checkpoint(plan_merge(open_checkpoint(base), [adapter]), tmp_path / "merged")
    written = {path.relative_to(tmp_path / "merged").as_posix() for path in (tmp_path / "merged").rglob("*.*")}
    assert written == {
        "README.md",
        "hra_export_manifest.json",
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet")
    exact = before[f"{module}.weight"].flatten(1).double() @ explicit_chain(adapter.chains[module])
    got = merged.get_submodule(module).weight.flatten(1).double()
    torch.testing.assert_close(got, exact, atol=ATOL_FP32, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_on_a_gpu_is_that_of_the_cpu_up_to_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tensors({"proj.weight": torch.randn(300, 512).to(dtype)}, tmp_path / "base")
    adapter = HraAdapter(chains(proj=512), rank=RANK)
    plan = plan_merge(open_checkpoint(tmp_path / "base"), [adapter])
    merge_checkpoint(plan, tmp_path / "cpu")
    merge_checkpoint(plan, tmp_path / "gpu", device=torch.device("cuda"))
    on_cpu, on_gpu = (
        load_file(tmp_path / name / "model.safetensors")["proj.weight"].float() for name in ("cpu", "gpu")
    )
    one_rounding = 0.0 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-5, rtol=one_rounding)
