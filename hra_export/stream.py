"""Stream planned tensors into files, block by block, folding where the plan says so.

The arithmetic of a merge is nothing; memory traffic is everything. Rows go through in blocks whose wide form stays
in the cache, `pread` in and `pwrite` out, one block for each worker thread, so memory does not grow with the model.
Each stored element is computed in float64 (float32 on a GPU) and rounded once. On a CPU float64 costs a fifth more
time than float32, and leaves no element further from the exact fold than its rounding.
"""

import contextlib
import errno
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from hra_export import householder
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.errors import NumericalError, OutputError
from hra_export.filesystem import CHUNK_BYTES, as_output_error, begin_writeback, write_all
from hra_export.plan import OutputTensor, Segment, Shard
from hra_export.tensorfile import DTYPES, TensorInfo, TensorLayout

# Elements of a block: 4 MB of float64, which a core's share of the last-level cache holds beside its copy.
BLOCK_ELEMENTS = 1 << 19
ROW_GROUP = 32
# Blocks waiting for each worker: enough to keep it busy, few enough that the factors of waiting folds stay small.
QUEUE_PER_WORKER = 4
# What rounding costs is measured on every element of a tensor up to 4 million, on every fourth row of a larger one: a
# million roundings give their mean square to a thousandth, and measuring all takes a fifth of the time of a merge.
MEASURED_WHOLE = 1 << 22
MEASURED_EVERY = 4
# More threads than this wait for memory and disk, and each holds about 16 MB.
MAX_WORKERS = 16
NO_COPY_FILE_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TensorTally:
    """Measured while a tensor was written: ‖ΔW‖² of the fold, and ‖stored − exact‖² of the rounding."""

    delta: float = 0.0
    rounding: float = 0.0

    def __add__(self, other: "TensorTally") -> "TensorTally":
        return TensorTally(self.delta + other.delta, self.rounding + other.rounding)


@dataclass(frozen=True)
class Fold:
    """One fold, ready for blocks of rows: ΔW = −s L A, with A (r, columns) the same for all, L (n, r) each block's own.

    Where rows are output features, L = W · U T and A = Uᵀ. Where the weight is stored (d, o), L is the rows of U
    themselves, and A = (Wᵀ · U T)ᵀ, which took a pass over the whole weight.
    """

    a: Tensor  # (r, columns)
    gram: Tensor  # (r, r), A Aᵀ: turns L into ‖ΔW‖
    strength: float
    ut: Tensor | None = None  # (r, columns), the transpose of U T, for L = W · U T
    u: Tensor | None = None  # (rows of the segment, r), L itself

    def left(self, rows: Tensor, first: int) -> Tensor:
        """L of the rows that begin `first` rows into the segment."""
        if self.ut is not None:
            # This way round the product of a wide and a narrow matrix takes half the time.
            return (self.ut @ rows.T).T
        assert self.u is not None
        return self.u[first : first + rows.shape[0]]

    def add_delta_(self, rows: Tensor, left: Tensor) -> None:
        """rows += s ΔW."""
        rows.addmm_(left, self.a, alpha=-self.strength)

    def delta_squared(self, left: Tensor) -> float:
        """‖s ΔW‖² of a block, from its L alone."""
        return self.strength**2 * float(((left @ self.gram) * left).sum())


class Streamer:
    """Worker threads and their buffers, for the length of one merge; a context manager.

    Inside it torch runs one thread for each worker; torch keeps that setting for the whole process, and it is put back
    at the end.

    Args:
        base: the checkpoint that planned segments refer to.
        adapters: the adapters that planned chains refer to.
        strength: s, the part of every ΔW that is folded in.
        device: where folds are computed.
        workers: threads; None takes the cores this process may use, up to `MAX_WORKERS`.
        progress: called with the bytes of each block written, from any thread.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[HraAdapter],
        *,
        strength: float,
        device: torch.device,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.adapters = adapters
        self.strength = strength
        self.device = device
        self.progress = progress
        self.files = {name: file.path for file in base.files for name in file.tensors}
        self.workers = workers or min(available_cores(), MAX_WORKERS)
        self.slots = threading.BoundedSemaphore(self.workers * QUEUE_PER_WORKER)
        self.buffers = threading.local()

    def __enter__(self) -> "Streamer":
        self.threads_before = torch.get_num_threads()
        # From here on, for the threads to come: a factorization's last bits depend on how many threads share it.
        torch.set_num_threads(1)
        # One torch thread for each worker: two pools of threads on the same cores take turns instead of working.
        self.pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        self.sources = {path: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in set(self.files.values())}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(cancel_futures=True)
        for descriptor in self.sources.values():
            os.close(descriptor)
        torch.set_num_threads(self.threads_before)  # torch keeps one setting for the whole process

    def write_shard(self, shard: Shard, layout: TensorLayout, descriptor: int) -> dict[str, TensorTally]:
        """Fill an open file of the layout's size with a shard's header and tensors.

        Returns:
            What was measured for each tensor that was not merely copied.

        Raises:
            NumericalError: a stored value is not finite although a fold or cast produced it.
            OSError: reading or writing failed.
        """
        write_all(descriptor, layout.header, 0)
        running: dict[str, list[Future[TensorTally]]] = {tensor.name: [] for tensor in shard.tensors}
        try:
            behind: TensorInfo | None = None
            for tensor in shard.tensors:
                target = layout.tensors[tensor.name]
                for block in self._blocks(tensor, target, descriptor):
                    running[tensor.name].append(self._submit(block))
                # A tensor late, when its blocks are written; and a tensor at once, since each call takes its time.
                if behind is not None:
                    begin_writeback(descriptor, behind.start, behind.size_bytes)
                behind = target
            return self._collect(shard, running)
        finally:
            # The caller closes the file next, and its number may then be that of any other file.
            for future in (future for futures in running.values() for future in futures):
                if not future.cancel():
                    future.exception()

    def _collect(self, shard: Shard, running: "Mapping[str, list[Future[TensorTally]]]") -> dict[str, TensorTally]:
        tallies = {}
        for tensor in shard.tensors:
            tally = sum((future.result() for future in running[tensor.name]), TensorTally())
            if not math.isfinite(tally.rounding):
                raise _not_finite(tensor)
            if tensor.action != "copy":
                tallies[tensor.name] = tally
        return tallies

    def _submit(self, block: Callable[[], TensorTally]) -> "Future[TensorTally]":
        self.slots.acquire()
        try:
            future = self.pool.submit(block)
        except RuntimeError as error:  # the pool was shut down by an interrupt
            self.slots.release()
            raise OutputError("the merge was stopped") from error
        future.add_done_callback(lambda _: self.slots.release())
        return future

    def _blocks(self, tensor: OutputTensor, target: TensorInfo, descriptor: int) -> Iterator[Callable[[], TensorTally]]:
        row_bytes = max(tensor.matrix_shape[1], 1) * DTYPES[tensor.dtype][0] // 8
        for segment in tensor.segments:
            fold = self._fold(tensor, segment) if segment.chains else None
            for start, stop in _steps(tensor, segment):
                block = _Block(tensor, segment, start, stop, fold, descriptor, target.start + start * row_bytes)
                yield lambda block=block: self._run(block)  # type: ignore[misc]  # the default binds this turn's block

    def _fold(self, tensor: OutputTensor, segment: Segment) -> Fold:
        """Multiply U T out in the reflector's own precision, then round once to the precision of the fold."""
        dtype = _compute_dtype(segment, tensor.dtype, self.device)
        chains = [self.adapters[site.adapter].reflector(site.module) for site in segment.chains]
        reflector = householder.compose(chains[0], *chains[1:])
        u, ut = (part.to(self.device, dtype) for part in (reflector.u, reflector.u @ reflector.t))
        if not segment.transposed:
            gram = (reflector.u.T @ reflector.u).to(self.device, dtype)
            return Fold(u.T.contiguous(), gram, self.strength, ut=ut.T.contiguous())
        a = self._coefficients(tensor, segment, ut).T.contiguous()
        return Fold(a, a @ a.T, self.strength, u=u)

    def _coefficients(self, tensor: OutputTensor, segment: Segment, ut: Tensor) -> Tensor:
        """Wᵀ · U T (o, r) of a weight stored (d, o), block by block: its columns lie scattered over the file."""
        total = ut.new_zeros(tensor.matrix_shape[1], ut.shape[1])
        for start, stop in _steps(tensor, segment):
            rows = self._read(_Block(tensor, segment, start, stop, None, -1, 0)).to(ut)
            total.addmm_(rows.T, ut[start - segment.start : stop - segment.start])
        return total

    def _run(self, block: "_Block") -> TensorTally:
        if block.is_plain_copy:
            tally = TensorTally()
            self._copy(block)
        else:
            tally = self._transform(block)
        if self.progress is not None:
            self.progress(block.size_bytes)
        return tally

    def _copy(self, block: "_Block") -> None:
        """Base bytes as they lie, inside the kernel where it can."""
        assert isinstance(block.segment.source, TensorInfo)
        source = self.sources[self.files[block.segment.source.name]]
        offset, target, left = block.source_offset, block.offset, block.size_bytes
        while left:
            try:
                done = os.copy_file_range(source, block.descriptor, left, offset, target)
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in NO_COPY_FILE_RANGE:
                    raise
                data = os.pread(source, min(left, CHUNK_BYTES), offset)
                write_all(block.descriptor, data, target)
                done = len(data)
            if not done:
                raise OutputError(
                    f"`{self.files[block.segment.source.name]}` ended early: it was changed while being read"
                )
            offset, target, left = offset + done, target + done, left - done

    def _transform(self, block: "_Block") -> TensorTally:
        """Read, fold, round once, measure, write."""
        dtype = _compute_dtype(block.segment, block.tensor.dtype, self.device)
        rows = self._buffer("rows", block.shape, dtype, self.device)
        rows.copy_(self._read(block))
        stored = self._buffer("stored", block.shape, _torch_dtype(block.tensor.dtype), torch.device("cpu"))
        tally = _fold_and_round_(rows, stored, block, self._buffer("spare", block.shape, dtype, self.device))
        write_all(block.descriptor, _bytes_of(stored), block.offset)
        return tally

    def _read(self, block: "_Block") -> Tensor:
        source = block.segment.source
        first = block.source_row
        if isinstance(source, Tensor):
            return source.reshape(-1, block.shape[1])[first : first + block.shape[0]]
        raw = self._buffer("raw", block.shape, _torch_dtype(source.dtype), torch.device("cpu"))
        view = _bytes_of(raw)
        path = self.files[source.name]
        offset, done = block.source_offset, 0
        while done < len(view):
            with as_output_error(f"read `{path}`"):
                read = os.preadv(self.sources[path], [view[done:]], offset + done)
            if not read:
                raise OutputError(f"`{path}` ended early: it was changed while being read")
            done += read
        return raw

    def _buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A worker's own scratch tensor, grown when needed and kept from block to block."""
        key = f"{name}-{dtype}"
        count = shape[0] * shape[1]
        held = getattr(self.buffers, key, None)
        if held is None or held.numel() < count:
            held = torch.empty(max(count, 1), dtype=dtype, device=device)
            if count <= 2 * BLOCK_ELEMENTS:  # a block in whole groups of rows; only a very wide row is larger
                setattr(self.buffers, key, held)
        result: Tensor = held[:count].view(shape)
        return result


@dataclass(frozen=True)
class _Block:
    """Rows [start, stop) of one tensor, on their way to `offset` of an open file."""

    tensor: OutputTensor
    segment: Segment
    start: int
    stop: int
    fold: Fold | None
    descriptor: int
    offset: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.tensor.matrix_shape[1]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.tensor.dtype][0] // 8

    @property
    def source_row(self) -> int:
        return self.segment.source_start + self.start - self.segment.start

    @property
    def source_offset(self) -> int:
        source = self.segment.source
        assert isinstance(source, TensorInfo)
        return source.start + self.source_row * self.shape[1] * DTYPES[source.dtype][0] // 8

    @property
    def measured_rows(self) -> int:
        """Rounding is measured on every row, or every n-th: never too few to see a value overflow float16."""
        is_small = math.prod(self.tensor.matrix_shape) < MEASURED_WHOLE
        return 1 if is_small or self.tensor.dtype == "F16" else MEASURED_EVERY

    @property
    def is_plain_copy(self) -> bool:
        source = self.segment.source
        return self.fold is None and isinstance(source, TensorInfo) and source.dtype == self.tensor.dtype


def _steps(tensor: OutputTensor, segment: Segment) -> Iterator[tuple[int, int]]:
    """A segment's rows in runs of about a block."""
    if not tensor.size_bytes:  # no columns; of rows there may be any number
        return
    rows_at_once = max(1, BLOCK_ELEMENTS // tensor.matrix_shape[1])
    if rows_at_once > ROW_GROUP:  # in whole groups: a product over 47 rows takes a fifth longer for each than over 64
        rows_at_once = -(-rows_at_once // ROW_GROUP) * ROW_GROUP
    for start in range(segment.start, segment.stop, rows_at_once):
        yield start, min(start + rows_at_once, segment.stop)


def available_cores() -> int:
    """The cores this process may use."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fold_and_round_(rows: Tensor, stored: Tensor, block: _Block, spare: Tensor) -> TensorTally:
    """Fold `rows` in place and round them into `stored`; `spare` is scratch of rows' shape and dtype."""
    fold = block.fold
    if fold is None:
        stored.copy_(rows)
        return TensorTally(0.0, _squared_distance(rows, stored, spare, every=1))
    left = fold.left(rows, block.start - block.segment.start)  # (n, r)
    delta = fold.delta_squared(left)
    if stored.dtype != rows.dtype:
        fold.add_delta_(rows, left)
        stored.copy_(rows)
        rounding = _squared_distance(rows, stored, spare, every=block.measured_rows)
        # A value that is not finite makes its whole row of `left` so, and every row is in there.
        return TensorTally(delta, rounding if math.isfinite(delta) else math.nan)
    # The sum itself is the rounding here: W − stored is exact to the last bit, and adding ΔW leaves the error.
    spare.copy_(rows)
    fold.add_delta_(rows, left)
    stored.copy_(rows)
    spare.sub_(rows)
    fold.add_delta_(spare, left)
    return TensorTally(delta, float(torch.dot(spare.view(-1), spare.view(-1))))


def _squared_distance(rows: Tensor, stored: Tensor, spare: Tensor, *, every: int) -> float:
    """‖stored − rows‖², from every n-th row; `spare` is overwritten."""
    sample = rows[::every]
    difference = spare[: sample.shape[0]].copy_(stored[::every]).sub_(sample).view(-1)
    return float(torch.dot(difference, difference)) * (rows.shape[0] / max(sample.shape[0], 1))


def _compute_dtype(segment: Segment, stored: str, device: torch.device) -> torch.dtype:
    source = segment.source.dtype
    wide = device.type == "cpu" or stored == "F64" or source in ("F64", torch.float64)
    return torch.float64 if wide else torch.float32


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[name][1])
    return dtype


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _not_finite(tensor: OutputTensor) -> NumericalError:
    return NumericalError(
        f"`{tensor.name}` is not finite as {tensor.dtype}: the base holds NaN or Inf there, or a value overflows",
        hint="write a wider dtype with `--dtype float32`, or `--dtype bfloat16` if it must be 16 bits",
    )
