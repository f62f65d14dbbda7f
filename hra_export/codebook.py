"""Matrices of bitsandbytes in 4 bits: a codebook of 16 values and a largest value for each block.

    W.flat[k] = codebook[code[k]] · absmax[k // block_size]

Unlike `QuantizedMatrix` the values are on no grid, and blocks run on over the ends of rows. `absmax` may be in 8 bits
itself (double quantization): it is widened here, with bitsandbytes' own arithmetic.

Letters: o out_features, d in_features.

Source: bitsandbytes `functional.QuantState.as_dict(packed=True)`, the layout of 4-bit checkpoints of transformers.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hra_export.errors import FormatError
from hra_export.quantization import Bytes, Floats

Kind = Literal["nf4", "fp4"]
STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True, eq=False)
class CodebookMatrix:
    """A matrix (o, d) of codes into a codebook.

    Attributes:
        kind: which codebook.
        block_size: values in a row-major block.
        shape: (o, d).
        packed: (o · d / 2,); of two codes in a byte, the first is the high one.
        absmax: one for each block.
        codebook: (16,).
        dtype: in which bitsandbytes computes with it; a dequantized model has its values rounded to that.
    """

    kind: Kind
    block_size: int
    shape: tuple[int, int]
    packed: Bytes
    absmax: Floats
    codebook: Floats
    dtype: torch.dtype = torch.float32

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4

    def values(self, rows: slice = slice(None)) -> Floats:
        """Some rows of the matrix, float32, not rounded to `dtype`."""
        start, stop, _ = rows.indices(self.shape[0])
        index: NDArray[np.int64] = np.arange(start * self.shape[1], stop * self.shape[1])
        pairs = self.packed[index // 2]
        codes = np.where(index % 2 == 0, pairs >> 4, pairs & 15)
        result: Floats = self.codebook[codes] * self.absmax[index // self.block_size]
        return result.reshape(stop - start, self.shape[1])

    def loaded_values(self, rows: slice = slice(None)) -> Floats:
        """The same rows as a dequantized model has them."""
        rounded: Floats = torch.from_numpy(self.values(rows)).to(self.dtype).float().numpy()
        return rounded


def read_matrices(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, CodebookMatrix]]:
    """Every 4-bit matrix among a checkpoint's tensors.

    Args:
        tensors: by name; `X.weight` and, beside it, `X.weight.absmax`, `X.weight.quant_state.bitsandbytes__nf4`, ….

    Yields:
        The parameter's name, and its matrix.

    Raises:
        FormatError: parts are missing or do not fit one another.
    """
    for key in tensors:
        name, found, kind = key.partition(STATE)
        if found:
            try:
                yield name, _matrix(tensors, name, tensors[key], kind)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise FormatError(f"`{name}` is no 4-bit matrix of bitsandbytes: {error!r}") from error


def _matrix(tensors: Mapping[str, Tensor], name: str, state: Tensor, kind: str) -> CodebookMatrix:
    settings = json.loads(bytes(state.tolist()))
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"quantization type {kind!r}")
    o, d = settings["shape"]
    block_size = int(settings["blocksize"])
    absmax = tensors[f"{name}.absmax"]
    if "nested_offset" in settings:
        index = torch.arange(absmax.numel()) // int(settings["nested_blocksize"])
        outer = tensors[f"{name}.nested_absmax"].float()[index]
        inner = tensors[f"{name}.nested_quant_map"].float()[absmax.long()]
        absmax = inner * outer + settings["nested_offset"]
    packed = tensors[name].reshape(-1).numpy()
    if packed.dtype != np.uint8 or packed.size != (o * d + 1) // 2 or absmax.numel() != -(-o * d // block_size):
        raise ValueError(f"{packed.size} bytes and {absmax.numel()} blocks of {block_size} for shape {(o, d)}")
    codebook = tensors[f"{name}.quant_map"].float().numpy()
    known: Kind = "nf4" if kind == "nf4" else "fp4"
    dtype = getattr(torch, settings["dtype"])
    return CodebookMatrix(known, block_size, (o, d), packed, absmax.float().numpy(), codebook, dtype)
