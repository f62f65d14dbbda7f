"""Where the parts of a tensor come from: shapes and names only, no values.

A `Block` is a tensor put together from `Piece`s of stored tensors. Slicing, stacking, concatenating and transposing a
block only rewrites its pieces, so transformers' weight conversions can be followed on headers alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
