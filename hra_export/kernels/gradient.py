"""The gradient of a chain on a GPU: ∂x and ∂U of z = x − ((x Û) S) Ûᵀ, g = ∂L/∂z, in three launches as a rule.

    ∂x = g − K Ûᵀ     K = g Û Sᵀ                       `forward.reflect` with Sᵀ for S
    gᵀM + xᵀK         C = MᵀK         uᵢᵀûᵢ            `accumulate`, in partial sums
    ∂U = (Û sym(C) − gᵀM − xᵀK) / ‖uᵢ‖                 `finish`

No step of it is a sum over all features of something that depends on such a sum. ∂Û = −gᵀM − xᵀK + Û (L + Lᵀ) with
L = tril(C, −1), and its part along ûᵢ, which the normalization takes away, is −Cᵢᵢ ‖ûᵢ‖² ûᵢ: with
S⁻¹ = diag(½ ûᵢᵀûᵢ) + tril(ÛᵀÛ, −1) put into g Û = K S⁻ᵀ and x Û = M S⁻¹, the other terms of ûᵢᵀ∂Ûᵢ cancel. So sym(C),
C's lower triangle with its diagonal, mirrored, has it all.

What must be moved and done, e bytes an element of x, p splits of the rows; at the 3.35 TB/s of an H100 and
n = 4096, d = 4096, r = 32 in bfloat16 (p = 8):

| kernel | bytes | operations | floor |
|---|---|---|---|
| `forward.reflect` | 2 e n d | 4 n d r | 67 MB: 20 µs |
| `accumulate` | 2 e n d + e r d + 4 r d + 4 p r (d + r) | 4 n d r + 2 n r² | 67 MB + 5 MB: 21 µs |
| `finish` | 4 p r (d + r) + (e + 4) r d | 2 d r² | 5 MB, from L2: 1.5 µs and the launch |

M and K are read again for each 64 features, from L2: r / 64 of the bytes of g and x. In bfloat16 at r = 32, sm90, a
program takes 80 registers a thread and 36 kB of shared memory, so that five share a processor. On tensor cores
`accumulate` does r operations a byte in half precision, so that memory binds it to r ≈ 290. Products of float32 are
IEEE's on the plain cores (67 TFLOP/s): arithmetic binds it from r ≈ 40. These times are reckoned; nothing here has run
on a GPU.

Sums are float32, in an order that the shapes and the kind of GPU fix: equal calls give equal bits.

Letters: d in_features, r rank, n rows of activations.
Limits: float32, float16, bfloat16; r ≤ 128. Leading dimensions that one stride cannot describe are copied.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hra_export.kernels import forward
from hra_export.kernels.gradient_kernel import accumulate, finish
from hra_export.kernels.operands import operand

# Bytes of a feature's activations that a split has for each reflection, at least: its partial sums, 8 bytes written and
# read, are an eighth of 2 × 32 bytes of g and x then.
BYTES_OF_SPLIT = 32
# At 4 warps a program, enough of them to hide the latency of memory.
PROGRAMS_PER_PROCESSOR = 4
FINISHED_COLUMNS = 64
# For Triton's interpreter: few, since it runs them one after another.
INTERPRETER_PROCESSORS = 4


@dataclass(frozen=True)
class Blocks:
    """What one program of `accumulate` handles at a time.

    Attributes:
        rows: of one step.
        columns: features it owns.
        warps, stages: Triton's `num_warps` and `num_stages`.
    """

    rows: int
    columns: int
    warps: int
    stages: int


def blocks_for(rank: int, itemsize: int) -> Blocks:
    """Blocks whose float32 sums, rank × columns, fit the registers; reasoned, not measured.

    Args:
        rank: padded, a power of 2 from 16 to 128.
        itemsize: bytes of an element of x, 2 or 4.
    """
    if itemsize == 4:  # no tensor cores: threads hold the operands of products too
        return Blocks(rows=16, columns=64, warps=4 if rank <= 32 else 8, stages=3)
    if rank <= 64:
        return Blocks(rows=32, columns=64, warps=4, stages=4)
    return Blocks(rows=32, columns=64, warps=8, stages=3)


def reflect_backward(
    grad: Tensor, x: Tensor, vectors: Tensor, u: Tensor, s: Tensor, m: Tensor, for_x: bool, for_vectors: bool
) -> tuple[Tensor, Tensor]:
    """∂x and ∂U of `forward.reflect`; the one that is not wanted is empty.

    Args:
        grad: ∂L/∂z (…, d), of x's dtype.
        x: (…, d), float32, float16 or bfloat16.
        vectors: (d, r), columns not normalized, float32 or less.
        u: (d, r) unit columns, of x's dtype.
        s: (r, r) lower triangular, float32.
        m: (r, n), from the forward pass.
        for_x: whether ∂x is wanted.
        for_vectors: whether ∂U is wanted.

    Returns:
        ∂x (…, d) in x's dtype, ∂U (d, r) in the dtype of `vectors`.
    """
    grad_x, k = forward.reflect(grad, u, s.T) if for_x else (x.new_empty(0), forward.coefficients(grad, u, s.T))
    if not for_vectors:
        return grad_x, vectors.new_empty(0)
    d = x.shape[-1]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        grad_vectors = _vectors_gradient(grad.reshape(-1, d), x.reshape(-1, d), vectors, u, m.contiguous(), k)
    return grad_x, grad_vectors


def _vectors_gradient(grads: Tensor, rows: Tensor, vectors: Tensor, u: Tensor, m: Tensor, k: Tensor) -> Tensor:
    """∂U (d, r) of rows x and ∂z (n, d) and their coefficients M and K (r, n)."""
    (n, d), r = rows.shape, u.shape[-1]
    rank = max(16, triton.next_power_of_2(r))
    blocks = blocks_for(rank, rows.element_size())
    tiles = triton.cdiv(d, blocks.columns)
    wanted = count_splits(n * rows.element_size(), r, tiles, _processors(rows.device))
    rows_of_split = max(1, triton.cdiv(n, wanted * blocks.rows)) * blocks.rows  # aligned, for wide loads of M and K
    splits = max(1, triton.cdiv(n, rows_of_split))
    flat = u.mT.contiguous()  # (r, d), as it is stored
    partials = torch.empty(splits, r, d, dtype=torch.float32, device=rows.device)
    grams = torch.empty(splits, r, r, dtype=torch.float32, device=rows.device)
    lengths = torch.empty(tiles, r, dtype=torch.float32, device=rows.device)
    accumulate[tiles + triton.cdiv(rank, blocks.columns), splits](
        grads,
        *grads.stride(),
        rows,
        *rows.stride(),
        m,
        k,
        flat,
        vectors,
        *vectors.stride(),
        partials,
        grams,
        lengths,
        n,
        d,
        r,
        rows_of_split,
        OPERAND=operand(rows.dtype),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        RANK=rank,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    grad_vectors = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
    finish[(triton.cdiv(d, FINISHED_COLUMNS),)](
        partials, grams, lengths, flat, grad_vectors, d, r, splits, tiles, COLUMNS=FINISHED_COLUMNS, RANK=rank
    )
    return grad_vectors


def count_splits(row_bytes: int, r: int, tiles: int, processors: int) -> int:
    """Into how many splits the rows go: enough programs to fill the GPU, few enough for their partial sums.

    Args:
        row_bytes: n times the bytes of an element.
        r: rank.
        tiles: of features.
        processors: of the GPU.
    """
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, tiles)
    return max(1, min(wanted, row_bytes // (BYTES_OF_SPLIT * r)))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
