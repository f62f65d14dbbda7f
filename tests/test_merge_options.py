"""What each option of `hra-export merge` does to the files, and what a run prints where."""

import fcntl
import json
import os
import pty
import shutil
import stat
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hra_export import stream
from hra_export.checkpoint import MANIFEST_NAME
from tests.command_line import ENVIRONMENT, PROGRAM, Outcome, run
from tests.synthetic import (
    RANK,
    Stored,
    decoded,
    dense_chain,
    hole,
    linear_modules,
    llama_config,
    llama_shapes,
    random_chains,
    random_tensor,
    read_tensors,
    toy_tensors,
    write_adapter_files,
    write_base,
    write_json,
    write_tensors,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
BITS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Half a unit in the last place, relative: what one rounding to the dtype may cost.
ROUNDING = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
COMPANIONS = {
    "generation_config.json": b'{"eos_token_id":2}',
    "tokenizer.json": b'{"base": true}\r\n',
    "tokenizer_config.json": b"{}",
    "special/nested.txt": bytes(range(256)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base in bfloat16 with companions, and an adapter on all of its linear layers."""
    base = write_base(tmp_path / "base", toy_tensors())
    for name, content in COMPANIONS.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    write_adapter_files(tmp_path / "adapter", random_chains(linear_modules()))
    return tmp_path


def arguments(folder: Path, *more: str | Path, output: str = "merged") -> list[str | Path]:
    return ["merge", folder / "adapter", "--base", folder / "base", "--output", folder / output, *more]


def merge(folder: Path, *more: str | Path, output: str = "merged") -> dict[str, Stored]:
    outcome = run(*arguments(folder, *more, output=output))
    assert outcome.code == 0, outcome.stderr
    return read_tensors(folder / output)


def chain(folder: Path, module: str = Q_PROJ, adapter: str = "adapter") -> np.ndarray:
    vectors = read_tensors(folder / adapter)[f"base_model.model.{module}.hra_u"]
    return dense_chain(vectors.values())


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Files


def test_merge_writes_exactly_these_files(folder: Path) -> None:
    merge(folder)
    expected = {*COMPANIONS, "config.json", "model.safetensors", "README.md", MANIFEST_NAME}
    assert names_in(folder / "merged") == sorted(expected)


def test_merge_copies_companions_byte_for_byte(folder: Path) -> None:
    merge(folder)
    for name, content in COMPANIONS.items():
        assert (folder / "merged" / name).read_bytes() == content


def test_merge_copies_config_byte_for_byte_when_nothing_must_change(folder: Path) -> None:
    unusual = b'{ "model_type":"llama",\t"vocab_size": 96, "x": 1e-05, "\\u00e4": "\xc3\xa4" }'
    (folder / "base" / "config.json").write_bytes(unusual)
    merge(folder)
    assert (folder / "merged" / "config.json").read_bytes() == unusual


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_merge_changes_the_dtype_in_the_config_under_its_own_key_and_nothing_else(folder: Path, key: str) -> None:
    write_json(folder / "base" / "config.json", {**llama_config(), key: "bfloat16"})
    merge(folder, "--dtype", "float16")
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config == {**llama_config(), key: "float16"}


def test_merge_prefers_the_tokenizer_of_the_adapter(folder: Path) -> None:
    """Tokens that training added are known only there."""
    own = {"tokenizer.json": b'{"adapter": true}', "chat_template.jinja": b"{{ messages }}", "added_tokens.json": b"{}"}
    for name, content in own.items():
        (folder / "adapter" / name).write_bytes(content)
    (folder / "adapter" / "training_args.bin").write_bytes(b"a pickle")
    (folder / "adapter" / "README.md").write_bytes(b"the adapter's card")
    merge(folder)
    merged = folder / "merged"
    assert {name: (merged / name).read_bytes() for name in own} == own
    assert (merged / "tokenizer_config.json").read_bytes() == COMPANIONS["tokenizer_config.json"]
    assert not (merged / "training_args.bin").exists()
    assert b"the adapter's card" not in (merged / "README.md").read_bytes()


def test_merge_leaves_unmerged_weights_of_the_base_behind_and_says_so(folder: Path) -> None:
    for name in ("pytorch_model.bin", "model.onnx", "consolidated.safetensors", "onnx/model.onnx_data", ".cache/x"):
        (folder / "base" / name).parent.mkdir(exist_ok=True)
        (folder / "base" / name).write_bytes(b"unmerged")
    outcome = run(*arguments(folder, "--dry-run", "--json"))
    expected = ["consolidated.safetensors", "model.onnx", "onnx/model.onnx_data", "pytorch_model.bin"]
    assert outcome.json["not_copied"] == expected
    merge(folder)
    assert not {*expected, ".cache/x"} & set(names_in(folder / "merged"))


def test_merge_does_not_carry_an_adapter_into_the_merged_model(folder: Path) -> None:
    """transformers would load it on top, and the old base below: people save adapters beside their model."""
    for path in (folder / "adapter").iterdir():
        shutil.copy(path, folder / "base")
    merge(folder)
    assert not [name for name in names_in(folder / "merged") if "adapter" in name]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_merge_gives_files_the_modes_of_the_umask(folder: Path, umask: int) -> None:
    (folder / "base" / "tokenizer.json").chmod(0o400)  # as the Hub's cache has them
    before = os.umask(umask)
    try:
        merge(folder)
    finally:
        os.umask(before)
    for path in (folder / "merged", *(folder / "merged").rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


# Shards


def test_merge_keeps_the_shards_of_the_base(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    write_base(folder / "base", toy_tensors(), shards=3)
    merge(folder)
    base, merged = (
        json.loads((folder / name / "model.safetensors.index.json").read_text()) for name in ("base", "merged")
    )
    assert merged["weight_map"] == base["weight_map"]
    tensors = read_tensors(folder / "merged")
    assert merged["metadata"]["total_size"] == sum(len(tensor.data or b"") for tensor in tensors.values())


def test_merge_splits_into_shards_of_at_most_the_given_size(folder: Path) -> None:
    tensors = merge(folder, "--max-shard-size", "12kB")
    merged = folder / "merged"
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in merged.glob("*.safetensors"))
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 2
    held: dict[str, str] = {}
    for name in shards:
        alone = folder / "alone"
        shutil.rmtree(alone, ignore_errors=True)
        alone.mkdir()
        shutil.copy(merged / name, alone)
        own = read_tensors(alone)
        assert sum(len(tensor.data or b"") for tensor in own.values()) <= 12_000
        held |= dict.fromkeys(own, name)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(len(tensor.data or b"") for tensor in tensors.values())
    assert tensors == merge(folder, output="whole")


def test_merge_joins_shards_that_fit_into_one_file(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    write_base(folder / "base", toy_tensors(), shards=3)
    tensors = merge(folder, "--max-shard-size", "5GB")
    assert [path.name for path in (folder / "merged").glob("*.safetensors")] == ["model.safetensors"]
    assert tensors.keys() == toy_tensors().keys()


def test_merge_gives_a_tensor_larger_than_the_size_a_shard_of_its_own(folder: Path) -> None:
    merge(folder, "--max-shard-size", "1")
    assert len(list((folder / "merged").glob("*.safetensors"))) == len(llama_shapes())


# Numbers


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16", "float16"])
def test_merge_stores_every_float_in_the_chosen_dtype_rounded_once(folder: Path, stored: str, dtype: str) -> None:
    shutil.rmtree(folder / "base")
    counts = {"model.positions": Stored("I64", (3,), bytes(24))}
    base = {**toy_tensors(dtype=stored), **counts}
    write_base(folder / "base", base)
    merged = merge(folder, "--dtype", dtype)
    expected = stored if dtype == "keep" else BITS[dtype]
    assert {name: tensor.dtype for name, tensor in merged.items()} == dict.fromkeys(toy_tensors(), expected) | {
        "model.positions": "I64"
    }
    assert merged["model.positions"] == counts["model.positions"]
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        exact = base[name].values()
        if module in linear_modules():
            exact = exact @ chain(folder, module)
        tolerance = ROUNDING.get(expected, 2.0**-53)
        # 2⁻²⁵: float16 has no finer steps near zero. 1e-15: a few roundings in float64 on the way.
        np.testing.assert_allclose(
            tensor.values(), exact, rtol=tolerance * 1.001, atol=1e-15 + 2.0**-25 * (expected == "F16")
        )


@pytest.mark.parametrize("interpolation", ["geodesic", "linear"])
def test_merge_at_strength_0_is_the_base_bit_for_bit(folder: Path, interpolation: str) -> None:
    assert merge(folder, "--strength", "0", "--interpolation", interpolation) == toy_tensors()


@pytest.mark.parametrize("interpolation", ["geodesic", "linear"])
def test_merge_at_strength_1_is_the_plain_merge_bit_for_bit(folder: Path, interpolation: str) -> None:
    plain = merge(folder, output="plain")
    assert merge(folder, "--strength", "1", "--interpolation", interpolation) == plain


def test_merge_at_half_strength_applied_twice_is_the_whole(folder: Path) -> None:
    """By default a strength is that of a rotation: W R^½ R^½ = W R, which no part of ΔW gives."""
    whole = merge(folder, "--dtype", "float32", output="whole")[f"{Q_PROJ}.weight"].values()
    merge(folder, "--dtype", "float32", "--strength", "0.5", output="half")
    again = run(*("merge", folder / "adapter", "--base", folder / "half", "-o", folder / "twice", "--strength", "0.5"))
    assert again.code == 0, again.stderr
    twice = read_tensors(folder / "twice")[f"{Q_PROJ}.weight"].values()
    np.testing.assert_allclose(twice, whole, atol=1e-7)


def test_merge_at_half_strength_adds_half_of_the_change_when_it_is_linear(folder: Path) -> None:
    part = ("--dtype", "float32", "--strength", "0.5", "--interpolation", "linear")
    whole = merge(folder, "--dtype", "float32", output="whole")[f"{Q_PROJ}.weight"].values()
    half = merge(folder, *part, output="half")[f"{Q_PROJ}.weight"].values()
    base = toy_tensors()[f"{Q_PROJ}.weight"].values()
    assert np.abs(whole - base).max() > 0.01
    np.testing.assert_allclose(half - base, (whole - base) / 2, atol=1e-8)


def test_merge_at_strength_minus_1_is_the_inverse(folder: Path) -> None:
    minus = merge(folder, "--dtype", "float32", "--strength", "-1")[f"{Q_PROJ}.weight"].values()
    base = toy_tensors()[f"{Q_PROJ}.weight"].values()
    np.testing.assert_allclose(minus, base @ chain(folder).T, atol=1e-7)


def test_merge_at_linear_strength_minus_1_is_not_the_inverse(folder: Path) -> None:
    """It is 2 W − W R, as it says: between and beyond 0 and 1 the weights are no rotation of the base's."""
    options = ("--dtype", "float32", "--strength", "-1", "--interpolation", "linear")
    minus = merge(folder, *options)[f"{Q_PROJ}.weight"].values()
    base = toy_tensors()[f"{Q_PROJ}.weight"].values()
    rotation = chain(folder)
    np.testing.assert_allclose(minus, 2 * base - base @ rotation, atol=1e-7)
    assert np.abs(minus - base @ rotation.T).max() > 0.01


def test_merge_composes_adapters_in_the_order_given(folder: Path) -> None:
    write_adapter_files(folder / "second", random_chains({Q_PROJ: 32}, 2, seed=300), rank=2)
    base = toy_tensors()[f"{Q_PROJ}.weight"].values()
    first, second = chain(folder), chain(folder, adapter="second")
    results = {}
    for order in (["adapter", "second"], ["second", "adapter"]):
        output = folder / "-".join(order)
        paths = [folder / name for name in order]
        outcome = run("merge", *paths, "--base", folder / "base", "-o", output, "--dtype", "float32")
        assert outcome.code == 0, outcome.stderr
        results[order[0]] = read_tensors(output)[f"{Q_PROJ}.weight"].values()
        names = [adapter["name"] for adapter in json.loads((output / MANIFEST_NAME).read_text())["adapters"]]
        assert names == order
    np.testing.assert_allclose(results["adapter"], base @ first @ second, atol=1e-7)
    np.testing.assert_allclose(results["second"], base @ second @ first, atol=1e-7)
    assert np.abs(results["adapter"] - results["second"]).max() > 0.01


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_merge_folds_weights_stored_in_out_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """GPT-2's: R acts on columns of the stored matrix, which are spread over all blocks."""
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 200)
    module = "transformer.h.0.attn.c_attn"
    weight, embedding = random_tensor(32, 96, dtype=dtype), random_tensor(50, 32, dtype=dtype)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 1, "n_head": 4}
    tensors = {"transformer.wte.weight": embedding, f"{module}.weight": weight}
    write_base(tmp_path / "base", tensors, config={**config, "vocab_size": 50})
    write_adapter_files(tmp_path / "adapter", random_chains({module: 32}))
    merged = merge(tmp_path, "--strength", "0.75", "--interpolation", "linear")[f"{module}.weight"]
    base = weight.values()
    delta = 0.75 * (chain(tmp_path, module).T @ base - base)
    np.testing.assert_allclose(merged.values(), base + delta, rtol=ROUNDING.get(dtype, 2.0**-50) * 1.001, atol=1e-15)
    entry = json.loads((tmp_path / "merged" / MANIFEST_NAME).read_text())["tensors"][f"{module}.weight"]
    assert entry["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    if dtype != "F64":
        assert entry["rounding_norm"] == pytest.approx(np.linalg.norm(merged.values() - base - delta), rel=1e-3)


def test_merge_reads_the_base_of_the_adapter_when_none_is_given(folder: Path) -> None:
    shutil.rmtree(folder / "adapter")
    chains = random_chains(linear_modules())
    write_adapter_files(folder / "adapter", chains, base_model_name_or_path=str(folder / "base"))
    outcome = run("merge", folder / "adapter", "--output", folder / "implied")
    assert outcome.code == 0, outcome.stderr
    assert read_tensors(folder / "implied") == merge(folder)


def test_merge_overwrites_an_earlier_merge_as_a_whole(folder: Path) -> None:
    merge(folder, "--max-shard-size", "12kB")
    (folder / "merged" / "notes.txt").write_text("mine")
    merge(folder, "--overwrite")
    expected = {*COMPANIONS, "config.json", "model.safetensors", "README.md", MANIFEST_NAME}
    assert names_in(folder / "merged") == sorted(expected)


# The plan


def test_dry_run_writes_nothing_and_gives_the_figures_of_the_real_run(folder: Path) -> None:
    more = ["--dtype", "float32", "--max-shard-size", "12kB", "--json"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    planned = run(*arguments(folder, *more, "--dry-run"))
    assert planned.code == 0, planned.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    done = run(*arguments(folder, *more))
    assert done.code == 0, done.stderr
    plan, report = planned.json, done.json
    assert plan.pop("dry_run")
    figures = [{key: tensor.pop(key) for key in ("delta_norm", "rounding_loss")} for tensor in report["tensors"]]
    assert all(figure["rounding_loss"] is None or figure["rounding_loss"] < 1e-4 for figure in figures)
    assert plan == {key: report[key] for key in plan}

    tensors = read_tensors(folder / "merged")
    assert plan["size_bytes"] == sum(len(tensor.data or b"") for tensor in tensors.values())
    assert plan["files"] == sorted(path.name for path in (folder / "merged").glob("*.safetensors"))
    shapes = llama_shapes()
    linear = [shapes[f"{module}.weight"] for module in linear_modules()]
    assert plan["flop"] == sum(4 * RANK * rows * columns for rows, columns in linear)
    assert plan["actions"] == {
        **dict.fromkeys(plan["actions"], 0),
        "fold": len(linear),
        "cast": len(shapes) - len(linear),
    }


def test_dry_run_reads_headers_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte of tensors, on a disk that has no room for them: they are holes."""
    shapes = {**llama_shapes(), "model.huge.weight": (2**20, 2**18)}
    shutil.rmtree(folder / "base")
    write_base(folder / "base", {name: hole(*shape, dtype="F32") for name, shape in shapes.items()})
    read: list[int] = []
    real = os.pread

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        read.append(count)
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    outcome = run(*arguments(folder, "--dry-run", "--json"))
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["size_bytes"] > 2**40
    assert sum(read) < 20_000  # two headers


def test_merge_into_a_disk_too_small_is_refused_before_the_first_byte(folder: Path) -> None:
    write_tensors(folder / "base" / "model.safetensors", {
        **{name: hole(*shape, dtype="F32") for name, shape in llama_shapes().items()},
        "model.huge.weight": hole(2**20, 2**20, dtype="F32"),
    })  # fmt: skip
    outcome = run(*arguments(folder))
    assert outcome.code == 6
    assert "not enough space" in outcome.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


# The manifest


def test_manifest_says_what_was_done(folder: Path) -> None:
    merged = merge(folder, "--strength", "0.5", "--interpolation", "linear", "--dtype", "float16")
    manifest = json.loads((folder / "merged" / MANIFEST_NAME).read_text())
    assert manifest["schema_version"] == 1
    assert manifest["tool"]["name"] == "hra-export"
    assert manifest["base"]["name"] == "base"
    (adapter,) = manifest["adapters"]
    assert (adapter["name"], adapter["rank"], adapter["apply_GS"]) == ("adapter", RANK, False)
    assert adapter["targets"] == len(linear_modules())
    assert len(adapter["digest"]) == len(manifest["base"]["fingerprint"]) == 64
    assert (manifest["strength"], manifest["interpolation"], manifest["dtype"]) == (0.5, "linear", "float16")
    assert manifest["config_changes"] == {"dtype": "float16"}
    assert manifest["totals"]["folded"] == len(linear_modules())
    assert manifest["totals"]["size_bytes"] == sum(len(tensor.data or b"") for tensor in merged.values())
    assert manifest["tensors"].keys() == merged.keys()  # every one was folded or cast
    exact = toy_tensors()[f"{Q_PROJ}.weight"].values()
    delta = 0.5 * (exact @ chain(folder) - exact)
    entry = manifest["tensors"][f"{Q_PROJ}.weight"]
    error = np.linalg.norm(merged[f"{Q_PROJ}.weight"].values() - (exact + delta))
    assert (entry["action"], entry["dtype"], entry["shape"]) == ("fold", "F16", [32, 32])
    assert entry["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert entry["rounding_norm"] == pytest.approx(error, rel=1e-3)
    assert entry["rounding_loss"] == pytest.approx(error / np.linalg.norm(delta), rel=1e-3)


@pytest.mark.parametrize("changed", ["base", "adapter"])
def test_manifest_digests_follow_the_inputs(folder: Path, changed: str) -> None:
    merge(folder, output="first")
    if changed == "base":
        tensors = toy_tensors()
        data = bytearray(tensors["model.norm.weight"].data or b"")
        data[5] ^= 1
        tensors["model.norm.weight"] = Stored("BF16", (32,), bytes(data))
        write_tensors(folder / "base" / "model.safetensors", tensors)
    else:
        (folder / "adapter" / "adapter_config.json").write_text(
            (folder / "adapter" / "adapter_config.json").read_text() + "\n"
        )
    merge(folder, output="second")
    first, second = (json.loads((folder / name / MANIFEST_NAME).read_text()) for name in ("first", "second"))
    assert (first["base"] != second["base"]) == (changed == "base")
    assert (first["adapters"] != second["adapters"]) == (changed == "adapter")


def test_manifest_and_card_say_nothing_of_the_machine(folder: Path) -> None:
    merge(folder)
    for name in (MANIFEST_NAME, "README.md"):
        text = (folder / "merged" / name).read_text()
        assert str(folder) not in text
        assert os.uname().nodename not in text


def test_merge_warns_when_rounding_eats_the_adapter(folder: Path) -> None:
    """A lightly trained adapter is smaller than the last bit of bfloat16 weights."""
    vectors = {}
    generator = np.random.default_rng(0)
    for key in random_chains(linear_modules()):
        d = linear_modules()[key.removeprefix("base_model.model.").removesuffix(".hra_u")]
        pairs = generator.normal(size=(d, RANK // 2)).repeat(2, axis=1)
        values = pairs + 1e-3 * generator.normal(size=pairs.shape)
        vectors[key] = Stored("F32", values.shape, values.astype("<f4").tobytes())
    shutil.rmtree(folder / "adapter")
    write_adapter_files(folder / "adapter", vectors)
    outcome = run(*arguments(folder, "-q"))
    assert outcome.code == 0
    assert "warning: rounding to BF16 changed ΔW by" in outcome.stderr
    assert "`--dtype float32` keeps it" in outcome.stderr
    assert run(*arguments(folder, "-q", "--dtype", "float32", output="wide")).stderr == ""


# What is printed


def test_stdout_carries_only_the_result(folder: Path) -> None:
    outcome = run(*arguments(folder, "-v"))
    lines = outcome.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["folded", "rounding", "wrote"]
    assert lines[0].startswith(f"folded {len(linear_modules())} tensors, copied ")
    assert lines[-1] == f"wrote `{folder / 'merged'}`"


def test_json_is_one_object_with_the_schema_version(folder: Path) -> None:
    outcome = run(*arguments(folder, "--json", "-vv"))
    assert outcome.stdout.count("\n") == 1
    assert outcome.json["schema_version"] == 1
    assert outcome.json["verb"] == "merge"
    assert outcome.json["output"] == str(folder / "merged")
    assert outcome.json["actions"]["fold"] == len(linear_modules())


def added_head(folder: Path) -> None:
    """An adapter with a tied head, for which a merge has something to say."""
    shutil.rmtree(folder / "base")
    tensors = toy_tensors()
    tensors.pop("lm_head.weight")
    write_base(folder / "base", tensors, config={**llama_config(), "tie_word_embeddings": True})
    shutil.rmtree(folder / "adapter")
    write_adapter_files(folder / "adapter", random_chains({"lm_head": 32}))


def test_notes_go_to_stderr_and_quiet_drops_them(folder: Path) -> None:
    added_head(folder)
    loud = run(*arguments(folder))
    assert "note: `lm_head.weight` is tied to `model.embed_tokens.weight`" in loud.stderr
    quiet = run(*arguments(folder, "-q", output="quiet"))
    assert (quiet.code, quiet.stderr) == (0, "")
    assert quiet.stdout.splitlines()[-1] == f"wrote `{folder / 'quiet'}`"


def test_merge_unties_a_head_it_folds_into(folder: Path) -> None:
    added_head(folder)
    merged = merge(folder, "--dtype", "float32")
    embedding = toy_tensors()["model.embed_tokens.weight"].values()
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"].values(), embedding)
    np.testing.assert_allclose(merged["lm_head.weight"].values(), embedding @ chain(folder, "lm_head"), atol=1e-7)
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config == {**llama_config(), "tie_word_embeddings": False, "dtype": "float32"}


def test_progress_is_not_shown_without_a_terminal(folder: Path) -> None:
    outcome = run(*arguments(folder))
    assert outcome.stderr == ""


def run_in_terminal(*words: str | Path, **environment: str) -> Outcome:
    """Run with stderr on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        env=ENVIRONMENT | {"TERM": "xterm"} | environment,
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        stdout, _ = process.communicate()
    os.close(ours)
    return Outcome(process.returncode, stdout.decode(), shown.decode())


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other side is closed
        return b""


def test_progress_is_shown_on_a_terminal_unless_quiet(folder: Path) -> None:
    loud = run_in_terminal(*arguments(folder))
    assert loud.code == 0
    assert "merge: 100%" in loud.stderr
    assert "merge: 100%" not in loud.stdout
    quiet = run_in_terminal(*arguments(folder, "-q", "--overwrite"))
    assert (quiet.code, quiet.stderr) == (0, "")


def test_errors_are_coloured_on_a_terminal_unless_no_color_is_set(folder: Path) -> None:
    words: list[Any] = ["merge", folder / "missing", "--base", folder / "base", "-o", folder / "merged"]
    assert "\x1b[31m" in run_in_terminal(*words).stderr
    plain = run_in_terminal(*words, NO_COLOR="1")
    assert plain.code == 4
    assert plain.stderr.startswith("error: adapter")
    assert "\x1b" not in plain.stderr


def test_help_of_merge_ends_in_an_example_and_needs_no_torch() -> None:
    outcome = run("merge", "--help")
    assert outcome.code == 0
    assert outcome.stdout.index("Example: hra-export merge") > outcome.stdout.index("Fold ADAPTERs")
    call = "from hra_export.cli import main\ntry: main(['merge', '--help'])\n"
    program = f"import sys; {call}finally: assert 'torch' not in sys.modules"
    done = subprocess.run([PROGRAM[0], "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_decoded_reverses_what_the_synthetic_files_are_written_with() -> None:
    """The judge of this file: bfloat16 bits by hand."""
    assert decoded("BF16", bytes.fromhex("803f 20c0 0000")).tolist() == [1.0, -2.5, 0.0]
    assert random_tensor(3, dtype="F16", seed=1).values().tolist() == [
        float(np.float16(value)) for value in np.random.default_rng(1).normal(0, 0.05, 3)
    ]
