"""Compression against dense float64 rotations: what is chosen, what it is said to cost, and what the file costs."""

import itertools
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.compression import outcome
from hra_export.compression.components import Components, Measure, components, mirror_axes
from hra_export.compression.outcome import compress_adapter
from hra_export.compression.plan import Aspect, CompressionPlan, plan_compression
from hra_export.compression.selection import best_of_rank, fewest_within, refined
from hra_export.errors import ConversionError, OutputError
from hra_export.householder import compact_wy
from hra_export.rotation import Rotation, decompose, shortest_chain
from tests.synthetic import (
    dense_chain,
    linear_modules,
    read_tensors,
    stored,
    toy_tensors,
    write_base,
)

WIDTH = 24
# Sums of a few hundred products in float64.
EXACT = 1e-12
# Float32 columns are off by 6e-8 each; here they turn planes by a tenth of a radian and more.
STORED = 2e-6
# Exchanges need not end at the best choice where components interact; on these they are never off by more.
NEARLY_BEST = 1.05


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turning(angles: list[float], mirrors: int = 0, *, seed: int = 0, width: int = WIDTH) -> Rotation:
    """Planes and mirrored directions in general position."""
    basis = torch.linalg.qr(gaussian(width, 2 * len(angles) + mirrors, seed=seed)).Q
    return Rotation(basis, torch.tensor(angles, dtype=torch.float64))


def dense(vectors: Tensor) -> Tensor:
    return (
        torch.from_numpy(dense_chain(vectors.double().numpy()))
        if vectors.shape[1]
        else torch.eye(len(vectors)).double()
    )


def scrambled(rotation: Rotation, *, idle_pairs: int = 0, seed: int = 9) -> Tensor:
    """The same R by a longer chain in which no column is a component's: equal pairs, and every vector mixed in."""
    vectors = shortest_chain(rotation)
    for extra in gaussian(len(vectors), idle_pairs, seed=seed).T:
        vectors = torch.cat([extra[:, None], extra[:, None], vectors], dim=1)
    # H_v H_u = H_u H_(H_u v): turning the first vector by the second swaps their order.
    first, second = vectors[:, -2] / vectors[:, -2].norm(), vectors[:, -1] / vectors[:, -1].norm()
    vectors[:, -2], vectors[:, -1] = second, first - 2 * second * (second @ first)
    return vectors


def measured(rotation: Rotation, weight: Tensor | None = None, inputs: Tensor | None = None) -> Components:
    """Components under W (o, d) and inputs (n, d)."""
    root = None if inputs is None else inputs @ rotation.basis / math.sqrt(len(inputs))
    measure = Measure(None if weight is None else weight @ rotation.basis, root)
    axes = mirror_axes(rotation, measure)
    return components(Rotation(rotation.basis @ axes, rotation.angles), measure.turned(axes))


def kept_error(rotation: Rotation, parts: Components, kept: list[int], weight: Tensor, inputs: Tensor) -> float:
    """Mean of ‖(W R − W R')ᵀ… x‖² by dense matrices."""
    before = dense(shortest_chain(rotation))
    after = dense(parts.rotation.basis @ parts.chain(kept))
    return float((inputs @ (weight @ (before - after)).T).square().sum()) / len(inputs)


def subsets(parts: Components, rank: int, *, odd: bool) -> list[tuple[int, ...]]:
    """Every choice that fits, by counting."""
    found: list[tuple[int, ...]] = [()]
    numbers = range(len(parts.form))
    for kept in itertools.chain.from_iterable(
        itertools.combinations(numbers, n) for n in range(1, len(parts.form) + 1)
    ):
        mirrors = sum(i in parts.mirrors for i in kept)
        if mirrors % 2 == odd and 2 * len(kept) - mirrors <= rank:
            found.append(kept)
    return found


MIXED = {"planes": ([0.9, 0.5, 0.4, 0.1], 0), "both": ([0.9, 0.3, 0.1], 3), "mirrors": ([], 6)}


@pytest.mark.parametrize(("angles", "mirrors"), MIXED.values(), ids=MIXED)
def test_error_of_a_choice_is_that_of_dense_matrices(angles: list[float], mirrors: int) -> None:
    """Cross terms between components included."""
    rotation, weight, inputs = turning(angles, mirrors), gaussian(7, WIDTH, seed=1), gaussian(5, WIDTH, seed=2)
    parts = measured(rotation, weight, inputs)
    for kept in subsets(parts, parts.rotation.rank, odd=bool(mirrors % 2)):
        expected = kept_error(rotation, parts, list(kept), weight, inputs)
        assert parts.error(kept) == pytest.approx(expected, abs=EXACT * expected + EXACT)


@pytest.mark.parametrize(("angles", "mirrors"), MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("odd", [False, True])
def test_best_of_rank_is_the_best_of_all_subsets_by_weight(
    rank: int, odd: bool, angles: list[float], mirrors: int
) -> None:
    parts = measured(turning(angles, mirrors), gaussian(7, WIDTH, seed=1))
    best = min(parts.error(kept) for kept in subsets(parts, rank, odd=odd))
    assert parts.error(best_of_rank(parts, rank, odd=odd)) == pytest.approx(best, rel=EXACT)


@pytest.mark.parametrize("seed", range(6))
def test_best_of_rank_is_nearly_the_best_by_outputs(seed: int) -> None:
    """Fewer inputs and outputs than directions make components interact."""
    rotation = turning([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], seed=seed)
    parts = measured(rotation, gaussian(7, WIDTH, seed=seed + 10), gaussian(9, WIDTH, seed=seed + 20))
    for rank in (2, 4, 6, 8, 10, 12):
        best = min(parts.error(kept) for kept in subsets(parts, rank, odd=False))
        assert parts.error(best_of_rank(parts, rank, odd=False)) <= NEARLY_BEST * best


@pytest.mark.parametrize(("seed", "rank"), [(8, 6), (13, 8), (37, 10), (47, 8), (47, 10)])
def test_no_exchange_of_two_components_is_better(seed: int, rank: int) -> None:
    """Under three outputs and four inputs nearly everything interacts; in these, elimination alone ends elsewhere."""
    rotation = turning([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 2, seed=seed)
    parts = measured(rotation, gaussian(3, WIDTH, seed=seed + 10), gaussian(4, WIDTH, seed=seed + 20))
    kept = best_of_rank(parts, rank, odd=False)
    for leave, back in itertools.product(kept, range(len(parts.form))):
        if back not in kept and (leave in parts.mirrors) == (back in parts.mirrors):
            other = [*(i for i in kept if i != leave), back]
            assert parts.error(other) >= parts.error(kept) * (1 - EXACT)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_fewest_within_keeps_to_the_budget_where_components_interact(seed: int, share: float) -> None:
    angles = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    parts = [
        measured(turning(angles, seed=n), gaussian(3, WIDTH, seed=n + 10), gaussian(4, WIDTH, seed=n + 20))
        for n in (seed, seed + 1)
    ]
    budget = share * sum(each.error([]) for each in parts)
    kept = fewest_within(parts, budget, odd=False)
    assert kept is not None
    assert sum(each.error(own) for each, own in zip(parts, kept, strict=True)) <= budget
    assert sum(map(len, kept)) < 2 * len(angles)


@pytest.mark.parametrize("mirrors", [0, 2])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.6, 0.9])
def test_fewest_within_keeps_as_few_as_any_choice(share: float, mirrors: int) -> None:
    parts = [
        measured(turning(angles, mirrors, seed=seed), gaussian(7, WIDTH, seed=seed))
        for seed, angles in enumerate([[0.9, 0.4, 0.1], [0.7, 0.3]])
    ]
    budget = share * sum(each.error([]) for each in parts)
    choices = itertools.product(*(subsets(each, each.rotation.rank, odd=False) for each in parts))
    sizes = [
        sum(each.chain(kept).shape[1] for each, kept in zip(parts, choice, strict=True))
        for choice in choices
        if sum(each.error(kept) for each, kept in zip(parts, choice, strict=True)) <= budget
    ]
    found = fewest_within(parts, budget, odd=False)
    assert found is not None
    assert sum(each.error(kept) for each, kept in zip(parts, found, strict=True)) <= budget
    assert sum(each.chain(kept).shape[1] for each, kept in zip(parts, found, strict=True)) == min(sizes)


def test_fewest_within_refuses_a_determinant_that_costs_more_than_the_budget() -> None:
    parts = [measured(turning([0.9, 0.1], 1))]
    assert fewest_within(parts, 1.0, odd=False) is None  # the mirror alone is 4
    assert fewest_within(parts, 1.0, odd=True) == [[0, 2]]


def test_mirrored_directions_are_laid_along_what_the_weight_sees() -> None:
    """Kept mirrors of a Gram–Schmidt chain: no two directions in their span are better, nor any two columns."""
    rotation, weight = turning([], 6), gaussian(7, WIDTH, seed=1) * torch.linspace(0.1, 3, WIDTH, dtype=torch.float64)
    parts = measured(rotation, weight)
    error = parts.error(best_of_rank(parts, 2, odd=False))
    values = torch.linalg.svdvals(weight @ rotation.basis)
    assert error == pytest.approx(4 * float(values[2:].square().sum()), rel=1e-9)
    columns = [components(rotation, parts.measure.turned(torch.eye(6).double())).error(pair) for pair in [(0, 1)]]
    assert error < min(columns) * 1.0 + EXACT


def test_refining_lowers_the_error_of_outputs_and_stays_a_chain_of_that_length() -> None:
    rotation, inputs = turning([0.9, 0.8, 0.7, 0.6, 0.5]), gaussian(50, WIDTH, seed=2)
    inputs = inputs * torch.logspace(1, -2, WIDTH, dtype=torch.float64)  # a few directions carry nearly everything
    weight = gaussian(7, WIDTH, seed=1)
    parts = measured(rotation, weight, inputs)
    dropped = parts.chain(best_of_rank(parts, 4, odd=False))
    chain = refined(parts, dropped)
    assert chain.shape == dropped.shape
    before, after = (kept_chain_error(rotation, each, weight, inputs) for each in (dropped, chain))
    assert after < 0.5 * before
    assert parts.deviation(chain).squared_error == pytest.approx(after, rel=1e-9)


def kept_chain_error(rotation: Rotation, chain: Tensor, weight: Tensor, inputs: Tensor) -> float:
    change = dense(shortest_chain(rotation)) - dense(rotation.basis @ chain)
    return float((inputs @ (weight @ change).T).square().sum()) / len(inputs)


def test_refining_gains_nothing_on_the_rotation_itself() -> None:
    """The widest planes are the best approximation there is."""
    parts = measured(turning([0.9, 0.8, 0.7, 0.6]))
    kept = parts.chain([0, 1])
    assert parts.deviation(refined(parts, kept)).relative == pytest.approx(parts.deviation(kept).relative, rel=1e-6)


# Whole adapters.


def scene(folder: Path, chains: dict[str, Tensor], **options: object) -> tuple[HraAdapter, Checkpoint]:
    """An adapter as read from its files, and a llama."""
    rank = next(iter(chains.values())).shape[1]
    write_adapter(HraAdapter(chains, rank, **options), folder / "adapter")  # type: ignore[arg-type]  # a test's own words
    write_base(folder / "base", toy_tensors(dtype="F32"))
    return read_adapter(folder / "adapter"), open_checkpoint(folder / "base")


def random_adapter(folder: Path, rank: int, **options: object) -> tuple[HraAdapter, Checkpoint]:
    chains = {module: gaussian(d, rank, seed=seed).float() for seed, (module, d) in enumerate(linear_modules().items())}
    return scene(folder, chains, **options)


def dense_errors(before: HraAdapter, after: HraAdapter, base: Path) -> dict[Aspect, float]:
    """Relative errors over all targets, by dense matrices."""
    tensors = read_tensors(base)
    sums = dict.fromkeys(["rotation", "rotation whole", "weights", "weights whole"], 0.0)
    for module in before.chains:
        weight = torch.from_numpy(tensors[f"{module}.weight"].values().copy())
        r = _dense_of(before, module)
        left = _dense_of(after, module) if module in after.chains else torch.eye(len(r)).double()
        sums["rotation"] += float((r - left).square().sum())
        sums["rotation whole"] += float((r - torch.eye(len(r)).double()).square().sum())
        sums["weights"] += float((weight @ (r - left)).square().sum())
        sums["weights whole"] += float((weight @ r - weight).square().sum())
    return {
        "rotation": math.sqrt(sums["rotation"] / sums["rotation whole"]),
        "weights": math.sqrt(sums["weights"] / sums["weights whole"]),
    }


def _dense_of(adapter: HraAdapter, module: str) -> Tensor:
    vectors = adapter.chains[module].double()
    if not adapter.orthogonalize:
        return dense(vectors)
    q = torch.linalg.qr(vectors).Q
    product: Tensor = torch.eye(len(q)).double() - 2 * q @ q.T
    return product


CHAINS = {"even": (6, False), "odd": (5, False), "gram-schmidt": (6, True), "one": (1, False)}
ASKED = {"rank 2": {"rank": 2}, "rank 3": {"rank": 3}, "tolerance 0.3": {"tolerance": 0.3}, "all": {"rank": 9}}


@pytest.mark.parametrize("with_base", [False, True], ids=["angles", "weights"])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize(("rank", "gram_schmidt"), CHAINS.values(), ids=CHAINS)
def test_predicted_error_is_achieved_and_is_that_of_dense_matrices(
    rank: int, gram_schmidt: bool, asked: dict[str, float], with_base: bool, tmp_path: Path
) -> None:
    adapter, base = random_adapter(tmp_path, rank, orthogonalize=gram_schmidt)
    plan = plan_compression(adapter, base=base if with_base else None, **asked)  # type: ignore[arg-type]  # of the table
    report = compress_adapter(plan, tmp_path / "out")
    written = read_adapter(tmp_path / "out")
    expected = dense_errors(adapter, written, tmp_path / "base")
    for aspect in plan.aspects:
        assert report.achieved[aspect] == pytest.approx(plan.predicted[aspect], abs=STORED)
        assert report.achieved[aspect] == pytest.approx(expected[aspect], abs=STORED)
    assert written.rank <= asked.get("rank", rank)
    assert plan.predicted[plan.by] <= asked.get("tolerance", 1.0)
    assert not written.orthogonalize


def test_idle_pairs_vanish_without_an_error() -> None:
    rotation = turning([0.9, 0.4, 0.01])
    vectors = scrambled(rotation, idle_pairs=3)
    assert vectors.shape[1] == 12
    adapter = HraAdapter({"proj": vectors}, rank=12)
    plan = plan_compression(adapter, rank=12)
    assert plan.rank == 6
    torch.testing.assert_close(dense(plan.targets[0].vectors()), dense(vectors), rtol=0, atol=EXACT)
    assert any("nothing is dropped" in note for note in plan.notes)


def test_one_rank_for_all_is_filled_with_pairs_and_the_real_ranks_are_told(tmp_path: Path) -> None:
    modules = list(linear_modules())[:3]
    rotations = [turning([0.9, 0.8, 0.7], width=32), turning([0.9, 0.01, 0.01], width=32)]
    chains = {module: shortest_chain(each).float() for module, each in zip(modules, rotations, strict=False)}
    idle = gaussian(32, 3, seed=5).float()
    chains[modules[2]] = torch.cat([idle, idle.flip(1)], dim=1)  # mirrors one after the other, and back again
    adapter, _ = scene(tmp_path, chains)
    plan = plan_compression(adapter, tolerance=0.05)
    compress_adapter(plan, tmp_path / "out")
    written = read_adapter(tmp_path / "out")
    assert {target.module: target.rank for target in plan.targets} == {modules[0]: 6, modules[1]: 2}
    assert {module: u.shape[1] for module, u in written.chains.items()} == dict.fromkeys(modules[:2], 6)
    one_plane = dense(shortest_chain(rotations[1].keep([0], [])))
    torch.testing.assert_close(dense(written.chains[modules[1]]), one_plane, rtol=0, atol=STORED)
    assert any("2 to 6 reflections" in note for note in plan.notes)
    assert any("1 targets are the identity" in note for note in plan.notes)


def test_weights_choose_otherwise_than_angles(tmp_path: Path) -> None:
    """A wide turn of directions that W does not see counts for nothing."""
    tensors = toy_tensors(dtype="F32")
    name = "model.layers.0.self_attn.q_proj"
    values = tensors[f"{name}.weight"].values().copy()
    rotation = turning([0.9, 0.2], width=32)
    blind = rotation.basis[:, :2].numpy()
    write_base(tmp_path / "base", tensors | {f"{name}.weight": stored(values - values @ blind @ blind.T)})
    adapter = HraAdapter({name: shortest_chain(rotation)}, rank=4)
    by_angle = plan_compression(adapter, rank=2)
    by_weight = plan_compression(adapter, rank=2, base=open_checkpoint(tmp_path / "base"))
    assert by_angle.predicted["rotation"] < 0.3
    assert by_weight.predicted["weights"] < 0.01
    assert by_weight.predicted["rotation"] > 0.9


def test_achieved_is_measured_on_the_file_and_not_on_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of other chains than those planned is told by the number after, and by nothing else."""
    adapter, base = random_adapter(tmp_path, 8)
    plan = plan_compression(adapter, rank=4, base=base)
    compressed = outcome._compressed

    def damaged(plan: CompressionPlan) -> HraAdapter:
        made = compressed(plan)
        return replace(made, chains={module: u.flip(1) for module, u in made.chains.items()})

    monkeypatch.setattr(outcome, "_compressed", damaged)
    report = compress_adapter(plan, tmp_path / "out")
    expected = dense_errors(adapter, read_adapter(tmp_path / "out"), tmp_path / "base")["weights"]
    assert report.achieved["weights"] == pytest.approx(expected, rel=STORED)
    assert report.achieved["weights"] > 1.1 * plan.predicted["weights"]


def test_compressed_beats_the_first_columns(tmp_path: Path) -> None:
    adapter, base = random_adapter(tmp_path, 8)
    plan = plan_compression(adapter, rank=4, base=base)
    first = HraAdapter({module: u[:, :4] for module, u in adapter.chains.items()}, rank=4)
    assert plan.predicted["weights"] < 0.9 * dense_errors(adapter, first, tmp_path / "base")["weights"]


def test_an_odd_rank_keeps_an_odd_number_everywhere(tmp_path: Path) -> None:
    modules = list(linear_modules())[:2]
    chains = {module: shortest_chain(turning([0.5, 0.2 + n], 1, width=32)) for n, module in enumerate(modules)}
    adapter, _ = scene(tmp_path, chains)
    plan = plan_compression(adapter, rank=4)
    assert {target.rank for target in plan.targets} == {3}
    assert any("3 reflections are kept, not 4" in note for note in plan.notes)
    compress_adapter(plan, tmp_path / "out")
    assert read_adapter(tmp_path / "out").rank == 3


def test_what_was_trained_beside_the_chains_is_carried_and_bytes_repeat(tmp_path: Path) -> None:
    bias = torch.arange(32.0)
    name = "model.layers.0.self_attn.q_proj"
    adapter, _ = random_adapter(
        tmp_path,
        4,
        parameters={f"{name}.bias": bias, "score.weight": torch.ones(3, 32)},
        bias="hra_only",
        modules_to_save=("score",),
        base="someone/llama",
        task="SEQ_CLS",
    )
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    for output in ("first", "second"):
        compress_adapter(plan_compression(adapter, rank=2), tmp_path / output)
    written = read_adapter(tmp_path / "first")
    assert written.parameters[f"{name}.bias"].equal(bias)
    assert written.parameters["score.weight"].equal(torch.ones(3, 32))
    kept = ("bias", "modules_to_save", "base", "task")
    assert [getattr(written, each) for each in kept] == [getattr(adapter, each) for each in kept]
    assert (tmp_path / "first" / "tokenizer.json").read_text() == "{}"
    for path in (tmp_path / "first").iterdir():
        assert path.name == "README.md" or path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert "base_model: someone/llama" in (tmp_path / "first" / "README.md").read_text()


def test_temporary_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = random_adapter(tmp_path, 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match="nowhere"):
        compress_adapter(plan_compression(adapter, rank=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_left_is_refused() -> None:
    one_plane = HraAdapter({"proj": shortest_chain(turning([0.5]))}, rank=2)
    with pytest.raises(ConversionError, match="nothing would be left"):
        plan_compression(one_plane, rank=1)
    idle = gaussian(WIDTH, 1, seed=0).expand(-1, 2)
    with pytest.raises(ConversionError, match="every chain is the identity"):
        plan_compression(HraAdapter({"proj": idle}, rank=2), rank=2)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 1, "tolerance": 0.1}, {"rank": 0}, {"tolerance": 0.0}, {"tolerance": 1.0}]
)
def test_arguments_out_of_range_are_value_errors(options: dict[str, float]) -> None:
    adapter = HraAdapter({"proj": shortest_chain(turning([0.5]))}, rank=2)
    with pytest.raises(ValueError, match="expected"):
        plan_compression(adapter, **options)  # type: ignore[arg-type]  # wrong on purpose


def test_components_of_a_chain_are_those_of_its_rotation() -> None:
    """Through the file's own way: compact WY, decompose, leave one plane out."""
    rotation = turning([0.9, 0.4])
    found = decompose(compact_wy(scrambled(rotation)))
    parts = components(found, Measure())
    left = dense(found.basis @ parts.chain([1]))
    torch.testing.assert_close(left, dense(shortest_chain(rotation.keep([1], []))), rtol=0, atol=EXACT)
