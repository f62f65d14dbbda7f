"""Live HRA layers: modules that carry a chain in front of any base layer.

`base_layer(z)` is called on rotated activations z = x Rᵀ, so quantized, sharded and wrapped base layers work, and the
base weight is never touched. A convolution has no rows of activations to rotate; it adds ΔW = B A as two small
convolutions. An embedding rotates the rows it looked up.

The chain's U stays float32. For half-precision activations U is cast first and T is built from the cast U: taken
from the uncast one, R leaves orthogonality by 2e-2 in bfloat16.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hra_export import householder
from hra_export.householder import BlockReflector
from hra_export.reflection import Factors, differentiable_factors, reflect, without_autocast


class Chain(nn.Module):
    """The reflection vectors of one target, and the factors computed from them.

    Args:
        vectors: (d, r); kept as a float32 parameter (float64 stays float64).
        orthogonalize: Gram-Schmidt variant.
    """

    def __init__(self, vectors: Tensor, *, orthogonalize: bool) -> None:
        super().__init__()
        dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):  # inference tensors do not count their changes, and can never be trained
            self.hra_u = nn.Parameter(vectors.detach().to(dtype, copy=True))
        self.orthogonalize = orthogonalize
        self._cached: tuple[torch.dtype, torch.device, int, BlockReflector] | None = None

    def is_trained(self) -> bool:
        """Whether a forward pass has to carry gradients to the vectors."""
        return self.hra_u.requires_grad and torch.is_grad_enabled()

    def reflector(self, dtype: torch.dtype, device: torch.device) -> BlockReflector:
        """U in `dtype`, T in float32 or wider. Differentiable while `hra_u` requires gradients, else cached."""
        if self.is_trained():
            found = differentiable_factors(self.hra_u.to(device), dtype, orthogonalize=self.orthogonalize)
            return BlockReflector(found.u, found.s.mT)
        version = self.hra_u._version  # torch's public way to see an in-place change is this counter
        if self._cached is None or self._cached[:3] != (dtype, device, version):
            with torch.inference_mode(False):  # the cache outlives the mode
                exact = householder.compact_wy(self.hra_u, orthogonalize=self.orthogonalize)
                self._cached = (dtype, device, version, _rounded(exact, dtype, device))
        return self._cached[3]


class ReflectedLayer(nn.Module):
    """A Linear-like layer behind one or more chains: y = base(x Rᵀ) with R = R_1 R_2 … in the order given.

    Any module that maps (…, d) to (…, o) can be the base: Linear, transformers' Conv1D, a quantized layer.
    At a strength s other than 1 the weight is W + s (W R − W), which takes a second call of the base layer.
    """

    def __init__(self, base_layer: nn.Module, chains: Sequence[Chain], *, strength: float = 1.0) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.chains = nn.ModuleList(chains)
        self.strength = strength
        self.enabled = True
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base layer (`weight`, `bias`, `in_features`) show through: model code reads them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """base_layer(x Rᵀ); further arguments go to the base layer."""
        self.calls += 1
        if not self.enabled:
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(self.rotate(x), *args, **kwargs)
        return y if self.strength == 1 else torch.lerp(self.base_layer(x, *args, **kwargs), y, self.strength)

    def rotate(self, x: Tensor) -> Tensor:
        """x (…, d) → x Rᵀ, in x's dtype; the r×r part runs in float32 or wider."""
        # W R_1 R_2: the last chain meets the activations first.
        for chain in reversed(chains_of(self)):
            if chain.is_trained() and not chain.orthogonalize:
                x = reflect(x, chain.hra_u.to(x.device))
                continue
            block = chain.reflector(x.dtype, x.device)
            if _is_one_launch(x) and not chain.is_trained():
                x = reflect(x, block.u, Factors(block.u, block.t.mT))
                continue
            coefficients = ((x @ block.u).to(block.t.dtype) @ block.t.T).to(x.dtype)  # (…, r)
            x = x - coefficients @ block.u.T
        return x


def added_convolution(base: nn.Conv2d, x: Tensor, blocks: Sequence[BlockReflector]) -> Tensor:
    """ΔW's part of a convolution behind chains: conv1×1(conv(x, A), B) with ΔW = W (R_1 R_2 … − I) = B A.

    Args:
        base: not grouped, any stride, padding, padding mode and dilation.
        x: (b, in, h, w).
        blocks: R_1, R_2, …, of d = in·kh·kw features, float32 or wider.

    Returns:
        (b, o, h', w'), in x's dtype, or in autocast's.
    """
    weight = base.weight
    with without_autocast(x):
        rows = weight.reshape(weight.shape[0], -1).to(blocks[0].u.dtype)
        b, a = householder.low_rank_factors(rows, householder.compose(blocks[0], *blocks[1:]))
    kernels = a.reshape(-1, *weight.shape[1:]).to(x.dtype)  # (r, in, kh, kw)
    # torch's own helper applies stride, padding, padding mode and dilation as the base convolution does.
    reduced = base._conv_forward(x, kernels, None)
    return nn.functional.conv2d(reduced, b.to(x.dtype)[:, :, None, None])


class ReflectedConv2d(ReflectedLayer):
    """A convolution behind chains over its (in·kh·kw) patches: y = conv(x, W) + conv1×1(conv(x, A), B), ΔW = B A."""

    base_layer: nn.Conv2d

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """The base convolution of x, plus ΔW's part."""
        self.calls += 1
        y = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return y
        weight = self.base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        blocks = [chain.reflector(wide, weight.device) for chain in chains_of(self)]
        return y + self.strength * added_convolution(self.base_layer, x, blocks)


class ReflectedEmbedding(ReflectedLayer):
    """An embedding whose rows are rotated after the lookup: e R."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """The looked-up rows of x (…), rotated: (…, d)."""
        self.calls += 1
        rows = base_rows = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return rows
        for chain in chains_of(self):
            block = chain.reflector(rows.dtype, rows.device)
            coefficients = ((rows @ block.u).to(block.t.dtype) @ block.t).to(rows.dtype)
            rows = rows - coefficients @ block.u.T
        return rows if self.strength == 1 else torch.lerp(base_rows, rows, self.strength)


class RotatedRegion(nn.Module):
    """A parametrization: one region of a stacked parameter (an expert, say) times R, computed at each access."""

    def __init__(
        self, chains: Sequence[Chain], index: tuple[slice | int, ...], input_axis: int, *, strength: float = 1.0
    ) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains)
        self.strength = strength
        self.index = index
        self.input_axis = input_axis
        self.enabled = True
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter with its region rotated; a copy."""
        self.calls += 1
        if not self.enabled:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = base_rows = weight[self.index].movedim(self.input_axis, -1).to(wide)
        for chain in chains_of(self):
            rows = householder.rotate_rows(rows, chain.reflector(wide, weight.device))
        rows = torch.lerp(base_rows, rows, self.strength)
        rotated = weight.clone()
        rotated[self.index] = rows.movedim(-1, self.input_axis).to(weight.dtype)
        return rotated


def chains_of(layer: ReflectedLayer | RotatedRegion) -> list[Chain]:
    """The chains of a live layer, in order."""
    return [chain for chain in layer.chains if isinstance(chain, Chain)]


def _is_one_launch(x: Tensor) -> bool:
    """Whether the operator is to be called for a chain that holds still.

    Elsewhere it costs more than it saves, and where gradients flow through, it is differentiable once only.
    """
    return x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad)


def _rounded(exact: BlockReflector, dtype: torch.dtype, device: torch.device) -> BlockReflector:
    """U cast to the activations' dtype; T from the cast U, so that R stays orthogonal."""
    u = exact.u.to(device, dtype).mT.contiguous().mT  # Uᵀ in one piece, for thin products
    return BlockReflector(u, householder.solve_t(u.double()).to(torch.promote_types(dtype, torch.float32)))
