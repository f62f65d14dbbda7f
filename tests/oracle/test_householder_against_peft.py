"""R as stock PEFT computes it (`get_delta_weight`, float64 parameters) = R from the compact WY form."""

from typing import Any

import pytest
import torch
from peft import HRAConfig
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from torch import Tensor, nn

from hra_export.householder import compact_wy, dense, fold

# PEFT rounds r dense float64 products where we round one: r · 2^-52 with room for the sums of d terms. Measured: 5e-15.
ATOL64 = 1e-12
# The same in PEFT's usual float32: 8 products of matrices of norm 1, 20 to 54 terms a sum.
ATOL32 = 1e-6


def peft_layer(base: nn.Module, r: int, *, gram_schmidt: bool, paired: bool, dtype: torch.dtype) -> Any:
    torch.manual_seed(r)
    config = HRAConfig(r=r, apply_GS=gram_schmidt, init_weights=paired)
    kind = HRAConv2d if isinstance(base, nn.Conv2d) else HRALinear
    return kind(base.requires_grad_(False), "default", config, r=r).to(dtype)


def vectors(layer: Any) -> Tensor:
    found: Tensor = layer.hra_u["default"].detach()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 2, 7, 8])
@pytest.mark.parametrize("base", [nn.Linear(20, 6), nn.Conv2d(6, 5, 3), nn.Conv2d(20, 5, 1)], ids=str)
@pytest.mark.parametrize("gram_schmidt", [False, True], ids=["chain", "gram-schmidt"])
def test_dense_reflector_is_that_of_peft(gram_schmidt: bool, base: nn.Module, r: int, dtype: torch.dtype) -> None:
    layer = peft_layer(base, r, gram_schmidt=gram_schmidt, paired=False, dtype=dtype)
    expected = layer.get_delta_weight("default").detach()
    got = dense(compact_wy(vectors(layer), orthogonalize=gram_schmidt))
    atol = ATOL64 if dtype == torch.float64 else ATOL32
    torch.testing.assert_close(got, expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("r", [2, 8])
def test_dense_reflector_is_that_of_peft_near_its_paired_start(r: int, spread: float) -> None:
    layer = peft_layer(nn.Linear(20, 6), r, gram_schmidt=False, paired=True, dtype=torch.float64)
    with torch.no_grad():
        layer.hra_u["default"].add_(spread * torch.randn(20, r, dtype=torch.float64))
    expected = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(dense(compact_wy(vectors(layer))), expected, rtol=0, atol=ATOL64)


@pytest.mark.parametrize("gram_schmidt", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("base", [nn.Linear(20, 6), nn.Conv2d(6, 5, 3)], ids=str)
def test_folded_weight_is_the_one_peft_merges(base: Any, gram_schmidt: bool) -> None:
    """For a convolution this also fixes the order of the patch: (in, kh, kw), rows of U alike."""
    before = base.double().weight.detach().clone()
    layer = peft_layer(base, 4, gram_schmidt=gram_schmidt, paired=False, dtype=torch.float64)
    layer.merge()
    merged = layer.get_base_layer().weight.detach()
    got = fold(before, compact_wy(vectors(layer), orthogonalize=gram_schmidt))
    torch.testing.assert_close(got, merged, rtol=0, atol=ATOL64)
    assert float((merged - before).abs().max()) > 1e-2
