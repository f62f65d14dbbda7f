"""Low-rank factors of chains against the explicit product in float64, and what rounding them costs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.errors import MismatchError, UnsupportedModelError
from hra_export.low_rank import DeltaSource, HraSource, locate, rounded

# Products of norm 1 in float64, some hundreds of them; measured: 2e-15.
ATOL64 = 1e-13
OUT, D = 20, 12


def base_of(folder: Path, **tensors: Tensor) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file({f"{name}.weight": value for name, value in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def chain(d: int, r: int, seed: int = 0) -> Tensor:
    return torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(chains: Mapping[str, Tensor], **fields: Any) -> HraAdapter:
    return HraAdapter(dict(chains), rank=next(iter(chains.values())).shape[1], **fields)


def explicit(vectors: Tensor) -> Tensor:
    product = torch.eye(vectors.shape[0], dtype=torch.float64)
    for u in vectors.T:
        product = product @ (torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    return product


def product(source: DeltaSource, base: Checkpoint, module: str) -> Tensor:
    left, right = source.factors(locate(source, base)[module])
    return left @ right


def test_factors_are_the_change_of_the_weight(tmp_path: Path) -> None:
    weight, u = torch.randn(OUT, D), chain(D, 5)
    got = product(HraSource([adapter({"a": u})]), base_of(tmp_path, a=weight), "a")
    exact = weight.double() @ explicit(u) - weight.double()
    torch.testing.assert_close(got, exact, rtol=0, atol=ATOL64)


def test_a_convolution_is_a_matrix_of_its_patches(tmp_path: Path) -> None:
    weight, u = torch.randn(6, 2, 3, 2), chain(12, 4)
    source, base = HraSource([adapter({"a": u})]), base_of(tmp_path, a=weight)
    assert locate(source, base)["a"].kernel == (2, 3, 2)
    rows = weight.reshape(6, 12).double()
    torch.testing.assert_close(product(source, base, "a"), rows @ explicit(u) - rows, rtol=0, atol=ATOL64)


def test_adapters_compose_in_their_order_and_scale(tmp_path: Path) -> None:
    weight, first, second = torch.randn(OUT, D), chain(D, 2), chain(D, 3, seed=1)
    adapters = [adapter({"a": first, "b": first}), adapter({"a": second})]
    base = base_of(tmp_path, a=weight, b=weight.clone())
    source = HraSource(adapters, strength=0.25)
    exact = 0.25 * weight.double() @ (explicit(first) @ explicit(second) - torch.eye(D))
    torch.testing.assert_close(product(source, base, "a"), exact, rtol=0, atol=ATOL64)
    assert (source.modules, source.rank("a"), source.rank("b")) == (("a", "b"), 5, 2)
    part = {"strength": 0.25, "interpolation": "linear"}
    assert source.entries() == [{**entry, **part} for entry in HraSource(adapters).entries()]
    assert (HraSource(adapters).digest != source.digest, HraSource(adapters, strength=0).rank("a")) == (True, 0)


def test_untrained_pairs_have_no_rank() -> None:
    idle = chain(D, 2).repeat_interleave(2, dim=1)
    source = HraSource([adapter({"a": idle, "b": torch.cat([idle[:, :2], chain(D, 2, seed=1)], dim=1)})])
    assert (source.rank("a"), source.rank("b")) == (0, 2)


def test_all_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    base = base_of(tmp_path, a=torch.randn(OUT, D), b=torch.randn(OUT, 8), c=torch.randn(OUT, D))
    source = HraSource([adapter({name: chain(10, 2) for name in "abc"})])
    with pytest.raises(MismatchError) as caught:
        locate(source, base)
    assert [line.split(", got")[0] for line in caught.value.findings] == [
        "a: expected U of shape (12, r)",
        "b: expected U of shape (8, r)",
        "c: expected U of shape (12, r)",
    ]


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path, a=torch.randn(6, 2, 3, 3))
    with pytest.raises(UnsupportedModelError, match="grouped"):
        locate(HraSource([adapter({"a": chain(36, 2)})]), base)


def test_two_values_for_one_parameter_are_refused() -> None:
    one, other = ({"b.bias": torch.full((3,), value)} for value in (1.0, 2.0))
    source = HraSource([adapter({"a": chain(D, 2)}, parameters=values) for values in (one, other)])
    with pytest.raises(MismatchError, match="do not compose"):
        _ = source.parameters


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_rounding_costs_what_the_dtype_costs_at_every_angle(angle: float, dtype: torch.dtype, bound: float) -> None:
    d, r = 96, 8
    basis = torch.linalg.qr(chain(d, r)).Q
    turned = math.cos(angle) * basis[:, ::2] + math.sin(angle) * basis[:, 1::2]
    u = torch.stack([basis[:, ::2], turned], dim=2).reshape(d, r)
    weight = chain(64, d, seed=1)
    source = HraSource([adapter({"a": u})])
    block = source.reflector("a")
    left, right = -(weight @ block.u) @ block.t, block.u.T
    b, a, error, norm = rounded(left, right, r, dtype)
    assert (b.dtype, a.dtype, b.shape, a.shape) == (dtype, dtype, (64, r), (r, d))
    exact = weight @ explicit(u) - weight
    measured = (b.double() @ a.double() - exact).norm() / exact.norm()
    assert measured < bound
    # `exact` is a difference of numbers 1/angle as large.
    assert error == pytest.approx(float(measured), rel=1e-3, abs=1e-12 / angle)
    assert norm == pytest.approx(float(exact.norm()), rel=1e-9)


def test_a_rank_may_be_cut_and_filled_up() -> None:
    left, right = chain(OUT, 3), chain(D, 3, seed=1).T
    b, a, error, _ = rounded(left, right, 5, torch.float32)
    assert (b.shape, a.shape, bool(b[:, 3:].any()), bool(a[3:].any())) == ((OUT, 5), (5, D), False, False)
    assert error < 1e-6
    singular = torch.linalg.svdvals(left @ right)
    *_, cut, norm = rounded(left, right, 2, torch.float64)
    assert cut * norm == pytest.approx(float(singular[2]), rel=1e-9)


def test_overflow_is_an_infinite_error() -> None:
    assert (
        rounded(torch.full((2, 1), 1e10).double(), torch.full((1, 2), 1e10).double(), 1, torch.float16)[2] == math.inf
    )
