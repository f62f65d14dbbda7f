"""Which graphs a model becomes, in the names of optimum and ONNX Runtime GenAI.

    encoder          model          input_ids, attention_mask[, token_type_ids]
                                    → logits | start_logits, end_logits | last_hidden_state[, pooler_output]
    decoder          model          input_ids, attention_mask, position_ids, past_key_values.N.key|value
                                    → logits, present.N.key|value
    encoder-decoder  encoder_model  input_ids, attention_mask → last_hidden_state, present.N.encoder.key|value
                     decoder_model  decoder_input_ids, encoder_attention_mask,
                                    past_key_values.N.decoder|encoder.key|value → logits, present.N.decoder.key|value
    image            model          pixel_values → logits | last_hidden_state[, pooler_output]
    image-text       model          input_ids, pixel_values, attention_mask
                                    → logits_per_image, logits_per_text, text_embeds, image_embeds
    denoiser         model          sample, timestep, encoder_hidden_states → out_sample

A decoder serves prefill (an empty past) and decoding; `attention_mask` covers past and present tokens, and
`position_ids` counts from the first token that is not padding. An encoder-decoder's cross attention reads keys and
values that the encoder's graph has computed once, so that no decoding step computes them again.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hra_export.errors import UnsupportedModelError
from hra_export.graph import caching
from hra_export.graph.ports import EXAMPLE_SIZES, Family, GraphSpec, Nested, Port, float_dtype, twin

__all__ = ["Family", "GraphSpec", "graph_specs"]

Tasks = Mapping[str, tuple[str, tuple[str, ...]]]
HIDDEN = ("feature-extraction", ("last_hidden_state", "pooler_output"))
# Ending of a class name → task and outputs; outputs that a model does not give are left out.
TOKEN_TASKS: Tasks = {
    "ForSequenceClassification": ("text-classification", ("logits",)),
    "ForTokenClassification": ("token-classification", ("logits",)),
    "ForMaskedLM": ("fill-mask", ("logits",)),
    "ForQuestionAnswering": ("question-answering", ("start_logits", "end_logits")),
    "Model": HIDDEN,
}
IMAGE_TASKS: Tasks = {
    "ForImageClassification": ("image-classification", ("logits",)),
    "Model": ("image-feature-extraction", HIDDEN[1]),
}
IMAGE_TEXT_OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
TOKENS = ("batch", "sequence")


def graph_specs(model: nn.Module, *, task: str | None = None) -> list[GraphSpec]:
    """The graphs that a model becomes.

    Args:
        model: of transformers or diffusers, traceable: plain, folded, or after `make_traceable_`. Not changed.
        task: refuse the model if it is for another task.

    Raises:
        ValueError: the model is in training mode: its graph would drop activations at random.
        UnsupportedModelError: an architecture that no graph is known for, or another task than the one asked for.
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode")
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"no ONNX graph is known for `{kind}` ({type(model).__name__})",
            hint=f"known: {', '.join(sorted(FAMILIES))}",
        )
    specs = FAMILIES[kind](model)
    if task is not None and task != specs[0].task:
        raise UnsupportedModelError(f"{type(model).__name__}: expected a model for {task}, got one for {specs[0].task}")
    return specs


def _encoder(model: nn.Module) -> list[GraphSpec]:
    config: Any = model.config
    task, outputs = _task(model, TOKEN_TASKS)
    inputs = [Port("input_ids", torch.int64, TOKENS, config.vocab_size), Port("attention_mask", torch.int64, TOKENS)]
    if getattr(config, "type_vocab_size", 0) > 1:
        inputs.append(Port("token_type_ids", torch.int64, TOKENS, config.type_vocab_size))
    return [_plain("encoder", task, model, inputs, outputs)]


def _decoder(model: nn.Module) -> list[GraphSpec]:
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedModelError(f"{type(model).__name__}: expected a causal language model with its head")
    config: Any = model.config
    past = caching.ports(model)
    inputs = [
        Port("input_ids", torch.int64, TOKENS, config.vocab_size),
        Port("attention_mask", torch.int64, ("batch", "total_sequence")),
        Port("position_ids", torch.int64, TOKENS, EXAMPLE_SIZES["sequence"]),
        *past,
    ]
    outputs = ("logits", *(caching.present_name(port) for port in past))

    def forward(self: nn.Module, past_key_values: Nested, **inputs: Tensor) -> Nested:
        caching.declare_lengths(inputs["input_ids"], inputs["attention_mask"], past_key_values)
        cache = caching.cache_of(past_key_values)
        result = type(model).forward(self, **inputs, past_key_values=cache, use_cache=True)
        return {"logits": result.logits, "present": caching.leaves_of(result.past_key_values)}

    return [GraphSpec("model", "decoder", "text-generation", twin(model, forward), tuple(inputs), outputs)]


def _encoder_decoder(model: nn.Module) -> list[GraphSpec]:
    if not type(model).__name__.endswith("ForConditionalGeneration"):
        raise UnsupportedModelError(f"{type(model).__name__}: expected a model for conditional generation")
    config: Any = model.config
    task = "text2text-generation"
    own, cross = caching.encoder_decoder_ports(model)
    source = ("batch", "encoder_sequence")

    def encode(self: nn.Module, **inputs: Tensor) -> Nested:
        start = torch.zeros_like(inputs["input_ids"][:, :1])  # one token: runs the products that fill the cache
        result = type(model).forward(self, **inputs, decoder_input_ids=start, use_cache=True)
        layers = caching.leaves_of(result.past_key_values.cross_attention_cache)
        present = {index: {"encoder": leaves} for index, leaves in layers.items()}
        return {"last_hidden_state": result.encoder_last_hidden_state, "present": present}

    def decode(
        self: nn.Module, decoder_input_ids: Tensor, encoder_attention_mask: Tensor, past_key_values: Nested
    ) -> Nested:
        cache, encoded = caching.encoder_decoder_cache_of(past_key_values)
        result = type(model).forward(
            self,
            decoder_input_ids=decoder_input_ids,
            attention_mask=encoder_attention_mask,
            encoder_outputs=encoded,
            past_key_values=cache,
            use_cache=True,
        )
        layers = caching.leaves_of(result.past_key_values.self_attention_cache)
        return {"logits": result.logits, "present": {index: {"decoder": leaves} for index, leaves in layers.items()}}

    ids = (Port("input_ids", torch.int64, source, config.vocab_size), Port("attention_mask", torch.int64, source))
    encoder_outputs = ("last_hidden_state", *(caching.present_name(port) for port in cross))
    past = [port for pair in zip(own[::2], own[1::2], cross[::2], cross[1::2], strict=True) for port in pair]
    decoder_inputs = (
        Port("decoder_input_ids", torch.int64, TOKENS, config.vocab_size),
        Port("encoder_attention_mask", torch.int64, source),
        *past,
    )
    decoder_outputs = ("logits", *(caching.present_name(port) for port in own))
    return [
        GraphSpec("encoder_model", "encoder-decoder", task, twin(model, encode), ids, encoder_outputs),
        GraphSpec("decoder_model", "encoder-decoder", task, twin(model, decode), decoder_inputs, decoder_outputs),
    ]


def _image(model: nn.Module) -> list[GraphSpec]:
    config: Any = model.config
    task, outputs = _task(model, IMAGE_TASKS)
    return [_plain("image", task, model, [_pixels(config, float_dtype(model), "batch")], outputs)]


def _image_text(model: nn.Module) -> list[GraphSpec]:
    config: Any = model.config
    task, _ = _task(model, {"CLIPModel": ("zero-shot-image-classification", ())})
    tokens = ("text_batch", "sequence")
    inputs = [
        Port("input_ids", torch.int64, tokens, config.text_config.vocab_size),
        _pixels(config.vision_config, float_dtype(model), "image_batch"),
        Port("attention_mask", torch.int64, tokens),
    ]
    return [_plain("image-text", task, model, inputs, IMAGE_TEXT_OUTPUTS)]


def _denoiser(model: nn.Module) -> list[GraphSpec]:
    config: Any = model.config
    _refuse_conditions(config)
    dtype = float_dtype(model)
    size = ("batch", config.in_channels, "height", "width")
    inputs = (
        Port("sample", dtype, size),
        Port("timestep", dtype, ()),
        Port("encoder_hidden_states", dtype, ("batch", "sequence", config.cross_attention_dim)),
    )

    def forward(self: nn.Module, **inputs: Tensor) -> Nested:
        return {"out_sample": type(model).forward(self, **inputs).sample}

    return [GraphSpec("model", "denoiser", "denoising", twin(model, forward), inputs, ("out_sample",))]


def _refuse_conditions(config: Any) -> None:
    """Further inputs of a denoiser (SDXL's, for one) that its graph has no ports for."""
    names = ("addition_embed_type", "class_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type")
    if found := [f"{name}: expected None, got {config[name]!r}" for name in names if config.get(name) is not None]:
        raise UnsupportedModelError("UNet2DConditionModel with further conditions has no ONNX graph", findings=found)


def _plain(family: Family, task: str, model: nn.Module, inputs: list[Port], outputs: tuple[str, ...]) -> GraphSpec:
    """One graph of a model that is called with its inputs and nothing else."""
    with torch.no_grad():
        given = model(**{port.name: port.example() for port in inputs})
    kept = tuple(name for name in outputs if given.get(name) is not None)

    def forward(self: nn.Module, **inputs: Tensor) -> Nested:
        result = type(model).forward(self, **inputs)
        return {name: result[name] for name in kept}

    return GraphSpec("model", family, task, twin(model, forward), tuple(inputs), kept)


def _pixels(config: Any, dtype: torch.dtype, batch: str) -> Port:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return Port("pixel_values", dtype, (batch, config.num_channels, height, width))


def _task(model: nn.Module, tasks: Tasks) -> tuple[str, tuple[str, ...]]:
    name = type(model).__name__
    for ending, found in tasks.items():
        if name.endswith(ending):
            return found
    raise UnsupportedModelError(f"{name}: expected a class that ends in one of {', '.join(tasks)}")


# transformers' `model_type`, or the class of a diffusers model.
FAMILIES: Mapping[str, Callable[[nn.Module], list[GraphSpec]]] = {
    **dict.fromkeys(("bert", "roberta", "deberta-v2"), _encoder),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "phi", "phi3"), _decoder),
    "t5": _encoder_decoder,
    "vit": _image,
    "clip": _image_text,
    "UNet2DConditionModel": _denoiser,
}
