"""`genai_config.json`: what ONNX Runtime GenAI knows of a graph, checked against it, or made for a traced one.

model.decoder.inputs, outputs     which of the graph's names is what; `%d` stands for a layer
model.type                        `decoder` for a traced graph: any decoder with a cache of keys and values
search                            defaults of the generator, a user's own options win
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from hra_export.errors import GraphError, UnsupportedModelError
from hra_export.graph.options import Provider

Config = dict[str, Any]

# GroupQueryAttention rotates heads of a size that is a multiple of the one, by angles whose number is of the other.
HEAD_STEP, ANGLE_STEP = 16, 8
COSINES = 7  # its input with the cosines (positions, angles)
LAYER = "%d"
# The builder's names of a configuration's fields; GPT-2 and older models have their own.
SYNONYMS = {
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocab_size": ("vocab_size",),
}
# What a generator does when nobody says otherwise: transformers' defaults.
SEARCH: Mapping[str, object] = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
SINGLE_INPUTS = ("input_ids", "attention_mask", "position_ids")
CACHE = {"key": ("past_key_values.{layer}.key", "present.{layer}.key")}
CACHE |= {"value": ("past_key_values.{layer}.value", "present.{layer}.value")}


def traced_config(graph: ir.Graph, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Config:
    """The configuration of a decoder that was traced with its cache.

    Args:
        graph: takes input_ids, past_key_values.N.key and .value, and perhaps attention_mask and position_ids; gives
            logits, present.N.key and .value.
        config: `config.json` of transformers.
        generation: `generation_config.json`; empty when there is none.

    Raises:
        GraphError: the graph is not of this kind, or the configuration lacks a size; all findings at once.
    """
    names = {str(value.name): value for value in graph.inputs}
    layers = sum(1 for name in names if name.startswith("past_key_values.") and name.endswith(".key"))
    cache = names.get("past_key_values.0.key")
    sizes = {key: _first(config, fields) for key, fields in SYNONYMS.items()}
    findings = [f"config.json has none of {', '.join(SYNONYMS[key])}" for key, size in sizes.items() if size is None]
    if cache is None or cache.shape is None or len(cache.shape) != 4:
        findings.append("the graph has no input past_key_values.0.key with its four axes")
    if findings:
        raise GraphError("ONNX Runtime GenAI cannot be told about this graph", findings=findings)
    assert cache is not None
    assert cache.shape is not None
    tokens = {key: generation.get(key, config.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens["pad_token_id"] = _or_first(tokens["pad_token_id"], tokens["eos_token_id"])
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": cache.shape[3],
        "hidden_size": sizes["hidden_size"],
        "inputs": {
            **{name: name for name in SINGLE_INPUTS if name in names},
            **{f"past_{part}_names": past.format(layer=LAYER) for part, (past, _) in CACHE.items()},
        },
        "outputs": {
            "logits": "logits",
            **{f"present_{part}_names": present.format(layer=LAYER) for part, (_, present) in CACHE.items()},
        },
        "num_attention_heads": sizes["num_attention_heads"],
        "num_hidden_layers": layers,
        "num_key_value_heads": cache.shape[1],
    }
    context = {"context_length": sizes["context_length"], "vocab_size": sizes["vocab_size"]}
    # A traced graph returns a cache that has grown; it does not write into one of full length.
    search = {**SEARCH, "max_length": sizes["context_length"], "past_present_share_buffer": False}
    search |= {key: generation[key] for key in SEARCH if generation.get(key) is not None}
    return {"model": {**tokens, **context, "type": "decoder", "decoder": decoder}, "search": search}


def for_provider(config: Config, provider: Provider) -> Config:
    """The same configuration for another provider: the builder's own, where it built for that."""
    options = config["model"]["decoder"]["session_options"]
    own = [entry for entry in options["provider_options"] if provider in entry]
    chosen = [] if provider == "cpu" else own or [{provider: {}}]
    decoder = {**config["model"]["decoder"], "session_options": {**options, "provider_options": chosen}}
    return {**config, "model": {**config["model"], "decoder": decoder}}


def check_config(config: Config, graph: ir.Graph) -> None:
    """Make sure that graph and configuration fit, and that generation can end.

    Raises:
        GraphError: names or sizes that the graph has not, inputs that nothing would feed; all findings at once.
        UnsupportedModelError: the runtime's attention has no kernel for heads of this size, or the graph lacks an
            output.
    """
    try:
        findings = list(_findings(config, graph))
    except (KeyError, TypeError) as error:
        raise GraphError(f"genai_config.json is not as expected: {error!r}") from error
    if findings:
        raise GraphError("genai_config.json does not fit the graph", findings=findings)
    unmade = [str(value.name) for value in graph.outputs if value.producer() is None]
    if unmade:
        raise UnsupportedModelError(
            "ONNX Runtime GenAI's builder made a graph without some of its outputs",
            findings=[f"{name}: no node gives it" for name in unmade],
            hint="it has no float32 graph for CUDA with shared keys: --precision fp16, or --provider cpu",
        )
    sizes = {(config["model"]["decoder"]["head_size"], _angles(node)) for node in graph if _rotates(node)}
    if any(head % HEAD_STEP or angles % ANGLE_STEP for head, angles in sizes):
        raise UnsupportedModelError(
            "ONNX Runtime's GroupQueryAttention has no kernel for these attention heads",
            findings=[
                f"expected a size that is a multiple of {HEAD_STEP} and half of the rotated part one of {ANGLE_STEP}, "
                f"got {head} and {angles}"
                for head, angles in sorted(sizes)
            ],
            hint="--runtime ort",
        )


def check_loadable(config: Config, directory: str, *, cuda_graph: bool) -> None:
    """Make sure that a directory runs no code of its own, and that its decoding can be recorded when it shall be.

    Args:
        config: the directory's.
        directory: for the message.
        cuda_graph: one-token runs are recorded and replayed, which needs a cache that stays where it is.

    Raises:
        GraphError: it names a library to load.
        UnsupportedModelError: its graph returns a cache that has grown.
    """
    named = config.get("model", {}).get("decoder", {}).get("session_options", {}).get("custom_ops_library")
    if named is not None:
        raise GraphError(
            f"`{directory}` wants a library of its own loaded, whose code would run here: `{named}`",
            hint="remove `custom_ops_library` from its genai_config.json; --operator names a library that you trust",
        )
    if cuda_graph and config.get("search", {}).get("past_present_share_buffer") is not True:
        raise UnsupportedModelError(
            f"`{directory}`: its decoding cannot be recorded as a CUDA graph",
            findings=["past_present_share_buffer is not true: each step returns its cache in other memory"],
            hint="graphs of GenAI's own builder for CUDA share it; open this one without `cuda_graph`",
        )


def provider_settings(provider: Provider, *, cuda_graph: bool) -> dict[str, str]:
    """What a provider is told when a directory is loaded, whatever its own configuration says."""
    if provider != "cuda":
        return {}
    # TF32 would round float32 products to 11 bits, as in other sessions.
    return {"enable_cuda_graph": str(int(cuda_graph)), "use_tf32": "0"}


def to_bytes(config: Config) -> bytes:
    """As it is written."""
    return (json.dumps(config, indent=4, ensure_ascii=False) + "\n").encode()


def _findings(config: Config, graph: ir.Graph) -> Iterator[str]:
    model, decoder = config["model"], config["model"]["decoder"]
    inputs = {str(value.name) for value in graph.inputs}
    fed = _expanded(decoder["inputs"], decoder["num_hidden_layers"])
    given = _expanded(decoder["outputs"], decoder["num_hidden_layers"])
    optional = {name for name in graph.initializers if name in inputs}
    yield from (f"input `{name}`: the graph has none of this name" for name in sorted(fed - inputs))
    yield from (f"input `{name}`: nothing would feed it" for name in sorted(inputs - fed - optional))
    outputs = {str(value.name) for value in graph.outputs}
    yield from (f"output `{name}`: the graph has none of this name" for name in sorted(given - outputs))
    ends = model["eos_token_id"] if isinstance(model["eos_token_id"], list) else [model["eos_token_id"]]
    if not all(isinstance(end, int) and 0 <= end < model["vocab_size"] for end in ends) or not ends:
        yield f"eos_token_id: expected tokens below {model['vocab_size']}, got {model['eos_token_id']}"
    if config["search"]["max_length"] > model["context_length"]:
        yield f"max_length: expected at most {model['context_length']}, got {config['search']['max_length']}"


def _expanded(names: Mapping[str, str], layers: int) -> set[str]:
    return {
        name.replace(LAYER, str(layer)) for name in names.values() for layer in range(layers if LAYER in name else 1)
    }


def _rotates(node: ir.Node) -> bool:
    attribute = node.attributes.get("do_rotary")
    return node.op_type == "GroupQueryAttention" and attribute is not None and attribute.as_int() == 1


def _angles(node: ir.Node) -> int:
    """How many angles a head is rotated by; a multiple of everything where the graph does not tell."""
    cosines = node.inputs[COSINES] if len(node.inputs) > COSINES else None
    size = None if cosines is None or cosines.shape is None else cosines.shape[-1]
    return size if isinstance(size, int) else 0


def _first(config: Mapping[str, Any], fields: tuple[str, ...]) -> int | None:
    return next((config[field] for field in fields if isinstance(config.get(field), int)), None)


def _or_first(token: object, others: object) -> object:
    if token is not None:
        return token
    return others[0] if isinstance(others, list) and others else others
