"""Several adapters as one, and adapters at another strength, as a directory of PEFT."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.checkpoint import MANIFEST_NAME
from hra_export.composition import composed, uniform
from hra_export.errors import ConversionError, HraExportError, MismatchError, NumericalError, OutputError
from hra_export.householder import compact_wy, dense, distance
from hra_export.registry import load_converter
from tests.test_strength import adapter_of, explicit, gaussian, near_parallel

to_hra = load_converter("to_hra")

# Products of a few dozen orthogonal factors of norm 1 in float64; measured: 3e-15.
ATOL64 = 1e-13
# Unit vectors rounded to float32, a dozen of them: each is off by 2⁻²⁴ of its size.
ATOL_FP32 = 2e-6


def saved(folder: Path, *adapters: HraAdapter) -> list[HraAdapter]:
    """Adapters as they are read back from directories `0`, `1`, …, in float32."""
    for i, adapter in enumerate(adapters):
        write_adapter(adapter, folder / str(i))
    return [read_adapter(folder / str(i)) for i in range(len(adapters))]


def matrix(adapters: Sequence[HraAdapter], module: str) -> Tensor:
    """R_1 R_2 … by the explicit chains."""
    product: Tensor | None = None
    for adapter in adapters:
        if module in adapter.chains:
            vectors = adapter.chains[module]
            own = dense(compact_wy(vectors, orthogonalize=True)) if adapter.orthogonalize else explicit(vectors)
            product = own if product is None else product @ own
    assert product is not None
    return product


def close(got: Tensor, expected: Tensor, atol: float = ATOL64) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_composition_is_the_stored_columns_one_behind_another_bit_for_bit(tmp_path: Path) -> None:
    first, second = saved(
        tmp_path, adapter_of(gaussian(16, 4), gaussian(12, 4)), adapter_of(gaussian(16, 3, seed=1), gaussian(12, 3))
    )
    report = to_hra.convert([first, second], tmp_path / "out")
    got = read_adapter(tmp_path / "out")
    for module in ("m0", "m1"):
        assert torch.equal(got.chains[module], torch.cat([first.chains[module], second.chains[module]], dim=1))
        close(explicit(got.chains[module]), matrix([first, second], module))
    assert (report.error, report.ranks) == (0, (7, 7))
    swapped = composed([second, first])
    assert float((explicit(swapped.chains["m0"]) - explicit(got.chains["m0"])).abs().max()) > 0.1


def test_targets_of_only_one_adapter_are_filled_with_pairs_that_cancel(tmp_path: Path) -> None:
    first, second = saved(tmp_path, adapter_of(gaussian(16, 4), gaussian(12, 4)), adapter_of(gaussian(16, 2, seed=1)))
    to_hra.convert([first, second], tmp_path / "out")
    got = read_adapter(tmp_path / "out")
    assert got.rank == 6
    close(explicit(got.chains["m1"]), explicit(first.chains["m1"]))
    assert torch.equal(got.chains["m1"][:, :4], first.chains["m1"])


def test_gram_schmidt_adapters_compose_by_their_orthonormal_columns(tmp_path: Path) -> None:
    first, second = saved(
        tmp_path, adapter_of(gaussian(16, 4), orthogonalize=True), adapter_of(gaussian(16, 2, seed=1))
    )
    report = to_hra.convert([first, second], tmp_path / "out")
    got = read_adapter(tmp_path / "out")
    assert not got.orthogonalize
    close(explicit(got.chains["m0"]), matrix([first, second], "m0"), ATOL_FP32)
    assert torch.equal(got.chains["m0"][:, 4:], second.chains["m0"])
    assert 0 < report.error < ATOL_FP32


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
def test_one_adapter_at_strength_1_is_copied_bit_for_bit(orthogonalize: bool, tmp_path: Path) -> None:
    (adapter,) = saved(tmp_path, adapter_of(gaussian(16, 3), gaussian(12, 3), orthogonalize=orthogonalize))
    report = to_hra.convert([adapter], tmp_path / "out")
    assert report.error == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "0" / name).read_bytes()


@pytest.mark.parametrize("t", [0.5, -0.3, 2.0])
def test_a_strength_is_that_of_the_product_and_has_one_rank_for_all(t: float, tmp_path: Path) -> None:
    """One target of one adapter, one that is idle, one of both: their shortest chains differ in length."""
    idle = gaussian(12, 1).repeat(1, 4)
    adapters = saved(tmp_path, adapter_of(gaussian(16, 4), gaussian(12, 4), idle), adapter_of(gaussian(16, 2, seed=1)))
    report = to_hra.convert(adapters, tmp_path / "out", strength=t)
    got = read_adapter(tmp_path / "out")
    again = to_hra.plan_product(adapters, strength=1 - t)[0]
    assert (got.rank, report.ranks) == (6, (6, 6))
    for module in ("m0", "m1", "m2"):
        both = explicit(got.chains[module]) @ explicit(again.chains[module])
        close(both, matrix(adapters, module), ATOL_FP32)
    assert report.error < ATOL_FP32
    assert [target.error for target in report.targets if target.module == "m2"] == [0]


@pytest.mark.parametrize("t", [-1.0, 0.0])
def test_the_inverse_and_nothing_exist_for_odd_chains_too(t: float, tmp_path: Path) -> None:
    (adapter,) = saved(tmp_path, adapter_of(gaussian(16, 3)))
    to_hra.convert([adapter], tmp_path / "out", strength=t)
    got = read_adapter(tmp_path / "out").chains["m0"]
    expected = explicit(adapter.chains["m0"]).T if t else torch.eye(16, dtype=torch.float64)
    close(explicit(got), expected)
    if t:
        assert torch.equal(got, adapter.chains["m0"].flip(1))


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
def test_half_of_near_parallel_pairs_keeps_what_float32_holds_and_says_what_it_lost(
    angle: float, tmp_path: Path
) -> None:
    (adapter,) = saved(tmp_path, adapter_of(near_parallel(64, 8, angle)))
    report = to_hra.convert([adapter], tmp_path / "out", strength=0.5)
    exact = to_hra.plan_product([adapter], strength=0.5)[0].chains["m0"]
    got = read_adapter(tmp_path / "out").chains["m0"]
    lost = float((explicit(got) - explicit(exact)).norm() / (explicit(exact) - torch.eye(64)).norm())
    assert report.error == pytest.approx(lost, rel=1e-6)
    assert report.error < 2.0**-22 / angle  # a rounding of unit vectors beside the angle between them
    assert report.delta_norm == pytest.approx(float((explicit(exact) - torch.eye(64)).norm()), rel=1e-9)


def test_what_was_trained_beside_the_chains_comes_along(tmp_path: Path) -> None:
    bias, head = {"m0.bias": torch.ones(3)}, {"head.weight": torch.randn(2, 4)}
    first = adapter_of(gaussian(16, 4), parameters=bias, bias="hra_only", task="SEQ_CLS", base="a/b")
    second = adapter_of(gaussian(16, 2), parameters=head, modules_to_save=("head",), base="c/d")
    report = to_hra.convert(saved(tmp_path, first, second), tmp_path / "out")
    got = read_adapter(tmp_path / "out")
    assert got.parameters.keys() == {"m0.bias", "head.weight"}
    assert (got.bias, got.modules_to_save, got.task, got.base) == ("hra_only", ("head",), "SEQ_CLS", "a/b")
    assert "name their base differently (a/b, c/d)" in report.notes[0]


def test_the_directory_has_a_manifest_a_card_and_the_last_tokenizer(tmp_path: Path) -> None:
    adapters = saved(tmp_path, adapter_of(gaussian(16, 4), base="a/b"), adapter_of(gaussian(16, 2)))
    (tmp_path / "0" / "tokenizer.json").write_text("0")
    (tmp_path / "1" / "tokenizer.json").write_text("1")
    to_hra.convert(adapters, tmp_path / "out", strength=0.5)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", MANIFEST_NAME, "tokenizer.json")
    ]
    assert (out / "tokenizer.json").read_text() == "1"
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert [entry["digest"] for entry in manifest["adapters"]] == [adapter.digest for adapter in adapters]
    assert (manifest["strength"], manifest["interpolation"], manifest["rank"]) == (0.5, "geodesic", 6)
    assert manifest["targets"]["m0"]["rank"] == 6
    card = (out / "README.md").read_text()
    assert "base_model: a/b" in card
    assert "strength 0.5" in card


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    adapters = saved(tmp_path, adapter_of(gaussian(16, 4)), adapter_of(gaussian(16, 2, seed=1)))
    for name in ("one", "two"):
        to_hra.convert(adapters, tmp_path / name, strength=0.5)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


REFUSED: dict[str, tuple[list[HraAdapter], dict[str, Any], type[HraExportError], list[str]]] = {
    "odd ranks of targets that one adapter lacks": (
        [adapter_of(gaussian(16, 4), gaussian(12, 4), gaussian(12, 4)), adapter_of(gaussian(16, 3))],
        {},
        ConversionError,
        ["m1: 4 reflections, which cannot be written as 7", "m2: 4", "--to lora"],
    ),
    "more reflections than features": (
        [adapter_of(gaussian(16, 4), gaussian(6, 4)), adapter_of(gaussian(16, 4), gaussian(6, 4))],
        {},
        ConversionError,
        ["m1: 8 reflections, but 6 features", "compress"],
    ),
    "other values of a parameter": (
        [
            adapter_of(gaussian(16, 4), parameters={"m0.bias": torch.ones(3)}),
            adapter_of(gaussian(16, 4), parameters={"m0.bias": torch.zeros(3)}),
        ],
        {},
        MismatchError,
        ["m0.bias: two adapters carry different values"],
    ),
    "other tasks and sizes": (
        [adapter_of(gaussian(16, 4), task="CAUSAL_LM"), adapter_of(gaussian(12, 4), task="SEQ_CLS")],
        {},
        MismatchError,
        ["CAUSAL_LM and SEQ_CLS", "m0: the adapters' chains have 12 and 16 features"],
    ),
    "a part of the change": ([adapter_of(gaussian(16, 4))], {"strength": 0.5, "interpolation": "linear"},
        ConversionError, ["no rotation", "--interpolation geodesic"]),
    "a part of an odd chain": ([adapter_of(gaussian(16, 3))], {"strength": 0.5}, ConversionError,
        ["m0: an odd number of reflections, 3"]),
    "vectors without direction": ([adapter_of(torch.zeros(16, 4)), adapter_of(gaussian(16, 4))], {}, NumericalError,
        ["m0", "zero"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_hra_adapter_can_be_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    adapters, options, kind, says = REFUSED[name]
    with pytest.raises(kind) as caught:
        to_hra.convert(adapters, tmp_path / "out", **options)
    for words in says:
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_output_may_not_be_an_adapter_that_goes_in(tmp_path: Path) -> None:
    adapters = saved(tmp_path, adapter_of(gaussian(16, 4)), adapter_of(gaussian(16, 2)))
    for t in (1.0, 0.5):
        with pytest.raises(OutputError):
            to_hra.convert(adapters, tmp_path / "1", strength=t, overwrite=True)
    assert read_adapter(tmp_path / "1").digest == adapters[1].digest


def test_uniform_leaves_equal_ranks_alone() -> None:
    adapter = adapter_of(gaussian(16, 3), gaussian(12, 3), orthogonalize=True)
    assert all(torch.equal(uniform(adapter).chains[module], u) for module, u in adapter.chains.items())


@pytest.mark.parametrize("angle", [1.0, 1e-3])
def test_distance_is_that_of_the_matrices(angle: float) -> None:
    one, other = compact_wy(near_parallel(20, 4, angle)), compact_wy(near_parallel(20, 6, angle, seed=3))
    identity = torch.eye(20, dtype=torch.float64)
    assert distance(one, other) == pytest.approx(float((dense(one) - dense(other)).norm()), rel=1e-9)
    assert distance(one) == pytest.approx(float((dense(one) - identity).norm()), rel=1e-9)
    assert distance(one, replace(one)) < 1e-14
