"""Where the parts of a tensor come from: shapes and names only, no values.

A `Block` is a tensor put together from `Piece`s of stored tensors. Slicing, stacking, concatenating and transposing a
block only rewrites its pieces, so transformers' weight conversions can be followed on headers alone. In the end the
pieces of each stored tensor are gathered into a `Region`, which is what a merge works on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING

from hra_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A part of one stored tensor, and its place in the block.

    Attributes:
        tensor: name of the stored tensor.
        index: which entries of the stored tensor, per axis of it; steps above 1 occur.
        place: where they lie in the block, per axis of the block; always contiguous.
        axes: the axis of the stored tensor behind each axis of the block, None for an axis that stacking made.
            Stored axes that are not named have a single entry in `index`.
    """

    tensor: str
    index: tuple[range, ...]
    place: tuple[range, ...]
    axes: tuple[int | None, ...]

    def select(self, value: "Tensor") -> "Tensor":
        """Of a value of the block's shape, this piece, as a view with the axes of the stored tensor."""
        part = value[tuple(slice(span.start, span.stop) for span in self.place)]
        kept = [position for position, axis in enumerate(self.axes) if axis is not None]
        made = [position for position, axis in enumerate(self.axes) if axis is None]
        part = part.permute(*made, *sorted(kept, key=lambda position: self.axes[position] or 0))
        part = part[(0,) * len(made)]
        return part[tuple(slice(None) if axis in self.axes else None for axis in range(len(self.index)))]


@dataclass(frozen=True)
class Block:
    """A tensor of which only the shape, and the origin of every entry, is known."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Region:
    """The part of one checkpoint tensor that holds a parameter, or some of it.

    Attributes:
        tensor: name on disk.
        index: (start, stop) per axis of the tensor on disk.
        features: the axis on disk of the input features, the first of them for a convolution; None for a vector, and
            where it cannot be told.
        rows: the part of the parameter's first axis that lies here; None for all of it.
        pieces: the exact correspondence; needed where rows are permuted, axes swapped or experts stacked.
    """

    tensor: str
    index: tuple[tuple[int, int], ...]
    features: int | None
    rows: tuple[int, int] | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def input_axis(self) -> int:
        """The axis on disk on which a chain acts.

        Raises:
            UnsupportedModelError: there is none, or it cannot be told.
        """
        return known_axis(self.features, self.tensor)

    def part(self, value: "Tensor") -> "Tensor":
        """Of a value for the whole parameter, what this region must hold, in the shape and order of the disk."""
        if not self.pieces:
            return value if self.rows is None else value[slice(*self.rows)]
        if len(self.pieces) == 1:
            return self.pieces[0].select(value)
        part = value.new_empty([stop - start for start, stop in self.index])
        for piece in self.pieces:
            spans = zip(piece.index, self.index, strict=True)
            where = tuple(slice(span.start - start, span.stop - start, span.step) for span, (start, _) in spans)
            part[where] = piece.select(value)
        return part


def whole(name: str, shape: tuple[int, ...]) -> Block:
    """A stored tensor as it is."""
    spans = tuple(range(size) for size in shape)
    return Block(shape, (Piece(name, spans, spans, tuple(range(len(shape)))),))


def take(block: Block, axis: int, wanted: range) -> Block:
    """The entries `wanted` along one axis, as `index_select` would give them."""
    pieces = []
    for piece in block.pieces:
        held, stored = piece.place[axis], piece.axes[axis]
        first = max(0, -((wanted.start - held.start) // wanted.step))
        last = min(len(wanted), -((wanted.start - held.stop) // wanted.step))
        if first >= last:
            continue
        here, index = wanted[first:last], piece.index
        if stored is not None:
            part = index[stored][here.start - held.start : here.stop - held.start : here.step]
            index = (*index[:stored], part, *index[stored + 1 :])
        place = (*piece.place[:axis], range(first, last), *piece.place[axis + 1 :])
        pieces.append(replace(piece, index=index, place=place))
    return Block((*block.shape[:axis], len(wanted), *block.shape[axis + 1 :]), tuple(pieces))


def concatenate(blocks: Sequence[Block], axis: int) -> Block:
    """`torch.cat`.

    Raises:
        ValueError: the shapes differ elsewhere than along `axis`.
    """
    if len({(*block.shape[:axis], *block.shape[axis + 1 :]) for block in blocks}) != 1:
        raise ValueError(f"cannot concatenate shapes {sorted({block.shape for block in blocks})} along axis {axis}")
    pieces, offset = [], 0
    for block in blocks:
        for piece in block.pieces:
            span = range(piece.place[axis].start + offset, piece.place[axis].stop + offset)
            pieces.append(replace(piece, place=(*piece.place[:axis], span, *piece.place[axis + 1 :])))
        offset += block.shape[axis]
    shape = blocks[0].shape
    return Block((*shape[:axis], offset, *shape[axis + 1 :]), tuple(pieces))


def stack(blocks: Sequence[Block], axis: int) -> Block:
    """`torch.stack`."""
    layers = []
    for block in blocks:
        pieces = tuple(
            replace(
                piece,
                place=(*piece.place[:axis], range(1), *piece.place[axis:]),
                axes=(*piece.axes[:axis], None, *piece.axes[axis:]),
            )
            for piece in block.pieces
        )
        layers.append(Block((*block.shape[:axis], 1, *block.shape[axis:]), pieces))
    return concatenate(layers, axis)


def squeeze(block: Block, axis: int) -> Block:
    """`torch.squeeze` of an axis that has one entry."""
    pieces = tuple(
        replace(
            piece,
            place=(*piece.place[:axis], *piece.place[axis + 1 :]),
            axes=(*piece.axes[:axis], *piece.axes[axis + 1 :]),
        )
        for piece in block.pieces
    )
    return Block((*block.shape[:axis], *block.shape[axis + 1 :]), pieces)


def transpose(block: Block, first: int, second: int) -> Block:
    """`torch.transpose`."""
    order = list(range(len(block.shape)))
    order[first], order[second] = order[second], order[first]
    pieces = tuple(
        replace(piece, place=tuple(piece.place[i] for i in order), axes=tuple(piece.axes[i] for i in order))
        for piece in block.pieces
    )
    return Block(tuple(block.shape[i] for i in order), pieces)


def split(block: Block, axis: int, sizes: Sequence[int]) -> list[Block]:
    """`torch.split` into the given sizes.

    Raises:
        ValueError: the sizes do not add up to the length of the axis.
    """
    if sum(sizes) != block.shape[axis]:
        raise ValueError(f"cannot split axis {axis} of shape {block.shape} into {list(sizes)}")
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [take(block, axis, range(stop - size, stop)) for stop, size in zip(stops, sizes, strict=True)]


def deinterleave(block: Block, axis: int, *, inverse: bool = False) -> Block:
    """Even entries first, then odd ones; inverse: the two halves in turns."""
    size = block.shape[axis]
    if inverse:
        runs = [range(start, size, size // 2) for start in range(size // 2)]
    else:
        runs = [range(start, size, 2) for start in range(2)]
    return concatenate([take(block, axis, run) for run in runs], axis)


def substitute(block: Block, origin: Callable[[str], Block]) -> Block:
    """Replace the stored tensors of a block by what they are in turn put together from."""
    pieces = []
    for piece in block.pieces:
        source = origin(piece.tensor)
        for axis, wanted in enumerate(piece.index):
            source = take(source, axis, wanted)
        for inner in source.pieces:
            place, axes = [], []
            for span, axis_behind in zip(piece.place, piece.axes, strict=True):
                held = range(len(span)) if axis_behind is None else inner.place[axis_behind]
                place.append(range(span.start + held.start, span.start + held.stop))
                axes.append(None if axis_behind is None else inner.axes[axis_behind])
            pieces.append(Piece(inner.tensor, inner.index, tuple(place), tuple(axes)))
    return Block(block.shape, tuple(pieces))


def regions_of(parameter: str, block: Block, input_axis: int | None) -> tuple[Region, ...]:
    """Gather the pieces of each stored tensor into one region, the box of it that they fill.

    Args:
        parameter: its name, for messages.
        block: what it is put together from.
        input_axis: the axis of the block that carries the input features, if any.

    Raises:
        UnsupportedModelError: input features are rearranged, or the pieces leave gaps for another layer.
    """
    regions = []
    for tensor, group in groupby(block.pieces, key=lambda piece: piece.tensor):
        pieces = tuple(group)
        axes = {None if input_axis is None else piece.axes[input_axis] for piece in pieces}
        if input_axis is not None and any(not _keeps_columns(piece, block, input_axis) for piece in pieces):
            raise UnsupportedModelError(f"`{parameter}` has its input features rearranged or spread in `{tensor}`")
        index = _box(pieces)
        if index is None:
            raise UnsupportedModelError(f"`{parameter}` alternates with other rows inside `{tensor}`")
        rows = None
        if block.shape:
            covered = (min(p.place[0].start for p in pieces), max(p.place[0].stop for p in pieces))
            rows = None if covered == (0, block.shape[0]) else covered
        regions.append(Region(tensor, index, axes.pop(), rows, pieces))
    return tuple(regions)


def _keeps_columns(piece: Piece, block: Block, input_axis: int) -> bool:
    axis = piece.axes[input_axis]
    return axis is not None and len(piece.place[input_axis]) == block.shape[input_axis] and piece.index[axis].step == 1


def _box(pieces: Sequence[Piece]) -> tuple[tuple[int, int], ...] | None:
    """The box of the stored tensor that these pieces fill without gaps; None when they do not."""
    box = tuple(
        (min(span.start for span in spans), max(span[-1] + 1 if span else span.start for span in spans))
        for spans in zip(*(piece.index for piece in pieces), strict=True)
    )
    filled = sum(prod(len(span) for span in piece.index) for piece in pieces)
    return box if filled == prod(stop - start for start, stop in box) else None


def known_axis(axis: int | None, name: str) -> int:
    """Insist on an axis.

    Raises:
        UnsupportedModelError: there is none, or it cannot be told.
    """
    if axis is None:
        raise UnsupportedModelError(f"which axis of `{name}` carries the input features cannot be told")
    return axis
