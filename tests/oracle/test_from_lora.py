"""LoRA as stock PEFT saves it and means it; and the HRA that comes of it, as stock PEFT loads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hra_export.adapter import read_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.lora.file import read_lora
from hra_export.low_rank import HraSource, locate
from hra_export.registry import load_converter
from tests.tiny_models import MODELS, UNET_TARGETS, build, scores

# PEFT forms ΔW in float32.
SAME_DELTA = 1e-6
# Of the adapter's effect: factors and vectors are float32, and chains lie a few hundred roundings of layers behind.
SAME_EFFECT = 1e-3
RANK = 4


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=96, n_positions=32)).eval()


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": "all-linear", "lora_alpha": 5}),
    "rslora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "q_proj": 5, "up_proj": 9},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
    "unet": ("unet", {"target_modules": UNET_TARGETS}),
}


def model_of(name: str) -> Any:
    return gpt2() if name == "gpt2" else build(name)


def trained(model: nn.Module, config: Any) -> Any:
    """The PEFT model with every tensor that it saves moved away from its start."""
    torch.manual_seed(1)
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    return adapted.eval()


def outputs_of(name: str, model: Any) -> Tensor:
    torch.manual_seed(2)
    inputs = MODELS["llama" if name == "gpt2" else name].inputs()
    with torch.no_grad():
        return scores(model(**inputs))


@pytest.mark.filterwarnings("ignore:.*embedding layers to.*:UserWarning")  # PEFT tells that it saves them along
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_delta_weights_are_those_of_peft(variant: str, tmp_path: Path) -> None:
    name, options = VARIANTS[variant]
    model_of(name).save_pretrained(tmp_path / "base")
    adapted = trained(model_of(name), LoraConfig(**{"r": RANK, **options}))
    adapted.save_pretrained(tmp_path / "lora")
    lora = read_lora(tmp_path / "lora")
    layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert set(lora.modules) == set(layers)
    for module, weight in locate(lora, open_checkpoint(tmp_path / "base")).items():
        left, right = lora.factors(weight)
        delta: Any = layers[module].get_delta_weight("default").detach().double()
        expected = delta.T if weight.kind == "conv1d" else delta.flatten(1)
        assert float(torch.linalg.matrix_norm(left @ right - expected) / expected.norm()) < SAME_DELTA


@pytest.mark.parametrize("name", ["llama", "bert", "unet"])
def test_lora_that_was_hra_is_hra_again_in_peft(name: str, tmp_path: Path) -> None:
    """HRA → LoRA → HRA, trained, saved and loaded by stock PEFT on either side."""
    tiny = MODELS[name]
    model = model_of(name)
    model.save_pretrained(tmp_path / "base")
    plain = outputs_of(name, model)
    adapted = trained(model, HRAConfig(r=RANK, target_modules=tiny.targets, **tiny.options))
    adapted.save_pretrained(tmp_path / "hra")
    expected = outputs_of(name, adapted)
    base = open_checkpoint(tmp_path / "base")
    source = HraSource([read_adapter(tmp_path / "hra")])
    load_converter("to_lora").convert(source, tmp_path / "lora", base=base, layout="peft")
    report = load_converter("from_lora").convert(tmp_path / "lora", tmp_path / "again", base=base, rank=RANK)
    assert report.error < SAME_EFFECT
    again = PeftModel.from_pretrained(model_of(name), str(tmp_path / "again")).eval()
    effect = torch.linalg.vector_norm(expected - plain)
    assert float(torch.linalg.vector_norm(outputs_of(name, again) - expected) / effect) < SAME_EFFECT


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_adapter_of_a_whole_model_does_in_peft_what_the_model_does(name: str, tmp_path: Path) -> None:
    """Chains, norms, biases and heads that changed."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "base")
    plain = outputs_of(name, model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, value in model.named_parameters():
            if value.ndim == 2 and "layer" in path:
                half = torch.randn(2, value.shape[1], RANK // 2, dtype=torch.float64, generator=generator)
                turn = torch.linalg.matrix_exp(0.01 * (half[0] @ half[1].T - half[1] @ half[0].T))
                value.copy_(value.double() @ turn)
            elif value.ndim == 1 or "head" in path:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(tmp_path / "tuned")
    expected = outputs_of(name, model)
    base = open_checkpoint(tmp_path / "base")
    load_converter("from_full_model").convert(tmp_path / "tuned", tmp_path / "hra", base=base, rank=RANK)
    again = PeftModel.from_pretrained(model_of(name), str(tmp_path / "hra")).eval()
    effect = torch.linalg.vector_norm(expected - plain)
    assert float(torch.linalg.vector_norm(outputs_of(name, again) - expected) / effect) < SAME_EFFECT
