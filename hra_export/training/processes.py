"""One process or several, as `accelerate launch` or `torchrun` started them: who speaks, who waits, what all agree on.

Every function here is a meeting: all processes of a run must come to it. With one process it costs nothing.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hra_export.errors import HraExportError

T = TypeVar("T")


def join(device: str) -> None:
    """Meet the other processes of this run, if there are any.

    Args:
        device: `cpu` keeps off the GPUs; any other word lets accelerate choose one for each process.
    """
    PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def leave() -> None:
    """End the meeting; without it torch warns at exit."""
    if PartialState._shared_state and PartialState().num_processes > 1:
        PartialState().destroy_process_group()


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return bool(PartialState().is_main_process)


def count() -> int:
    """How many processes there are."""
    return int(PartialState().num_processes)


def wait() -> None:
    """Wait for all."""
    PartialState().wait_for_everyone()


def from_main(work: Callable[[], T]) -> T:
    """Run `work` in the main process alone, and give its result, which must be picklable, to all.

    Raises:
        HraExportError: raised by `work`, and here in every process.
    """
    result: list[T | HraExportError | None] = [None]
    if is_main():
        try:
            result = [work()]
        except HraExportError as error:
            result = [error]
    if count() > 1:
        broadcast_object_list(result)
    (answer,) = result
    if isinstance(answer, HraExportError):
        raise answer
    return answer  # type: ignore[return-value]  # None only when `work` returns it


def together(work: Callable[[], T]) -> T:
    """Run `work` in every process, and go on in none unless it has succeeded in all.

    Raises:
        HraExportError: raised by `work` in any of them, and here in every process, once all have ended it.
    """
    own: list[HraExportError | None] = [None]
    try:
        result = work()
    except HraExportError as error:
        own = [error]
    for failure in gather_object(own) if count() > 1 else own:
        if failure is not None:
            raise failure
    return result


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    if count() == 1:
        return flag
    state = PartialState()
    votes = torch.tensor([int(flag)], device=state.device)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return bool(votes.item())
