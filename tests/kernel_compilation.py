"""Ahead-of-time compilation of a Triton kernel, without a GPU: what the machine code takes of registers and memory.

Only in a process where Triton does not interpret: without TRITON_INTERPRET in its environment.
"""

import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Resources:
    """Of one kernel.

    Attributes:
        registers: of a thread.
        spilled_bytes: of a thread: what it keeps in memory for want of registers.
        shared_bytes: of a program.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int,
    aligned: Collection[str] = (),
    **options: Any,
) -> Resources:
    """Compile a kernel.

    Args:
        kernel: a function under `triton.jit`.
        types: of its arguments, `*fp32`, `*bf16`, `i32`; in any order.
        constants: its other arguments, compile-time constants.
        capability: 80, 90, 100.
        aligned: integers that are multiples of 16, as pointers are.
        options: `num_warps`, `num_stages`.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    divisible = [name for name in names if signature[name].startswith("*") or name in aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack, local = _usage(built.asm["cubin"])
    return Resources(registers, stack + local, built.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found, said
    registers, stack, local = map(int, found.groups())
    return registers, stack, local
