"""Llamas of real sizes with random weights, module trees that share their weights, checkpoints in either."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Size:
    """The shape of a llama; `tied` says that its head is its embedding."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    tied: bool
    vocabulary: int = 128256


SIZES = {
    "1B": Size(2048, 8192, 16, 32, 8, 64, tied=True),
    "3B": Size(3072, 8192, 28, 24, 8, 128, tied=True),
    "8B": Size(4096, 14336, 32, 32, 8, 128, tied=False),
}


def build_base(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A frozen llama with random weights, in training mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        head_dim=size.head_width,
        max_position_embeddings=131072,
        tie_word_embeddings=size.tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).train()


def sharing_copy(model: nn.Module) -> nn.Module:
    """A module tree of its own with the same parameter and buffer objects."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def checkpoint_gradients_(model: Any) -> None:
    """Recompute every block in the backward pass, without reentry; under the name that this transformers has for it."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
