"""The reflection as a torch operator: `hra::reflect`, z = x Rᵀ = x − ((x U) S) Uᵀ with S = Tᵀ, and its gradient.

    reflect(x, vectors)                             what layers call; finds U and S, obeys autocast
    factor(vectors, dtype)                          U and S of one chain, or of a batch of chains in one solve
    reflect_rows(x, index, factors)                 a chain of its own for each entry of a batch; for inference
    torch.ops.hra.reflect(x, vectors, u, s)         the operator: z, and M for the backward pass
    torch.ops.hra.reflect_backward(grad, …)         its gradient, an operator too, so that a device can bring a kernel
    torch.ops.hra.reflect_rows(x, index, u, s)      z alone

NVIDIA GPUs bring kernels (`hra_export.kernels`): one launch for all of `hra::reflect`. What they do not take, float64
and ranks above 128 among it, runs as on any device, in the plain version.

The operator is given U and S beside the vectors they come from, and sends the whole gradient to the vectors: the
factors do not depend on x, so many layers find theirs in one batched solve, once for all micro-batches of a step.
`u` and `s` must be what `factor` makes of `vectors`, or of vectors with the same directions.

For half-precision activations U is cast first, and the Gram matrix is built in float32 from the cast U with ½ uᵢᵀuᵢ on
the diagonal of T⁻¹: R then stays orthogonal to 1e-5, instead of 2e-2 with T from the uncast U.

For the backward pass x is saved and the r coefficients M of each row, as LoRA saves x and x A. With the unit columns Û,
g = ∂L/∂z, M = x Û S, K = g Û Sᵀ:

    ∂x = g − K Ûᵀ      ∂S⁻¹ = tril(Mᵀ K, −1)      ∂Û = −gᵀM − xᵀK + Û (∂S⁻¹ + ∂S⁻ᵀ)
    ∂U = (∂Û − Û diag(ûᵢᵀ ∂Ûᵢ)) / ‖uᵢ‖

Limits: differentiable once. A zero vector has no direction and gives NaN.

Letters: d in_features, r rank, n rows of activations.
Source: the derivative of the UT transform (Joffrain et al. 2006) through the normalization of the columns.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hra_export import householder, kernels


@dataclass(frozen=True)
class Factors:
    """What `hra::reflect` needs of a chain: constants for autograd.

    Attributes:
        u: (…, d, r) unit columns, rounded to the dtype of the activations; stored as Uᵀ.
        s: (…, r, r) lower triangular, Tᵀ of the rounded columns; float32, or float64 for float64 activations.
    """

    u: Tensor
    s: Tensor


@torch.no_grad()
def factor(vectors: Tensor, dtype: torch.dtype) -> Factors:
    """U and S of a chain, or of many chains of one shape in one batched solve.

    Args:
        vectors: (…, d, r), any float dtype, columns not normalized.
        dtype: of the activations.

    Returns:
        The factors, on the vectors' device. On a CPU the solve runs in float64; an NVIDIA GPU brings a kernel.
    """
    return Factors(*torch.ops.hra.factor(vectors, dtype))


def reflect(x: Tensor, vectors: Tensor, factors: Factors | None = None) -> Tensor:
    """Rotate activations by a chain: z = x Rᵀ, so that `base(z)` equals `x (W R)ᵀ`.

    Args:
        x: (…, d). Under autocast it is cast to autocast's dtype first.
        vectors: (d, r), the chain R = H_1 … H_r; not normalized, float32 as a rule.
        factors: `factor(vectors, activation_dtype(x))`, if it is at hand.

    Returns:
        (…, d), in `activation_dtype(x)`.
    """
    if factors is None:
        factors = factor(vectors, activation_dtype(x))
    return torch.ops.hra.reflect(x.to(factors.u.dtype), vectors, factors.u, factors.s)[0]


def reflect_rows(x: Tensor, index: Tensor, factors: Factors) -> Tensor:
    """Rotate each entry of a batch by a chain of its own: z[i] = x[i] R_jᵀ with j = index[i]. Not differentiable.

    Args:
        x: (b, …, d). Under autocast it is cast to autocast's dtype first.
        index: (b,), int64, on the device of x. An entry that is not in 0 … a − 1 makes its rows NaN, on every device:
            on a GPU an exception would cost a wait for it.
        factors: of the a chains, u (a, d, r) and s (a, r, r): `factor(torch.stack(vectors), activation_dtype(x))`.
            With zeros for S a chain is the identity, for entries without an adapter.

    Returns:
        (b, …, d), in `activation_dtype(x)`.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    u, s = factors.u, factors.s
    if u.ndim != 3 or s.shape != (u.shape[0], u.shape[2], u.shape[2]):
        raise ValueError(f"factors: expected u (a, d, r) and s (a, r, r), got {tuple(u.shape)} and {tuple(s.shape)}")
    if x.ndim < 2 or x.shape[-1] != u.shape[1]:
        raise ValueError(f"x: expected (b, …, {u.shape[1]}), got {tuple(x.shape)}")
    if index.dtype != torch.int64 or index.shape != x.shape[:1]:
        raise ValueError(f"index: expected int64 ({len(x)},), got {index.dtype} {tuple(index.shape)}")
    z: Tensor = torch.ops.hra.reflect_rows(x.to(u.dtype), index, u, s)
    return z


def activation_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matrix product with x runs in: autocast's where it is on, else x's own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def differentiable_factors(vectors: Tensor, dtype: torch.dtype, *, orthogonalize: bool = False) -> Factors:
    """`factor` in the reach of autograd, for layers whose base takes no rotated rows: convolutions, stacked experts.

    Args:
        vectors: (d, r), columns not normalized.
        dtype: of the activations.
        orthogonalize: Gram–Schmidt variant.

    Returns:
        Factors that carry gradients to `vectors`.
    """
    wide = vectors.to(torch.promote_types(torch.promote_types(vectors.dtype, dtype), torch.float32))
    with without_autocast(vectors):
        units = orthonormal_columns(wide) if orthogonalize else _unit_columns(wide)
        u = units.to(dtype)
        s = householder.solve_t(u.to(wide.dtype)).mT
    return Factors(u, s.to(torch.promote_types(dtype, torch.float32)))


def orthonormal_columns(vectors: Tensor) -> Tensor:
    """Gram–Schmidt by QR, differentiable: the chain of these columns is I − 2 Q Qᵀ whatever their signs.

    Args:
        vectors: (…, d, r), float32 or wider.
    """
    with without_autocast(vectors):
        return torch.linalg.qr(_unit_columns(vectors)).Q


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block in which products run in the dtypes that they are written in."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _unit_columns(vectors: Tensor) -> Tensor:
    # Scaled first, by a constant for autograd: R does not depend on it, and the squares of 1e-25 leave float32's range.
    scaled = vectors / vectors.detach().abs().amax(dim=-2, keepdim=True)
    return scaled / torch.linalg.vector_norm(scaled, dim=-2, keepdim=True)


@torch.library.custom_op("hra::factor", mutates_args=())
def _factor(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u (…, d, r) and s (…, r, r) of vectors (…, d, r). Not differentiable: see `differentiable_factors`."""
    return _plain_factor(vectors, dtype)


@_factor.register_kernel("cuda")
def _(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype in kernels.DTYPES and kernels.take(vectors, vectors.shape[-1]):
        from hra_export.kernels import factors  # imports triton

        return factors.factor(vectors, dtype)
    return _plain_factor(vectors, dtype)


def _plain_factor(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(vectors.dtype, dtype), torch.float32)
    with without_autocast(vectors):
        u = _unit_columns(vectors.to(wide)).to(dtype).mT.contiguous().mT  # Uᵀ in one piece, for thin products
        s = householder.solve_t(u.to(torch.float64 if u.device.type == "cpu" else wide)).mT
    return u, s.to(torch.promote_types(dtype, torch.float32), memory_format=torch.contiguous_format)


@torch.library.custom_op("hra::reflect", mutates_args=())
def _reflect(x: Tensor, vectors: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """z (…, d), and M = Sᵀ Uᵀ xᵀ (r, n) for the backward pass."""
    return _plain_reflect(x, u, s)


@_reflect.register_kernel("cuda")
def _(x: Tensor, vectors: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    if kernels.take(x, u.shape[-1]):
        from hra_export.kernels import forward  # imports triton

        return forward.reflect(x, u, s)
    return _plain_reflect(x, u, s)


def _plain_reflect(x: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # (n, d)
    with without_autocast(x):
        m = _coefficients(rows, u, s)
        return torch.addmm(rows, m.T, u.T, alpha=-1).view(x.shape), m


@torch.library.custom_op("hra::reflect_rows", mutates_args=())
def _reflect_rows(x: Tensor, index: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """z (b, …, d) of x (b, …, d), index (b,), u (a, d, r), s (a, r, r)."""
    return _plain_reflect_rows(x, index, u, s)


@_reflect_rows.register_kernel("cuda")
def _(x: Tensor, index: Tensor, u: Tensor, s: Tensor) -> Tensor:
    if kernels.take(x, u.shape[-1]):
        from hra_export.kernels import forward  # imports triton

        return forward.reflect_rows(x, index, u, s)[0]
    return _plain_reflect_rows(x, index, u, s)


def _plain_reflect_rows(x: Tensor, index: Tensor, u: Tensor, s: Tensor) -> Tensor:
    rows = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])  # (b, t, d)
    is_known = (index >= 0) & (index < len(u))
    chosen = torch.where(is_known, index, 0)
    units = u[chosen]  # (b, d, r)
    with without_autocast(x):
        coefficients = ((rows @ units).to(s.dtype) @ s[chosen]).to(x.dtype)  # (b, t, r)
        z = torch.baddbmm(rows, coefficients, units.mT, alpha=-1)
    return torch.where(is_known[:, None, None], z, torch.nan).view(x.shape)


@torch.library.custom_op("hra::reflect_backward", mutates_args=())
def _reflect_backward(
    grad: Tensor, x: Tensor, vectors: Tensor, u: Tensor, s: Tensor, m: Tensor, for_x: bool, for_vectors: bool
) -> tuple[Tensor, Tensor]:
    """∂x (…, d) and ∂U (d, r); the one that is not wanted is empty."""
    return _plain_reflect_backward(grad, x, vectors, u, s, m, for_x, for_vectors)


@_reflect_backward.register_kernel("cuda")
def _(
    grad: Tensor, x: Tensor, vectors: Tensor, u: Tensor, s: Tensor, m: Tensor, for_x: bool, for_vectors: bool
) -> tuple[Tensor, Tensor]:
    if kernels.take(x, u.shape[-1]) and vectors.dtype in kernels.DTYPES:
        from hra_export.kernels import gradient  # imports triton

        return gradient.reflect_backward(grad, x, vectors, u, s, m, for_x, for_vectors)
    return _plain_reflect_backward(grad, x, vectors, u, s, m, for_x, for_vectors)


def _plain_reflect_backward(
    grad: Tensor, x: Tensor, vectors: Tensor, u: Tensor, s: Tensor, m: Tensor, for_x: bool, for_vectors: bool
) -> tuple[Tensor, Tensor]:
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])  # (n, d)
    with without_autocast(x):
        k = _coefficients(grads, u, s.T)  # (r, n)
        grad_x = torch.addmm(grads, k.T, u.T, alpha=-1).view(x.shape) if for_x else x.new_empty(0)
        grad_vectors = _vectors_gradient(grads, rows, m, k, vectors, u) if for_vectors else vectors.new_empty(0)
    return grad_x, grad_vectors


# Thin matrices lie down, (r, n) and (r, d): CPUs multiply (r, d) × (d, n) up to four times as fast as (n, d) × (d, r).


def _coefficients(rows: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """Sᵀ Uᵀ rowsᵀ (r, n), in the rows' dtype; the r×r product runs in S's."""
    return (s.T @ (u.T @ rows.T).to(s.dtype)).to(u.dtype)


def _vectors_gradient(grads: Tensor, rows: Tensor, m: Tensor, k: Tensor, vectors: Tensor, u: Tensor) -> Tensor:
    wide = torch.promote_types(u.dtype, torch.float32)
    lower = torch.tril((m @ k.T).to(wide), -1)  # (r, r)
    units = u.T.to(wide)  # (r, d)
    grad_units = (lower + lower.T) @ units  # (r, d)
    for left, right in ((m, grads), (k, rows)):
        if u.dtype == wide:
            grad_units.addmm_(left, right, alpha=-1)
        else:  # half-precision products, added in float32
            grad_units.sub_(left @ right)
    return _through_normalization_(grad_units, units, vectors.T).T.to(vectors.dtype).contiguous()


def _through_normalization_(grad_units: Tensor, units: Tensor, vectors: Tensor) -> Tensor:
    """∂U of ∂Û, in place: without the part along each vector, which its norm takes away, over the norm. All (r, d)."""
    # ‖uᵢ‖ as uᵢᵀûᵢ: the squares of 1e30 leave float32's range.
    grad_units.div_((vectors.to(units.dtype) * units).sum(dim=1, keepdim=True))
    radial = (units * grad_units).sum(dim=1, keepdim=True)  # (r, 1)
    return grad_units.addcmul_(units, radial, value=-1)


@_factor.register_fake
def _(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    *leading, d, r = vectors.shape
    u = vectors.new_empty(*leading, r, d, dtype=dtype).mT
    return u, vectors.new_empty(*leading, r, r, dtype=torch.promote_types(dtype, torch.float32))


@_reflect.register_fake
def _(x: Tensor, vectors: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(u.shape[-1], x.numel() // x.shape[-1])


@_reflect_rows.register_fake
def _(x: Tensor, index: Tensor, u: Tensor, s: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_reflect_backward.register_fake
def _(
    grad: Tensor, x: Tensor, vectors: Tensor, u: Tensor, s: Tensor, m: Tensor, for_x: bool, for_vectors: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if for_x else 0), vectors.new_empty(vectors.shape if for_vectors else 0)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor | None, Tensor | None, None, None]:
    for_x, for_vectors = ctx.needs_input_grad[:2]
    grad_x, grad_vectors = torch.ops.hra.reflect_backward(grad, *ctx.saved_tensors, for_x, for_vectors)
    return grad_x if for_x else None, grad_vectors if for_vectors else None, None, None


_reflect.register_autograd(_backward, setup_context=_save_for_backward)


@_reflect.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, vectors: Tensor, u: Tensor, s: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        raise NotImplementedError("vmap over chains: `hra::reflect_rows` takes a chain for each entry")
    z, m = torch.ops.hra.reflect(x.movedim(in_dims[0], 0), vectors, u, s)
    return (z, m.unflatten(1, (info.batch_size, -1))), (0, 1)
