"""Counters for programs of one launch that wait for one another.

A counter must be zero, or left by a finished meeting, and no two launches that run at the same time may share one. So
each stream has counters of its own, since a stream runs one launch after another; and each call that is captured in a
CUDA graph has some for good, since graphs are replayed beside streams and one graph never beside itself.

This is the one state that the kernels keep from call to call: a device's counters are made on first use, 2 MB.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from hra_export.kernels.tuning import MOST_TILES_TOGETHER

COUNTERS = 2**19
# Pointers that are multiples of 16 bytes are one kind to Triton's compiler, others another: a second compilation.
ALIGNED = 4


@dataclass
class Counters:
    """The counters of one device.

    Attributes:
        all: (counters,), int32.
        of_stream: those of each stream that had some, by the stream's address.
        given: how many have been given away.
    """

    all: Tensor
    of_stream: dict[int, Tensor] = field(default_factory=dict)
    given: int = 0
    _lock: Lock = field(default_factory=Lock)

    def take(self, tiles: int, stream: int, *, is_captured: bool) -> Tensor | None:
        """Counters for one launch, one for each tile at least; None when too few are left.

        Args:
            tiles: of the launch.
            stream: its address.
            is_captured: the launch goes into a graph, and is repeated whenever the graph is replayed.
        """
        with self._lock:
            found = None if is_captured else self.of_stream.get(stream)
            if found is None:
                wanted = tiles if is_captured else MOST_TILES_TOGETHER
                last = self.given + -(-wanted // ALIGNED) * ALIGNED
                if last > len(self.all):
                    return None
                found, self.given = self.all[self.given : last], last
                if not is_captured:
                    self.of_stream[stream] = found
        return found


def counters(device: torch.device, tiles: int) -> Tensor | None:
    """Counters for a launch of some tiles, `MOST_TILES_TOGETHER` at most, on the device's current stream.

    None when there are none to be had: all are given away, or a graph is captured before the device's were made. Made
    then, they would lie in the graph's own memory.
    """
    is_captured = torch.cuda.is_current_stream_capturing()
    if is_captured and device not in _made:
        return None
    stream = torch.cuda.current_stream(device).cuda_stream
    with _making:
        found = _counters(device)
    return found.take(tiles, stream, is_captured=is_captured)


_made: set[torch.device] = set()
_making = Lock()


@functools.cache
def _counters(device: torch.device) -> Counters:
    found = Counters(_lasting_zeros(COUNTERS, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams use them too
    _made.add(device)
    return found


def _lasting_zeros(count: int, device: torch.device) -> Tensor:
    """Zeros (count,), int32, made by a thread of its own.

    While a program under `torch.compile(mode="reduce-overhead")` warms up for its graphs, all that its thread allocates
    lies in the graphs' memory, which is used anew for every run.
    """
    with ThreadPoolExecutor(1) as another:
        return another.submit(lambda: torch.zeros(count, dtype=torch.int32, device=device)).result()
