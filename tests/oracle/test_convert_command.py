"""What `hra-export convert` writes, in the hands of its clients: stock PEFT, 4-bit layers, a diffusers pipeline.

The adapter's effect is compared: one that is ignored is off by 1.
"""

import json
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.attachment import attach
from tests import llama_cpp_judge, tiny_models
from tests.command_line import run
from tests.test_from_bitsandbytes import own_values, quantize

# Factors are rounded to float32, and both sides compute in it, in another order of sums.
EFFECT_FP32 = 1e-4
RANK = 4
LINEARS = ("_proj",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))


def put_adapter(model: nn.Module, folder: Path, name: str, *, rank: int = RANK, seed: int = 1) -> Path:
    """Vectors in pairs that enclose wide angles, on every linear layer but the head."""
    generator = torch.Generator().manual_seed(seed)
    chains = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(LINEARS):
            first = torch.randn(module.in_features, rank // 2, generator=generator)
            second = first + 0.5 * torch.randn(first.shape, generator=generator)
            chains[path] = torch.stack([first, second], dim=2).flatten(1)
    write_adapter(HraAdapter(chains, rank, task="CAUSAL_LM"), folder / name)
    return folder / name


def logits(model: Any) -> Tensor:
    """float64. With a gradient to carry, bitsandbytes multiplies by the values that it dequantizes, in float32."""
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    result: Tensor = model(inputs_embeds=embedded).logits.detach().double()
    return result


def live_logits(model: nn.Module, *adapters: Path, **options: Any) -> Tensor:
    attachment = attach(model, *map(read_adapter, adapters), **options)
    found = logits(model)
    attachment.detach()
    return found


def effect_error(found: Tensor, reference: Tensor, start: Tensor) -> float:
    effect = (reference - start).norm()
    assert effect > 0.01 * start.norm()
    return float((found - reference).norm() / effect)


def with_lora(model: nn.Module, lora: Path) -> Tensor:
    """Of stock PEFT, which is taken off again."""
    loaded: Any = PeftModel.from_pretrained(model, lora).eval()
    found = logits(loaded)
    loaded.unload()
    return found


def convert(*arguments: str | Path) -> None:
    outcome = run("convert", *arguments)
    assert outcome.code == 0, outcome.stderr


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    """A model whose directory is `base`, with the adapters `first` and `second` beside it."""
    model: Any = tiny_models.build("llama").eval()
    model.save_pretrained(tmp_path / "base")
    put_adapter(model, tmp_path, "first")
    put_adapter(model, tmp_path, "second", rank=2, seed=2)
    return model


@pytest.mark.parametrize(
    ("strength", "interpolation"),
    [("1", "geodesic"), ("0.5", "geodesic"), ("-1", "geodesic"), ("2", "geodesic"), ("0.5", "linear")],
)
def test_a_lora_at_a_strength_is_live_layers_at_that_strength(
    llama: Any, strength: str, interpolation: str, tmp_path: Path
) -> None:
    adapters = tmp_path / "first", tmp_path / "second"
    given = ("--strength", strength, "--interpolation", interpolation)
    convert(*adapters, "--base", tmp_path / "base", "--to", "lora", "-o", tmp_path / "lora", *given)
    start = logits(llama)
    reference = live_logits(llama, *adapters, strength=float(strength), interpolation=interpolation)
    assert effect_error(with_lora(llama, tmp_path / "lora"), reference, start) < EFFECT_FP32
    for other in (1.0, 0.75, -0.5):  # which this one is not
        assert effect_error(live_logits(llama, *adapters, strength=other), reference, start) > 100 * EFFECT_FP32 or (
            other == float(strength)
        )


@pytest.mark.parametrize("interpolation", ["geodesic", "linear"])
def test_a_lora_at_strength_0_is_the_base_bit_for_bit(llama: Any, interpolation: str, tmp_path: Path) -> None:
    given = ("--strength", "0", "--interpolation", interpolation)
    convert(tmp_path / "first", "--base", tmp_path / "base", "--to", "lora", "-o", tmp_path / "lora", *given)
    assert torch.equal(with_lora(llama, tmp_path / "lora"), logits(llama))


def test_a_composed_half_as_one_hra_directory_is_live_layers_of_both(llama: Any, tmp_path: Path) -> None:
    adapters = tmp_path / "first", tmp_path / "second"
    convert(*adapters, "--to", "hra", "--strength", "0.5", "-o", tmp_path / "half")
    start, reference = logits(llama), live_logits(llama, *adapters, strength=0.5)
    assert effect_error(with_lora(llama, tmp_path / "half"), reference, start) < EFFECT_FP32


def test_ranks_of_a_compressed_adapter_are_kept_by_peft(llama: Any, tmp_path: Path) -> None:
    """By tolerance each target keeps as many reflections as it needs, and the file holds no more."""
    base, wide = tmp_path / "base", tmp_path / "wide"
    convert(tmp_path / "first", tmp_path / "second", "--to", "hra", "-o", wide)
    small, lora = tmp_path / "small", tmp_path / "lora"
    outcome = run("compress", wide, "--tolerance", "0.3", "--base", base, "-o", small, "--json")
    assert outcome.code == 0, outcome.stderr
    convert(small, "--base", base, "--to", "lora", "--mixed-ranks", "-o", lora)
    start, reference = logits(llama), live_logits(llama, small)
    loaded: Any = PeftModel.from_pretrained(llama, lora).eval()
    assert effect_error(logits(loaded), reference, start) < EFFECT_FP32
    layers = {p: m for p, m in loaded.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    ranks = {path: layer.r["default"] for path, layer in layers.items()}
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= RANK + 2
    assert sum(ranks.values()) < (RANK + 2) * len(ranks)
    assert all(layer.scaling["default"] == 1 for layer in layers.values())
    loaded.unload()
    assert effect_error(live_logits(llama, wide), reference, start) > 0.05  # compressing was not for nothing


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("fp4", True)])
def test_a_lora_for_4_bits_of_bitsandbytes_is_made_of_what_they_dequantize(
    kind: str, nested: bool, tmp_path: Path
) -> None:
    """PEFT puts the factors beside the 4-bit layers; the float model they were quantized from is another base."""
    base = quantize(tmp_path, kind, nested=nested)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    adapter = put_adapter(plain, tmp_path, "hra")
    convert(adapter, "--base", base, "--to", "lora", "-o", tmp_path / "lora")
    convert(adapter, "--base", tmp_path / "float", "--to", "lora", "-o", tmp_path / "other")
    plain.load_state_dict(own_values(base))
    reference, start = live_logits(plain, adapter), logits(plain)
    quantized: Any = AutoModelForCausalLM.from_pretrained(base, device_map="cpu").eval()
    assert quantized.model.layers[0].mlp.up_proj.weight.quant_state is not None
    assert effect_error(with_lora(quantized, tmp_path / "lora"), reference, start) < EFFECT_FP32
    assert effect_error(with_lora(quantized, tmp_path / "other"), reference, start) > 0.01


def test_a_lora_for_a_gguf_file_is_made_of_what_it_dequantizes(tmp_path: Path) -> None:
    model = llama_cpp_judge.build("llama")
    file = llama_cpp_judge.write_model(model, "llama", tmp_path / "model.gguf", Type.Q4_1)
    model.save_pretrained(tmp_path / "float")
    adapter = put_adapter(model, tmp_path, "hra")
    convert(adapter, "--base", file, "--to", "lora", "-o", tmp_path / "lora")
    convert(adapter, "--base", tmp_path / "float", "--to", "lora", "-o", tmp_path / "other")
    values: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    reference, start = live_logits(values, adapter), logits(values)
    assert effect_error(with_lora(values, tmp_path / "lora"), reference, start) < EFFECT_FP32
    assert effect_error(with_lora(values, tmp_path / "other"), reference, start) > 0.01


@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
def test_a_pipeline_of_diffusers_loads_the_directory_by_itself(mixed: bool, tmp_path: Path) -> None:
    """`load_lora_weights` finds file, component, rank and alpha; nothing of the text encoder is touched."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    unet: Any = tiny_models.build("unet").eval()
    unet.save_pretrained(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    widths = {path: m.in_features for path, m in unet.named_modules() if isinstance(m, nn.Linear) and ".to_" in path}
    generator = torch.Generator().manual_seed(1)
    for name, rank in (("first", RANK), ("second", 2)):
        paths = [path for path in widths if rank == RANK or path.endswith("to_q")]
        chains = {path: torch.randn(widths[path], rank, generator=generator) for path in paths}
        write_adapter(HraAdapter(chains, rank), tmp_path / name)
    adapters = tmp_path / "first", tmp_path / "second"
    flags = ["--mixed-ranks"] if mixed else []
    convert(*adapters, "--base", tmp_path / "base", "--to", "lora", "-o", tmp_path / "lora", *flags)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=32, max_position_embeddings=8, **sizes)),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    @torch.no_grad()
    def image() -> Tensor:
        torch.manual_seed(2)
        result: Tensor = unet(**tiny_models.MODELS["unet"].inputs()).sample
        return result

    start = image()
    attachment = attach(unet, *map(read_adapter, adapters))
    reference = image()
    attachment.detach()
    pipeline.load_lora_weights(tmp_path / "lora")
    assert effect_error(image(), reference, start) < EFFECT_FP32
    assert {path for path, m in unet.named_modules() if isinstance(m, LoraLayer)} == set(widths)
    assert not any(isinstance(module, LoraLayer) for module in pipeline.text_encoder.modules())
    pipeline.unload_lora_weights()
    torch.testing.assert_close(image(), start)


def test_conv1d_is_said_to_lie_transposed(tmp_path: Path) -> None:
    """PEFT would find out by itself, with a warning; other readers have the configuration alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96)).save_pretrained(tmp_path / "base")
    write_adapter(HraAdapter({"transformer.h.0.attn.c_attn": torch.randn(32, RANK)}, RANK), tmp_path / "hra")
    convert(tmp_path / "hra", "--base", tmp_path / "base", "--to", "lora", "-o", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
