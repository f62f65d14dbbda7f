"""Inputs that must be refused, through the command line: exit code, what the message names, and nothing written.

Each case is a function that damages a good scene of base and adapter; its decorator says how the run must end. A case
may return arguments of its own. The scene is compared byte for byte before and after: inputs included.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hra_export import filesystem, publish
from hra_export.checkpoint import MANIFEST_NAME
from tests.command_line import ENVIRONMENT, PROGRAM, Outcome, run
from tests.refusals import Case, Damage, Refusals
from tests.synthetic import (
    RANK,
    Sizes,
    Stored,
    linear_modules,
    llama_config,
    random_chains,
    random_tensor,
    read_tensors,
    stored,
    toy_tensors,
    write_adapter_files,
    write_base,
    write_index,
    write_json,
    write_tensors,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"
PREFIX = "base_model.model."
U_KEY = f"{PREFIX}{Q_PROJ}.hra_u"


@dataclass(frozen=True)
class Scene:
    """A folder with a good `base`, a good `adapter`, and the `output` still to be made."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def output(self) -> Path:
        return self.folder / "merged"

    @property
    def merge(self) -> list[str | Path]:
        return ["merge", self.adapter, "--base", self.base, "--output", self.output]

    def put_adapter(
        self, tensors: dict[str, Stored], *, rank: int = RANK, name: str = "adapter", **config: Any
    ) -> Path:
        """Write an adapter in the place of the good one, or beside it."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return write_adapter_files(self.folder / name, tensors, rank=rank, **config)

    def put_base(self, tensors: dict[str, Stored], **options: Any) -> None:
        shutil.rmtree(self.base)
        write_base(self.base, tensors, **options)

    def configure(self, path: Path, **changes: object) -> None:
        """Change fields of a JSON file."""
        write_json(path, {**json.loads(path.read_text()), **changes})

    def snapshot(self) -> dict[str, tuple[str, bytes]]:
        """Everything in the folder: kind and content of each name, hidden ones too."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_symlink():
                found[name] = ("link", os.fsencode(path.readlink()))
            else:
                found[name] = ("file", path.read_bytes()) if path.is_file() else ("other", b"")
        return found


refused: Refusals[Scene] = Refusals()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path)
    write_base(scene.base, toy_tensors())
    write_adapter_files(scene.adapter, random_chains({Q_PROJ: 32, UP_PROJ: 32}))
    return scene


# The adapter does not fit the base


@refused(4, "3 tensors have no place", "decoder.block.0.q: no weight of this name in the base", "decoder.block.2.q")
def adapter_of_another_base(scene: Scene) -> None:
    scene.put_adapter(random_chains({f"decoder.block.{i}.q": 32 for i in range(3)}))


@refused(
    4,
    f"{Q_PROJ}: expected U of shape (32, {RANK}), got (64, {RANK})",
    "model.layers.1.mlp.down_proj: expected U of shape (48,",
)
def adapter_of_a_wider_base(scene: Scene) -> None:
    modules = {name: 2 * d for name, d in linear_modules().items()}
    scene.put_adapter(random_chains(modules))


@refused(
    4,
    "2 tensors have no place",
    "model.layers.7.mlp.up_proj: no weight",
    f"{Q_PROJ}: expected U of shape (32, 4), got (40, 4)",
)
def adapter_with_findings_of_two_kinds_beside_good_chains(scene: Scene) -> None:
    scene.put_adapter(random_chains({Q_PROJ: 40, UP_PROJ: 32, "model.layers.7.mlp.up_proj": 32}))


@refused(4, "model.layers.9.self_attn.q_proj: no weight of this name", "hint: `hra-export inspect")
def one_chain_without_a_module(scene: Scene) -> None:
    scene.put_adapter(random_chains({**linear_modules(), "model.layers.9.self_attn.q_proj": 32}))


@refused(4, "model.norm: its weight has shape (32,)")
def chain_on_a_vector(scene: Scene) -> None:
    scene.put_adapter(random_chains({"model.norm": 32}))


@refused(4, "score.weight: two adapters carry different values for it")
def two_adapters_with_different_saved_parameters(scene: Scene) -> list[str | Path]:
    paths = []
    for i in range(2):
        saved = {f"{PREFIX}score.weight": random_tensor(3, 32, seed=i)}
        tensors = {**random_chains({Q_PROJ: 32}, seed=i), **saved}
        paths.append(scene.put_adapter(tensors, name=f"adapter-{i}", modules_to_save=["score"]))
    return ["merge", *paths, "--base", scene.base, "--output", scene.output]


@refused(4, "model.norm.weight: expected shape (32,), got (16,)")
def saved_parameter_of_another_shape(scene: Scene) -> None:
    saved = {f"{PREFIX}model.norm.weight": random_tensor(16)}
    scene.put_adapter({**random_chains({Q_PROJ: 32}), **saved}, modules_to_save=["norm"])


@refused(4, f"{Q_PROJ}.bias: expected shape (32,), got (31,)")
def bias_of_another_shape(scene: Scene) -> None:
    scene.put_base({**toy_tensors(), f"{Q_PROJ}.bias": random_tensor(32)})
    bias = {f"{PREFIX}{Q_PROJ}.base_layer.bias": random_tensor(31)}
    scene.put_adapter({**random_chains({Q_PROJ: 32}), **bias}, bias="hra_only")


@refused(4, f"{Q_PROJ}.bias: no tensor of this name in the base")
def bias_that_the_base_does_not_have(scene: Scene) -> None:
    bias = {f"{PREFIX}{Q_PROJ}.base_layer.bias": random_tensor(32)}
    scene.put_adapter({**random_chains({Q_PROJ: 32}), **bias}, bias="hra_only")


# The adapter is damaged or something else


@refused(4, "does not exist")
def adapter_missing(scene: Scene) -> None:
    shutil.rmtree(scene.adapter)


@refused(4, "is not an adapter directory: it has no adapter_config.json", "save_pretrained")
def adapter_config_missing(scene: Scene) -> None:
    (scene.adapter / "adapter_config.json").unlink()


@refused(4, "is not an adapter directory")
def adapter_is_a_file(scene: Scene) -> list[str | Path]:
    path = scene.adapter / "adapter_model.safetensors"
    return ["merge", path, "--base", scene.base, "--output", scene.output]


@refused(4, "has no adapter_model.safetensors")
def adapter_weights_missing(scene: Scene) -> None:
    (scene.adapter / "adapter_model.safetensors").unlink()


@refused(4, "adapter_config.json` is not valid JSON")
def adapter_config_garbled(scene: Scene) -> None:
    (scene.adapter / "adapter_config.json").write_bytes(b'{"peft_type": "HRA", "r": 4')


@refused(4, "adapter_config.json` is not valid JSON")
def adapter_config_binary(scene: Scene) -> None:
    (scene.adapter / "adapter_config.json").write_bytes(bytes(range(256)))


@refused(4, "adapter_config.json` is not valid JSON")
def adapter_config_nested_too_deep(scene: Scene) -> None:
    (scene.adapter / "adapter_config.json").write_text("[" * 100_000)


@refused(4, "repeats the JSON key `r`")
def adapter_config_with_two_ranks(scene: Scene) -> None:
    (scene.adapter / "adapter_config.json").write_text('{"peft_type": "HRA", "r": 4, "r": 8}')


@refused(4, "adapter_config.json` has 1", "an adapter config has at most")
def adapter_config_of_a_megabyte(scene: Scene) -> None:
    (scene.adapter / "adapter_config.json").write_text('{"peft_type": "HRA", "r": 4}' + " " * 2**20)


@refused(4, "expected a JSON object, got list")
def adapter_config_is_a_list(scene: Scene) -> None:
    write_json(scene.adapter / "adapter_config.json", ["HRA"])


@refused(4, "is not an HRA adapter: its peft_type is 'LORA'", "merge_and_unload")
def lora_adapter(scene: Scene) -> None:
    scene.put_adapter({f"{PREFIX}{Q_PROJ}.lora_A.weight": random_tensor(4, 32)}, peft_type="LORA")


@refused(
    4,
    "is not a valid HRA config",
    "r: expected a positive integer, got '8'",
    "apply_GS: expected true or false, got 1",
    "bias: expected",
)
def adapter_config_with_wrong_types(scene: Scene) -> None:
    scene.configure(scene.adapter / "adapter_config.json", r="8", apply_GS=1, bias="some")


@refused(4, "modules_to_save: expected a list of names or null, got '.*'")
def adapter_config_with_a_pattern_as_saved_modules(scene: Scene) -> None:
    scene.configure(scene.adapter / "adapter_config.json", modules_to_save=".*")


@refused(4, U_KEY, "the config says r = 8, so expected (d, 8)", f"got (32, {RANK})", "2 tensors are wrong")
def rank_that_disagrees(scene: Scene) -> None:
    scene.configure(scene.adapter / "adapter_config.json", r=8)


@refused(4, "expected (d, 40) with d >= 40, got (32, 40)")
def rank_above_the_features(scene: Scene) -> None:
    scene.put_adapter(random_chains({Q_PROJ: 32}, 40), rank=40)


@refused(4, f"{PREFIX}{Q_PROJ}.hra_v: not a tensor of an HRA adapter")
def tensor_that_hra_does_not_have(scene: Scene) -> None:
    scene.put_adapter({**random_chains({Q_PROJ: 32}), f"{PREFIX}{Q_PROJ}.hra_v": random_tensor(32, 4)})


@refused(4, f"{U_KEY}: expected floats, got I64")
def chain_of_integers(scene: Scene) -> None:
    scene.put_adapter({U_KEY: stored(np.ones((32, RANK)), "I64")})


@refused(4, "holds no `hra_u` tensor")
def adapter_without_a_tensor(scene: Scene) -> None:
    scene.put_adapter({})


@refused(4, "is a pickle, which can run code", "safe_serialization=True")
def pickled_adapter(scene: Scene) -> None:
    (scene.adapter / "adapter_model.safetensors").rename(scene.adapter / "adapter_model.bin")


def with_column(value: float) -> dict[str, Stored]:
    vectors = np.random.default_rng(0).normal(size=(32, RANK))
    vectors[:, 2] = value
    return {U_KEY: stored(vectors), f"{PREFIX}{UP_PROJ}.hra_u": stored(vectors)}


@refused(
    5, "2 reflection vectors have no direction", f"{U_KEY}, vector 2: NaN or infinite", f"{UP_PROJ}.hra_u, vector 2"
)
def nan_column(scene: Scene) -> None:
    scene.put_adapter(with_column(np.nan))


@refused(5, f"{U_KEY}, vector 2: NaN or infinite", "training diverged")
def inf_column(scene: Scene) -> None:
    scene.put_adapter(with_column(-np.inf))


@refused(5, f"{U_KEY}, vector 2: zero")
def zero_column(scene: Scene) -> None:
    scene.put_adapter(with_column(0.0))


@refused(
    5,
    "2 chains cannot be computed",
    f"target `{Q_PROJ}`",
    f"target `{UP_PROJ}`",
    "Gram-Schmidt breaks down: reflection vector 1",
    "init_weights=False",
)
def gram_schmidt_over_repeated_columns(scene: Scene) -> None:
    columns = np.random.default_rng(0).normal(size=(32, 2)).repeat(2, axis=1)
    scene.put_adapter({U_KEY: stored(columns), f"{PREFIX}{UP_PROJ}.hra_u": stored(columns)}, apply_GS=True)


# Damaged containers, of the adapter and of the base


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], *, tail: bytes = b"") -> None:
    """Change the header of a safetensors file and leave its data."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:] + tail)


def weights(scene: Scene) -> Path:
    return scene.adapter / "adapter_model.safetensors"


def base_weights(scene: Scene) -> Path:
    return scene.base / "model.safetensors"


@refused(4, "adapter_model.safetensors` is truncated: its header takes")
def adapter_cut_off_in_the_header(scene: Scene) -> None:
    os.truncate(weights(scene), 60)


@refused(4, "base/model.safetensors` is truncated: its header takes")
def base_cut_off_in_the_header(scene: Scene) -> None:
    os.truncate(base_weights(scene), 60)


@refused(4, "model.safetensors` is truncated: 5 bytes")
def base_cut_off_in_the_length(scene: Scene) -> None:
    os.truncate(base_weights(scene), 5)


@refused(4, "base/model.safetensors` is truncated: its tensors end at byte")
def base_cut_off_in_the_data(scene: Scene) -> None:
    os.truncate(base_weights(scene), base_weights(scene).stat().st_size - 1)


@refused(4, "adapter_model.safetensors` is truncated: 0 bytes")
def adapter_weights_empty(scene: Scene) -> None:
    os.truncate(weights(scene), 0)


@refused(4, "base/model.safetensors` has 3 bytes that belong to no tensor")
def base_with_trailing_bytes(scene: Scene) -> None:
    rewrite(base_weights(scene), lambda header: None, tail=b"abc")


@refused(4, "adapter_model.safetensors` has 3 bytes that belong to no tensor")
def adapter_with_trailing_bytes(scene: Scene) -> None:
    rewrite(weights(scene), lambda header: None, tail=b"abc")


@refused(4, f"`{Q_PROJ}.weight` overlaps the tensor before it")
def base_with_overlapping_tensors(scene: Scene) -> None:
    def overlap(header: dict[str, Any]) -> None:
        first, last = header[f"{Q_PROJ}.weight"]["data_offsets"]
        header[f"{Q_PROJ}.weight"]["data_offsets"] = [first - 2, last - 2]

    rewrite(base_weights(scene), overlap)


@refused(4, "leaves a hole before it")
def base_with_a_hole(scene: Scene) -> None:
    rewrite(base_weights(scene), lambda header: header.pop(f"{Q_PROJ}.weight"))


@refused(4, f"tensor `{Q_PROJ}.weight` of BF16 [32, 33] takes 2112 bytes, its offsets say 2048")
def base_whose_shape_and_size_disagree(scene: Scene) -> None:
    rewrite(base_weights(scene), lambda header: header[f"{Q_PROJ}.weight"].update(shape=[32, 33]))


@refused(4, "unknown dtype 'F128'")
def base_of_an_unknown_dtype(scene: Scene) -> None:
    rewrite(base_weights(scene), lambda header: header[f"{Q_PROJ}.weight"].update(dtype="F128"))


@refused(4, "impossible shape [32, -32]")
def base_with_a_negative_size(scene: Scene) -> None:
    rewrite(base_weights(scene), lambda header: header[f"{Q_PROJ}.weight"].update(shape=[32, -32]))


@refused(4, "tensor `extra` has the impossible shape")
def base_with_a_size_no_machine_can_count_to(scene: Scene) -> None:
    """No bytes, 10²⁴ rows: a loop over them would never end."""

    def add(header: dict[str, Any]) -> None:
        header["extra"] = {"dtype": "F32", "shape": [10**24, 0], "data_offsets": [0, 0]}

    rewrite(base_weights(scene), add)


@refused(4, "model.safetensors` is not valid JSON", "surrogates not allowed")
def base_with_half_a_character_as_a_name(scene: Scene) -> None:
    def add(header: dict[str, Any]) -> None:
        header["\ud800"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    rewrite(base_weights(scene), add)


@refused(4, "model.safetensors` is not a safetensors file: it claims a header of")
def base_that_is_something_else(scene: Scene) -> None:
    base_weights(scene).write_bytes(b"GGUF\x03\0\0\0" * 100)


@refused(4, "model.safetensors` is not a regular file")
def base_weights_are_a_pipe(scene: Scene) -> None:
    base_weights(scene).unlink()
    os.mkfifo(base_weights(scene))


@refused(4, "adapter_model.safetensors` is not a regular file")
def adapter_weights_are_a_pipe(scene: Scene) -> None:
    weights(scene).unlink()
    os.mkfifo(weights(scene))


@pytest.mark.parametrize("which", ["adapter", "base"])
@pytest.mark.parametrize("bit", range(64))
def test_merge_refuses_any_flipped_bit_of_the_header_length(scene: Scene, which: str, bit: int) -> None:
    path = {"adapter": weights, "base": base_weights}[which](scene)
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    check_refused(scene, scene.merge, 4, [path.name])


# The base


@refused(4, "does not exist")
def base_missing(scene: Scene) -> None:
    shutil.rmtree(scene.base)


@refused(4, "the adapter names no base", "`--base`")
def base_named_nowhere(scene: Scene) -> list[str | Path]:
    return ["merge", scene.adapter, "--output", scene.output]


@refused(4, "base `/nowhere/llama` does not exist", "pass another with `--base`")
def base_of_the_adapter_gone(scene: Scene) -> list[str | Path]:
    scene.configure(scene.adapter / "adapter_config.json", base_model_name_or_path="/nowhere/llama")
    return ["merge", scene.adapter, "--output", scene.output]


@refused(4, "~nobody-of-this-name/llama` does not exist")
def base_in_the_home_of_nobody(scene: Scene) -> list[str | Path]:
    return ["merge", scene.adapter, "--base", "~nobody-of-this-name/llama", "--output", scene.output]


@refused(4, "does not exist")
def base_with_a_name_too_long(scene: Scene) -> list[str | Path]:
    return ["merge", scene.adapter, "--base", "b" * 300, "--output", scene.output]


@refused(4, "does not exist")
def adapter_with_a_name_too_long(scene: Scene) -> list[str | Path]:
    return ["merge", "a" * 300, "--base", scene.base, "--output", scene.output]


@refused(4, "is not a directory", "pass a transformers or diffusers directory")
def base_is_a_file(scene: Scene) -> list[str | Path]:
    return ["merge", scene.adapter, "--base", base_weights(scene), "--output", scene.output]


@refused(4, "has no model.safetensors, nor an index of shards")
def base_without_weights(scene: Scene) -> None:
    base_weights(scene).unlink()


@refused(4, "holds only pickled weights: pytorch_model.bin")
def pickled_base(scene: Scene) -> None:
    base_weights(scene).rename(scene.base / "pytorch_model.bin")


@refused(4, "config.json` is not valid JSON")
def base_config_garbled(scene: Scene) -> None:
    (scene.base / "config.json").write_text("{'model_type': 'llama'}")


@refused(4, "config.json`", "`model_type`", "expected a string, got ['llama']")
def base_config_with_a_list_for_a_type(scene: Scene) -> None:
    scene.configure(scene.base / "config.json", model_type=["llama"])


@refused(4, "config.json` is not valid JSON")
def base_config_nested_too_deep(scene: Scene) -> None:
    (scene.base / "config.json").write_text('{"a":' * 100_000)


@refused(8, "is quantized (gptq)", "merge into the unquantized base")
def quantized_base(scene: Scene) -> None:
    scene.configure(scene.base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@refused(8, "`conv` is a grouped convolution", "U has 72 rows")
def grouped_convolution(scene: Scene) -> None:
    scene.put_base({"conv.weight": random_tensor(8, 2, 3, 3)}, config={})
    scene.put_adapter(random_chains({"conv": 72}))


@refused(8, "cannot build a model of type `banana`", "upgrade transformers if the model is new")
def model_type_that_transformers_does_not_know(scene: Scene) -> None:
    scene.configure(scene.base / "config.json", model_type="banana")
    scene.put_adapter(random_chains({"encoder.layer.0": 32}))


@refused(5, f"`{Q_PROJ}.weight` is not finite as BF16", "the base holds NaN or Inf there")
def nan_in_a_weight_that_is_folded(scene: Scene) -> None:
    values = np.random.default_rng(0).normal(size=(32, 32))
    values[7, 9] = np.nan
    scene.put_base({**toy_tensors(), f"{Q_PROJ}.weight": stored(values, "BF16")})


@refused(5, f"`{Q_PROJ}.weight` is not finite as F32")
def inf_in_a_weight_that_is_folded(scene: Scene) -> None:
    values = np.random.default_rng(0).normal(size=(32, 32))
    values[7, 9] = np.inf
    scene.put_base({**toy_tensors(), f"{Q_PROJ}.weight": stored(values, "F32")})


@refused(5, "`model.norm.weight` is not finite as F16", "--dtype bfloat16")
def overflow_after_the_cast(scene: Scene) -> list[str | Path]:
    scene.put_base({**toy_tensors(), "model.norm.weight": stored(np.full(32, 70000.0), "BF16")})
    return [*scene.merge, "--dtype", "float16"]


# Shards


def shard(scene: Scene) -> dict[str, str]:
    """Store the base in two shards; returns its index."""
    scene.put_base(toy_tensors(), shards=2)
    index = json.loads((scene.base / "model.safetensors.index.json").read_text())
    weight_map: dict[str, str] = index["weight_map"]
    return weight_map


@refused(
    4, "model.safetensors.index.json` names shards that cannot be used", "model-00002-of-00002.safetensors: missing"
)
def shard_missing(scene: Scene) -> None:
    shard(scene)
    (scene.base / "model-00002-of-00002.safetensors").unlink()


@refused(4, "'../model-00001-of-00002.safetensors': expected the name of a .safetensors file in the same directory")
def shard_above_the_base(scene: Scene) -> None:
    weight_map = shard(scene)
    name = "model-00001-of-00002.safetensors"
    (scene.base / name).rename(scene.folder / name)
    write_index(scene.base, {key: f"../{value}" if value == name else value for key, value in weight_map.items()})


@refused(4, "expected the name of a .safetensors file in the same directory", "/model-00001-of-00002.safetensors'")
def shard_with_an_absolute_name(scene: Scene) -> None:
    weight_map = shard(scene)
    name = "model-00001-of-00002.safetensors"
    absolute = str(scene.base / name)
    write_index(scene.base, {key: absolute if value == name else value for key, value in weight_map.items()})


@refused(
    4,
    "and its shards disagree",
    "model.norm.weight: in model-00001-of-00002.safetensors and again in model-00002-of-00002",
)
def tensor_in_two_shards(scene: Scene) -> None:
    shard(scene)
    tensors = list(toy_tensors().items())
    write_tensors(
        scene.base / "model-00001-of-00002.safetensors", dict(tensors[: -(-len(tensors) // 2)] + tensors[-2:-1])
    )


@refused(4, "and its shards disagree", "lm_head.weight: lies in model-00002-of-00002.safetensors, the index says None")
def tensor_that_the_index_does_not_know(scene: Scene) -> None:
    weight_map = shard(scene)
    weight_map.pop("lm_head.weight")
    write_index(scene.base, weight_map)


@refused(4, "and its shards disagree", "ghost.weight: in the index, and in no shard")
def tensor_that_no_shard_has(scene: Scene) -> None:
    weight_map = shard(scene)
    write_index(scene.base, {**weight_map, "ghost.weight": "model-00001-of-00002.safetensors"})


@refused(4, "model.safetensors.index.json` has no weight_map")
def index_without_a_map(scene: Scene) -> None:
    shard(scene)
    write_json(scene.base / "model.safetensors.index.json", {"metadata": {}})


# The output


@refused(6, "exists", "`--overwrite` replaces it")
def output_exists(scene: Scene) -> None:
    scene.output.mkdir()
    (scene.output / MANIFEST_NAME).write_text("{}")


@refused(6, "is not overwritten: it was not written by hra-export")
def output_of_somebody_else(scene: Scene) -> list[str | Path]:
    scene.output.mkdir()
    (scene.output / "thesis.tex").write_text("years of work")
    return [*scene.merge, "--overwrite"]


@refused(6, "lies in the input", "choose an output outside of the inputs")
def output_inside_the_base(scene: Scene) -> list[str | Path]:
    return [*scene.merge, "--output", scene.base / "merged"]


@refused(6, "lies in the input", "adapter")
def output_is_the_adapter(scene: Scene) -> list[str | Path]:
    return [*scene.merge, "--output", scene.adapter, "--overwrite"]


@refused(6, "contains or lies in the input")
def output_holds_the_inputs(scene: Scene) -> list[str | Path]:
    return [*scene.merge, "--output", scene.folder, "--overwrite"]


@refused(6, "merged` is not a directory")
def output_is_a_file(scene: Scene) -> list[str | Path]:
    scene.output.write_text("notes")
    return [*scene.merge, "--overwrite"]


@refused(6, "merged` is a symbolic link")
def output_is_a_link(scene: Scene) -> list[str | Path]:
    (scene.folder / "elsewhere").mkdir()
    scene.output.symlink_to("elsewhere")
    return [*scene.merge, "--overwrite"]


@refused(6, "notes` is not a directory")
def output_below_a_file(scene: Scene) -> list[str | Path]:
    (scene.folder / "notes").write_text("notes")
    return [*scene.merge, "--output", scene.folder / "notes" / "merged"]


@refused(6, "File name too long")
def output_with_a_name_too_long(scene: Scene) -> list[str | Path]:
    return [*scene.merge, "--output", scene.folder / ("m" * 300)]


@refused(6, "File name too long", "choose a shorter output name")
def output_with_a_name_too_long_for_what_lies_beside_it(scene: Scene) -> list[str | Path]:
    return [*scene.merge, "--output", scene.folder / ("m" * 250)]


@refused(6, "exists")
def dry_run_of_an_output_that_exists(scene: Scene) -> list[str | Path]:
    scene.output.mkdir()
    (scene.output / MANIFEST_NAME).write_text("{}")
    return [*scene.merge, "--dry-run"]


# Usage and devices


@refused(2, "No such option", "--outptu")
def option_misspelt(scene: Scene) -> list[str | Path]:
    return [*scene.merge[:-2], "--outptu", scene.output]


@refused(2, "Missing option", "--output")
def output_left_out(scene: Scene) -> list[str | Path]:
    return scene.merge[:-2]


@refused(2, "Missing argument 'ADAPTER...'")
def adapter_left_out(scene: Scene) -> list[str | Path]:
    return ["merge", "--base", scene.base, "--output", scene.output]


@refused(2, "No such command", "fold")
def verb_misspelt(scene: Scene) -> list[str | Path]:
    return ["fold", *scene.merge[1:]]


@refused(2, "'--dtype'", "'fp8' is not one of", "'bfloat16'")
def dtype_unknown(scene: Scene) -> list[str | Path]:
    return [*scene.merge, "--dtype", "fp8"]


@pytest.mark.parametrize("size", ["0", "-5GB", "GB", "5XB", "5GiB", "nan", "inf", "1e400GB", ""])
def test_merge_refuses_a_shard_size_that_is_none(scene: Scene, size: str) -> None:
    says = ["--max-shard-size", "expected a size such as 5GB"]
    check_refused(scene, [*scene.merge, "--max-shard-size", size], 2, says)


@pytest.mark.parametrize("strength", ["half", "nan", "inf", "-inf"])
def test_merge_refuses_a_strength_that_is_no_number(scene: Scene, strength: str) -> None:
    check_refused(scene, [*scene.merge, "--strength", strength], 2, ["'--strength'", strength.lstrip("-")])


@pytest.mark.parametrize(
    "word", ["banana", "gpu", "meta", "mps", "cpu:1", "cuda:", "cuda:x", "cuda:-1", "cuda:99999999999999999999", ""]
)
def test_merge_refuses_a_word_that_is_no_device(scene: Scene, word: str) -> None:
    """A word that could never work is usage; a device that is not there is 7."""
    check_refused(scene, [*scene.merge, "--device", word], 2, ["'--device'", "auto, cpu, cuda or cuda:N"])


@pytest.mark.parametrize("word", ["cuda", "cuda:0", "cuda:999"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["merge", "dry-run"])
def test_merge_refuses_a_cuda_device_that_is_absent(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, word: str, more: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    says = [f"`{word}` is not there", "`--device cpu` always works"]
    check_refused(scene, [*scene.merge, "--device", word, *more], 7, says)


# The runner


def check_refused(
    scene: Scene, arguments: Sequence[str | Path], code: int, says: Sequence[str], run: Callable[..., Outcome] = run
) -> Outcome:
    """Run, and compare the end with what must be; nothing may have changed on disk."""
    before = scene.snapshot()
    outcome = run(*arguments)
    assert outcome.code == code, outcome.stderr
    for part in says:
        assert part in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert scene.snapshot() == before
    return outcome


@pytest.mark.parametrize("case", refused.cases, ids=lambda case: case.damage.__name__)
def test_merge_refuses(case: Case[Scene], scene: Scene) -> None:
    arguments = case.damage(scene) or scene.merge
    check_refused(scene, arguments, case.code, case.says)


def test_table_is_as_large_as_it_claims_to_be() -> None:
    names = [case.damage.__name__ for case in refused.cases]
    assert len(names) >= 75
    assert len(set(names)) == len(names)


def run_process(*arguments: str | Path, **options: Any) -> Outcome:
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


PROCESS_CASES = [base_cut_off_in_the_data, nan_in_a_weight_that_is_folded, output_of_somebody_else, option_misspelt]


@pytest.mark.parametrize("damage", PROCESS_CASES, ids=lambda damage: damage.__name__)
def test_merge_refuses_as_a_process(damage: Damage[Scene], scene: Scene) -> None:
    case = next(case for case in refused.cases if case.damage is damage)
    arguments = damage(scene) or scene.merge
    check_refused(scene, arguments, case.code, case.says, run_process)


def test_base_of_the_hub_is_not_fetched_when_offline(scene: Scene) -> None:
    arguments: list[str | Path] = ["merge", scene.adapter, "--base", "nobody/no-such-model", "--output", scene.output]
    says = ["cannot fetch base `nobody/no-such-model` from the Hub (HF_HUB_OFFLINE is set)"]
    check_refused(scene, arguments, 6, says, run_process)


# How errors are shown


@pytest.mark.parametrize("damage", [nan_column, lora_adapter, base_missing, output_exists, grouped_convolution])
def test_json_gives_an_error_as_one_object_on_stdout(damage: Damage[Scene], scene: Scene) -> None:
    case = next(case for case in refused.cases if case.damage is damage)
    outcome = run(*(damage(scene) or scene.merge), "--json")
    assert outcome.code == case.code
    assert outcome.stdout.count("\n") == 1
    assert outcome.json["schema_version"] == 1
    error = outcome.json["error"]
    assert error["exit_code"] == case.code
    text = "\n".join([error["message"], *error["findings"], error["hint"] or ""])
    assert all(part.removeprefix("hint: ") in text for part in case.says)
    assert error["message"] in outcome.stderr


def test_json_gives_a_usage_error_as_one_object_on_stdout(scene: Scene) -> None:
    outcome = run(*scene.merge, "--dtype", "fp8", "--json")
    assert outcome.code == 2
    assert outcome.json["error"]["exit_code"] == 2
    assert "'fp8' is not one of" in outcome.json["error"]["message"]
    assert "Usage: hra-export merge" in outcome.stderr


def test_json_keeps_a_name_that_is_not_unicode(scene: Scene) -> None:
    """A path may hold any bytes, and stdout takes only text."""
    output = scene.folder / os.fsdecode(b"m\xff")
    outcome = run(*scene.merge[:-1], output, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["output"] == str(output)
    assert (output / MANIFEST_NAME).is_file()


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_result_is_shown_where_the_terminal_has_no_greek(scene: Scene, encoding: str) -> None:
    """The merge is on disk by then: it must not end as a crash."""
    outcome = run(*scene.merge, encoding=encoding)
    assert outcome.code == 0, outcome.stderr
    assert "of \\u0394W" in outcome.stdout


def test_debug_shows_the_traceback_of_refused_input(scene: Scene) -> None:
    lora_adapter(scene)
    outcome = run(*scene.merge, "--debug")
    assert outcome.code == 4
    assert "Traceback (most recent call last)" in outcome.stderr
    assert "read_adapter" in outcome.stderr
    assert outcome.stderr.rstrip().endswith("merges the other methods")


def test_error_does_not_pass_control_characters_to_the_terminal(scene: Scene) -> None:
    """A tensor name could clear the screen, or write a line of its own."""
    scene.put_adapter({"\x1b[2J\rerror: \x9b31m.hra_u": random_tensor(32, RANK)})
    outcome = run(*scene.merge)
    assert outcome.code == 4
    assert not {character for character in outcome.stderr if not character.isprintable()} - {"\n"}
    assert "\\x1b[2J\\rerror: \\x9b31m.hra_u: not a tensor" in outcome.stderr


# What is hostile and harmless


def test_merge_never_runs_the_pattern_of_target_modules(scene: Scene) -> None:
    """This one takes hours on a name of 44 characters."""
    scene.configure(scene.adapter / "adapter_config.json", target_modules=r"(\w+\.?)+!")
    assert run(*scene.merge).code == 0


@pytest.mark.parametrize("sizes", [{"vocab_size": [96]}, {"text_config": {"vocab_size": {}}}, {"text_config": [1]}])
def test_merge_does_not_mind_fields_of_the_config_it_has_no_use_for(scene: Scene, sizes: dict[str, object]) -> None:
    scene.configure(scene.base / "config.json", **sizes)
    assert run(*scene.merge).code == 0


def test_merge_looks_through_a_config_nested_deeper_than_calls_can_be(scene: Scene) -> None:
    depth = 900  # Python's JSON parser still reads this
    (scene.base / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    assert run(*scene.merge).code == 0


def test_merge_copies_a_tensor_of_many_rows_without_columns(scene: Scene) -> None:
    """It takes no bytes, and a loop over its rows would take years."""

    def add(header: dict[str, Any]) -> None:
        header["empty"] = {"dtype": "F32", "shape": [2**60, 0], "data_offsets": [0, 0]}

    rewrite(base_weights(scene), add)
    outcome = run(*scene.merge)
    assert outcome.code == 0, outcome.stderr
    assert read_tensors(scene.output)["empty"].shape == (2**60, 0)


def test_merge_takes_a_base_whose_name_is_not_unicode(scene: Scene) -> None:
    """The name goes into the manifest and the model card."""
    base = scene.base.rename(scene.folder / os.fsdecode(b"b\xff"))
    outcome = run("merge", scene.adapter, "--base", base, "--output", scene.output)
    assert outcome.code == 0, outcome.stderr
    assert json.loads((scene.output / MANIFEST_NAME).read_bytes())["base"]["name"] == "b?"


def test_merge_takes_saved_modules_literally(scene: Scene) -> None:
    """PEFT puts these names into a pattern."""
    saved = {f"{PREFIX}model.norm.weight": random_tensor(32)}
    scene.put_adapter({**random_chains({Q_PROJ: 32}), **saved}, modules_to_save=[".*", "(\\w+)+!"])
    assert run(*scene.merge).code == 0


def test_merge_does_not_run_code_of_the_base(scene: Scene) -> None:
    """The names do not match directly, so transformers is asked about this model."""
    (scene.base / "modeling_evil.py").write_text(f"open({str(scene.folder / 'pwned')!r}, 'w')\n")
    auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    scene.configure(scene.base / "config.json", auto_map=auto_map)
    scene.put_adapter(random_chains({"layers.0.self_attn.q_proj": 32}))
    run(*scene.merge)
    assert not (scene.folder / "pwned").exists()


# Full disks, read-only disks, other runs


def run_mounted(scene: Scene, options: str, *more: str, fill: str = "") -> Outcome:
    """Merge into a tmpfs, mounted in a namespace that ends with the process; then list what is left there."""
    disk = scene.folder / "disk"
    disk.mkdir()
    command = [*PROGRAM, *map(str, scene.merge[:-1]), f"{disk}/out", *more]
    script = f'mount -t tmpfs -o {options} tmpfs {disk} || exit 99; {fill}\n"$@"; code=$?; ls -A "$0" >&2; exit $code'
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*namespace, "sh", "-c", script, str(disk), *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    return Outcome(done.returncode, done.stdout, done.stderr)


needs_mounts = pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs in a namespace of Linux")


@needs_mounts
def test_merge_refuses_a_disk_that_is_too_small(scene: Scene) -> None:
    scene.put_base({**toy_tensors(), "model.extra.weight": random_tensor(1024, 1024)})
    outcome = run_mounted(scene, "size=2m")
    assert outcome.code == 6
    assert "not enough space for" in outcome.stderr
    assert "0.005 GB needed, 0.002 GB free" in outcome.stderr
    assert outcome.stderr.rstrip().endswith("on another disk")  # and no name after it: the disk is empty


@needs_mounts
def test_merge_ends_cleanly_where_no_more_files_can_be_made(scene: Scene) -> None:
    outcome = run_mounted(scene, "size=16m,nr_inodes=4")
    assert outcome.code == 6
    assert "No space left on device" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.rstrip().endswith("on another disk")


@needs_mounts
def test_merge_refuses_a_read_only_disk(scene: Scene) -> None:
    outcome = run_mounted(scene, "size=16m", fill=f"mount -o remount,ro {scene.folder}/disk")
    assert outcome.code == 6
    assert "no permission to write in" in outcome.stderr or "Read-only file system" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "copy_file_range"])
def test_merge_leaves_nothing_when_a_call_fails_in_the_middle(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    """The disk fills up, or breaks, after the merge has begun."""
    real, calls = getattr(os, call), []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    check_refused(scene, scene.merge, 6, [os.strerror(code), "hint: "])
    assert len(calls) >= 3


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_merge_says_so_when_it_may_not_read(scene: Scene, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Permission is no property of the input: 6, as for every other no of the file system."""
    path, real = {"base": base_weights, "adapter": weights}[which](scene), os.open

    def refuse(name: Any, *arguments: Any, **options: Any) -> int:
        if Path(name) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    check_refused(scene, scene.merge, 6, [str(path), "Permission denied"])


@pytest.mark.parametrize("call", ["pread", "preadv"])
@pytest.mark.parametrize("at", [1, 2])
def test_merge_blames_the_base_when_it_cannot_be_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    real, calls = getattr(os, call), []

    def fail(*arguments: Any) -> Any:
        path = Path(f"/dev/fd/{arguments[0]}").readlink()
        calls.extend([1] if path == base_weights(scene) and arguments[-1] > 8 else [])
        if len(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    check_refused(scene, scene.merge, 6, ["cannot read", str(scene.base), os.strerror(errno.EIO)])


def test_merge_writes_nothing_to_a_file_it_has_closed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error other blocks of the shard were still under way, and the number was another file's by then."""
    scene.put_base({**toy_tensors(), **{f"model.extra.{i}.weight": random_tensor(64, 32) for i in range(40)}})
    opened: set[int] = set()
    late: list[int] = []
    real_open, real_close, real_copy = os.open, os.close, os.copy_file_range

    def open_(*arguments: Any, **options: Any) -> int:
        descriptor = real_open(*arguments, **options)
        opened.add(descriptor)
        return descriptor

    def close(descriptor: int) -> None:
        opened.discard(descriptor)
        real_close(descriptor)

    def copy(source: int, target: int, *rest: int) -> int:
        time.sleep(0.02)
        late.extend(number for number in (source, target) if number not in opened)
        return real_copy(source, target, *rest)

    def break_(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name, patched in {"open": open_, "close": close, "copy_file_range": copy, "preadv": break_}.items():
        monkeypatch.setattr(os, name, patched)
    check_refused(scene, scene.merge, 6, ["cannot read"])
    assert late == []


def test_merge_refuses_an_output_that_another_run_is_writing(scene: Scene) -> None:
    with publish.stage(scene.output, key="other", size_bytes=0) as stage:
        stage.write_bytes("model.safetensors", b"half of a merge")
        before = scene.snapshot()
        outcome = run_process(*scene.merge)
        assert outcome.code == 6
        assert "another run is writing" in outcome.stderr
        assert "wait for it to end" in outcome.stderr
        assert scene.snapshot() == before
        stage.publish(MANIFEST_NAME, b"{}")


def test_merge_refuses_a_base_that_shrinks_meanwhile(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    real = filesystem.allocate

    def allocate(fd: int, size_bytes: int) -> None:
        real(fd, size_bytes)
        os.truncate(base_weights(scene), 4000)

    monkeypatch.setattr(filesystem, "allocate", allocate)
    outcome = run(*scene.merge)
    assert outcome.code == 6
    assert "ended early: it was changed while being read" in outcome.stderr
    assert sorted(path.name for path in scene.folder.iterdir()) == ["adapter", "base"]


def test_good_scene_merges(scene: Scene) -> None:
    """Every refusal above would be worth nothing if the scene were refused as it is."""
    outcome = run(*scene.merge)
    assert outcome.code == 0, outcome.stderr
    assert json.loads((scene.output / "config.json").read_text()) == llama_config(Sizes())
