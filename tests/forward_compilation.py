"""`python -m tests.forward_compilation [all]`: compiles the forward kernel for every tile of the tuning table.

One line of JSON for each: what it was, and what it takes. Without `all`, the tiles of bfloat16 at r = 8 for sm90 alone.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import triton.language as tl

from hra_export.kernels import forward, tuning
from hra_export.kernels.reflection_kernel import ALONE, FINISH, PARTIAL, TOGETHER, reflection_kernel
from hra_export.kernels.tuning import Gpu, Launch, Shape
from tests.kernel_compilation import Resources, compiled

TYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
PHASES = {"alone": (ALONE,), "together": (TOGETHER,), "in turn": (PARTIAL, FINISH)}
PROCESSORS = {80: 108, 90: 132, 100: 148}
ALIGNED = ["d", "slice_columns", "x_outer", "x_inner", "u_chain", "u_stride", "s_chain"]
POINTERS = {"s": "*fp32", "index": "*i64", "partials": "*fp32", "counters": "*i32"}


@dataclass(frozen=True)
class Case:
    """One compilation."""

    capability: int
    dtype: str
    groups: int
    rows: int
    features: int
    rank: int

    @property
    def launch(self) -> Launch:
        """As the table has it."""
        itemsize = TYPES[self.dtype].primitive_bitwidth // 8
        shape = Shape(self.groups, self.rows, self.features, self.rank, itemsize)
        return tuning.choose(shape, Gpu(f"sm{self.capability}", PROCESSORS[self.capability]))


def cases(*, every: bool) -> Iterator[Case]:
    """Decoding and prefill, a batch of chains; small and large factors."""
    if not every:
        yield from (Case(90, "bf16", 1, rows, 4096, 8) for rows in (1, 16, 4096))
        yield Case(90, "bf16", 1, 1, 14336, 64)
        return
    for capability in (80, 90):
        for dtype in TYPES:
            for rank in (1, 8, 17, 64, 128):
                for rows in (1, 16, 64, 256, 4096):
                    yield Case(capability, dtype, 1, rows, 14336, rank)
                yield Case(capability, dtype, 64, 1, 4096, rank)


def resources(case: Case) -> Iterator[Resources]:
    """Of each launch."""
    launch = case.launch
    tile, rank = launch.tile, tuning.padded_rank(case.rank, rows=launch.tile.rows)
    types = dict.fromkeys(reflection_kernel.arg_names, "i32") | POINTERS
    types |= dict.fromkeys(("x", "u", "z", "m"), f"*{case.dtype}")
    constants = {
        "ROWS": tile.rows,
        "RANK": rank,
        "COLUMNS": tile.columns,
        "SPLITS": launch.splits,
        "GROUP": forward.group_of(launch.splits, tile.rows * rank),
        "INDEXED": case.groups > 1,
        "WRITES_Z": True,
        "OPERAND": TYPES[case.dtype],
        **dict.fromkeys(("x_column", "u_column", "s_column"), 1),  # Triton makes a constant of an argument that is 1
    }
    for phase in PHASES[launch.exchange]:
        yield compiled(
            reflection_kernel,
            types,
            constants | {"PHASE": phase.value},
            capability=case.capability,
            aligned=ALIGNED,
            num_warps=tile.warps,
            num_stages=tile.stages,
            launch_cooperative_grid=phase.value == TOGETHER.value,
        )


if __name__ == "__main__":
    for case in cases(every="all" in sys.argv):
        for found in resources(case):
            print(json.dumps(asdict(case) | {"launch": asdict(case.launch)} | asdict(found)), flush=True)  # noqa: T201  a script
