"""Base checkpoints: every layout that is read, every trick in an index that is not, and what travels along."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hra_export.checkpoint import MANIFEST_NAME, MAX_JSON_BYTES, SAMPLE_BYTES, Checkpoint, open_checkpoint
from hra_export.errors import CheckpointError
from tests.tiny_models import build

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensor(value: float, size: int = 4) -> Tensor:
    return torch.full((size,), float(value))


def single(path: Path, **tensors: Tensor) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors or {"a": tensor(1), "b": tensor(2)}, path / "model.safetensors")
    return path


def sharded(path: Path, *, index: object = None, shards: dict[str, dict[str, Tensor]] | None = None) -> Path:
    """Two shards and their index; `index` replaces the weight map, or the whole file when it is bytes."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    shards = shards or {SHARDS[0]: {"a": tensor(1), "b": tensor(2)}, SHARDS[1]: {"c": tensor(3)}}
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    good = {name: shard for shard, tensors in shards.items() for name in tensors}
    if not isinstance(index, bytes):
        index = json.dumps({"metadata": {"total_size": 48}, "weight_map": good if index is None else index}).encode()
    (path / INDEX).write_bytes(index)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 4
    return str(caught.value)


def names(checkpoint: Checkpoint) -> list[str]:
    return [str(path) for path in checkpoint.companions()]


# Layouts.


def test_single_file(tmp_path: Path) -> None:
    found = open_checkpoint(single(tmp_path / "m"))
    assert (found.component, found.index_name, found.config) == ("", None, {"model_type": "llama"})
    assert (set(found.tensors), found.size_bytes, found.directory) == ({"a", "b"}, 32, tmp_path / "m")
    assert [file.path.name for file in found.files] == ["model.safetensors"]


def test_shards_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    found = open_checkpoint(sharded(tmp_path / "m", index={"c": SHARDS[1], "b": SHARDS[0], "a": SHARDS[0]}))
    assert [file.path.name for file in found.files] == list(SHARDS)
    assert (list(found.tensors), found.size_bytes, found.index_name) == (["a", "b", "c"], 48, INDEX)


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers."""
    sharded(tmp_path / "m")
    assert set(open_checkpoint(single(tmp_path / "m")).tensors) == {"a", "b"}


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
def test_what_transformers_writes_is_read(shard_size: str, tmp_path: Path) -> None:
    model: Any = build("llama-tied")
    model.save_pretrained(tmp_path / "m", max_shard_size=shard_size)
    found = open_checkpoint(tmp_path / "m")
    assert set(found.tensors) == set(model.state_dict()) - {"lm_head.weight"}
    assert (found.index_name is None) == (shard_size == "10GB")
    assert found.config["model_type"] == "llama"
    assert names(found) == ["config.json", "generation_config.json"]


def test_what_diffusers_writes_is_read(tmp_path: Path) -> None:
    model: Any = build("unet")
    model.save_pretrained(tmp_path / "m")
    found = open_checkpoint(tmp_path / "m")
    assert set(found.tensors) == set(model.state_dict())
    assert names(found) == ["config.json"]


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_a_pipeline_is_its_denoiser_and_keeps_the_other_components(component: str, tmp_path: Path) -> None:
    root = tmp_path / "p"
    denoiser = single(root / component)
    (denoiser / "model.safetensors").rename(denoiser / "diffusion_pytorch_model.safetensors")
    for other in ("vae", "text_encoder"):
        single(root / other)
    (root / "scheduler").mkdir()
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (root / name).write_text("{}")
    (denoiser / "diffusion_pytorch_model.bin").write_bytes(b"x")
    (denoiser / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    found = open_checkpoint(root)
    assert (found.component, found.directory, set(found.tensors)) == (component, root / component, {"a", "b"})
    assert names(found) == sorted(
        [
            *("model_index.json", "scheduler/scheduler_config.json", f"{component}/config.json"),
            *("text_encoder/config.json", "text_encoder/model.safetensors", "vae/config.json", "vae/model.safetensors"),
        ]
    )
    assert [str(path) for path in found.left_out()] == [
        f"{component}/diffusion_pytorch_model.bin",
        f"{component}/diffusion_pytorch_model.fp16.safetensors",
    ]


@pytest.mark.parametrize("components", [[], ["unet", "transformer"]])
def test_a_pipeline_without_one_denoiser_is_refused(components: list[str], tmp_path: Path) -> None:
    for name in components:
        single(tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")
    text = refused(tmp_path)
    assert ("unet and transformer" if components else "neither unet nor transformer") in text
    assert "component's own folder" in text


@pytest.mark.parametrize("make", [single, sharded])
def test_links_into_a_cache_are_followed(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """The Hub's cache: every file of a snapshot links to a blob named by its digest."""
    store = make(tmp_path / "store")
    (store / "tokenizer.json").write_text("{}")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(store.iterdir())):
        path.rename(blobs / f"{i:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs", f"{i:064x}"))
    found = open_checkpoint(snapshot)
    assert found.tensors
    assert all(file.path.name.endswith(".safetensors") for file in found.files)
    assert names(found) == ["config.json", "tokenizer.json"]


def test_a_checkpoint_without_a_config_is_read(tmp_path: Path) -> None:
    (single(tmp_path / "m") / "config.json").unlink()
    assert open_checkpoint(tmp_path / "m").config == {}


# Refusals.


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    assert "is not a directory" in refused(tmp_path / "none")
    assert "is not a directory" in refused(single(tmp_path / "m") / "model.safetensors")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "no model.safetensors" in refused(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
    text = refused(tmp_path)
    assert "only pickled weights: pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin" in text
    assert "save_pretrained" in text


@pytest.mark.parametrize("config", [b"{", b"[]", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff"])
def test_a_damaged_config_is_refused(config: bytes, tmp_path: Path) -> None:
    (single(tmp_path / "m") / "config.json").write_bytes(config)
    assert "config.json" in refused(tmp_path / "m")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = single(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"`{path}` is truncated" in refused(tmp_path / "m")


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m") / SHARDS[1]
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"`{path}` has 1 bytes that belong to no tensor" in refused(tmp_path / "m")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "sub/inside.safetensors",
        "/outside.safetensors",
        "{root}/outside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "C:\\outside.safetensors",
        "\\\\server\\share\\outside.safetensors",
        "file://outside.safetensors",
        "model.safetensors:stream.safetensors",
        "nul\0.safetensors",
        "model.bin",
        "model.safetensors.bin",
        "config.json",
        "..",
        ".",
        "",
    ],
)
def test_shard_names_never_leave_the_directory_nor_the_format(name: str, tmp_path: Path) -> None:
    """The file exists, so that only the name can be what is refused."""
    save_file({"a": tensor(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "m" / "sub").mkdir(parents=True)
    save_file({"a": tensor(1)}, tmp_path / "m" / "sub" / "inside.safetensors")
    name = name.format(root=tmp_path)
    text = refused(sharded(tmp_path / "m", index={"a": name, "b": SHARDS[0], "c": SHARDS[1]}))
    assert f"{name!r}: expected the name of a .safetensors file in the same directory" in text
    assert INDEX in text


@pytest.mark.parametrize("value", [None, 5, True, ["model.safetensors"], {"file": "model.safetensors"}])
def test_shard_names_that_are_no_text_are_refused(value: object, tmp_path: Path) -> None:
    assert "expected the name of" in refused(sharded(tmp_path / "m", index={"a": value}))


def test_missing_shards_are_listed_all_at_once(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    for name in SHARDS:
        (root / name).unlink()
    (root / SHARDS[1]).mkdir()  # something of this name is not a shard either
    text = refused(root)
    assert all(f"  {name}: missing" in text for name in SHARDS)


def test_a_shard_that_links_to_nothing_is_missing(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m") / SHARDS[0]
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    assert f"{SHARDS[0]}: missing" in refused(tmp_path / "m")


def test_a_fifo_as_a_shard_does_not_hang(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m") / SHARDS[0]
    path.unlink()
    os.mkfifo(path)
    assert f"{SHARDS[0]}: missing" in refused(tmp_path / "m")


def test_every_disagreement_between_index_and_shards_is_listed(tmp_path: Path) -> None:
    shards = {SHARDS[0]: {"a": tensor(1), "b": tensor(2), "e": tensor(5)}, SHARDS[1]: {"c": tensor(3), "b": tensor(9)}}
    text = refused(
        sharded(tmp_path / "m", shards=shards, index={"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[0], "d": SHARDS[1]})
    )
    assert f"b: in {SHARDS[0]} and again in {SHARDS[1]}" in text
    assert f"c: lies in {SHARDS[1]}, the index says '{SHARDS[0]}'" in text
    assert f"e: lies in {SHARDS[0]}, the index says None" in text
    assert "d: in the index, and in no shard" in text
    assert "  a:" not in text


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        "x",
        7,
        b"{}",
        b'{"weight_map": null}',
        b"[]",
        b"",
        b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        b"{" * 100_000,
    ],
)
def test_an_index_without_a_usable_map_is_refused(index: object, tmp_path: Path) -> None:
    assert INDEX in refused(sharded(tmp_path / "m", index=index))


def test_an_index_too_large_for_its_kind_is_not_read(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m") / INDEX
    os.truncate(path, MAX_JSON_BYTES + 1)
    assert f"`{path}` has {MAX_JSON_BYTES + 1} bytes" in refused(tmp_path / "m")


# What travels along.


KEPT = [
    "1_Pooling/config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "configuration_custom.py",
    "docs/README.md",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "weights.index.json",
]
LEFT_OUT = [
    "model.fp16.safetensors",
    "model.onnx",
    "model.onnx_data",
    "model.q4.gguf",
    "onnx/model.onnx",
    "onnx/model_quantized.onnx",
    "original/consolidated.00.pth",
    "flax_model.msgpack",
    "openvino/openvino_model.bin",
    "pytorch_model.bin",
    "rust_model.ot",
    "tf_model.h5",
    "training_args.bin",
]
ANEW = [
    "README.md",
    MANIFEST_NAME,
    ".gitattributes",
    ".cache/huggingface/download/config.json.metadata",
    "1_Pooling/.hidden",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors.index.json",
]


@pytest.mark.parametrize("make", [single, sharded])
def test_companions_are_exactly_what_is_not_weights(make: Callable[[Path], Path], tmp_path: Path) -> None:
    root = make(tmp_path / "m")
    for name in [*KEPT, *LEFT_OUT, *ANEW]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    found = open_checkpoint(root)
    assert names(found) == KEPT
    assert [str(path) for path in found.left_out()] == sorted(LEFT_OUT)


def test_a_stale_index_beside_a_single_file_does_not_travel(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    single(root)
    assert names(open_checkpoint(root)) == ["config.json"]
    assert [str(path) for path in open_checkpoint(root).left_out()] == list(SHARDS)


def test_links_to_folders_and_special_files_do_not_travel(tmp_path: Path) -> None:
    """A link to a folder may lead to anything, itself included."""
    root = single(tmp_path / "m")
    (root / "loop").symlink_to(root)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("x")
    (root / "secret").symlink_to(tmp_path / "secret")
    (root / "broken.json").symlink_to(tmp_path / "gone")
    os.mkfifo(root / "pipe.json")
    assert names(open_checkpoint(root)) == ["config.json"]


def test_weights_of_sentence_transformers_modules_travel(tmp_path: Path) -> None:
    """A Dense head behind the encoder keeps its weights in a folder of its own, and the model is nothing without it."""
    root = single(tmp_path / "m")
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (root / "modules.json").write_text(json.dumps(modules))
    single(root / "2_Dense")
    (root / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    single(root / "3_Unlisted")
    found = open_checkpoint(root)
    assert names(found) == [
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "3_Unlisted/config.json",
        "config.json",
        "modules.json",
    ]
    assert [str(path) for path in found.left_out()] == ["3_Unlisted/model.safetensors"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"path": 3}]', '[{"path": ".."}]', "[" * 100_000])
def test_a_strange_list_of_modules_changes_nothing(text: str, tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    (root / "modules.json").write_text(text)
    single(root / "2_Dense")
    assert names(open_checkpoint(root)) == ["2_Dense/config.json", "config.json", "modules.json"]


# Fingerprints.


LARGE = 3 * SAMPLE_BYTES  # elements, four bytes each


def fingerprint(root: Path) -> str:
    return open_checkpoint(root).fingerprint()


def overwrite(path: Path, at: int, value: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(value)


def test_fingerprint_is_stable_and_the_same_for_a_copy(tmp_path: Path) -> None:
    first, second = (sharded(tmp_path / name) for name in "mn")
    (second / "tokenizer.json").write_text("{}")
    os.utime(second / SHARDS[0], (1, 1))
    assert fingerprint(first) == fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("at", ["head", "head-end", "tail-start", "tail"])
def test_fingerprint_sees_head_and_tail_of_every_tensor(name: str, at: str, tmp_path: Path) -> None:
    shards = {SHARDS[0]: {"a": tensor(1, LARGE), "b": tensor(2, LARGE)}, SHARDS[1]: {"c": tensor(3, LARGE)}}
    root = sharded(tmp_path / "m", shards=shards)
    found = open_checkpoint(root)
    before = found.fingerprint()
    file = next(file for file in found.files if name in file.tensors)
    info = file.tensors[name]
    end = info.start + info.size_bytes
    sample = SAMPLE_BYTES
    offsets = {"head": info.start, "head-end": info.start + sample - 1, "tail-start": end - sample, "tail": end - 1}
    overwrite(file.path, offsets[at], b"\x7f")
    assert fingerprint(root) != before


CHANGES: dict[str, dict[str, Any]] = {
    "value": {"a": tensor(1.5), "b": tensor(2)},
    "dtype": {"a": tensor(1).view(torch.int32), "b": tensor(2)},
    "shape": {"a": tensor(1).reshape(2, 2), "b": tensor(2)},
    "name": {"A": tensor(1), "b": tensor(2)},
    "one-more": {"a": tensor(1), "b": tensor(2), "c": torch.empty(0)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_sees_every_change_of_tensors(change: str, tmp_path: Path) -> None:
    before = fingerprint(single(tmp_path / "m"))
    assert fingerprint(single(tmp_path / "m", **CHANGES[change])) != before


def test_fingerprint_sees_the_config_and_the_layout(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    found = {fingerprint(root)}
    (root / "config.json").write_text('{"model_type": "llama", "rope_theta": 5e5}')
    found.add(fingerprint(root))
    (root / "config.json").unlink()
    found.add(fingerprint(root))
    found.add(fingerprint(sharded(tmp_path / "n", shards={SHARDS[0]: {"a": tensor(1)}, SHARDS[1]: {"b": tensor(2)}})))
    assert len(found) == 4
