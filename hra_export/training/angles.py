"""How far one optimizer step turns the reflection vectors.

A chain does not depend on the length of its vectors, so this angle, and not a distance, is the size of a step.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all trained reflection vectors (d, r), by parameter name; of sharded ones, the whole.

    With sharded vectors every process must call this. Vectors without their shape, as DeepSpeed leaves them, are
    left out.
    """
    copies = {}
    for name, parameter in model.named_parameters():
        if ".hra_u." in name and parameter.requires_grad and parameter.ndim == 2:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            copies[name] = whole.detach().clone()
    return copies


def mean_angle_degrees(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float | None:
    """The mean angle between each vector before and after, in degrees; None without vectors.

    From the length of the chord between unit vectors: the arc cosine would lose angles below a hundredth of a degree
    to the rounding of float32.
    """
    angles = []
    for name, old in before.items():
        chord = torch.linalg.vector_norm(_units(after[name]) - _units(old), dim=0)  # (r,)
        angles.append(2 * torch.asin((chord / 2).clamp(max=1)))
    if not angles:
        return None
    return math.degrees(torch.cat(angles).mean().item())


def _units(vectors: Tensor) -> Tensor:
    wide = vectors.float()
    return wide / torch.linalg.vector_norm(wide, dim=0)
