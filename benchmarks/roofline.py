"""Rooflines: the bytes and operations that every kernel must move, and the least time that takes on a machine.

    floor            max(bytes / bandwidth, operations / peak): no kernel is faster with its data in main memory
    with launches    the floor, and one launch for every kernel: what a stream of dependent kernels can reach

Bytes are those of main memory, each tensor once, whatever a cache keeps. A tensor that one kernel writes and the next
one reads counts twice. An operation is an addition or a multiplication. `rows_cached` leaves the activations out of
the bytes: on a CPU, and for few rows on a GPU, the kernel before has just left them in a cache.

Letters: n rows of activations, d in_features, o out_features, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
WIDE_BYTES = 4  # S, and what is trained, are float32 whatever the activations are
INDEX_BYTES = 8


@dataclass(frozen=True)
class Shape:
    """One reflection in front of one product.

    Attributes:
        rows, features, outputs, rank: n, d, o, r.
        dtype: of the activations, a key of `ITEM_BYTES`.
    """

    rows: int
    features: int
    outputs: int
    rank: int
    dtype: str = "float16"

    @property
    def item(self) -> int:
        """Bytes of one activation."""
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Work:
    """What has to be done, and in how many kernels."""

    bytes: float
    operations: float
    launches: int = 1

    def __add__(self, other: "Work") -> "Work":
        """One after the other."""
        return Work(self.bytes + other.bytes, self.operations + other.operations, self.launches + other.launches)


@dataclass(frozen=True)
class Machine:
    """What a machine can do at most.

    Attributes:
        name: of the device.
        bandwidth: bytes a second of main memory.
        peaks: operations a second of a matrix product, by dtype.
        launch_seconds: from one kernel's end to the next one's, both launched by a program.
        replay_seconds: the same in a CUDA graph.
        source: where the figures are from.
    """

    name: str
    bandwidth: float
    peaks: Mapping[str, float]
    launch_seconds: float = 0.0
    replay_seconds: float = 0.0
    source: str = ""

    def floor(self, work: Work, dtype: str) -> float:
        """Seconds without launches."""
        return max(work.bytes / self.bandwidth, work.operations / self.peaks[dtype])

    def with_launches(self, work: Work, dtype: str, *, recorded: bool) -> float:
        """Seconds with a launch for every kernel, in a CUDA graph or not."""
        each = self.replay_seconds if recorded else self.launch_seconds
        return self.floor(work, dtype) + work.launches * each

    def balance(self, dtype: str) -> float:
        """Operations a byte at which both limits meet."""
        return self.peaks[dtype] / self.bandwidth


# Dense products with float32 accumulation; float32 on the CUDA cores, not TF32. The launches are assumptions, of the
# order that is usually seen; a benchmark on a machine measures its own.
LAUNCH, REPLAY = 3.0e-6, 1.3e-6
H100 = Machine(
    "H100 SXM", 3.35e12, {"float32": 67e12, "float16": 989e12, "bfloat16": 989e12}, LAUNCH, REPLAY, "data sheet"
)
A100 = Machine(
    "A100 80GB SXM", 2.039e12, {"float32": 19.5e12, "float16": 312e12, "bfloat16": 312e12}, LAUNCH, REPLAY, "data sheet"
)
DATA_SHEETS = (H100, A100)


def reflect(shape: Shape, *, rows_cached: bool = False) -> Work:
    """The Triton forward: x, U and S in, z and the coefficients M (r, n) out, in one kernel."""
    n, d, r = shape.rows, shape.features, shape.rank
    rows = 0 if rows_cached else 2 * n * d
    moved = shape.item * (rows + d * r + n * r) + WIDE_BYTES * r * r
    return Work(moved, 4 * n * d * r + 2 * n * r * r)


def reflect_in_three_calls(shape: Shape) -> Work:
    """x U, times S, and `addmm`: x and U are read twice, (n, r) is written and read between them."""
    n, d, r = shape.rows, shape.features, shape.rank
    moved = shape.item * (3 * n * d + 2 * d * r + 4 * n * r) + WIDE_BYTES * r * r
    return Work(moved, 4 * n * d * r + 2 * n * r * r, launches=3)


def reflect_rows(shape: Shape, adapters: int) -> Work:
    """The Triton forward for rows that name their adapters: U and S of as many as there are, or as there are rows."""
    n, d, r = shape.rows, shape.features, shape.rank
    used = min(n, adapters)
    moved = shape.item * (2 * n * d + used * d * r) + used * WIDE_BYTES * r * r + n * INDEX_BYTES
    return Work(moved, 4 * n * d * r + 2 * n * r * r)


def reflect_backward(shape: Shape) -> Work:
    """The Triton backward: K and ∂x in one kernel, gᵀM + xᵀK in one, the rest of ∂U in one.

    The second kernel reads g again. The last one adds Û (∂L + ∂Lᵀ) and goes through the norm.
    """
    n, d, r = shape.rows, shape.features, shape.rank
    for_x = Work(shape.item * (2 * n * d + d * r + n * r) + WIDE_BYTES * r * r, 4 * n * d * r + 2 * n * r * r)
    tall = Work(shape.item * (2 * n * d + 2 * n * r) + WIDE_BYTES * d * r, 4 * n * d * r)
    small = Work(WIDE_BYTES * 3 * d * r + shape.item * (d * r + 2 * n * r), 2 * d * r * r + 2 * n * r * r)
    return for_x + tall + small


def factor(shape: Shape, chains: int) -> Work:
    """U and S of many chains of one shape: the Gram matrix, and a triangular inverse of r³ / 3 operations."""
    d, r = shape.features, shape.rank
    moved = chains * (WIDE_BYTES * d * r + shape.item * d * r + WIDE_BYTES * r * r)
    return Work(moved, chains * (2 * d * r * r + r**3 / 3))


def operator(shape: Shape, members: int = 1, *, rows_cached: bool = False, constant: bool = False) -> Work:
    """The ONNX operator on the CPU or the GPU: one X, and U, V and Y of every member, in one kernel.

    Args:
        shape: of every member.
        members: of the group.
        rows_cached: X and Y do not cross memory.
        constant: of the float32 factors of a chain that the file holds, the CPU's kernel reads U and an (r, r) matrix.
    """
    n, d, r = shape.rows, shape.features, shape.rank
    rows = 0 if rows_cached else (1 + members) * n * d
    factors = d * r + r * r if constant else 2 * d * r
    return Work(shape.item * (rows + members * factors), members * 4 * n * d * r)


def operator_rows(shape: Shape, adapters: int, members: int = 1) -> Work:
    """The ONNX operator for rows that name their adapters."""
    n, d, r = shape.rows, shape.features, shape.rank
    used = min(n, adapters)
    moved = shape.item * ((1 + members) * n * d + members * used * 2 * d * r) + n * INDEX_BYTES
    return Work(moved, members * 4 * n * d * r)


def product(shape: Shape) -> Work:
    """The base product x W."""
    n, d, o = shape.rows, shape.features, shape.outputs
    return Work(shape.item * (n * d + d * o + n * o), 2 * n * d * o)


def quantized_product(shape: Shape, bits: int = 4, block: int = 32) -> Work:
    """The base product with a quantized W, a scale for every block."""
    n, d, o = shape.rows, shape.features, shape.outputs
    weight = d * o * (bits / 8 + shape.item / block)
    return Work(shape.item * (n * d + n * o) + weight, 2 * n * d * o)


def lora(shape: Shape) -> Work:
    """What LoRA adds to the base product: x A, and y + (x A) B, which reads and writes y again."""
    n, d, o, r = shape.rows, shape.features, shape.outputs, shape.rank
    moved = shape.item * (n * d + d * r + 2 * n * r + r * o + 2 * n * o)
    return Work(moved, 2 * n * r * (d + o), launches=2)


def fused_lora(shape: Shape) -> Work:
    """The same inside the base product: columns beside W's and an epilogue, so that x and y cross memory once only."""
    d, o, r = shape.features, shape.outputs, shape.rank
    return Work(shape.item * r * (d + o), 2 * shape.rows * r * (d + o), launches=0)


def on_top(machine: Machine, extra: Work, shape: Shape) -> float:
    """How much longer a product takes with something before or behind it, both at their floors."""
    return machine.floor(extra, shape.dtype) / machine.floor(product(shape), shape.dtype)
