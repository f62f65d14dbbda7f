"""The orthogonality regularizer of HRA: how far the unit reflection vectors of each chain are from orthogonal.

`squared` is the paper's λ Σ ‖I − ÛᵀÛ‖_F² (arXiv 2405.17484, equation 6); `norm` is what the authors' code computes,
λ Σ ‖I − ÛᵀÛ‖_F. Between the equal vectors of a pair the gradient of both is zero: the penalty does not open a pair.
"""

from collections import defaultdict
from typing import Literal

import torch
from peft.tuners.hra.layer import HRALayer
from torch import Tensor, nn

from hra_export.errors import UnsupportedModelError

Form = Literal["squared", "norm"]


def orthogonality_penalty(model: nn.Module, *, form: Form = "squared") -> Tensor:
    """Σ over targets of ‖I − ÛᵀÛ‖_F² or ‖I − ÛᵀÛ‖_F, for the active adapters.

    Args:
        model: with HRA layers in it, ours or PEFT's.
        form: `squared`, the paper's, or `norm`, the authors' code's.

    Returns:
        A float32 scalar that carries gradients to the reflection vectors; add λ times it to the loss.

    Raises:
        UnsupportedModelError: the vectors are sharded over processes.
        ValueError: the model has no HRA layer.
    """
    chains: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
    for layer in model.modules():
        if isinstance(layer, HRALayer):
            for name in layer.active_adapters:
                if name in layer.hra_u:
                    vectors = layer.hra_u[name]
                    chains[vectors.shape, vectors.device].append(vectors)
    if not chains:
        raise ValueError(f"this {type(model).__name__} has no HRA layer with an active adapter")
    for shape, _ in chains:
        if len(shape) != 2 or 0 in shape:
            raise UnsupportedModelError("the regularizer needs whole reflection vectors, and here they are sharded")
    return torch.stack([_penalty(torch.stack(each), form) for each in chains.values()]).sum()


def _penalty(vectors: Tensor, form: Form) -> Tensor:
    """Of chains (n, d, r) of one shape."""
    wide = vectors.float()
    units = wide / torch.linalg.vector_norm(wide, dim=-2, keepdim=True)
    off = units.mT @ units - torch.eye(vectors.shape[-1], device=vectors.device)  # (n, r, r)
    squares = off.square().sum(dim=(-2, -1))  # (n,)
    if form == "squared":
        return squares.sum()
    # The norm has no gradient where it is zero: there it is a minimum, and the gradient is taken as zero.
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt().mul(squares > 0).sum()
