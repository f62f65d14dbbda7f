"""llama.cpp as the judge of adapters: models in files as its own converter writes them, and its answers.

Names, row orders and metadata are written down here a second time, after llama.cpp's `convert_hf_to_gguf.py`: what is
judged must not have a part in the judgement. That the files are right shows in the base's answers, which are
PyTorch's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
import xllamacpp
from gguf import MODEL_ARCH as ARCH
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from hra_export.adapter import HraAdapter

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, POSITIONS = 96, 64, 96, 2, 4, 2, 64
HEAD = WIDTH // HEADS

Floats = NDArray[np.floating[Any]]
Prepare = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp.

    Attributes:
        model: of transformers.
        config: what differs from `SIZES`.
        permuted: query and key rows lie in the order of llama.cpp's rotary embedding.
        shifted: norms are stored with the 1 that the model adds.
        transposed: matrices are transformers' Conv1D.
        prepare: writes metadata of its own.
    """

    arch: Any
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    shifted: bool = False
    transposed: bool = False
    prepare: Prepare = lambda writer, config: None


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

NOT_GPT2 = ("intermediate_size", "num_key_value_heads")


def _gemma(writer: Any, config: Any, *, window: bool, caps: bool) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if window:
        writer.add_sliding_window(config.sliding_window)
    if caps:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _head_size(writer: Any, config: Any) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _phi3(writer: Any, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(POSITIONS)
    writer.add_sliding_window(0)


def _granite(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


GRANITE = {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
GEMMA: dict[str, Any] = {"head_dim": HEAD, "tie_word_embeddings": True}
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": HEAD, "sliding_window": 32}
FAMILIES: dict[str, Family] = {
    "llama": Family(ARCH.LLAMA, "Llama", permuted=True),
    "llama-tied": Family(ARCH.LLAMA, "Llama", {"tie_word_embeddings": True}, permuted=True),
    "llama-wide-heads": Family(ARCH.LLAMA, "Llama", {"head_dim": 32}, permuted=True, prepare=_head_size),
    "mistral": Family(ARCH.LLAMA, "Mistral", {"sliding_window": None}, permuted=True),
    "qwen2": Family(ARCH.QWEN2, "Qwen2"),
    "qwen3": Family(ARCH.QWEN3, "Qwen3", {"head_dim": 32}, prepare=_head_size),
    "gemma": Family(ARCH.GEMMA, "Gemma", GEMMA, shifted=True, prepare=partial(_gemma, window=False, caps=False)),
    "gemma2": Family(ARCH.GEMMA2, "Gemma2", GEMMA2, shifted=True, prepare=partial(_gemma, window=True, caps=True)),
    "gemma3": Family(ARCH.GEMMA3, "Gemma3", GEMMA2, shifted=True, prepare=partial(_gemma, window=True, caps=False)),
    "phi3": Family(ARCH.PHI3, "Phi3", prepare=_phi3),
    "gpt2": Family(ARCH.GPT2, "GPT2", {"n_inner": 4 * WIDTH}, transposed=True),
    "starcoder2": Family(ARCH.STARCODER2, "Starcoder2", {"sliding_window": None}),
    "olmo2": Family(ARCH.OLMO2, "Olmo2"),
    "granite": Family(ARCH.GRANITE, "Granite", GRANITE, permuted=True, prepare=_granite),
    "smollm3": Family(ARCH.SMOLLM3, "SmolLM3", {"no_rope_layer_interval": 4}, permuted=True),
}


def build(family: str) -> Any:
    """The model in evaluation mode, the same each time; float32."""
    entry = FAMILIES[family]
    sizes = {key: value for key, value in SIZES.items() if not (entry.transposed and key in NOT_GPT2)}
    suffix = "TextConfig" if entry.model == "Gemma3" else "Config"
    config = getattr(transformers, f"{entry.model}{suffix}")(**{**sizes, **entry.config})
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if entry.transposed else f"{entry.model}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual start has weights so small that nothing would show
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model


def targets(model: Any, *, head: bool = False) -> list[str]:
    """Every matrix but the head's, which is added on demand."""
    kinds = ("Linear", "Conv1D")
    names = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    return [name for name in names if head or "lm_head" not in name]


def random_adapter(model: Any, modules: Sequence[str], *, rank: int = 4, seed: int = 1) -> HraAdapter:
    """Chains that change every one of these modules."""
    generator = torch.Generator().manual_seed(seed)
    chains = {}
    for name in modules:
        weight = model.get_submodule(name).weight
        features = weight.shape[0] if type(model.get_submodule(name)).__name__ == "Conv1D" else weight.shape[1]
        chains[name] = torch.randn(features, rank, generator=generator)
    return HraAdapter(chains=chains, rank=rank)


def write_model(model: Any, family: str, path: Path, kind: Type = Type.F32) -> Path:
    """The model as llama.cpp's converter writes it; matrices in `kind`, vectors in float32."""
    entry, config = FAMILIES[family], model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[entry.arch])
    _add_sizes(writer, config)
    entry.prepare(writer, config)
    _add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(entry.arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        array = _stored(entry, config, name, value.detach())
        chosen = kind if array.ndim > 1 and "position" not in found else Type.F32
        writer.add_tensor(found, gguf.quantize(array, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(entry: Family, config: Any, name: str, value: Tensor) -> Floats:
    array: Floats = value.float().numpy()
    if entry.permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
        return permuted(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
    if entry.shifted and name.endswith("norm.weight"):
        return array + np.float32(1)
    if entry.transposed and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return np.ascontiguousarray(array.T)
    return array


def permuted(weight: Floats, heads: int) -> Floats:
    """`LlamaModel.permute` of llama.cpp's converter: a head's two halves become its even and its odd rows."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _add_sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_vocab_size(config.vocab_size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "norm_epsilon", None) or config.layer_norm_epsilon)
    if config.model_type != "gpt2":
        writer.add_rope_dimension_count(getattr(config, "head_dim", None) or HEAD)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])


def _add_vocabulary(writer: Any, size: int) -> None:
    """Any words: prompts are token ids."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<pad>", "<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(6, size))])
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3] + [1] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def log_probabilities(
    model: Path, prompts: Sequence[Sequence[int]], vocabulary: int, *, adapter: Path | None = None
) -> Tensor:
    """What llama.cpp says about the token after each prompt: (prompts, vocabulary), float64.

    Raises:
        RuntimeError: llama.cpp does not load the model or the adapter.
    """
    server = start(model, adapter)
    rows = torch.full((len(prompts), vocabulary), float("-inf"), dtype=torch.float64)
    for row, prompt in zip(rows, prompts, strict=True):
        (answer,) = _complete(server, prompt, 1, vocabulary)["choices"]
        for entry in answer["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    return rows


def greedy_tokens(model: Path, prompt: Sequence[int], count: int, *, adapter: Path | None = None) -> list[int]:
    """The tokens that llama.cpp appends to a prompt, its end token too."""
    (answer,) = _complete(start(model, adapter), prompt, count, 1)["choices"]
    return [entry["id"] for entry in answer["logprobs"]["content"]]


def start(model: Path, adapter: Path | None) -> Any:
    """A server of one thread; keys and values in float32 and no fused attention, which rounds to half precision."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.warmup, params.n_parallel, params.n_ctx, params.cache_ram_mib, params.verbosity = False, 1, 512, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def _complete(server: Any, prompt: Sequence[int], count: int, alternatives: int) -> Any:
    request = {"prompt": list(prompt), "max_tokens": count, "temperature": 0, "logprobs": alternatives}
    answer = server.handle_completions({**request, "cache_prompt": False})
    assert "choices" in answer, answer
    return answer


def effect_error(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> float:
    """How far llama.cpp is off what the adapter does in PyTorch: 0 is perfect, 1 means that the adapter is not there.

    Args:
        before: log-probabilities of PyTorch and of llama.cpp without the adapter.
        after: the same with it.
    """
    reference = after[0] - before[0]
    return float(((after[1] - before[1]) - reference).norm() / reference.norm())


def pytorch_log_probabilities(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The same from a model of transformers, float64."""
    with torch.no_grad():
        rows = [model(torch.tensor([list(prompt)])).logits[0, -1].double() for prompt in prompts]
    return torch.stack(rows).log_softmax(-1)
