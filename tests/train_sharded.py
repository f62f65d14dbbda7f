"""The command line in one of several processes, started by torchrun, as the tests need it.

ACCELERATE_USE_FSDP in the environment makes accelerate shard on the CPU, which it offers for GPUs alone; the rest is as
`accelerate launch --use_fsdp` sets it up. STOP_AT=N sends SIGTERM to the second process alone, in its N-th step.
"""

import os
import signal
from importlib import import_module
from typing import Any

from hra_export.cli import main
from hra_export.training.callbacks import Watch

accelerate = import_module("accelerate")  # patched here; what the tests test is imported elsewhere


def shard_on_cpu() -> None:
    """Let accelerate take FSDP for granted once it was asked for."""
    real = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        real(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = accelerate.DistributedType.FSDP
            accelerate.PartialState._shared_state["distributed_type"] = self.distributed_type
            self.fsdp_plugin = fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = init


def stop_at(step: int) -> None:
    """A scheduler's signal need not reach all processes in the same step."""
    real = Watch.after_step

    def after_step(self: Watch, state: Any, control: Any) -> None:
        if state.global_step == step and accelerate.PartialState().process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, state, control)

    Watch.after_step = after_step  # type: ignore[method-assign]  # patched


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpu()
    if step := os.environ.get("STOP_AT"):
        stop_at(int(step))
    main()
