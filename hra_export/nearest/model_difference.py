"""Two checkpoints of one architecture, tensor by tensor: which values changed, what was added, what is missing.

Limits: tensors that the base stores under other names are found by transformers' mapping, where they lie in one piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_export.checkpoint import Checkpoint
from hra_export.errors import MismatchError, UnsupportedModelError
from hra_export.layout import Region
from hra_export.locator import Locator
from hra_export.tensorfile import TensorFile

# Elements compared at a time: 16 MB of float32.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class ModelDifference:
    """What tells a fine-tuned checkpoint from its base; all names are the fine-tuned one's.

    Attributes:
        changed: tensors of other values.
        added: tensors that the base does not have, such as a new head.
        missing: tensors of the base that the fine-tuned one does not have, by the base's names.
    """

    changed: tuple[str, ...]
    added: tuple[str, ...]
    missing: tuple[str, ...]


def compare_models(base: Checkpoint, tuned: Checkpoint) -> ModelDifference:
    """Compare every tensor; values are read once, and none is held.

    A tensor that is stored in a narrower dtype than the base's is the same when it is the base's, rounded.

    Raises:
        MismatchError: other architectures, or tensors of other shapes; all of them.
        UnsupportedModelError: the base stores a tensor in parts, or in another order.
    """
    _check_architecture(base, tuned)
    locator = Locator(base, model_class=class_name(tuned))
    sources = {name: file for file in base.files for name in file.tensors}
    changed, added, findings, used = [], [], [], set()
    for file in tuned.files:
        for name, info in file.tensors.items():
            region = _region(name, locator)
            if region is None:
                added.append(name)
                continue
            used.add(region.tensor)
            shape = tuple(stop - start for start, stop in region.index)
            if shape != info.shape:
                findings.append(f"{name}: expected shape {shape}, got {info.shape}")
            elif not _is_same(_part(region, sources[region.tensor]), file.map(name)):
                changed.append(name)
    if findings:
        raise MismatchError(
            f"`{tuned.root}` does not fit base `{base.root}`: {len(findings)} tensors have other shapes",
            findings=findings,
            hint="pass the very model that it was fine-tuned from as base",
        )
    return ModelDifference(tuple(changed), tuple(added), tuple(name for name in base.tensors if name not in used))


def class_name(checkpoint: Checkpoint) -> str | None:
    """The class that its configuration names: of transformers, or of diffusers."""
    named = checkpoint.config.get("architectures")
    own = named[0] if isinstance(named, list) and named else checkpoint.config.get("_class_name")
    return own if isinstance(own, str) else None


def _check_architecture(base: Checkpoint, tuned: Checkpoint) -> None:
    for key in ("model_type", "_class_name"):
        first, second = base.config.get(key), tuned.config.get(key)
        if first is not None and second is not None and first != second:
            raise MismatchError(
                f"`{tuned.root}` is no fine-tuned `{base.root}`: its {key} is `{second}`, the base's is `{first}`"
            )


def _region(name: str, locator: Locator) -> Region | None:
    """Where the base has a tensor of the fine-tuned model."""
    shapes = locator.shapes
    if name in shapes:
        return Region(name, tuple((0, size) for size in shapes[name]), None)
    if not locator.base.config:
        return None
    regions = locator.find(name.rpartition(".")[0], name).regions
    if not regions:
        return None
    region = regions[0]
    is_plain = all(piece.axes == tuple(range(len(region.index))) for piece in region.pieces)
    if len(regions) > 1 or len(region.pieces) > 1 or not is_plain:
        raise UnsupportedModelError(
            f"the base stores `{name}` in another form, in {', '.join(f'`{part.tensor}`' for part in regions)}",
            hint="save both models with the same version of transformers",
        )
    return region


def _part(region: Region, file: TensorFile) -> Tensor:
    stored = file.map(region.tensor)
    return stored[tuple(slice(*edges) for edges in region.index)]


def _is_same(before: Tensor, after: Tensor) -> bool:
    return all(torch.equal(first.to(second.dtype), second) for first, second in _chunks(before, after))


def _chunks(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    first, second = before.reshape(-1), after.reshape(-1)
    for start in range(0, second.numel(), CHUNK_ELEMENTS):
        yield first[start : start + CHUNK_ELEMENTS], second[start : start + CHUNK_ELEMENTS]
