"""Keys and values of past tokens: a cache object in transformers, plain tensors in a graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hra_export.errors import UnsupportedModelError
from hra_export.graph.ports import Nested, Port, float_dtype

LEAVES = ("key", "value")


def ports(model: nn.Module) -> list[Port]:
    """Inputs `past_key_values.N.key|value` of a decoder.

    Raises:
        UnsupportedModelError: the model keeps something else than keys and values for every layer.
    """
    return _ports(model, _one_token(model).past_key_values, "past_key_values.{}.{}", "past_sequence")


def encoder_decoder_ports(model: nn.Module) -> tuple[list[Port], list[Port]]:
    """Inputs `past_key_values.N.decoder.key|value`, and those of the cross attention, `….encoder.key|value`."""
    cache = _one_token(model, decoder_input_ids=torch.zeros((1, 1), dtype=torch.int64)).past_key_values
    own = _ports(model, cache.self_attention_cache, "past_key_values.{}.decoder.{}", "past_sequence")
    cross = _ports(model, cache.cross_attention_cache, "past_key_values.{}.encoder.{}", "encoder_sequence")
    return own, cross


def present_name(port: Port) -> str:
    """The output that becomes this input of the next step."""
    return port.name.replace("past_key_values", "present", 1)


def cache_of(past: Nested) -> Any:
    """Keys and values by layer as a cache whose every layer keeps all tokens; masks see to sliding windows."""
    from transformers import DynamicCache

    return DynamicCache([(layer["key"], layer["value"]) for layer in past.values()])


def encoder_decoder_cache_of(past: Nested) -> tuple[Any, Any]:
    """A cache with the cross attention's part filled, and encoder outputs that tell their length and nothing else."""
    from transformers import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    own = cache_of({index: layer["decoder"] for index, layer in past.items()})
    cross = cache_of({index: layer["encoder"] for index, layer in past.items()})
    cache = EncoderDecoderCache(own, cross)
    cache.is_updated = dict.fromkeys(range(len(past)), True)
    keys = cross.layers[0].keys  # (b, heads, t, d)
    return cache, BaseModelOutput(keys.new_zeros((keys.shape[0], keys.shape[2], 1)))


def leaves_of(cache: Any) -> Nested:
    """Keys and values of a cache by layer."""
    return {
        str(index): dict(zip(LEAVES, (layer.keys, layer.values), strict=True))
        for index, layer in enumerate(cache.layers)
    }


def declare_lengths(tokens: Tensor, mask: Tensor, past: Nested) -> None:
    """Tell the tracer which lengths are one: fewer symbols, and fewer nodes that compute them."""
    first: Sequence[int] = next(iter(past.values()))["key"].shape
    check: Callable[[bool], None] = torch._check  # it has no types
    check(mask.shape[0] == tokens.shape[0])
    check(mask.shape[1] == first[2] + tokens.shape[1])
    for layer in past.values():
        for leaf in LEAVES:
            check(layer[leaf].shape[0] == tokens.shape[0])
            check(layer[leaf].shape[2] == first[2])


@torch.no_grad()
def _one_token(model: nn.Module, **inputs: Tensor) -> Any:
    """What the model gives for one token; its cache tells sizes that configurations call by many names."""
    return model(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=True, **inputs)


def _ports(model: nn.Module, cache: Any, template: str, length: str) -> list[Port]:
    made = []
    for index, layer in enumerate(cache.layers):
        for leaf, tensor in zip(LEAVES, (getattr(layer, "keys", None), getattr(layer, "values", None)), strict=True):
            if tensor is None or tensor.ndim != 4:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: layer {index} keeps a {type(layer).__name__}, expected keys and values"
                )
            axes = ("batch", tensor.shape[1], length, tensor.shape[3])
            made.append(Port(template.format(index, leaf), float_dtype(model), axes))
    return made
