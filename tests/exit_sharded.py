"""One of several processes whose last collective is slow to be put away, started by torchrun, as the tests need it."""

import os
from pathlib import Path

from torch.distributed.device_mesh import init_device_mesh

from hra_export.cli import main
from hra_export.training import processes


def starve_gloo() -> int:
    """Let gloo's threads run when nothing else wants the processor; how many there are."""
    threads = [task for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]
    for task in threads:
        os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    return len(threads)


if __name__ == "__main__":
    processes.join("cpu")
    kept = init_device_mesh("cpu", (2,))  # as DTensor's caches keep it
    processes.from_main(lambda: None)
    assert starve_gloo() > 1
    processes.from_main(lambda: None)
    processes.leave()
    main(["--version"])
