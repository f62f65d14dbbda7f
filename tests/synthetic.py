"""Checkpoints and adapters made of plain bytes: no torch, so that a process may fork after it; sparse on demand.

A base is a llama in transformers' layout. Its tensors can be written as holes, so that a model of many gigabytes takes
no space and no time.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hra_export.tensorfile import lay_out

RANK = 4
VOCABULARY = 96
WIDTH = 32
INNER = 48
HEADS = 4


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file; without data it is a hole, which reads as zeros."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | None

    def values(self) -> np.ndarray:
        """As float64, whatever it is stored as."""
        assert self.data is not None
        return decoded(self.dtype, self.data).reshape(self.shape)


@dataclass(frozen=True)
class Sizes:
    """The shape of a llama."""

    layers: int = 2
    width: int = WIDTH
    inner: int = INNER
    vocabulary: int = VOCABULARY
    heads: int = HEADS
    key_heads: int = HEADS


def encoded(dtype: str, values: np.ndarray) -> bytes:
    """Float values as bytes of a dtype; bfloat16 is cut off, not rounded, for numpy has no such type."""
    if dtype == "BF16":
        return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return np.asarray(values, {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}[dtype]).tobytes()


def decoded(dtype: str, data: bytes) -> np.ndarray:
    """The reverse of `encoded`, as float64."""
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype("<u4") << 16
        return bits.view("<f4").astype(np.float64)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}[dtype]).astype(np.float64)


def stored(values: Any, dtype: str = "F32") -> Stored:
    """Values as a stored tensor."""
    array = np.asarray(values)
    return Stored(dtype, array.shape, encoded(dtype, array))


def random_tensor(*shape: int, dtype: str = "F32", seed: int = 0, scale: float = 0.05) -> Stored:
    """Normal values, the same for the same seed."""
    return stored(np.random.default_rng(seed).normal(0, scale, shape), dtype)


def hole(*shape: int, dtype: str) -> Stored:
    """A tensor that takes no space on disk."""
    return Stored(dtype, shape, None)


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file; holes stay holes."""
    layout = lay_out(((name, value.dtype, value.shape) for name, value in tensors.items()), {"format": "pt"})
    with path.open("wb") as file:
        file.write(layout.header)
        for name, info in layout.tensors.items():
            data = tensors[name].data
            if data is not None:
                file.seek(info.start)
                file.write(data)
        file.truncate(layout.size_bytes)


def read_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory, by an own reader of a few lines."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = Stored(entry["dtype"], tuple(entry["shape"]), raw[start + first : start + last])
    return found


def llama_shapes(sizes: Sizes = Sizes()) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes in the order transformers stores them."""
    d, inner, keys = sizes.width, sizes.inner, sizes.width // sizes.heads * sizes.key_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocabulary, d)}
    for i in range(sizes.layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{block}.self_attn.{name}.weight": (d, d) for name in ("q_proj", "o_proj")}
        shapes |= {f"{block}.self_attn.{name}.weight": (keys, d) for name in ("k_proj", "v_proj")}
        shapes |= {f"{block}.mlp.{name}.weight": (inner, d) for name in ("gate_proj", "up_proj")}
        shapes[f"{block}.mlp.down_proj.weight"] = (d, inner)
    return {**shapes, "model.norm.weight": (d,), "lm_head.weight": (sizes.vocabulary, d)}


def llama_config(sizes: Sizes = Sizes()) -> dict[str, object]:
    """`config.json` of such a llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }


def write_base(
    directory: Path,
    tensors: Mapping[str, Stored],
    *,
    shards: int = 1,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Write a model directory: tensors in `shards` files with about the same number each, and `config.json`."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", llama_config() if config is None else config)
    if shards == 1:
        write_tensors(directory / "model.safetensors", tensors)
        return directory
    names, count = list(tensors), -(-len(tensors) // shards)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        shard, own = f"model-{i + 1:05}-of-{shards:05}.safetensors", names[i * count : (i + 1) * count]
        write_tensors(directory / shard, {name: tensors[name] for name in own})
        weight_map |= dict.fromkeys(own, shard)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: Mapping[str, str]) -> None:
    """Write the index of shards."""
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})


def toy_tensors(sizes: Sizes = Sizes(), *, dtype: str = "BF16") -> dict[str, Stored]:
    """A random llama."""
    shapes = llama_shapes(sizes)
    return {name: random_tensor(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def linear_modules(sizes: Sizes = Sizes()) -> dict[str, int]:
    """Module path → in_features d, of every linear layer but the head."""
    return {
        name.removesuffix(".weight"): shape[1]
        for name, shape in llama_shapes(sizes).items()
        if len(shape) == 2 and "layers" in name
    }


def random_chains(modules: Mapping[str, int], rank: int = RANK, *, seed: int = 100) -> dict[str, Stored]:
    """Random reflection vectors under their keys in an adapter file."""
    return {
        f"base_model.model.{module}.hra_u": random_tensor(d, rank, seed=seed + i, scale=1.0)
        for i, (module, d) in enumerate(modules.items())
    }


def write_adapter_files(directory: Path, tensors: Mapping[str, Stored], *, rank: int = RANK, **config: object) -> Path:
    """Write an adapter directory; `config` overrides fields of its configuration."""
    directory.mkdir(parents=True)
    fields = {"peft_type": "HRA", "r": rank, "apply_GS": False, "bias": "none", "modules_to_save": None}
    fields |= {"base_model_name_or_path": None, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    write_json(directory / "adapter_config.json", {**fields, **config})
    write_tensors(directory / "adapter_model.safetensors", tensors)
    return directory


def write_json(path: Path, content: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2))


def dense_chain(vectors: np.ndarray) -> np.ndarray:
    """H_1 H_2 … H_r in float64, one dense reflection after the other."""
    product = np.eye(len(vectors))
    for u in vectors.T:
        product = product @ (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u))
    return product


def read_tree(folder: Path) -> dict[str, bytes] | None:
    """Every file below a folder, by name; None when there is no folder."""
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_beside(output: Path) -> list[str]:
    """What lies in the output's folder, the output left out."""
    return sorted(path.name for path in output.parent.iterdir() if path != output)
