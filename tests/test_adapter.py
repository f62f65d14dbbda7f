"""Adapter directories: what is refused and why, and that what is written comes back."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hra_export import householder
from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.errors import AdapterError, NumericalError
from hra_export.names import AdapterKey, chain_key, is_under, parameter_key, parse_adapter_key
from hra_export.peft_directory import CONFIG_NAME, MAX_CONFIG_BYTES, PICKLE_NAME, WEIGHTS_NAME

RANK, FEATURES = 2, 6
# Reading is a few milliseconds; the regular expression below runs for hours on the names it meets.
HANG_SECONDS = 20.0
CONFIG: dict[str, Any] = {"peft_type": "HRA", "r": RANK, "apply_GS": False, "bias": "none", "target_modules": ["q"]}
KEY = chain_key("layers.0.q_proj")


def vectors(d: int = FEATURES, r: int = RANK, *, seed: int = 0) -> Tensor:
    return torch.randn(d, r, generator=torch.Generator().manual_seed(seed))


def adapter_directory(
    path: Path,
    *,
    tensors: dict[str, Tensor] | None = None,
    config: dict[str, Any] | bytes | None = None,
    **changes: Any,
) -> Path:
    """A good adapter of one target, with config fields or tensors changed."""
    path.mkdir(exist_ok=True)
    raw = config if isinstance(config, bytes) else json.dumps({**(config or CONFIG), **changes}).encode()
    (path / CONFIG_NAME).write_bytes(raw)
    save_file(tensors if tensors is not None else {KEY: vectors()}, path / WEIGHTS_NAME, {"format": "pt"})
    return path


def refused(path: Path, kind: type[AdapterError | NumericalError] = AdapterError) -> str:
    """The whole text of the refusal, which names the directory."""
    with pytest.raises(kind) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_good_adapter_is_read(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a", task_type="CAUSAL_LM", base_model_name_or_path="models/tiny")
    adapter = read_adapter(path)
    assert list(adapter.chains) == ["layers.0.q_proj"]
    assert torch.equal(adapter.chains["layers.0.q_proj"], vectors())
    assert (adapter.rank, adapter.orthogonalize, adapter.bias, adapter.modules_to_save) == (RANK, False, "none", ())
    assert (adapter.task, adapter.base, adapter.path) == ("CAUSAL_LM", "models/tiny", tmp_path / "a")
    assert len(adapter.digest) == 64


# The config, field by field.


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("r", True, "r: expected a positive integer, got True"),
        ("r", 2.0, "got 2.0"),
        ("r", "2", "got '2'"),
        ("r", 0, "got 0"),
        ("r", -2, "got -2"),
        ("r", None, "got None"),
        ("r", [2], "got [2]"),
        ("apply_GS", "false", "apply_GS: expected true or false, got 'false'"),
        ("apply_GS", 0, "apply_GS: expected true or false, got 0"),
        ("apply_GS", None, "apply_GS: expected true or false, got None"),
        ("bias", "lora_only", "bias: expected none, hra_only or all, got 'lora_only'"),
        ("bias", None, "bias"),
        ("bias", ["none"], "bias"),
        ("modules_to_save", "classifier", "modules_to_save: expected a list of names or null, got 'classifier'"),
        ("modules_to_save", [1], "modules_to_save"),
        ("modules_to_save", {"classifier": 1}, "modules_to_save"),
    ],
)
def test_config_field_of_the_wrong_kind_is_refused(field: str, value: Any, says: str, tmp_path: Path) -> None:
    text = refused(adapter_directory(tmp_path / "a", **{field: value}))
    assert says in text
    assert CONFIG_NAME in text


def test_config_findings_come_all_at_once(tmp_path: Path) -> None:
    text = refused(adapter_directory(tmp_path / "a", r=0, apply_GS="no", bias="some", modules_to_save="head"))
    assert all(f"  {field}: expected" in text for field in ("r", "apply_GS", "bias", "modules_to_save"))


def test_config_without_a_rank_is_refused(tmp_path: Path) -> None:
    assert "r: expected" in refused(adapter_directory(tmp_path / "a", config={"peft_type": "HRA"}))


@pytest.mark.parametrize("peft_type", ["LORA", "hra", "Hra", "OFT", "", None, ["HRA"], 1])
def test_other_kinds_of_adapter_are_refused(peft_type: object, tmp_path: Path) -> None:
    text = refused(adapter_directory(tmp_path / "a", peft_type=peft_type))
    assert f"is not an HRA adapter: its peft_type is {peft_type!r}" in text


def test_config_without_a_kind_is_refused(tmp_path: Path) -> None:
    assert "peft_type is None" in refused(adapter_directory(tmp_path / "a", config={"r": 2}))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{'r': 2}", "not valid JSON"),
        (b'{"r": 2,}', "not valid JSON"),
        (b'{"peft_type": "H\xff"}', "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b'{"base_model_name_or_path": "\\udc80"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b'"HRA"', "expected a JSON object, got str"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"peft_type": "HRA", "r": 2, "r": 4}', "repeats the JSON key `r`"),
        (b'{"peft_type": "HRA", "peft_type": "LORA", "r": 2}', "repeats the JSON key `peft_type`"),
        (b'{"peft_type": "HRA", "r": NaN}', "holds NaN"),
        (b'{"peft_type": "HRA", "r": 2, "x": {"y": -Infinity}}', "holds -Infinity"),
    ],
)
def test_config_that_is_no_clean_json_object_is_refused(raw: bytes, says: str, tmp_path: Path) -> None:
    text = refused(adapter_directory(tmp_path / "a", config=raw))
    assert says in text
    assert CONFIG_NAME in text


def test_config_of_more_than_a_mebibyte_is_refused(tmp_path: Path) -> None:
    allowed = adapter_directory(tmp_path / "a", target_modules=["x" * (MAX_CONFIG_BYTES - 400)])
    assert (allowed / CONFIG_NAME).stat().st_size < MAX_CONFIG_BYTES
    assert read_adapter(allowed).rank == RANK
    assert "at most 1048576" in refused(adapter_directory(tmp_path / "b", target_modules=["x" * MAX_CONFIG_BYTES]))


def test_unknown_config_fields_do_no_harm(tmp_path: Path) -> None:
    """PEFT adds fields with every release."""
    assert read_adapter(adapter_directory(tmp_path / "a", new_field={"a": [1]}, peft_version="9.9")).rank == RANK


def test_fields_absent_from_old_configs_have_pefts_defaults(tmp_path: Path) -> None:
    adapter = read_adapter(adapter_directory(tmp_path / "a", config={"peft_type": "HRA", "r": 2}))
    assert (adapter.orthogonalize, adapter.bias, adapter.modules_to_save) == (False, "none", ())
    assert (adapter.base, adapter.task, adapter.model_class) == (None, None, None)


@pytest.mark.parametrize("value", [3, ["x"], {}, ""])
def test_texts_of_another_kind_count_as_absent(value: Any, tmp_path: Path) -> None:
    changes = dict.fromkeys(["base_model_name_or_path", "task_type", "auto_mapping"], value)
    adapter = read_adapter(adapter_directory(tmp_path / "a", **changes))
    assert (adapter.base, adapter.task, adapter.model_class, adapter.model_library) == (None,) * 4


def test_the_target_pattern_is_never_run(tmp_path: Path) -> None:
    """A catastrophic regular expression over the very names the file holds."""
    name = "a" * 60
    path = adapter_directory(tmp_path / "a", tensors={chain_key(name): vectors()}, target_modules="(a+)+b")
    started = time.monotonic()
    assert list(read_adapter(path).chains) == [name]
    assert time.monotonic() - started < HANG_SECONDS


@pytest.mark.parametrize("target", ["(", "[", None, 5, ["nothing.of.this.name"]])
def test_tensor_names_say_what_is_adapted_whatever_the_config_says(target: object, tmp_path: Path) -> None:
    assert list(read_adapter(adapter_directory(tmp_path / "a", target_modules=target)).chains) == ["layers.0.q_proj"]


# The directory.


def test_missing_directory(tmp_path: Path) -> None:
    assert f"has no {CONFIG_NAME}" in refused(tmp_path / "none")


def test_directory_without_a_config(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    (path / CONFIG_NAME).unlink()
    text = refused(path)
    assert f"has no {CONFIG_NAME}" in text
    assert "save_pretrained" in text


def test_directory_without_weights(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    (path / WEIGHTS_NAME).unlink()
    assert f"has no {WEIGHTS_NAME}" in refused(path)


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    assert "not an adapter directory" in refused(path / WEIGHTS_NAME)


def test_a_directory_instead_of_the_config(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    (path / CONFIG_NAME).unlink()
    (path / CONFIG_NAME).mkdir()
    assert "not an adapter directory" in refused(path)


def test_a_directory_instead_of_the_weights(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    (path / WEIGHTS_NAME).unlink()
    (path / WEIGHTS_NAME).mkdir()
    assert "not a regular file" in refused(path)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_fifo_instead_of_a_file_does_not_hang(name: str, tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    (path / name).unlink()
    os.mkfifo(path / name)
    refused(path)


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """The Hub's cache holds links."""
    store = adapter_directory(tmp_path / "store")
    (tmp_path / "a").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / "a" / name).symlink_to(store / name)
    assert list(read_adapter(tmp_path / "a").chains) == ["layers.0.q_proj"]


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    (path / WEIGHTS_NAME).rename(path / PICKLE_NAME)
    text = refused(path)
    assert "is a pickle, which can run code" in text
    assert "safe_serialization=True" in text


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    (path / PICKLE_NAME).write_bytes(b"\x80\x04.")
    assert read_adapter(path).rank == RANK


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a")
    content = (path / WEIGHTS_NAME).read_bytes()
    (path / WEIGHTS_NAME).write_bytes(content[:-1])
    assert "truncated" in refused(path)


# The tensors.


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    assert "holds no `hra_u` tensor" in refused(adapter_directory(tmp_path / "a", tensors={}))


def test_parameters_without_a_chain_are_refused(tmp_path: Path) -> None:
    tensors = {"base_model.model.head.weight": vectors()}
    assert "holds no `hra_u` tensor" in refused(adapter_directory(tmp_path / "a", tensors=tensors))


def test_foreign_tensors_are_listed_all_at_once(tmp_path: Path) -> None:
    foreign = [
        "layers.0.q_proj.hra_u",
        "model.layers.0.q_proj.hra_u",
        "base_model.layers.0.q_proj.hra_u",
        "base_model.model.hra_u",
        "base_model.model..hra_u",
        "base_model.model.a..b.hra_u",
        "base_model.model.layers.0.q_proj.hra_u.default",
        "base_model.model.layers.0.q_proj.hra_u.weight.x",
        "base_model.model.layers.0.q_proj.oft_r",
        "base_model.model.layers.0.running_mean",
        "",
    ]
    tensors = {KEY: vectors(), **{name: vectors() for name in foreign}}
    text = refused(adapter_directory(tmp_path / "a", tensors=tensors))
    assert f"{len(foreign)} tensors are wrong" in text
    assert all(f"  {name}: not a tensor of an HRA adapter" in text for name in foreign)


@pytest.mark.parametrize("shape", [(6, 3), (6, 1), (2, 6), (1, 2), (6,), (1, 6, 2), ()])
def test_chains_that_disagree_with_the_rank_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    other = chain_key("layers.1.q_proj")
    text = refused(adapter_directory(tmp_path / "a", tensors={KEY: vectors(), other: torch.ones(shape)}))
    assert f"{other}: the config says r = 2, so expected (d, 2) with d >= 2, got {shape}" in text
    assert KEY not in text


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("key", [KEY, "base_model.model.layers.0.q_proj.base_layer.bias"])
def test_vectors_and_biases_that_are_no_floats_are_refused(key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {KEY: vectors(), key: torch.ones(FEATURES, RANK).to(dtype)}
    assert f"{key}: expected floats" in refused(adapter_directory(tmp_path / "a", tensors=tensors))


def test_biases_that_peft_writes_twice_are_one_parameter(tmp_path: Path) -> None:
    """With `bias="all"` and a saved module: its bias, the same from inside PEFT's wrapper, and the base's own."""
    prefix = "base_model.model.head"
    tensors = {f"{prefix}.bias": torch.ones(3), f"{prefix}.modules_to_save.bias": torch.ones(3)}
    tensors |= {KEY: vectors(), f"{prefix}.original_module.bias": torch.zeros(3)}
    path = adapter_directory(tmp_path / "a", tensors=tensors, modules_to_save=["head"], bias="all")
    found = read_adapter(path).parameters
    assert {name: value.tolist() for name, value in found.items()} == {"head.bias": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize("other", [torch.zeros(3), torch.ones(4)], ids=["values", "shape"])
def test_a_saved_bias_with_two_values_is_refused(other: Tensor, tmp_path: Path) -> None:
    prefix = "base_model.model.head"
    tensors = {KEY: vectors(), f"{prefix}.bias": torch.ones(3), f"{prefix}.modules_to_save.bias": other}
    path = adapter_directory(tmp_path / "a", tensors=tensors, modules_to_save=["head"], bias="all")
    assert "a second value for head.bias" in refused(path)


def test_two_values_for_one_parameter_are_refused(tmp_path: Path) -> None:
    """A bias with and without `base_layer` is the same bias; one of them would silently win."""
    values = {"bias": torch.ones(3), "base_layer.bias": torch.zeros(3)}
    tensors = {f"base_model.model.layers.0.q_proj.{name}": value for name, value in values.items()}
    text = refused(adapter_directory(tmp_path / "a", tensors={KEY: vectors(), **tensors}))
    assert "a second value for layers.0.q_proj.bias" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_vectors_without_a_direction_are_named_all_at_once(dtype: torch.dtype, tmp_path: Path) -> None:
    bad = vectors(r=4)
    bad[:, 0] = 0
    bad[3, 1] = float("nan")
    bad[4, 3] = -float("inf")
    fine, worse = vectors(r=4, seed=1), torch.zeros(FEATURES, 4)
    tensors = {chain_key(name): value.to(dtype) for name, value in {"a": bad, "b": fine, "c": worse}.items()}
    text = refused(adapter_directory(tmp_path / "x", tensors=tensors, r=4), NumericalError)
    assert "7 reflection vectors have no direction" in text
    assert f"{chain_key('a')}, vector 0: zero" in text
    assert f"{chain_key('a')}, vector 1: NaN or infinite" in text
    assert f"{chain_key('a')}, vector 2" not in text
    assert f"{chain_key('a')}, vector 3: NaN or infinite" in text
    assert chain_key("b") not in text
    assert text.count(chain_key("c")) == 4


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *((torch.float16, 6e-8), (torch.float16, 6e4), (torch.bfloat16, 1e-38), (torch.bfloat16, 3e38)),
        *((torch.float32, 1e-45), (torch.float32, 3e38), (torch.float64, 1e-300), (torch.float64, 1e300)),
    ],
)
def test_tiny_and_huge_vectors_are_read(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    stored = torch.full((FEATURES, RANK), size, dtype=dtype)
    adapter = read_adapter(adapter_directory(tmp_path / "a", tensors={KEY: stored}))
    assert torch.equal(adapter.chains["layers.0.q_proj"], stored)
    # Two equal vectors: the identity.
    identity = torch.eye(FEATURES, dtype=torch.float64)
    torch.testing.assert_close(householder.dense(adapter.reflector("layers.0.q_proj")), identity)


def test_reflector_names_the_target_it_fails_on(tmp_path: Path) -> None:
    path = adapter_directory(tmp_path / "a", tensors={KEY: torch.ones(FEATURES, RANK)}, apply_GS=True)
    with pytest.raises(NumericalError) as caught:
        read_adapter(path).reflector("layers.0.q_proj")
    for word in (str(path), "`layers.0.q_proj`", "Gram-Schmidt", "init_weights=False"):
        assert word in str(caught.value)


def test_digest_tells_configs_and_weights_apart(tmp_path: Path) -> None:
    path = tmp_path / "a"
    digests = [
        read_adapter(adapter_directory(path, **changes)).digest
        for changes in ({}, {}, {"bias": "all"}, {"tensors": {KEY: vectors(seed=1)}})
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# What is written comes back.


def full_adapter(**changes: Any) -> HraAdapter:
    parameters = {
        "layers.0.q_proj.bias": torch.arange(3.0),
        "norm.bias": torch.ones(2, dtype=torch.bfloat16),
        "head.weight": torch.randn(4, 2, generator=torch.Generator().manual_seed(3)).T,  # not contiguous
        "head.scale": torch.tensor(1.5),
        "head.counter": torch.tensor(7),
        "head.rows": torch.empty(0, 3, dtype=torch.float16),
    }
    fields: dict[str, Any] = {
        "chains": {"layers.0.q_proj": vectors(), "layers.1.q_proj": vectors(9, seed=2)},
        "rank": RANK,
        "orthogonalize": True,
        "parameters": parameters,
        "bias": "all",
        "modules_to_save": ("head",),
        "base": "models/tiny",
        "model_class": "LlamaForCausalLM",
        "model_library": "transformers.models.llama.modeling_llama",
    }
    return HraAdapter(**{**fields, **changes})


def test_write_then_read_is_the_same_adapter(tmp_path: Path) -> None:
    adapter = full_adapter()
    write_adapter(adapter, tmp_path / "new" / "a")
    found = read_adapter(tmp_path / "new" / "a")
    for name in ("rank", "orthogonalize", "bias", "modules_to_save", "base", "task", "model_class", "model_library"):
        assert getattr(found, name) == getattr(adapter, name)
    for part in ("chains", "parameters"):
        expected, got = getattr(adapter, part), getattr(found, part)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value)


def test_write_gives_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    adapter = full_adapter()
    parts: dict[str, dict[str, Tensor]] = {"chains": dict(adapter.chains), "parameters": dict(adapter.parameters)}
    turned = full_adapter(**{part: dict(reversed(tensors.items())) for part, tensors in parts.items()})
    write_adapter(adapter, tmp_path / "a")
    write_adapter(turned, tmp_path / "b")
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "c")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert len({(tmp_path / directory / name).read_bytes() for directory in "abc"}) == 1


def test_write_leaves_exactly_pefts_two_files_with_pefts_keys(tmp_path: Path) -> None:
    write_adapter(full_adapter(), tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert set(load_file(tmp_path / "a" / WEIGHTS_NAME)) == {
        f"base_model.model.{name}"
        for name in (
            *("layers.0.q_proj.hra_u", "layers.1.q_proj.hra_u", "layers.0.q_proj.base_layer.bias", "norm.bias"),
            *("head.weight", "head.scale", "head.counter", "head.rows"),
        )
    }
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_bytes())
    assert (config["peft_type"], config["r"], config["apply_GS"], config["bias"]) == ("HRA", RANK, True, "all")
    assert config["target_modules"] == ["layers.0.q_proj", "layers.1.q_proj"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_chains_are_written_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = vectors().to(dtype)
    write_adapter(full_adapter(chains={"layers.0.q_proj": stored}), tmp_path / "a")
    assert torch.equal(read_adapter(tmp_path / "a").chains["layers.0.q_proj"], stored.float())


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_vectors_that_float32_cannot_hold_are_not_written(size: float, tmp_path: Path) -> None:
    adapter = full_adapter(chains={"layers.0.q_proj": vectors().double() * size})
    with pytest.raises(NumericalError, match="have no direction"):
        write_adapter(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_writing_over_an_adapter_replaces_it(tmp_path: Path) -> None:
    write_adapter(full_adapter(), tmp_path / "a")
    smaller = HraAdapter({"x": vectors()}, rank=RANK)
    write_adapter(smaller, tmp_path / "a")
    found = read_adapter(tmp_path / "a")
    assert (list(found.chains), dict(found.parameters), found.orthogonalize) == (["x"], {}, False)


def test_writing_leaves_vectors_and_their_gradients_alone(tmp_path: Path) -> None:
    live = vectors().requires_grad_()
    write_adapter(full_adapter(chains={"layers.0.q_proj": live}), tmp_path / "a")
    assert live.requires_grad
    assert torch.equal(live.detach(), vectors())


def test_read_tensors_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    write_adapter(full_adapter(), tmp_path / "a")
    before = (tmp_path / "a" / WEIGHTS_NAME).read_bytes()
    found = read_adapter(tmp_path / "a")
    for value in (*found.chains.values(), *found.parameters.values()):
        value.zero_()
    assert (tmp_path / "a" / WEIGHTS_NAME).read_bytes() == before


def test_vectors_do_not_change_when_the_file_is_written_over_in_place(tmp_path: Path) -> None:
    """A training run may save over its last checkpoint while it is being merged."""
    path = adapter_directory(tmp_path / "a")
    chains = read_adapter(path).chains
    with (path / WEIGHTS_NAME).open("r+b") as stream:
        stream.write(b"\xff" * (path / WEIGHTS_NAME).stat().st_size)
    assert torch.equal(chains["layers.0.q_proj"], vectors())


def test_label_is_the_path_or_says_that_there_is_none(tmp_path: Path) -> None:
    assert full_adapter().label == "(in memory)"
    assert read_adapter(adapter_directory(tmp_path / "a")).label == str(tmp_path / "a")


# Names.


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model.model.a.b.hra_u", AdapterKey("chain", "a.b")),
        ("base_model.model.model.layers.0.q.hra_u", AdapterKey("chain", "model.layers.0.q")),
        ("base_model.model.base_model.model.q.hra_u", AdapterKey("chain", "base_model.model.q")),
        ("base_model.model.a.base_layer.bias", AdapterKey("parameter", "a.bias")),
        ("base_model.model.a.bias", AdapterKey("parameter", "a.bias")),
        ("base_model.model.a.base_layer.weight", AdapterKey("parameter", "a.weight")),
        ("base_model.model.head.scale", AdapterKey("parameter", "head.scale")),
        ("base_model.model.x.head.0.scale", AdapterKey("parameter", "x.head.0.scale")),
        ("base_model.model.ahead.scale", None),
        ("base_model.model.scale", None),
        ("base_model.model.x.head.modules_to_save.bias", AdapterKey("parameter", "x.head.bias")),
        ("base_model.model.x.head.original_module.bias", AdapterKey("original", "x.head.bias")),
        ("base_model.model.x.original_module.bias", AdapterKey("parameter", "x.original_module.bias")),
        ("base_model.model.a.lora_A", None),
    ],
)
def test_parse_adapter_key(key: str, expected: AdapterKey | None) -> None:
    assert parse_adapter_key(key, ["head"]) == expected


@pytest.mark.parametrize("write", [chain_key, lambda name: parameter_key(f"{name}.bias", [name])])
def test_written_keys_parse_back(write: Callable[[str], str]) -> None:
    parsed = parse_adapter_key(write("model.layers.0.q_proj"))
    assert parsed is not None
    assert parsed.path.removesuffix(".bias") == "model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("name", "modules", "expected"),
    [
        ("a.head.weight", ["head"], True),
        ("a.head.weight", ["a.head"], True),
        ("a.head.weight", ["a"], True),
        ("a.header.weight", ["head"], False),
        ("a.head.weight", ["ad"], False),
        ("a.head.weight", ["h.ad"], False),
        ("a.head.weight", ["h[e]ad", "h.*"], False),
        ("a.head.weight", [""], False),
        ("a.head.weight", [], False),
    ],
)
def test_is_under_compares_whole_parts_literally(name: str, modules: list[str], expected: bool) -> None:
    assert is_under(name, modules) is expected
