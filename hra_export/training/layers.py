"""PEFT's HRA layers with the fast forward pass: the reflection in front of an untouched base layer.

PEFT builds a dense (d, d) matrix at every pass; here `base_layer(z)` runs on rotated activations z = x Rᵀ. So any base
that maps (…, d) to (…, o) will do: quantized, sharded, transposed. Names, shapes and values in a state dict are PEFT's.

`merge` keeps the base's own parameters aside, and `unmerge` puts them back: the same bits.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import HRAConfig
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hra_export import householder, kernels
from hra_export.errors import NumericalError, UnsupportedModelError
from hra_export.householder import BlockReflector
from hra_export.layer import added_convolution
from hra_export.reflection import (
    Factors,
    activation_dtype,
    differentiable_factors,
    orthonormal_columns,
    reflect,
    reflect_rows,
)
from hra_export.training import quantized
from hra_export.training.workspace import Workspace

BASE = "__base__"  # PEFT's word in `adapter_names` for a row without an adapter


class ReflectionLayer(nn.Module):
    """What the layers share: vectors, merging, the choice of adapters. For use in front of a layer of PEFT's."""

    workspace: Workspace
    base_layer: nn.Module
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    merged_adapters: list[str]
    hra_r: dict[str, int]
    hra_apply_GS: dict[str, bool]  # noqa: N815  PEFT's name
    hra_u: nn.ParameterDict
    _kept: quantized.Kept
    # Methods of PEFT's, declared for type checkers.
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: HRAConfig, r: int, workspace: Workspace
    ) -> None:
        nn.Module.__init__(self)
        _begin_layer(self, base_layer, workspace)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config=config)

    def update_layer(self, adapter_name: str, r: int, config: HRAConfig, **kwargs: object) -> None:
        """Add an adapter, or replace one of this name.

        Raises:
            ValueError: r < 1, or more reflections than the base layer has features.
        """
        features = chain_features(self.get_base_layer())
        if not 1 <= r <= features:
            raise ValueError(f"rank: expected 1 to {features} reflections for {features} input features, got {r}")
        self.hra_r[adapter_name] = r
        self.hra_apply_GS[adapter_name] = config.apply_GS
        self.hra_u[adapter_name] = nn.Parameter(initial_vectors(features, r, paired=bool(config.init_weights)))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def working_adapters(self) -> list[str]:
        """The active adapters that this layer has, in the order of their product: W R_1 R_2 …."""
        return [name for name in self.active_adapters if name in self.hra_u]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight, with one rounding for all that are merged.

        Args:
            safe_merge: refuse a result with NaN or Inf; the base is left as it was.
            adapter_names: what to merge; the active adapters if None.

        Raises:
            NumericalError: `safe_merge` found NaN or Inf, or a reflection vector has no direction.
            UnsupportedModelError: the base layer is quantized in a way that cannot be undone here.
        """
        chosen = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.hra_u]
        if not chosen:
            return
        base: Any = self.get_base_layer()
        kept = self._kept if self.merged else quantized.Kept.of(base)
        rows = quantized.dense_weight(base, kept)  # (o, d), as the kept weight is
        for name in [*self.merged_adapters, *chosen]:
            rows = householder.fold(rows, self._exact(name, rows))
        if safe_merge and not bool(torch.isfinite(rows.to(kept.dtype)).all()):
            raise NumericalError(f"adapters {', '.join(chosen)}: NaN or Inf in the merged weight")
        quantized.install(base, rows, kept)
        self._kept = kept
        self.merged_adapters.extend(chosen)

    def unmerge(self) -> None:
        """Put the base's own parameters back, bit for bit."""
        if self.merged:
            self._kept.restore(self.get_base_layer())
            del self._kept
            self.merged_adapters.clear()

    def _exact(self, adapter: str, weight: Tensor) -> BlockReflector:
        """R in float64 on a CPU, in float32 elsewhere."""
        dtype = torch.float64 if weight.device.type == "cpu" else torch.promote_types(weight.dtype, torch.float32)
        block = householder.compact_wy(self.hra_u[adapter], orthogonalize=self.hra_apply_GS[adapter])
        return block.to(weight.device, dtype)

    def _check_rows(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names: expected one name for each of {len(x)} rows, got {len(adapter_names)}")
        if self.merged:
            raise ValueError("adapter_names: adapters are merged; call `unmerge_adapter` first")

    def _is_plain(self) -> bool:
        """Whether the base layer alone is to answer; unmerges when adapters were disabled meanwhile."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.disable_adapters or self.merged


class ReflectionLinear(ReflectionLayer, HRALinear):
    """A Linear-like layer behind chains: y = base(x Rᵀ)."""

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """base(x Rᵀ).

        Args:
            x: (…, d).
            adapter_names: one for each row of x, `__base__` for none; None for the active adapters everywhere.
            args: for the base layer.
            kwargs: for the base layer.
        """
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
        if self._is_plain():
            return self.base_layer(x, *args, **kwargs)
        z = self._rotate_rows(x, adapter_names) if adapter_names is not None else self._rotate(x)
        return self.base_layer(z, *args, **kwargs)

    def _rotate(self, x: Tensor) -> Tensor:
        # W R_1 R_2: the last chain meets the activations first.
        for name in reversed(self.working_adapters()):
            x = self._reflect(x, name)
        return x

    def _rotate_rows(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        names = sorted(set(adapter_names) & set(self.hra_u))
        if self._is_one_launch(x, names):
            return self._rotate_together(x, adapter_names, names)
        z = x.to(activation_dtype(x), copy=True)
        for name in names:
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            z[rows] = self._reflect(x[rows], name)
        return z

    def _is_one_launch(self, x: Tensor, names: list[str]) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or len({self.hra_r[name] for name in names}) != 1:
            return False
        return kernels.take(x, self.hra_r[names[0]])

    def _rotate_together(self, x: Tensor, adapter_names: list[str], names: list[str]) -> Tensor:
        """The chains of all rows at once; rows without an adapter have a chain of zeros, which is the identity."""
        found = [self.workspace.factors(self, name, activation_dtype(x)) for name in names]
        u = torch.stack([*(each.u.mT for each in found), torch.zeros_like(found[0].u.mT)]).mT  # each stored as Uᵀ
        s = torch.stack([*(each.s for each in found), torch.zeros_like(found[0].s)])
        place = {name: i for i, name in enumerate(names)}
        index = torch.tensor([place.get(name, len(names)) for name in adapter_names], device=x.device)
        return reflect_rows(x, index, Factors(u, s))

    def _reflect(self, x: Tensor, adapter: str) -> Tensor:
        vectors = self.hra_u[adapter]
        if self.hra_apply_GS[adapter] and (torch.compiler.is_compiling() or _wants_gradient(vectors)):
            return reflect(x, orthonormal_columns(vectors.to(torch.promote_types(vectors.dtype, torch.float32))))
        if torch.compiler.is_compiling():
            return reflect(x, vectors)
        return reflect(x, vectors, self.workspace.factors(self, adapter, activation_dtype(x)))


class ReflectionConv2d(ReflectionLayer, HRAConv2d):
    """A convolution behind chains over its (in·kh·kw) patches: y = conv(x, W) + conv1×1(conv(x, A), B), ΔW = B A."""

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base convolution of x (b, in, h, w), plus ΔW's part; `adapter_names` as in `ReflectionLinear`."""
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
        if self._is_plain():
            return self.base_layer(x, *args, **kwargs)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if adapter_names is None:
            names = self.working_adapters()
            return y + self._added(x, names).to(y.dtype) if names else y
        y = y.clone()
        for name in set(adapter_names) & set(self.hra_u):
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            y[rows] += self._added(x[rows], [name]).to(y.dtype)
        return y

    def _added(self, x: Tensor, adapters: list[str]) -> Tensor:
        base = self.get_base_layer()
        assert isinstance(base, nn.Conv2d)
        return added_convolution(base, x, [self._block(name, base.weight) for name in adapters])

    def _block(self, adapter: str, weight: Tensor) -> BlockReflector:
        wide = torch.promote_types(weight.dtype, torch.float32)
        vectors = self.hra_u[adapter].to(weight.device)
        found = differentiable_factors(vectors, wide, orthogonalize=self.hra_apply_GS[adapter])
        return BlockReflector(found.u, found.s.mT)


def chain_features(base: nn.Module) -> int:
    """d: how many inputs one output of a base layer sees.

    Raises:
        UnsupportedModelError: a grouped convolution, or a kind of layer that no chain is defined for.
    """
    if isinstance(base, nn.Conv2d):
        if base.groups != 1:
            raise UnsupportedModelError(f"a grouped convolution (groups={base.groups}), which HRA has not")
        return base.in_channels * math.prod(base.kernel_size)
    if is_conv1d(base):
        return int(base.weight.shape[0])  # type: ignore[index]  # every attribute is Tensor | Module
    if isinstance(getattr(base, "in_features", None), int):
        return int(base.in_features)  # type: ignore[arg-type]
    raise UnsupportedModelError(f"a {type(base).__name__}, for which HRA defines no chain")


def is_conv1d(base: nn.Module) -> bool:
    """Whether this is GPT-2's layer, a Linear with a transposed weight (d, o)."""
    return type(base).__name__ == "Conv1D" and isinstance(getattr(base, "weight", None), Tensor)


def initial_vectors(features: int, rank: int, *, paired: bool) -> Tensor:
    """(d, r) reflection vectors to start from, float32, as PEFT draws them.

    Args:
        features: d.
        rank: r.
        paired: equal neighbours, so that R = I. With an odd rank the last vector has no partner: R is then the
            reflection by it alone, since an odd number of reflections is never the identity. Otherwise all are random.
    """
    if not paired:
        return nn.init.kaiming_uniform_(torch.empty(features, rank), a=math.sqrt(5))
    half = torch.empty(features, rank // 2)
    if rank > 1:
        nn.init.kaiming_uniform_(half, a=math.sqrt(5))
    pairs = half.repeat_interleave(2, dim=1)
    if rank % 2 == 0:
        return pairs
    return torch.cat([pairs, nn.init.kaiming_uniform_(torch.empty(features, 1), a=math.sqrt(5))], dim=1)


def _begin_layer(layer: Any, base_layer: nn.Module, workspace: Workspace) -> None:
    """The attributes that PEFT's `HRALayer.__init__` sets, for base layers that it does not know too."""
    layer.base_layer = base_layer
    layer.hra_r, layer.hra_apply_GS = {}, {}
    layer.hra_u = nn.ParameterDict({})
    layer._disable_adapters = False
    layer.merged_adapters = []
    layer.cast_input_dtype_enabled = True
    layer.kwargs = {}
    layer.workspace = workspace
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        layer.in_features, layer.out_features = base.in_channels, base.out_channels
    else:
        layer.in_features = chain_features(base)
        layer.out_features = getattr(base, "out_features", None) or getattr(base, "nf", None)


def _wants_gradient(vectors: Tensor) -> bool:
    return vectors.requires_grad and torch.is_grad_enabled()
