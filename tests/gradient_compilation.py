"""Compile the kernels of the backward pass and of the factors, and print what their machine code takes, as JSON.

python -m tests.gradient_compilation CAPABILITY RANK fp32|fp16|bf16
"""

import dataclasses
import json
import sys
from typing import Any

import triton.language as tl

from hra_export.kernels import factors, gradient
from hra_export.kernels.factors_kernel import factor_kernel
from hra_export.kernels.gradient_kernel import accumulate, finish
from tests.kernel_compilation import compiled

ALIGNED = ("d", "n", "r", "rows_of_split", "grads_row", "x_row", "chain_stride", "row_stride")


def resources(capability: int, rank: int, dtype: str) -> list[dict[str, Any]]:
    """Of each kernel, for padded rank and the dtype of activations; vectors are float32."""
    itemsize = 4 if dtype == "fp32" else 2
    operand = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
    blocks = gradient.blocks_for(rank, itemsize)
    small = dict.fromkeys(("grads", "x", "m", "k", "u"), f"*{dtype}")
    full = dict.fromkeys(("vectors", "partials", "grams", "lengths", "grad_vectors", "s"), "*fp32")
    integers = (
        "grads_row", "x_row", "vectors_row", "n", "d", "r", "rows_of_split", "splits", "tiles",
        "chain_stride", "row_stride",
    )  # fmt: skip
    types = {**small, **full, **dict.fromkeys(integers, "i32")}
    shape = {"ROWS": blocks.rows, "COLUMNS": blocks.columns, "RANK": rank, "OPERAND": operand}
    units = {"grads_column": 1, "x_column": 1, "vectors_column": 1}
    runs: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        (accumulate, {**shape, **units}, {"num_warps": blocks.warps, "num_stages": blocks.stages}),
        (finish, {"COLUMNS": gradient.FINISHED_COLUMNS, "RANK": rank}, {}),
        (
            factor_kernel,
            {"column_stride": 1, "OPERAND": operand, "COLUMNS": factors.STEP // rank, "RANK": rank},
            {"num_warps": factors.warps_for(rank), "num_stages": 2},
        ),
    ]
    return [
        {"kernel": kernel.__name__}
        | dataclasses.asdict(compiled(kernel, types, constants, capability=capability, aligned=ALIGNED, **options))
        for kernel, constants, options in runs
    ]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(resources(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
