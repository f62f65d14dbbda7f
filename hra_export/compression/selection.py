"""Which components of a rotation to keep: the best of a rank, the fewest within an error, and what refining wins.

Where the form is diagonal, sorting finds the best choice. Where components interact, under a measure of outputs, the
choice is made by elimination and exchanges, which need not end at the best.
"""

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hra_export.compression.components import Components, Deviation

# An exchange must win more than rounding, or two equal choices would take turns for ever.
EXCHANGE_GAIN = 1e-12
REFINING_STEPS = 60
REFINING_HISTORY = 20
# Refining lowers an error by two thirds at most in what was seen; the search for a tolerance starts out that far.
LARGEST_STRETCH = 3.0
STRETCH_STEPS = 4


def chains_of_rank(parts: Sequence[Components], rank: int, *, refine: bool) -> list[Tensor]:
    """The chains of at most `rank` reflections with the smallest error over all targets, in one determinant."""
    choices = [[best_of_rank(each, rank, odd=odd) for each in parts] for odd in (False, True)]
    best = min(choices, key=lambda kept: sum(each.error(own) for each, own in zip(parts, kept, strict=True)))
    chains = [each.chain(own) for each, own in zip(parts, best, strict=True)]
    return [refined(each, chain) for each, chain in zip(parts, chains, strict=True)] if refine else chains


def chains_within(parts: Sequence[Components], tolerance: float, *, refine: bool) -> list[Tensor]:
    """The fewest reflections over all targets within a relative error, in one determinant.

    Refined chains would come out far inside of it. What is left out before they are refined is therefore stretched,
    by bisection, as far as the tolerance holds after it.
    """
    found = _left_out(parts, tolerance)
    if not refine:
        return found
    found = [refined(each, chain) for each, chain in zip(parts, found, strict=True)]
    low, high = 1.0, LARGEST_STRETCH
    for _ in range(STRETCH_STEPS):
        middle = math.sqrt(low * high)
        tried = _left_out(parts, min(tolerance * middle, 1.0))
        tried = [refined(each, chain) for each, chain in zip(parts, tried, strict=True)]
        if _relative(parts, tried) <= tolerance:
            low, found = middle, tried
        else:
            high = middle
    return found


def _left_out(parts: Sequence[Components], tolerance: float) -> list[Tensor]:
    whole = sum(each.measure.squared(each.rotation.core()) for each in parts)
    choices = [fewest_within(parts, tolerance**2 * whole, odd=odd) for odd in (False, True)]
    chains = [[each.chain(own) for each, own in zip(parts, kept, strict=True)] for kept in choices if kept is not None]
    return min(chains, key=lambda each: (sum(chain.shape[1] for chain in each), _relative(parts, each)))


def _relative(parts: Sequence[Components], chains: Sequence[Tensor]) -> float:
    deviations = [each.deviation(chain) for each, chain in zip(parts, chains, strict=True)]
    return sum(deviations, Deviation()).relative


def best_of_rank(parts: Components, rank: int, *, odd: bool) -> list[int]:
    """The components that at most `rank` reflections can keep with the smallest error.

    Args:
        parts: of one rotation.
        rank: at least 0.
        odd: whether an odd number of reflections must remain; keeping nothing is allowed either way.

    Returns:
        Their numbers, ascending; exact where the form is diagonal.
    """
    choices: list[list[int]] = [[]]
    for mirrors in range(int(odd), min(len(parts.mirrors), rank) + 1, 2):
        planes = min(len(parts.planes), (rank - mirrors) // 2)
        choices.append(_best(parts, planes, mirrors))
    return min(choices, key=lambda kept: (parts.error(kept), len(kept)))


def _best(parts: Components, planes: int, mirrors: int) -> list[int]:
    """So many planes and mirrors, from two starts: leave out one after the other, and take back one after the other."""
    quotas = ((parts.planes, planes), (parts.mirrors, mirrors))
    starts = [parts.form.new_full((len(parts.form),), start, dtype=torch.bool) for start in (False, True)]
    for out in starts:
        for group, keep in quotas:
            _fill_(parts.form, out, group, len(group) - keep)
        _exchange_(parts, out)
    best = min(starts, key=lambda out: _squared(parts.form, out))
    return [i for i in range(len(best)) if not best[i]]


def _fill_(form: Tensor, out: Tensor, group: range, count: int) -> None:
    """Leave out the cheapest of a group, or take back the dearest, until so many of it are left out."""
    while (missing := count - int(out[group.start : group.stop].sum())) != 0:
        grows = missing > 0
        allowed = [i for i in group if bool(out[i]) != grows]
        chosen = min(allowed, key=lambda i: _cost(form, out, i) if grows else _saving(form, out, i))
        out[chosen] = grows


def _cost(form: Tensor, out: Tensor, i: int) -> float:
    """By how much the squared error grows when component i is left out too."""
    return float(form[i, i] + 2 * form[i, out].sum())


def _saving(form: Tensor, out: Tensor, i: int) -> float:
    """By how much the squared error grows, which is less than nothing, when component i is taken back."""
    return float(form[i, i] - 2 * form[i, out].sum())


def _exchange_(parts: Components, out: Tensor) -> None:
    """Swap a component that is left out for a kept one of its kind, the best swap first, until none wins."""
    form, diagonal = parts.form, parts.form.diagonal()
    is_mirror = torch.arange(len(out)) >= parts.mirrors.start
    while True:
        pull = form @ out.to(form.dtype)
        gain = (2 * pull - diagonal)[:, None] - (2 * pull + diagonal)[None, :] + 2 * form  # take back i, leave out j
        allowed = out[:, None] & ~out[None, :] & (is_mirror[:, None] == is_mirror[None, :])
        gain = gain.masked_fill(~allowed, 0.0)
        best = int(gain.argmax()) if gain.numel() else 0
        if gain.numel() == 0 or float(gain.flatten()[best]) <= EXCHANGE_GAIN * float(diagonal.sum()):
            return
        back, leave = divmod(best, len(out))
        out[back], out[leave] = False, True


def fewest_within(parts: Sequence[Components], budget: float, *, odd: bool) -> list[list[int]] | None:
    """The fewest reflections, over all rotations together, whose squared errors add up to at most a budget.

    Leaves out the cheapest step over all rotations, again and again, while the budget holds. A step takes two
    reflections: a plane, or two mirrors, which keeps the determinant. With diagonal forms all steps are independent
    and cost the same, so no choice leaves out more.

    Args:
        parts: of each rotation.
        budget: the largest sum of squared errors.
        odd: whether each rotation must keep an odd number of reflections, or nothing.

    Returns:
        The kept components of each; None when this determinant alone costs more than the budget.
    """
    outs = [_forced(each, odd=odd) for each in parts]
    spent = sum(_squared(each.form, out) for each, out in zip(parts, outs, strict=True))
    if spent > budget:
        return None
    steps = [(step, n) for n, each in enumerate(parts) if (step := _cheapest_step(each, outs[n])) is not None]
    heapq.heapify(steps)
    while steps:
        (_, cost, leave), n = heapq.heappop(steps)
        if spent + cost > budget:
            continue
        outs[n][list(leave)] = True
        spent += cost
        step = _cheapest_step(parts[n], outs[n])
        if step is not None:
            heapq.heappush(steps, (step, n))
    for each, out in zip(parts, outs, strict=True):
        _exchange_(each, out)
    return [[i for i in range(len(out)) if not out[i]] for out in outs]


def _forced(parts: Components, *, odd: bool) -> Tensor:
    """What must be left out for the determinant: a mirror, or everything where there is none."""
    out = parts.form.new_zeros(len(parts.form), dtype=torch.bool)
    if len(parts.mirrors) % 2 != odd:
        if parts.mirrors:
            out[min(parts.mirrors, key=lambda i: float(parts.form[i, i]))] = True
        else:
            out[:] = True
    return out


def _cheapest_step(parts: Components, out: Tensor) -> tuple[float, float, tuple[int, ...]] | None:
    """Cost for each reflection, cost and components of the cheapest step; None when nothing is left."""
    steps: list[tuple[float, float, tuple[int, ...]]] = [
        (_cost(parts.form, out, i) / 2, _cost(parts.form, out, i), (i,)) for i in parts.planes if not out[i]
    ]
    mirrors = sorted((i for i in parts.mirrors if not out[i]), key=lambda i: _cost(parts.form, out, i))
    if len(mirrors) > 1 or (mirrors and not steps):
        leave = tuple(mirrors[:2])
        cost = sum(_cost(parts.form, out, i) for i in leave)
        cost += 2 * float(parts.form[leave[0], leave[1]]) if len(leave) == 2 else 0.0
        steps.append((cost / len(leave), cost, leave))
    return min(steps, default=None)


def _squared(form: Tensor, out: Tensor) -> float:
    indicator = out.to(form.dtype)
    return float(indicator @ form @ indicator)


def refined(parts: Components, chain: Tensor) -> Tensor:
    """A chain of the same length, nearer to R under the measure: its vectors may turn anywhere in the basis.

    Minimizes ‖L (R − R') Nᵀ‖_F² over the vectors by L-BFGS, from the given ones. Under a measure with N = I and L = I
    nothing is gained: the kept planes are the best approximation (Eckart, Young).

    Args:
        parts: the components.
        chain: (k, r') in coordinates of the basis.

    Returns:
        (k, r'), unit columns; the given chain where nothing was gained.
    """
    total = parts.measure.squared(parts.rotation.core())
    if chain.shape[1] in (0, parts.rotation.rank) or total == 0:
        return chain

    with torch.inference_mode(False), torch.enable_grad():
        vectors = chain.detach().clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [vectors], max_iter=REFINING_STEPS, history_size=REFINING_HISTORY, line_search_fn="strong_wolfe"
        )

        def relative_error() -> Tensor:
            optimizer.zero_grad()
            loss = parts.measure.image(parts.change(vectors)).square().sum() / total
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            return loss

        optimizer.step(relative_error)  # type: ignore[no-untyped-call]  # torch has no types for it
    found = vectors.detach() / torch.linalg.vector_norm(vectors.detach(), dim=0)
    before, after = (parts.measure.squared(parts.change(each)) for each in (chain, found))
    return found if after < before else chain
