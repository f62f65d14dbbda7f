"""The forward kernel against the explicit chain in float64: on a CPU in Triton's interpreter, compiled on a GPU."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hra_export import kernels
from hra_export.kernels import barriers, forward, tuning
from hra_export.kernels.operands import IS_COMPILED
from hra_export.kernels.tuning import Exchange, Gpu, Launch, Shape, Tile
from hra_export.reflection import Factors, factor, reflect_rows

DEVICE = "cuda" if IS_COMPILED else "cpu"
# The interpreter cuts float32 to bfloat16 where a GPU rounds: one unit in the last place instead of half of one.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Of the norm of z: the coefficients and z round once each, and |S| ≤ 4 with cancelling pairs weighs the first. Float32
# sums have d + 2 r roundings more, which grow like their square root: at most √513 here, times 4.
ROUNDINGS = {torch.float32: 100, torch.float16: 4, torch.bfloat16: 4}
SIZES = [(1, 1), (3, 7), (65, 100), (1, 257), (3, 257), (16, 33)]
RANKS = [1, 2, 8, 17, 32, 64, 128]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def chain(d: int, r: int, dtype: torch.dtype, *, seed: int = 1) -> Factors:
    """A chain of random vectors, every other one near its neighbour, as training leaves them."""
    vectors = gaussian(d, r, seed=seed)
    vectors[:, 1::2] = vectors[:, : 2 * (r // 2) : 2] + 0.1 * vectors[:, 1::2]
    return factor(vectors, dtype)


def explicit(u: Tensor) -> Tensor:
    """H_1 H_2 … H_r in float64, one reflection after another."""
    product = torch.eye(u.shape[0], dtype=torch.float64, device=u.device)
    for column in u.double().T:
        product = product - 2 * torch.outer(product @ column, column) / column.square().sum()
    return product


def holds(found: tuple[Tensor, Tensor], x: Tensor, factors: Factors) -> None:
    """z is x Rᵀ, and M = Sᵀ Uᵀ xᵀ, but for roundings."""
    z, m = found
    d, r = factors.u.shape
    assert (z.shape, z.dtype, z.is_contiguous()) == (x.shape, x.dtype, True)
    assert (m.shape, m.dtype) == ((r, x.numel() // d), x.dtype)
    rows = x.double().reshape(-1, d)
    products = rows @ factors.u.double() @ factors.s.double()
    bound = ROUNDINGS[x.dtype] * UNIT[x.dtype]
    exact = rows @ explicit(factors.u).T
    assert (z.double().reshape(-1, d) - exact).norm() <= bound * exact.norm()
    assert (m.double().T - products).norm() <= bound * products.norm()


@pytest.mark.parametrize(("r", "size"), [(r, size) for r, size in zip(RANKS, itertools.cycle(SIZES), strict=False)])
@pytest.mark.parametrize("dtype", UNIT)
def test_reflect_is_x_times_the_transposed_chain(dtype: torch.dtype, r: int, size: tuple[int, int]) -> None:
    n, d = size
    x, factors = gaussian(n, d).to(dtype), chain(d, r, dtype)
    holds(forward.reflect(x, factors.u, factors.s), x, factors)


@pytest.mark.slow
@pytest.mark.parametrize("size", [*SIZES, (2, 1000), (130, 300)])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", UNIT)
def test_reflect_of_every_size(dtype: torch.dtype, r: int, size: tuple[int, int]) -> None:
    n, d = size
    if r > d:
        pytest.skip("no adapter has more reflections than features; their coefficients outgrow x, and cancel")
    x, factors = gaussian(n, d).to(dtype), chain(d, r, dtype)
    for splits, exchange in LAUNCHES:
        tile = tuning.reasoned_tile(Shape(1, n, d, r, x.element_size()))
        holds(forward.reflect(x, factors.u, factors.s, launch=Launch(tile, splits, exchange)), x, factors)


# On a GPU, "together" meets at a barrier; the interpreter runs its two halves in turn.
LAUNCHES: list[tuple[int, Exchange]] = [(1, "alone"), (4, "alone"), (1, "in turn"), (8, "in turn"), (4, "together")]


@pytest.mark.parametrize(("splits", "exchange"), LAUNCHES)
@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize("dtype", UNIT)
def test_every_way_to_the_coefficients_gives_the_same(
    dtype: torch.dtype, rows: int, splits: int, exchange: Exchange
) -> None:
    """Some of the 8 splits have no columns; 17 rows leave the last tile almost empty."""
    x, factors = gaussian(2 if rows == 1 else 17, 40).to(dtype), chain(40, 9, dtype)
    z, m = forward.reflect(x, factors.u, factors.s, launch=Launch(Tile(rows, 16, 4, 2), splits, exchange))
    holds((z, m), x, factors)


def test_more_partial_sums_than_are_read_at_once_are_all_added() -> None:
    x, factors = gaussian(3, 130), chain(130, 100, torch.float32)
    assert forward.group_of(8, 16 * 128) < 8
    found = forward.reflect(x, factors.u, factors.s, launch=Launch(Tile(16, 16, 4, 2), 8, "in turn"))
    holds(found, x, factors)


@pytest.mark.parametrize("exchange", ["alone", "in turn"])
def test_coefficients_are_those_of_reflect(exchange: Exchange) -> None:
    x, factors = gaussian(5, 40), chain(40, 9, torch.float32)
    launch = Launch(Tile(16, 16, 4, 2), 2, exchange)
    m = forward.reflect(x, factors.u, factors.s, launch=launch)[1]
    assert torch.equal(forward.coefficients(x, factors.u, factors.s, launch=launch), m)


STRIDED = {
    "transposed": lambda: gaussian(40, 5).T,
    "every other column": lambda: gaussian(5, 80)[:, ::2],
    "columns of a wider one": lambda: gaussian(5, 64)[:, 8:48],
    "batch and tokens swapped": lambda: gaussian(3, 4, 40).transpose(0, 1),
    "one row for all": lambda: gaussian(1, 40).expand(5, 40),
    "one number for all": lambda: gaussian(1, 1).expand(5, 40),
    "a single row": lambda: gaussian(40),
    "three strides": lambda: gaussian(4, 3, 2, 40).permute(2, 1, 0, 3),
}


@pytest.mark.parametrize("name", STRIDED)
def test_reflect_takes_x_as_it_lies(name: str) -> None:
    x, factors = STRIDED[name](), chain(40, 4, torch.float32)
    holds(forward.reflect(x, factors.u, factors.s), x, factors)
    assert (forward._rows_of(x)[-1] is x) == (name != "three strides")


def test_reflect_takes_factors_as_they_lie() -> None:
    """U that is not stored as Uᵀ, and S transposed, as for the gradient of x: R instead of Rᵀ."""
    x, factors = gaussian(3, 40), chain(40, 4, torch.float32)
    z, _ = forward.reflect(x, factors.u.contiguous(), factors.s.T)
    exact = x.double() @ explicit(factors.u)
    assert (z - exact).norm() <= ROUNDINGS[torch.float32] * UNIT[torch.float32] * exact.norm()


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_no_rows_are_no_work(shape: tuple[int, ...]) -> None:
    factors = chain(40, 4, torch.float32)
    z, m = forward.reflect(gaussian(*shape), factors.u, factors.s)
    assert (z.shape, m.shape) == (shape, (4, 0))
    stacked = Factors(factors.u[None], factors.s[None])
    empty = gaussian(0, 3, 40), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert forward.reflect_rows(*empty, stacked.u, stacked.s)[0].shape == (0, 3, 40)


def stacked_chains(count: int, d: int, r: int, dtype: torch.dtype) -> Factors:
    return factor(torch.stack([gaussian(d, r, seed=seed) for seed in range(count)]), dtype)


@pytest.mark.parametrize("shape", [(5, 33), (5, 1, 33), (5, 18, 33), (5, 2, 3, 33)])
@pytest.mark.parametrize("dtype", UNIT)
def test_each_entry_of_a_batch_has_its_own_chain(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, factors = gaussian(*shape).to(dtype), stacked_chains(3, 33, 5, dtype)
    index = torch.tensor([2, 0, 0, 1, 2], device=DEVICE)
    z, m = forward.reflect_rows(x, index, factors.u, factors.s)
    columns = m.reshape(5, 5, -1).movedim(1, 0)  # of each entry
    for i, j in enumerate(index.tolist()):
        holds((z[i], columns[i]), x[i], Factors(factors.u[j], factors.s[j]))


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("wrong", [-1, 3, 2**62, -(2**62)])
def test_entries_without_a_chain_are_nan_and_read_nothing(tokens: int, wrong: int) -> None:
    x, factors = gaussian(3, tokens, 33), stacked_chains(3, 33, 5, torch.float32)
    index = torch.tensor([1, wrong, 2], device=DEVICE)
    for launch in (None, Launch(Tile(16, 16, 4, 2), 4, "in turn")):
        z, m = forward.reflect_rows(x, index, factors.u, factors.s, launch=launch)
        assert z[1].isnan().all()
        assert m.reshape(5, 3, tokens)[:, 1].isnan().all()
        assert not z[[0, 2]].isnan().any()
    plain = torch.ops.hra.reflect_rows(x, index, factors.u, factors.s)
    torch.testing.assert_close(z, plain, rtol=0, atol=2e-5, equal_nan=True)


def test_public_reflect_rows_is_each_chain_and_identity_without_one() -> None:
    factors = stacked_chains(2, 33, 4, torch.float32)
    u = torch.cat([factors.u, torch.zeros_like(factors.u[:1])])
    with_base = Factors(u, torch.cat([factors.s, torch.zeros_like(factors.s[:1])]))
    x, index = gaussian(4, 3, 33), torch.tensor([1, 2, 0, 2], device=DEVICE)
    z = reflect_rows(x, index, with_base)
    assert torch.equal(z[[1, 3]], x[[1, 3]])
    for i, j in ((0, 1), (2, 0)):
        exact = x[i].double() @ explicit(factors.u[j]).T
        assert (z[i] - exact).norm() <= ROUNDINGS[torch.float32] * UNIT[torch.float32] * exact.norm()
    torch.library.opcheck(torch.ops.hra.reflect_rows, (x, index, with_base.u, with_base.s))


def test_public_reflect_rows_refuses_what_does_not_fit() -> None:
    factors = stacked_chains(2, 33, 4, torch.float32)
    x, index = gaussian(4, 33), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"index: expected int64 \(4,\), got torch.int32"):
        reflect_rows(x, index.int(), factors)
    with pytest.raises(ValueError, match=r"x: expected \(b, …, 33\)"):
        reflect_rows(x[:, :32], index, factors)
    with pytest.raises(ValueError, match=r"factors: expected u \(a, d, r\)"):
        reflect_rows(x, index, Factors(factors.u[0], factors.s[0]))


@pytest.mark.skipif(IS_COMPILED, reason="a GPU is there, and taken")
def test_kernels_are_for_gpus_alone() -> None:
    assert not kernels.take(gaussian(3, 8), 4)


# How a call is launched.

GPUS = [Gpu("sm80", 108), Gpu("sm89", 58), Gpu("sm90", 132), Gpu("sm100", 148)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.kind)
def test_decoding_is_one_launch_whose_programs_are_all_there(gpu: Gpu) -> None:
    """A barrier deadlocks when a program waits for one that has no processor."""
    many = itertools.product((1, 2, 9, 16, 17, 64), (1, 576, 4096, 14336, 28672), (1, 8, 32, 128), (2, 4))
    for rows, features, rank, itemsize in many:
        shape = Shape(1, rows, features, rank, itemsize)
        launch = tuning.choose(shape, gpu)
        tiles = tuning.count_tiles(shape, launch.tile)
        assert launch.exchange != "in turn", shape
        assert launch.splits == tuning.power_of_2(launch.splits)
        assert launch.exchange == "alone" or tiles * launch.splits <= gpu.processors
        assert launch.exchange == "alone" or tiles <= tuning.MOST_TILES_TOGETHER


def test_large_factors_are_shared_and_small_ones_are_not() -> None:
    gpu = Gpu("sm90", 132)
    assert tuning.reasoned(Shape(1, 1, 4096, 8, 2), gpu).exchange == "alone"
    assert tuning.reasoned(Shape(1, 1, 14336, 64, 2), gpu).exchange == "together"
    assert tuning.reasoned(Shape(1, 8192, 4096, 32, 2), gpu) == Launch(tuning.MANY_ROWS[2, 32], 1, "alone")


def test_measured_launch_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, gpu = Shape(1, 3, 4000, 8, 2), Gpu("sm90", 132)
    launch = Launch(Tile(16, 64, 4, 2), 2, "alone")
    monkeypatch.setattr(tuning, "MEASURED", {tuning.Case("sm90", 1, 4, 4096, 8, 2): launch})
    assert tuning.choose(shape, gpu) is launch
    assert tuning.choose(shape, Gpu("sm80", 108)) is not launch


def test_streams_keep_their_counters_and_captured_calls_have_their_own() -> None:
    held = barriers.Counters(torch.zeros(2 * tuning.MOST_TILES_TOGETHER + 8, dtype=torch.int32))
    calls = [(10, False), (20, False), (10, False), (10, True), (10, True), (30, False), (10, True), (20, False)]
    found = [held.take(3, stream, is_captured=captured) for stream, captured in calls]
    # Places in the order they are given; three counters take four, so that each place is aligned.
    assert [None if place is None else place.storage_offset() for place in found] == [0, 32, 0, 64, 68, None, None, 32]
    assert [len(place) >= 3 for place in found if place is not None] == [True] * 6


def test_counters_are_not_made_in_a_thread_whose_memory_is_a_graphs() -> None:
    """Inference mode is a thread's own, as the pool of memory is that cudagraph trees let it allocate from."""
    with torch.inference_mode():
        made = barriers._lasting_zeros(8, torch.device(DEVICE))
    assert not made.is_inference()
    assert made.tolist() == [0] * 8


@pytest.mark.parametrize(("exchange", "phases"), [("alone", [0]), ("in turn", [1, 2]), ("together", [3])])
def test_only_programs_that_meet_are_launched_as_a_whole(
    exchange: Exchange, phases: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton writes options into its cache as JSON, where all but plain values become objects, which are true."""
    launched: list[dict[str, object]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda *arguments, **options: launched.append(options)

    monkeypatch.setattr(forward, "reflection_kernel", Kernel())
    monkeypatch.setattr(forward, "IS_COMPILED", True)
    monkeypatch.setattr(barriers, "counters", lambda device, tiles: torch.zeros(tiles, dtype=torch.int32))
    factors = chain(40, 4, torch.float32)
    forward.reflect(gaussian(3, 40), factors.u, factors.s, launch=Launch(Tile(16, 16, 4, 2), 2, exchange))
    options = [(each["PHASE"], each["launch_cooperative_grid"]) for each in launched]
    assert json.loads(json.dumps(options, default=vars)) == [[phase, exchange == "together"] for phase in phases]


@pytest.mark.parametrize("wrong", ["features", "rank of S", "dtype"])
def test_factors_that_do_not_fit_are_refused_before_they_are_read(wrong: str) -> None:
    x, factors = gaussian(3, 40), chain(40, 4, torch.float32)
    u, s = factors.u, factors.s
    u = {"features": u[:32], "rank of S": u, "dtype": u.half()}[wrong]
    with pytest.raises(ValueError, match="expected x"):
        forward.reflect(x, u, s[:3, :3] if wrong == "rank of S" else s)


def compile_ahead(*arguments: str) -> list[dict[str, object]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.forward_compilation", *arguments]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in said.splitlines()]


# What sm86 and sm89 give one program; sm80 and sm90 give more.
SHARED_BYTES = 99 * 1024


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_compiled_kernel_spills_nothing(which: str) -> None:
    found = compile_ahead(which)
    assert len(found) >= 4
    assert [case for case in found if case["spilled_bytes"] or int(str(case["shared_bytes"])) > SHARED_BYTES] == []
