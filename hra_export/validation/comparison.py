"""Outputs of both sides, brought to one shape and measured where they count."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from hra_export import parity
from hra_export.parity import OutputParity
from hra_export.validation.graph_probes import GraphProbe
from hra_export.validation.job import Array

ENCODER = "encoder/"
# Outputs with one entry for each token and no further axis.
RENAMED = {"out_sample": "sample"}  # optimum's name, and diffusers'
TOKEN_SCORES = ("start_logits", "end_logits")

Tensors = Mapping[str, Tensor]


def joined(name: str, parts: Sequence[Mapping[str, Array]]) -> Array:
    """One output of a run, its pieces after one another."""
    return parts[0][name] if len(parts) == 1 else np.concatenate([part[name] for part in parts], axis=1)


def outputs_by_name(steps: Sequence[Mapping[str, Array]], *, has_encoder: bool) -> dict[str, Array]:
    """The outputs of a run by the reference's names."""
    if not has_encoder:
        found = {name: joined(name, steps) for name in steps[-1]}
        return {RENAMED.get(name, name): array for name, array in found.items()}
    encoder, decoder = steps[0], outputs_by_name(steps[1:], has_encoder=False)
    return {**{ENCODER + name: array for name, array in encoder.items()}, **decoder}


def compared(
    label: str,
    probe: GraphProbe,
    reference: Tensors,
    base: Tensors,
    candidate: Mapping[str, Array],
    start: Mapping[str, Array] | None = None,
) -> Iterator[OutputParity | str]:
    """Measure every output that both sides have.

    Args:
        label: of the run.
        probe: whose padding does not count.
        reference: of PyTorch with live layers.
        base: of PyTorch without.
        candidate: by the reference's names.
        start: the candidate without its adapter, where it runs so.

    Yields:
        What was measured, or why it could not be.
    """
    for name, array in candidate.items():
        if name not in reference:
            continue
        sides = [_array(reference[name]), array, _array(base[name])]
        if start is not None and name in start:
            sides.append(start[name])
        sides = _last_position(sides) if _is_pruned(sides[0], array) else sides
        what = f"{label}, {name.removeprefix(ENCODER).replace('_', ' ')}{' of the encoder' * name.startswith(ENCODER)}"
        if any(side.shape != sides[0].shape for side in sides):
            yield f"{what}: expected shape {sides[0].shape}, got {array.shape}"
            continue
        ref, cand, origin, *own = [_counted(name, side.astype(np.float64), probe) for side in sides]
        is_logits = name.startswith("logits") and ref.shape[-1] > 1
        yield parity.compare(what, ref, cand, origin, logits=is_logits, start=own[0] if own else None)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().float().numpy()


def _is_pruned(reference: Array, candidate: Array) -> bool:
    """Whether the candidate gives the last position only, as graphs made for generation do."""
    return reference.ndim == candidate.ndim == 3 and candidate.shape[1] == 1 < reference.shape[1]


def _last_position(sides: Sequence[Array]) -> list[Array]:
    return [side[:, -1:] for side in sides]


def _counted(name: str, array: Array, probe: GraphProbe) -> Array:
    """The positions that are not padding, (n, …); everything where an output has no positions."""
    if probe.mask is None or array.shape[:2] != tuple(probe.mask.shape):
        return array
    has_positions = array.ndim == 3 or name in TOKEN_SCORES
    return array[probe.mask.numpy()] if has_positions else array
