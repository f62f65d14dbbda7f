"""Signals during work that can stop between two steps and be taken up again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """What a signal asked for.

    Attributes:
        number: of the first signal; 0 until then.
        is_armed: a signal is noted only, instead of ending the process.
    """

    number = 0
    is_armed = False

    def is_asked(self) -> bool:
        """Whether to stop after this step."""
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """130 or 143, as a shell gives them; 143 where another process got the signal."""
        return 128 + (self.number or signal.SIGTERM)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM once armed; before, and the second time, do what was done before the block."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if stop.is_armed and not stop.is_asked():
            stop.number = number
        elif callable(handler):
            handler(number, frame)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
