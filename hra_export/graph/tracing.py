"""Live layers as modules that an exporter can trace: the chain becomes two constants and one node.

A convolution has no rows to reflect; its ΔW stands beside it as two small convolutions. A region of a stacked
parameter is folded: the product with it is not a layer of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hra_export import householder
from hra_export.attachment import Attachment
from hra_export.graph.operator import operands, trace
from hra_export.householder import BlockReflector
from hra_export.layer import ReflectedConv2d, ReflectedEmbedding, ReflectedLayer, RotatedRegion, chains_of


class TracedModule(nn.Module):
    """In the place of a base layer, whose attributes (`weight`, `in_features`) show through: model code reads them."""

    base_layer: nn.Module
    calls = 0

    def __getattr__(self, name: str) -> Any:
        """What neither this module nor its buffers have is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class TracedLayer(TracedModule):
    """base(x Rᵀ) as the operator and the base layer; `hra_U` and `hra_V` become initializers `<path>.hra_U`, `.hra_V`.

    Args:
        base_layer: any module that maps (…, d) to (…, o).
        u: (d, r).
        v: (r, d).
    """

    hra_U: Tensor  # noqa: N815  the operator's names, which the initializers keep
    hra_V: Tensor  # noqa: N815

    def __init__(self, base_layer: nn.Module, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.register_buffer("hra_U", u)
        self.register_buffer("hra_V", v)

    def forward(self, x: Tensor) -> Tensor:
        """The base layer of the reflected rows."""
        self.calls += 1
        return self.base_layer(trace(x, self.hra_U, self.hra_V))


class TracedEmbedding(TracedLayer):
    """An embedding whose looked-up rows are reflected."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows of x (…), rotated: (…, d)."""
        self.calls += 1
        return trace(self.base_layer(x), self.hra_U, self.hra_V)


class TracedConv2d(TracedModule):
    """conv(x, W) + conv1×1(conv(x, A), B) with s ΔW = B A, all constants."""

    base_layer: nn.Conv2d
    hra_A: Tensor  # noqa: N815
    hra_B: Tensor  # noqa: N815

    def __init__(self, base_layer: nn.Conv2d, blocks: Sequence[BlockReflector], *, strength: float = 1.0) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        rows = weight.detach().reshape(weight.shape[0], -1).to(torch.float64)
        b, a = householder.low_rank_factors(rows, householder.compose(blocks[0], *blocks[1:]))
        b, a = householder.balanced(strength * b, a)
        self.register_buffer("hra_A", a.reshape(-1, *weight.shape[1:]).to(weight.dtype))  # (r, in, kh, kw)
        self.register_buffer("hra_B", b[:, :, None, None].to(weight.dtype))  # (o, r, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The base convolution plus ΔW's part."""
        self.calls += 1
        reduced = self.base_layer._conv_forward(x, self.hra_A, None)  # stride, padding and dilation of the base
        return self.base_layer(x) + nn.functional.conv2d(reduced, self.hra_B)


def used_reflections(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Module paths of reflections that a forward pass has run, a traced one for instance, and of the others."""
    found = {path: module.calls for path, module in model.named_modules() if isinstance(module, TracedModule)}
    return tuple(path for path in found if found[path]), tuple(path for path in found if not found[path])


def make_traceable_(attachment: Attachment) -> tuple[str, ...]:
    """Replace the live layers of a float32 model by traceable ones, in place and for good.

    Args:
        attachment: adapters at work.

    Returns:
        The targets that were folded instead.
    """
    folded = []
    for path, layer in attachment.layers.items():
        if isinstance(layer, RotatedRegion):
            folded.append(path)
        else:
            attachment.model.set_submodule(path, _traced(layer))
    for module in list(attachment.model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return tuple(folded)


def _traced(layer: ReflectedLayer) -> nn.Module:
    blocks = [
        householder.compact_wy(chain.hra_u, orthogonalize=chain.orthogonalize).to("cpu", torch.float64)
        for chain in chains_of(layer)
    ]
    if isinstance(layer, ReflectedConv2d):
        return TracedConv2d(layer.base_layer, blocks, strength=layer.strength).eval()
    is_embedding = isinstance(layer, ReflectedEmbedding)
    u, v = operands(blocks, torch.float32, rows=is_embedding, strength=layer.strength)
    kind = TracedEmbedding if is_embedding else TracedLayer
    return kind(layer.base_layer, u, v).eval()
