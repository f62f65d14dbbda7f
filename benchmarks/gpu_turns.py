"""Timing kernels on a GPU: contenders that take turns on rotating copies of their data, eager and in CUDA graphs.

A kernel that is called again on the same data finds it in the L2 cache; in a model it does not, for the weights of all
other layers have passed. So every contender walks over copies of its data that are larger together than the cache.
Where they are so small that `MAX_COPIES` of them fit into it, launches decide and not memory.

Times are between two events on the stream, a whole walk at a time, over the number of calls. In eager mode the
processor launches every kernel, as an ordinary program does; a graph is recorded once and replayed.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.ceilings import event_seconds

MAX_COPIES = 256
CACHES = 2  # copies are so many times the L2 cache together
TURN_SECONDS = 0.004
MODES = ("eager", "graph")

Call = Callable[[], object]


@dataclass(frozen=True)
class Seconds:
    """Of one call, in every turn."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle turn."""
        return statistics.median(self.turns)


@dataclass
class Walk:
    """One contender: its call on every copy, or the replay of a graph of them."""

    calls: Sequence[Call]
    count: int
    taken: list[float] = field(default_factory=list)
    repeats: int = 1

    def warm_up(self) -> None:
        """Run it, and find how often it must run to fill a turn."""
        event_seconds(self.calls)
        self.repeats = max(1, int(TURN_SECONDS / max(event_seconds(self.calls), 1e-7)))

    def turn(self) -> None:
        """One turn that counts."""
        self.taken.append(event_seconds([*self.calls] * self.repeats) / self.repeats / self.count)


def copies(bytes_each: float) -> int:
    """How many copies of some data are larger than the L2 cache."""
    cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return max(2, min(MAX_COPIES, round(CACHES * cache / bytes_each) + 1))


def take_turns(
    contenders: Mapping[str, Callable[[int], object]], count: int, rounds: int
) -> tuple[dict[str, dict[str, Seconds]], list[str]]:
    """Contender → mode → seconds of a call, and a line for each that failed or cannot be recorded.

    Args:
        contenders: name → its call on a copy of its data.
        count: how many copies there are.
        rounds: turns of each; a round goes the way back of the one before it.
    """
    walks: dict[str, dict[str, Walk]] = {}
    failures = []
    for name, call in contenders.items():
        calls = [partial(call, i) for i in range(count)]
        try:
            walks[name] = {mode: _walk(calls, mode) for mode in MODES}
            for walk in walks[name].values():
                walk.warm_up()
        except Exception as error:  # out of memory, compilers; Triton's are no RuntimeError
            walks.pop(name, None)
            failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    every = [walk for modes in walks.values() for walk in modes.values()]
    for turn in range(rounds):
        for walk in every[:: 1 if turn % 2 == 0 else -1]:
            walk.turn()
    taken = {name: {mode: Seconds(tuple(walk.taken)) for mode, walk in modes.items()} for name, modes in walks.items()}
    return taken, failures


def _walk(calls: Sequence[Call], mode: str) -> Walk:
    if mode == "eager":
        return Walk(calls, len(calls))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries and compilers do their own setting up outside of the record
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Walk([graph.replay], len(calls))
