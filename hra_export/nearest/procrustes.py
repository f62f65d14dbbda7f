"""The orthogonal R of k reflections with W R nearest to W' = W + ΔW, and how near any rotation comes.

R turns a subspace of k dimensions: R = I + S (X − I) Sᵀ. For a given S (d, k) the best X is a polar factor, that of
N = Sᵀ Wᵀ W' S (orthogonal Procrustes), and ‖W R − W'‖² = ‖ΔW‖² − 2 (‖N‖_* − tr N). So a span is sought, the one with
the largest gain ‖N‖_* − tr N. The search starts in the span of [ΔWᵀ, WᵀΔW], which holds the gradient of the gain at
I, with those planes of the best rotation there that gain most. Each step then looks for the best span within the last
one, its gradient and the last move, so that a step costs two passes over W. The gain never falls.

det R = (−1)^k: an even number of reflections rotates; an odd number mirrors one direction on top.

Limits: the search finds a local optimum, the best one in almost all small problems that were solved by brute force.

Sources: Schönemann 1966 (Procrustes); Knyazev 2001 (LOBPCG: span, gradient and last move).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hra_export.householder import BlockReflector
from hra_export.nearest.weight_change import Change, orthonormal
from hra_export.rotation import Rotation, from_orthogonal

# A step that shortens the distance by less is the last: the third digit of the distance is settled.
SMALLEST_STEP = 3e-4
MOST_STEPS = 30
# Less than float32 vectors can hold of a rotation.
SMALLEST_DISTANCE = 1e-8
# L-BFGS in the small problem of a step, which only has to make headway.
INNER_STEPS = 12
# (d, d) or (o, o), the smaller: above it singular values take seconds for each target (1536: 1 s on one core).
LARGEST_EXACT = 1536
# Rows in which a larger problem is looked at, and the blocks of them: on SmolLM2 mostly within 4 % of the exact floor,
# 9 % off for small ranks.
MOST_ROWS = 512
KRYLOV_BLOCKS = 7


@dataclass(frozen=True)
class Floor:
    """How near rotations of any rank come: min ‖W R − W'‖ / ‖ΔW‖ over all orthogonal R.

    Attributes:
        is_exact: otherwise the distance is a lower bound, and no rotation comes nearer than this.
    """

    distance: float
    is_exact: bool


def nearest_rotation(change: Change, rank: int) -> Rotation:
    """The best R found with rank(R − I) ≤ `rank` and det R = (−1)^rank.

    Args:
        change: W and ΔW ≠ 0.
        rank: k, at most d.

    Raises:
        ValueError: a rank that is not between 1 and d.
    """
    if not 1 <= rank <= change.weight.shape[1]:
        raise ValueError(f"rank: expected 1 to {change.weight.shape[1]}, got {rank}")
    sign = -1 if rank % 2 else 1
    state = _first_span(change, rank, sign)
    last = orthonormal(state.span[:, :0])
    for _ in range(MOST_STEPS):
        before = state.distance()
        if before < SMALLEST_DISTANCE:
            break
        state, last = _step(state, last, rank)
        if before - state.distance() < SMALLEST_STEP * before:
            break
    return from_orthogonal(state.inside, state.span)


def distance(change: Change, reflector: BlockReflector) -> float:
    """‖W R − W'‖ / ‖ΔW‖ of any R: two passes, and nothing that cancels above 1e-8."""
    basis, triangle = torch.linalg.qr(reflector.u)  # W (R − I) = −(W U) T Uᵀ, and U = basis · triangle
    moved = -(change.weight.times(reflector.u) @ reflector.t) @ triangle.T  # (o, k)
    wanted = change.delta.times(basis)
    outside = max(change.norm**2 - float(wanted.square().sum()), 0.0)
    return float((float((moved - wanted).square().sum()) + outside) ** 0.5) / change.norm


def rotation_floor(change: Change) -> Floor:
    """How near any rotation comes: √(‖W‖² + ‖W'‖² − 2 ‖Wᵀ W'‖_*) / ‖ΔW‖.

    Beyond `LARGEST_EXACT` the problem is looked at in some rows only, P W and P W' for an orthonormal P: what is left
    there is left in the whole. P spans a Krylov space of W Wᵀ from ΔW and W ΔWᵀ, where all of ΔW is.
    """
    o, d = change.weight.shape
    is_exact = min(o, d) <= LARGEST_EXACT
    if is_exact and o > d:
        whole = torch.eye(d, dtype=torch.float64)
        before, moved = change.weight.times(whole), change.delta.times(whole)
        nuclear = torch.linalg.svdvals(before.T @ (before + moved)).sum()
    else:
        rows = torch.eye(o, dtype=torch.float64) if is_exact else _krylov_rows(change)
        before, moved = change.weight.transposed_times(rows), change.delta.transposed_times(rows)  # (d, m)
        first, second = torch.linalg.qr(before, mode="r").R, torch.linalg.qr(before + moved, mode="r").R
        nuclear = torch.linalg.svdvals(first @ second.T).sum()
    squared = float(before.square().sum() + (before + moved).square().sum() - 2 * nuclear)
    return Floor(max(squared, 0.0) ** 0.5 / change.norm, is_exact)


@dataclass(frozen=True)
class _Span:
    """A subspace and the best orthogonal X on it.

    Attributes:
        span: S (d, k), orthonormal.
        seen, moved: W S and ΔW S (o, k).
        inside: X (k, k).
        gain: ‖N‖_* − tr N, or less where the determinant costs something.
    """

    change: Change
    span: Tensor
    seen: Tensor
    moved: Tensor
    inside: Tensor
    gain: float
    sign: int

    @classmethod
    def of(
        cls, change: Change, span: Tensor, sign: int, seen: Tensor | None = None, moved: Tensor | None = None
    ) -> "_Span":
        seen = change.weight.times(span) if seen is None else seen
        moved = change.delta.times(span) if moved is None else moved
        inside, gain = _polar(seen.T @ (seen + moved), sign)
        return cls(change, span, seen, moved, inside, gain, sign)

    def distance(self) -> float:
        """‖W R − W'‖ / ‖ΔW‖, to half of float64's digits."""
        return float(max(self.change.norm**2 - 2 * self.gain, 0.0) ** 0.5 / self.change.norm)

    def gradient(self) -> Tensor:
        """Of the gain, by the span: C S (X − I)ᵀ + Cᵀ S (X − I) with C = WᵀW', less what lies in the span."""
        turn = self.inside - torch.eye(self.inside.shape[0], dtype=torch.float64)
        left = (self.seen + self.moved) @ turn.T + self.seen @ turn  # (o, k)
        slope = self.change.weight.transposed_times(left) + self.change.delta.transposed_times(self.seen @ turn)
        return slope - self.span @ (self.span.T @ slope)


def _first_span(change: Change, rank: int, sign: int) -> _Span:
    """The better one of two: planes in the span of ΔWᵀ, where a rotation that was folded in lies; and of [ΔWᵀ, WᵀΔW].

    Where W is blind to some of the wider span, it does not tell the rotation that was folded in from others.
    """
    most = max(4 * rank, 64)  # more would not be looked at
    left, right = change.leading.left[:, :most], change.leading.right[:most]
    rows = orthonormal(right.T)
    wide = torch.cat([rows, orthonormal(change.weight.transposed_times(left), rows)], dim=1)
    starts = [_best_planes(_Span.of(change, span, sign), rank) for span in (rows, wide)]
    return max(starts, key=lambda start: start.gain)


def _best_planes(state: _Span, rank: int) -> _Span:
    """The span of those planes of a rotation that gain most, `rank` dimensions at most."""
    if state.span.shape[1] <= rank:
        return state
    rotation = from_orthogonal(state.inside, state.span)
    seen, moved = state.change.weight.times(rotation.basis), state.change.delta.times(rotation.basis)
    small = seen.T @ (seen + moved)
    # A mirrored direction loses 2 bᵀ C b: one has to be, the others turn in pairs.
    mirrors = sorted(range(2 * rotation.planes, rotation.rank), key=lambda i: float(small[i, i]))
    kept = [mirrors.pop(0)] if state.sign < 0 else []
    pairs = [[2 * i, 2 * i + 1] for i in range(rotation.planes)]
    pairs += [list(pair) for pair in zip(mirrors[::2], mirrors[1::2], strict=True)]
    gains = [_polar(small[pair][:, pair], 1)[1] for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -gains[i])[: rank // 2]
    columns = kept + [column for i in order for column in pairs[i]]
    return _Span.of(state.change, rotation.basis[:, columns], state.sign, seen[:, columns], moved[:, columns])


def _step(state: _Span, last: Tensor, rank: int) -> tuple[_Span, Tensor]:
    """The best span found in this one, its gradient and the last move; and the move."""
    change, old = state.change, state.span
    fresh = orthonormal(state.gradient(), old, last)
    around = torch.cat([last, fresh], dim=1)
    if not around.shape[1]:
        return state, last
    wide = torch.cat([old, around], dim=1)  # (d, m)
    seen = torch.cat([state.seen, change.weight.times(around)], dim=1)
    moved = torch.cat([state.moved, change.delta.times(around)], dim=1)
    start = torch.eye(wide.shape[1], min(rank, wide.shape[1]), dtype=torch.float64)
    chosen = _ascend(seen.T @ (seen + moved), start, state.sign, state.gain)  # (m, k)
    found = _Span.of(change, wide @ chosen, state.sign, seen @ chosen, moved @ chosen)
    outside = chosen.clone()
    outside[: old.shape[1]] = 0
    move = wide @ orthonormal(outside, chosen)
    return (found, move) if found.gain > state.gain else (state, last[:, :0])


def _ascend(small: Tensor, start: Tensor, sign: int, gain: float) -> Tensor:
    """A few steps of L-BFGS up the gain of a span Z (m, k) in a small problem N (m, m), from a start and its gain."""
    with torch.enable_grad():
        point = start.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [point], max_iter=INNER_STEPS, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
        )
        scale = abs(gain) or float(torch.linalg.matrix_norm(small))

        def loss() -> Tensor:
            search.zero_grad()
            span = torch.linalg.qr(point).Q
            inside = span.T @ small @ span
            value = (inside.trace() - _signed_nuclear_norm(inside, sign)) / scale
            value.backward()
            return value

        search.step(loss)  # type: ignore[no-untyped-call]  # torch does not annotate it
    chosen = torch.linalg.qr(point.detach()).Q
    return chosen if chosen.isfinite().all() else start


def _signed_nuclear_norm(inside: Tensor, sign: int) -> Tensor:
    """The largest tr(XᵀN) over orthogonal X with this determinant: Σσ, less 2 σ_min where signs differ."""
    sigma = torch.linalg.svdvals(inside)
    opposite = float(torch.linalg.slogdet(inside.detach()).sign) * sign < 0
    return sigma.sum() - 2 * sigma[-1] if opposite else sigma.sum()


def _polar(inside: Tensor, sign: int) -> tuple[Tensor, float]:
    """The orthogonal X of this determinant with the largest tr(XᵀN), and tr(XᵀN) − tr N."""
    left, _, right = torch.linalg.svd(inside)
    if float(torch.linalg.det(left @ right)) * sign < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)
    x = left @ right
    return x, float(((x - torch.eye(x.shape[0], dtype=x.dtype)) * inside).sum())


def _krylov_rows(change: Change) -> Tensor:
    """P (o, m): ΔW and W ΔWᵀ, then W Wᵀ times these again and again."""
    most = MOST_ROWS // 4  # of each, so that there is room to go on
    left, right = change.leading.left[:, :most], change.leading.right[:most]
    block = orthonormal(torch.cat([left, change.weight.times(right.T)], dim=1))
    rows = block
    for _ in range(KRYLOV_BLOCKS):
        if rows.shape[1] >= MOST_ROWS or not block.shape[1]:
            break
        block = orthonormal(change.weight.times(change.weight.transposed_times(block)), rows)
        rows = torch.cat([rows, block], dim=1)
    return rows
