"""Kill this process at a chosen system call, as a power switch would."""

import fcntl
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from hra_export import filesystem

CALLS = (
    *("open", "close", "write", "pwrite", "fsync", "ftruncate", "posix_fallocate", "copy_file_range"),
    *("rename", "replace", "unlink", "mkdir", "rmdir", "scandir"),
)
# Calls that can be torn: the position of what tells how much they write.
AMOUNTS = {"write": 1, "pwrite": 1, "copy_file_range": 2}


def die() -> None:
    """End as a power switch would."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point: int) -> None:
    """Patch this process to die before its `point`-th call; a write counts twice, the second time it is torn."""
    count = 0
    lock = threading.Lock()

    def step() -> bool:
        nonlocal count
        with lock:
            count += 1
            return count == point

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if step():
                die()
            return call(*args, **kwargs)

        return wrapper

    def torn(call: Callable[..., Any], position: int) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            if step():
                die()
            if step():
                call(*args[:position], _half(args[position]), *args[position + 1 :])
                die()
            return call(*args)

        return wrapper

    for name in CALLS:
        call = getattr(os, name)
        setattr(os, name, torn(call, AMOUNTS[name]) if name in AMOUNTS else counted(call))
    fcntl.flock = counted(fcntl.flock)
    filesystem.exchange = counted(filesystem.exchange)


def _half(amount: Any) -> Any:
    return amount // 2 if isinstance(amount, int) else bytes(amount)[: len(amount) // 2]


def lives(work: Callable[[], None], *, point: int = 0) -> bool:
    """Run `work` in a forked child that is to die at `point`; whether it lived to its end.

    Raises:
        AssertionError: it ended by itself with an error; its traceback is on stderr.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            kill_at(point)
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"point {point}: the run failed by itself"
    return not os.WIFSIGNALED(status)
