"""A weight matrix in blocks of few bits: what the codes stand for, rows, and rounding to nearest.

    W[i, j] = scale · (code − zero) + offset        for the block of 16, 32, … columns that j lies in

Codes of 4 or 8 bits, scales and offsets in float32: the blocks of ONNX Runtime's MatMulNBits, and every affine block of
ggml without a change of value. An offset and no fractional zero point: −offset / scale would be rounded.

Letters: o out_features, d in_features, n blocks of a row.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hra_export.errors import NumericalError

Bits = Literal[4, 8]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Rows that are worked on at once: temporaries of some tens of MB for the widest models.
ROWS = 1024


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A matrix (o, d) in blocks along its rows.

    Attributes:
        bits: of a code.
        block_size: columns of a block, a power of two from 16 on.
        columns: d; the last block of a row may reach beyond it.
        packed: (o, n, block_size · bits / 8); of two codes of 4 bits in a byte, the first is the low one.
        scales: (o, n).
        zero_points: (o, n), one a byte; None means 2^(bits−1) everywhere.
        offsets: (o, n); None means 0 everywhere.
    """

    bits: Bits
    block_size: int
    columns: int
    packed: Bytes
    scales: Floats
    zero_points: Bytes | None = None
    offsets: Floats | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit one another.

        Raises:
            ValueError: they do not.
        """
        blocks = -(-self.columns // self.block_size)
        grid = (self.packed.shape[0], blocks)
        expected = {"packed": (*grid, self.block_size * self.bits // 8), "scales": grid}
        expected |= {name: grid for name in ("zero_points", "offsets") if getattr(self, name) is not None}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {getattr(self, name).shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(o, d)."""
        return self.packed.shape[0], self.columns

    @property
    def size_bytes(self) -> int:
        """Of codes, scales, zero points and offsets together, as held here."""
        parts = (self.packed, self.scales, self.zero_points, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, index: NDArray[np.int64] | slice) -> "QuantizedMatrix":
        """Some rows in some order; no code changes."""
        return replace(
            self,
            packed=self.packed[index],
            scales=self.scales[index],
            zero_points=None if self.zero_points is None else self.zero_points[index],
            offsets=None if self.offsets is None else self.offsets[index],
        )

    def codes(self) -> Bytes:
        """(o, n, block_size), one a byte."""
        return self.packed if self.bits == 8 else unpack(self.packed)

    def values(self, rows: slice = slice(None)) -> Floats:
        """Some rows of the matrix that the blocks stand for, float32, each element rounded at most twice."""
        part = self.rows(rows)
        zeros = np.full(part.scales.shape, 2 ** (self.bits - 1)) if part.zero_points is None else part.zero_points
        centred = part.codes().astype(np.float32) - zeros[..., None].astype(np.float32)  # (rows, n, block_size)
        result = centred * part.scales[..., None]
        if part.offsets is not None:
            result += part.offsets[..., None]
        flat: Floats = result.reshape(len(result), -1)[:, : self.columns]
        return flat


def nibbles(matrix: QuantizedMatrix) -> tuple[QuantizedMatrix, QuantizedMatrix]:
    """A matrix of 8 bits as the sum of two of 4: scale · (c − z) = 16 scale · (c₁ − z₁) + scale · (c₀ − z₀).

    Exact as long as the scales have at most 16 significant bits, as half-precision ones have. Offsets go to the first.
    """
    zeros = np.full(matrix.scales.shape, 128, np.uint8) if matrix.zero_points is None else matrix.zero_points
    codes, four, low_bits = matrix.codes(), np.uint8(4), np.uint8(15)
    scales = matrix.scales * np.float32(16)
    high = replace(matrix, bits=4, packed=pack(codes >> four), scales=scales, zero_points=zeros >> four)
    low = replace(matrix, bits=4, packed=pack(codes & low_bits), zero_points=zeros & low_bits, offsets=None)
    return high, low


def pack(codes: Bytes) -> Bytes:
    """Codes of 4 bits (…, k), k even, two to a byte (…, k / 2), the first in the low half."""
    packed: Bytes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def unpack(packed: Bytes) -> Bytes:
    """The inverse of `pack`."""
    return np.stack([packed & 15, packed >> np.uint8(4)], axis=-1).reshape(*packed.shape[:-1], -1)


def quantize(weight: NDArray[np.floating], *, bits: Bits, block_size: int, symmetric: bool = False) -> QuantizedMatrix:
    """Round a matrix to the nearest codes, block by block.

    Asymmetric blocks span [min(w, 0), max(w, 0)]; symmetric ones put the entry of largest size on the code 0, where
    two's complement has one step more. These are the rules of ONNX Runtime's own quantizer.

    Args:
        weight: (o, d), any float dtype; computed in float32.
        bits: of a code.
        block_size: columns that share a scale.
        symmetric: no zero points.

    Raises:
        NumericalError: the matrix holds a NaN or an infinity.
        ValueError: not a matrix, or not a block size.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {weight.shape}")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"expected a block size of 16, 32, 64, … columns, got {block_size}")
    parts = [
        _quantize_rows(torch.from_numpy(np.array(weight[start : start + ROWS], np.float32, order="C")), bits,
                       block_size, symmetric)
        for start in range(0, len(weight), ROWS)
    ]  # fmt: skip
    codes, scales, zeros = (np.concatenate(part) for part in zip(*parts, strict=True))
    packed = pack(codes) if bits == 4 else codes
    return QuantizedMatrix(bits, block_size, weight.shape[1], packed, scales, None if symmetric else zeros)


def _quantize_rows(rows: Tensor, bits: int, block_size: int, symmetric: bool) -> tuple[Bytes, Floats, Bytes]:
    if not bool(torch.isfinite(rows).all()):
        raise NumericalError("a weight to be quantized is not finite")
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % block_size))
    blocks = padded.reshape(len(rows), -1, block_size)  # (rows, n, block_size)
    top = 2**bits - 1
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)  # (rows, n)
    if symmetric:
        extreme = torch.where(high > -low, high, low)
        scales = extreme / -(2.0 ** (bits - 1))
        zeros = torch.full_like(scales, 2.0 ** (bits - 1))
    else:
        scales = (high - low) / top
        zeros = torch.where(scales > 0, (-low / scales).round().clamp(0, top), 2.0 ** (bits - 1))
    inverse = torch.where(scales == 0, 0, 1 / scales)
    codes = (blocks * inverse[..., None] + zeros[..., None]).round_().clamp_(0, top)
    return codes.to(torch.uint8).numpy(), scales.numpy(), zeros.to(torch.uint8).numpy()


def relative_error(matrix: QuantizedMatrix, weight: NDArray[np.floating]) -> float:
    """‖Q(W) − W‖ / ‖W‖ in Frobenius norm; 0 for a matrix of zeros."""
    error = size = 0.0
    for start in range(0, len(weight), ROWS):
        part = slice(start, start + ROWS)
        exact = torch.from_numpy(np.array(weight[part], np.float32))  # a copy: mapped files are read-only
        difference = torch.from_numpy(matrix.values(part)) - exact
        error += float(difference.square().sum(dtype=torch.float64))
        size += float(exact.square().sum(dtype=torch.float64))
    return (error / size) ** 0.5 if size else 0.0
