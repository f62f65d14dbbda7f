"""The blocks of ggml, as GGUF files store them, read as `QuantizedMatrix`: the same values, no code changed.

A tensor of shape (o, d) is o·d/b blocks of b columns, one after another. Legacy types have b = 32 and scales of half
precision; K-types have b = 256, with small integer scales of parts of 32 or 16 columns beside those of half precision.

    scale · (code − middle)            Q4_0, Q5_0, Q8_0, Q6_K
    scale · code + minimum             Q4_1, Q5_1, Q4_K, Q5_K

The second kind becomes scale · (code − middle) + offset with offset = minimum + scale · middle, for kernels that round
activations lose least on codes around zero. The few blocks whose offset is no float32 keep their minimum, with 0 in
the middle's place: every value stays ggml's own, bit for bit.

Source: ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hra_export.quantization import Bits, Bytes, Floats, QuantizedMatrix, pack

SUPER_BLOCK = 256

# codes (n, parts, size), scales (n, parts), and minima (n, parts) or None: n blocks in the order of the file
_Parts = tuple[NDArray[np.integer[Any]], Floats, Floats | None]


def read_blocks(kind: str, data: Bytes, shape: tuple[int, int]) -> QuantizedMatrix | None:
    """A tensor's bytes as a matrix of blocks.

    Args:
        kind: ggml's name of the type, such as `Q4_K`.
        data: all bytes of the tensor, in any shape.
        shape: (o, d).

    Returns:
        None for a type that is not affine in blocks, or not known here.

    Raises:
        ValueError: the bytes are not those of such a tensor.
    """
    if kind not in _READERS:
        return None
    size, bits, middle, reader = _READERS[kind]
    rows, columns = shape
    blocks = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if columns % _columns(kind) or blocks.size != rows * columns // _columns(kind) * size:
        raise ValueError(f"{kind} of shape {shape}: {blocks.size} bytes do not fit")
    codes, scales, low = reader(blocks.reshape(-1, size))
    part = codes.shape[-1]
    grid = (rows, columns // part)
    shift = 2 ** (bits - 1) - middle  # the middle code stands for 0
    bytes_ = (codes.astype(np.int16) + shift).astype(np.uint8).reshape(*grid, part)
    packed = pack(bytes_) if bits == 4 else bytes_
    scales = scales.reshape(grid)
    if low is None:
        return QuantizedMatrix(bits, part, columns, packed, scales)
    offsets, zeros = _centred(scales, low.reshape(grid), middle, shift)
    return QuantizedMatrix(bits, part, columns, packed, scales, zeros, offsets)


def _centred(scales: Floats, minima: Floats, middle: int, shift: int) -> tuple[Floats, Bytes | None]:
    """Offsets for codes around the middle one, and zero points where such an offset would be rounded."""
    exact = minima.astype(np.float64) + scales.astype(np.float64) * middle
    offsets = exact.astype(np.float32)
    is_rounded = offsets != exact
    if not is_rounded.any():
        return offsets, None
    zeros = np.where(is_rounded, shift, middle + shift).astype(np.uint8)
    return np.where(is_rounded, minima, offsets), zeros


def _columns(kind: str) -> int:
    return SUPER_BLOCK if kind.endswith("_K") else 32


def _halves(data: Bytes) -> Floats:
    """(n, 2k) bytes as (n, k) half-precision numbers, widened."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """(…, k) bytes as (…, 2k): all low halves, then all high ones."""
    return np.concatenate([data & 15, data >> np.uint8(4)], axis=-1)


def _fifth_bits(data: Bytes) -> Bytes:
    """(n, 4) bytes as (n, 32): one bit a column, worth 16."""
    return np.unpackbits(data, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> _Parts:
    return _nibbles(blocks[:, 2:])[:, None], _halves(blocks[:, :2]), None


def _q4_1(blocks: Bytes) -> _Parts:
    return _nibbles(blocks[:, 4:])[:, None], _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q5_0(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return codes[:, None], _halves(blocks[:, :2]), None


def _q5_1(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes[:, None], _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q8_0(blocks: Bytes) -> _Parts:
    return blocks[:, 2:].view(np.int8)[:, None], _halves(blocks[:, :2]), None


def _six_bit_scales(data: Bytes) -> tuple[Bytes, Bytes]:
    """(n, 12) bytes as 8 scales and 8 minima of 6 bits, as Q4_K and Q5_K pack them."""
    first, second, rest = data[:, 0:4], data[:, 4:8], data[:, 8:12]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)], axis=-1)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], axis=-1)
    return scales, minima


def _affine_k(blocks: Bytes, codes: Bytes) -> _Parts:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    return codes, _halves(blocks[:, :2]) * scales, -(_halves(blocks[:, 2:4]) * minima)


def _q4_k(blocks: Bytes) -> _Parts:
    return _affine_k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> _Parts:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high: Bytes = (blocks[:, None, 16:48] >> shifts) & np.uint8(1)  # (n, 8, 32): bit p of byte j belongs to part p
    return _affine_k(blocks, low | (high << np.uint8(4)))


def _q6_k(blocks: Bytes) -> _Parts:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3  # (n, 2, 4, 32)
    codes = (low | (high << np.uint8(4))).reshape(-1, 16, 16)
    scales = _halves(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8)
    return codes, scales.astype(np.float32), None


# type → bytes of a block, bits of a code as it is kept, middle code, reader
_READERS: Mapping[str, tuple[int, Bits, int, Callable[[Bytes], _Parts]]] = {
    "Q4_0": (18, 4, 8, _q4_0),
    "Q4_1": (20, 4, 8, _q4_1),
    "Q5_0": (22, 8, 16, _q5_0),
    "Q5_1": (24, 8, 16, _q5_1),
    "Q8_0": (34, 8, 0, _q8_0),
    "Q4_K": (144, 4, 8, _q4_k),
    "Q5_K": (176, 8, 16, _q5_k),
    "Q6_K": (210, 8, 32, _q6_k),
}
KINDS = tuple(_READERS)
