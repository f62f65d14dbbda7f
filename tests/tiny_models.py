"""Tiny random models of many architectures, made in the test run, with an input for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96
TOKENS = 9


@dataclass(frozen=True)
class TinyModel:
    """One architecture: how to build it, what to feed it, and what PEFT may adapt.

    Attributes:
        build: makes the model; called under a fixed seed.
        inputs: makes one batch for it.
        targets: PEFT's `target_modules`.
        options: further arguments of `HRAConfig`.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: str | list[str] = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)


def token_inputs() -> dict[str, Tensor]:
    """Two rows of random tokens."""
    return {"input_ids": torch.randint(4, VOCABULARY, (2, TOKENS))}


def seq2seq_inputs() -> dict[str, Tensor]:
    """Random tokens for encoder and decoder."""
    return {**token_inputs(), "decoder_input_ids": torch.randint(4, VOCABULARY, (2, 5))}


def image_inputs() -> dict[str, Tensor]:
    """Two random images of 16 × 16."""
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def denoiser_inputs() -> dict[str, Tensor]:
    """Random latents, a time step and a text embedding."""
    return {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 5, 32),
    }


def _decoder(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A causal language model of two layers, 32 wide."""

    def build() -> nn.Module:
        import transformers

        sizes: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
        return model

    return build


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, **sizes))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", **sizes))


def _encoder(name: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        sizes: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "num_labels": 3,
        }
        config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
        model: nn.Module = getattr(transformers, f"{name}{head}")(config)
        return model

    return build


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes))


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


UNET_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "proj_in",
]
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "type_vocab_size": 0}

MODELS: dict[str, TinyModel] = {
    "llama": TinyModel(_decoder("Llama"), token_inputs),
    "llama-tied": TinyModel(_decoder("Llama", tie_word_embeddings=True), token_inputs),
    "llama-tied-head": TinyModel(
        _decoder("Llama", tie_word_embeddings=True), token_inputs, ["q_proj", "down_proj", "lm_head"]
    ),
    "llama-biases": TinyModel(_decoder("Llama", attention_bias=True), token_inputs, options={"bias": "hra_only"}),
    "qwen3": TinyModel(_decoder("Qwen3", head_dim=8), token_inputs),
    "qwen3-moe": TinyModel(
        _decoder("Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24), token_inputs
    ),
    "mixtral": TinyModel(_decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), token_inputs),
    "gemma": TinyModel(_decoder("Gemma", head_dim=8, tie_word_embeddings=True), token_inputs),
    "phi3": TinyModel(_decoder("Phi3"), token_inputs),
    "gpt-neox": TinyModel(_decoder("GPTNeoX"), token_inputs),
    "gpt-neox-head": TinyModel(
        _decoder("GPTNeoX"), token_inputs, ["query_key_value", "dense_4h_to_h", "embed_out", "lm_head"]
    ),
    "opt": TinyModel(_opt, token_inputs, options={"bias": "all"}),
    "t5": TinyModel(_t5, seq2seq_inputs),
    "bert": TinyModel(
        _encoder("Bert", "ForSequenceClassification"), token_inputs, options={"modules_to_save": ["classifier"]}
    ),
    "deberta-v2": TinyModel(_encoder("DebertaV2", "ForSequenceClassification", **DEBERTA), token_inputs),
    "vit": TinyModel(_vit, image_inputs),
    "unet": TinyModel(_unet, denoiser_inputs, UNET_TARGETS),
}


def build(name: str, *, seed: int = 0) -> nn.Module:
    """The model of this name in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    return MODELS[name].build().eval()


def scores(result: Any) -> Tensor:
    """The output of a forward pass that comparisons are made on."""
    for key in ("logits", "sample", "last_hidden_state"):
        if getattr(result, key, None) is not None:
            tensor: Tensor = getattr(result, key)
            return tensor.detach()
    raise KeyError(f"no scores in {type(result).__name__}")
