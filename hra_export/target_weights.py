"""The weights that adapters act on, read from a base lazily: what W U takes, and nothing else of the checkpoint.

Where a module's weight lies is the locator's answer: a tensor, some of its rows, several tensors, an expert of a stack.
Rows come in the module's own order, which is the order of a LoRA factor's rows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from hra_export import names
from hra_export.checkpoint import Checkpoint
from hra_export.errors import MismatchError, NumericalError, UnsupportedModelError
from hra_export.layout import Region
from hra_export.locator import Locator
from hra_export.pieces import Piece
from hra_export.tensorfile import FLOAT_DTYPES, TensorFile, tensor_bytes

Kind = Literal["linear", "conv1d", "conv2d", "embedding"]

# Elements of a block: 8 MB of float64.
BLOCK_ELEMENTS = 1 << 20
# What an embedding is called: only then, or where it has one row per token, is the model asked what the module is.
EMBEDDING_WORDS = ("emb", "wte", "wpe")


@dataclass(frozen=True)
class TargetWeight:
    """The matrix W (o, d) of one module, on disk.

    Attributes:
        kind: `conv1d` is transformers' Conv1D, which stores its weight (d, o).
        shape: (o, d); d = in·kh·kw for a convolution; (vocabulary, d) for an embedding, whose rows are rotated.
        kernel: (in, kh, kw) of a convolution.
        dtype: as stored, `F32` say.
    """

    module: str
    kind: Kind
    shape: tuple[int, int]
    kernel: tuple[int, int, int] | None
    dtype: str
    _regions: tuple[Region, ...]
    _files: Mapping[str, TensorFile]

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint tensors it lies in."""
        return tuple(dict.fromkeys(region.tensor for region in self._regions))

    @property
    def size_bytes(self) -> int:
        """What is read for one pass over it."""
        return tensor_bytes(self.dtype, self.shape)

    def matrix(self) -> Tensor:
        """W (o, d) as stored, a lazily paged view of the file where it lies in one piece."""
        parts = [_part(region, self._files[region.tensor].map(region.tensor)) for region in _ordered(self._regions)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def is_value(self, parameter: Tensor) -> bool:
        """Whether a parameter, as a model of this kind stores it, holds these values, rounded to their dtype."""
        own = self.matrix()
        rows = parameter.T if self.kind == "conv1d" else parameter.reshape(parameter.shape[0], -1)
        return rows.shape == own.shape and torch.equal(rows.to(own.dtype), own)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows, in float64.

        Raises:
            NumericalError: NaN or Inf among them.
        """
        matrix = self.matrix()
        step = max(1, BLOCK_ELEMENTS // max(self.shape[1], 1))
        for start in range(0, self.shape[0], step):
            run = slice(start, min(start + step, self.shape[0]))
            block = matrix[run].double()
            if not block.isfinite().all():
                file = self._files[self.names[0]].path
                raise NumericalError(f"`{file}`: `{', '.join(self.names)}` holds NaN or Inf in target `{self.module}`")
            yield run, block

    def times(self, right: Tensor) -> Tensor:
        """W right (o, k), float64.

        Args:
            right: (d, k), float64.
        """
        product = torch.empty(self.shape[0], right.shape[1], dtype=torch.float64)
        for run, block in self.blocks():
            product[run] = block @ right
        return product

    def transposed_times(self, left: Tensor) -> Tensor:
        """Wᵀ left (d, k), float64.

        Args:
            left: (o, k), float64.
        """
        product = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64)
        for run, block in self.blocks():
            product.addmm_(block.T, left[run])
        return product


def find_targets(
    base: Checkpoint, modules: Iterable[str], *, task: str | None = None, model_class: str | None = None
) -> dict[str, TargetWeight]:
    """Find the weights of modules, from headers only.

    Args:
        base: as opened by `open_checkpoint`.
        modules: module paths, by any name transformers has had for them.
        task: PEFT's `task_type`, if known.
        model_class: the class that was adapted, if known.

    Raises:
        MismatchError: modules without a weight in the base; all of them.
        UnsupportedModelError: the base is quantized, a weight is no matrix, or which of its axes carries the input
            features cannot be told.
    """
    refuse_quantized(base)
    locator = Locator(base, task, model_class)
    files = {name: file for file in base.files for name in file.tensors}
    found: dict[str, TargetWeight] = {}
    missing = []
    for module in modules:
        regions = locator.find(module, names.weight_name(module)).regions
        if regions:
            found[module] = _target(module, regions, locator, files)
        else:
            missing.append(f"{module}: no weight of this name in the base")
    if missing:
        raise MismatchError(f"base `{base.root}` lacks {len(missing)} targets", findings=missing)
    return found


def refuse_quantized(base: Checkpoint) -> None:
    """ΔW belongs to the values that a runtime dequantizes, and these are codes.

    Raises:
        UnsupportedModelError: the configuration says that the weights are quantized.
    """
    quantization = base.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"base `{base.root}` is quantized ({method}), in a way whose values cannot be read here",
            hint="pass the unquantized base, a `.gguf` file, or 4 bits of bitsandbytes",
        )


def _target(
    module: str, regions: tuple[Region, ...], locator: Locator, files: Mapping[str, TensorFile]
) -> TargetWeight:
    first = regions[0]
    info = files[first.tensor].tensors[first.tensor]
    if info.dtype not in FLOAT_DTYPES:
        raise UnsupportedModelError(f"`{first.tensor}` is stored as {info.dtype}, not as floats")
    shapes = [_part_shape(region) for region in regions]
    shape = (sum(o for o, _ in shapes), shapes[0][1])
    if len(info.shape) == 4:
        _, *kernel = info.shape
        return TargetWeight(module, "conv2d", shape, (kernel[0], kernel[1], kernel[2]), info.dtype, regions, files)
    if len(info.shape) not in (2, 3):
        raise UnsupportedModelError(f"`{module}`: its weight has shape {info.shape}, for which HRA defines no chain")
    kind: Kind = "linear"
    if len(info.shape) == 2 and first.input_axis == 0:
        kind = "conv1d"
    elif _may_be_embedding(module, first, locator) and locator.layout.is_embedding(module):
        kind = "embedding"
    return TargetWeight(module, kind, shape, None, info.dtype, regions, files)


def _may_be_embedding(module: str, region: Region, locator: Locator) -> bool:
    leaf = module.rpartition(".")[2].lower()
    is_named = any(word in leaf for word in EMBEDDING_WORDS)
    return bool(locator.base.config.get("model_type")) and (is_named or locator.may_be_tied(region.tensor))


def _part_shape(region: Region) -> tuple[int, int]:
    """(rows, columns) of a region as a part of W."""
    sizes = [stop - start for start, stop in region.index]
    if len(sizes) == 4:
        return sizes[0], prod(sizes[1:])
    columns = sizes[region.input_axis]
    return prod(sizes) // columns, columns


def _ordered(regions: Sequence[Region]) -> list[Region]:
    return sorted(regions, key=lambda region: region.rows or (0, 0))


def _part(region: Region, stored: Tensor) -> Tensor:
    """The rows of W in one tensor, (rows, d)."""
    rows, columns = _part_shape(region)
    if len(region.pieces) > 1:
        return _assembled(region, stored).reshape(rows, columns)
    part = stored[tuple(slice(*edges) for edges in region.index)]
    if part.ndim == 4:
        return part.reshape(rows, columns)
    return part.movedim(region.input_axis, -1).reshape(rows, columns)


def _assembled(region: Region, stored: Tensor) -> Tensor:
    """Pieces whose order on disk is not the module's, put into it."""
    axis = region.input_axis if stored.ndim < 4 else 1
    first = region.rows[0] if region.rows else 0
    rows = sum(len(piece.place[0]) for piece in region.pieces if _is_first_column(piece))
    sizes = [rows, *(max(p.place[i].stop for p in region.pieces) for i in range(1, len(region.pieces[0].place)))]
    result = stored.new_empty(sizes)
    for piece in region.pieces:
        place = [slice(span.start, span.stop) for span in piece.place]
        place[0] = slice(place[0].start - first, place[0].stop - first)
        result[tuple(place)] = _as_block(piece, stored)
    column = region.pieces[0].axes.index(axis)
    return result if result.ndim == 4 else result.movedim(column, -1)


def _is_first_column(piece: Piece) -> bool:
    return all(span.start == 0 for span in piece.place[1:])


def _as_block(piece: Piece, stored: Tensor) -> Tensor:
    """A piece of a stored tensor, with the axes of the block."""
    part = stored[tuple(slice(span.start, span.stop, span.step) for span in piece.index)]
    kept = [axis for axis in piece.axes if axis is not None]
    order = [*kept, *(axis for axis in range(stored.ndim) if axis not in kept)]
    part = part.permute(order).reshape([part.shape[axis] for axis in kept])
    return part[tuple(slice(None) if axis is not None else None for axis in piece.axes)]
