"""The algebra of Householder chains: compact WY, apply, fold, low-rank factors, composition.

A chain is R = H_1 H_2 … H_r with H_i = I − 2 u_i u_iᵀ / ‖u_i‖². Its block form R = I − U T Uᵀ needs only U (d, r)
and T (r, r), so nothing here ever builds a (d, d) matrix, except `dense`, which exists for tests.

Letters: d in_features, o out_features, r rank, n rows of activations. Tensors are torch; nothing is changed in place.

Limits: T is found by substitution. |T_ij| ≤ 4 and the diagonal of T⁻¹ is ½, so it cannot blow up; with all columns
equal and r = 64 its condition number reaches 7e3, which costs four of float64's sixteen digits and no more.

Sources: Schreiber & Van Loan 1989 (compact WY); Joffrain et al. 2006 (UT transform); Yuan, Liu & Xu, NeurIPS 2024,
arXiv 2405.17484 (HRA); PEFT `tuners/hra/layer.py` (order of the product, Gram-Schmidt variant).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hra_export.errors import NumericalError

# PEFT orthogonalizes in float32, where a pivot p leaves the new direction with about 1e-7 / p of rounding noise.
# Under 1e-4 a thousandth of the direction is noise, different on every device: no file can promise that rotation.
GRAM_SCHMIDT_MIN_PIVOT = 1e-4


@dataclass(frozen=True)
class BlockReflector:
    """R = I − U T Uᵀ, an orthogonal (d, d) matrix held by its factors.

    Attributes:
        u: (d, r), unit columns.
        t: (r, r); upper triangular for a chain, lower triangular for the inverse of one.
    """

    u: Tensor
    t: Tensor

    @property
    def features(self) -> int:
        """d, the size of the space R acts on."""
        return self.u.shape[0]

    @property
    def rank(self) -> int:
        """r, the number of reflections."""
        return self.u.shape[1]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "BlockReflector":
        """The same reflector on another device, rounded once to `dtype`."""
        return BlockReflector(self.u.to(device, dtype), self.t.to(device, dtype))


def compact_wy(vectors: Tensor, *, orthogonalize: bool = False, dtype: torch.dtype = torch.float64) -> BlockReflector:
    """Gather a chain of Householder reflections into one block reflector.

    The chain is R = H_1 H_2 … H_r with H_i = I − 2 u_i u_iᵀ / ‖u_i‖². With unit columns
    T⁻¹ = ½ I + triu(UᵀU, 1), so T comes from one triangular solve and R itself is never formed.

    Args:
        vectors: (d, r), any float dtype; column i is u_i before normalization.
        orthogonalize: Gram-Schmidt the columns first (PEFT's `apply_GS`); then R = I − 2 U Uᵀ.
        dtype: of the computation and of the result, float32 or float64.

    Returns:
        U (d, r) with unit columns and T (r, r) upper triangular.

    Raises:
        NumericalError: a column is zero or not finite, or Gram-Schmidt meets columns that are parallel to
            working precision; the message gives the column's index.
        ValueError: `vectors` is not a (d, r) matrix with 1 ≤ r ≤ d.
    """
    u = unit_columns(vectors, dtype=dtype)
    if orthogonalize:
        u = gram_schmidt(u)
        return BlockReflector(u, 2 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device))
    return gathered(u)


def gathered(columns: Tensor) -> BlockReflector:
    """(I − 2 u_1 u_1ᵀ) … (I − 2 u_r u_rᵀ) as I − U T Uᵀ: reflections for unit columns, softer ones for shorter.

    Args:
        columns: U (d, r), float32 or float64, as they are.

    Returns:
        U itself, and T (r, r) upper triangular with T⁻¹ = ½ I + triu(UᵀU, 1).
    """
    t_inverse = torch.triu(columns.T @ columns, diagonal=1)  # (r, r)
    t_inverse.diagonal().fill_(0.5)
    identity = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    return BlockReflector(columns, torch.linalg.solve_triangular(t_inverse, identity, upper=True))


def solve_t(u: Tensor) -> Tensor:
    """T of columns whose norms need not be 1: T⁻¹ = diag(½ uᵢᵀuᵢ) + triu(UᵀU, 1), by substitution.

    Args:
        u: (…, d, r), float32 or float64; many chains are solved in one call.

    Returns:
        (…, r, r) upper triangular, u's dtype.
    """
    gram = u.mT @ u  # (…, r, r)
    t_inverse = torch.triu(gram, diagonal=1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(t_inverse, identity.expand_as(gram), upper=True)


def unit_columns(vectors: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Divide each column of `vectors` (d, r) by its norm, safely for tiny and huge entries.

    Raises:
        NumericalError: a column is zero or not finite.
        ValueError: `vectors` is not a (d, r) matrix with 1 ≤ r ≤ d.
    """
    if vectors.ndim != 2 or not 1 <= vectors.shape[1] <= vectors.shape[0]:
        raise ValueError(f"expected reflection vectors of shape (d, r) with 1 <= r <= d, got {tuple(vectors.shape)}")
    # Wide enough for both: float64 vectors of 1e-200 are not zero, whatever the result's dtype.
    columns = vectors.detach().to(torch.promote_types(vectors.dtype, dtype))
    largest = columns.abs().amax(dim=0)  # (r,)
    for i, value in enumerate(largest.tolist()):
        if value == 0:
            raise NumericalError(f"reflection vector {i} is zero: it has no direction")
        if not value < float("inf"):
            raise NumericalError(f"reflection vector {i} is not finite")
    # Scaled by the largest entry first: the squares of 1e-200 or 1e200 leave float64's range, and 1e-30 float32's.
    scaled = columns / largest
    return (scaled / torch.linalg.vector_norm(scaled, dim=0)).to(dtype)


def gram_schmidt(units: Tensor) -> Tensor:
    """Orthonormalize unit columns (d, r) in order; the span of the first k columns is kept for every k.

    The signs may differ from PEFT's loop, which I − 2 Q Qᵀ does not see.

    Raises:
        NumericalError: a column lies in the span of those before it, to `GRAM_SCHMIDT_MIN_PIVOT`.
    """
    q, upper = torch.linalg.qr(units)
    pivots = upper.diagonal().abs().tolist()
    for i, pivot in enumerate(pivots):
        if pivot < GRAM_SCHMIDT_MIN_PIVOT:
            raise NumericalError(
                f"Gram-Schmidt breaks down: reflection vector {i} lies in the span of those before it "
                f"(pivot {pivot:.1e}, expected at least {GRAM_SCHMIDT_MIN_PIVOT:.0e})",
                hint="PEFT's default initialization repeats each vector; with `apply_GS` it then normalizes rounding "
                "noise, and the trained rotation depends on the device. Train with `init_weights=False`",
            )
    return q


def inverse(reflector: BlockReflector) -> BlockReflector:
    """R⁻¹ = Rᵀ = I − U Tᵀ Uᵀ: the chain backwards. Folding it undoes a fold."""
    return BlockReflector(reflector.u, reflector.t.T)


def compose(first: BlockReflector, *others: BlockReflector) -> BlockReflector:
    """R_a R_b … as one block reflector of rank r_a + r_b + …; exact, the ranks add.

    For two: U = [U_a U_b], T = [[T_a, −T_a U_aᵀU_b T_b], [0, T_b]].

    Raises:
        ValueError: the reflectors act on spaces of different size.
    """
    product = first
    for other in others:
        if other.features != product.features:
            raise ValueError(f"cannot compose reflectors of {product.features} and {other.features} features")
        coupling = -(product.t @ (product.u.T @ other.u) @ other.t)  # (r_a, r_b)
        zeros = product.t.new_zeros(other.rank, product.rank)
        upper = torch.cat([product.t, coupling], dim=1)
        lower = torch.cat([zeros, other.t], dim=1)
        product = BlockReflector(torch.cat([product.u, other.u], dim=1), torch.cat([upper, lower], dim=0))
    return product


def apply(x: Tensor, reflector: BlockReflector) -> Tensor:
    """Rotate activations the way a layer with folded weights sees them: z = x Rᵀ = x − ((x U) Tᵀ) Uᵀ.

    `base(z)` then equals `x (W R)ᵀ`. With T in place of Tᵀ it would be the reversed chain.

    Args:
        x: (…, d).
        reflector: on x's device and in x's dtype.

    Returns:
        (…, d), x's dtype.
    """
    return x - ((x @ reflector.u) @ reflector.t.T) @ reflector.u.T


def rotate_rows(rows: Tensor, reflector: BlockReflector) -> Tensor:
    """Rows times R: y = rows − ((rows U) T) Uᵀ, as for the weights of a Linear or the rows of an embedding.

    Args:
        rows: (…, d).
        reflector: on the rows' device and in their dtype.

    Returns:
        (…, d), the rows' dtype.
    """
    return rows - ((rows @ reflector.u) @ reflector.t) @ reflector.u.T


def fold(weight: Tensor, reflector: BlockReflector, *, strength: float = 1.0) -> Tensor:
    """Fold the chain into a weight: W + s (W R − W), in O(o·d·r).

    Args:
        weight: (o, d), or (o, in, kh, kw) with in·kh·kw = d, as a convolution stores it.
        reflector: of d features; the computation runs in its dtype.
        strength: s; 1 is the adapter, 0 the base. Between them the result is not W times a rotation.

    Returns:
        The folded weight, of weight's shape and the reflector's dtype, not rounded back.
    """
    rows = weight.reshape(weight.shape[0], -1).to(reflector.u)  # (o, d)
    b, a = low_rank_factors(rows, reflector)
    return torch.addmm(rows, b, a, alpha=strength).reshape(weight.shape)


def low_rank_factors(weight: Tensor, reflector: BlockReflector) -> tuple[Tensor, Tensor]:
    """ΔW = W R − W = B A exactly, with rank r.

    Args:
        weight: (o, d), of the reflector's dtype.
        reflector: of d features.

    Returns:
        B = −(W U) T (o, r) and A = Uᵀ (r, d).
    """
    return -((weight @ reflector.u) @ reflector.t), reflector.u.T


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of two thin matrices from factors of equal size, which lose least when they are rounded.

    left · right = P Σ Qᵀ becomes (P √Σ)(√Σ Qᵀ), by two QR decompositions and an SVD of their small core.

    Args:
        left: (m, r), float64 as a rule.
        right: (r, n).

    Returns:
        (m, r) and (r, n); columns beyond the numerical rank are tiny.
    """
    q_left, core_left = torch.linalg.qr(left)
    q_right, core_right = torch.linalg.qr(right.T)
    p, sigma, q_t = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    root = sigma.sqrt()
    return q_left @ (p * root), (root[:, None] * q_t) @ q_right.T


def distance(first: BlockReflector, second: BlockReflector | None = None) -> float:
    """‖R_a − R_b‖_F of two reflectors, ‖R_a − I‖_F of one, from the factors alone.

    With [U_a U_b] = Q [L_a L_b] by QR, the norm is ‖L_a T_a L_aᵀ − L_b T_b L_bᵀ‖_F.
    """
    both = first.u if second is None else torch.cat([first.u, second.u], dim=1)
    left, right = torch.linalg.qr(both).R.split([first.rank, both.shape[1] - first.rank], dim=1)
    change = left @ first.t @ left.T
    return float(torch.linalg.matrix_norm(change if second is None else change - right @ second.t @ right.T))


def dense(reflector: BlockReflector) -> Tensor:
    """R itself, (d, d). For tests and small examples: O(d²) memory, which nothing else here needs."""
    identity = torch.eye(reflector.features, dtype=reflector.u.dtype, device=reflector.u.device)
    return rotate_rows(identity, reflector)


def orthogonality_error(reflector: BlockReflector) -> float:
    """‖RᵀR − I‖_F, from the factors alone; 0 up to rounding for every chain.

    RᵀR − I = U M Uᵀ with M = TᵀGT − T − Tᵀ and G = UᵀU, so the norm is ‖L M Lᵀ‖_F with U = Q Lᵀ, here by QR.
    """
    t, triangle = reflector.t, torch.linalg.qr(reflector.u).R
    middle = t.T @ (reflector.u.T @ reflector.u) @ t - t - t.T  # (r, r)
    return float(torch.linalg.matrix_norm(triangle @ middle @ triangle.T))
