"""Reflections in ONNX graphs on a GPU: decoding through layers of the shapes of Llama 3.2 1B and Llama 3.1 8B.

    python -m benchmarks.onnx_gpu [--rounds 5] [--only CASE …] [--budget 420]
                                 [--operator FILE] [--check]

A graph is a few blocks without attention over a cache: norm, q, k, v, their sum in place of attention, o, norm, gated
feed-forward, in fp32, fp16 or int4 (`MatMulNBits`, blocks of 32, fp16 activations), weights random. Every linear layer
is adapted, r = 8. The variants:

    merged           folded into the weights; int4: the same operators with other codes
    function         the operator, which the runtime inlines
    native           the same file with the operator's kernels; left out, and said so, where there is no library
    native-grouped   q, k, v and gate, up are one node each, as `hra-export onnx` writes them
    auto             what `--plain-ops` writes
    augmented        [x, x U][W; V W], where weights are floats
    output           x W + (x U)(V W), LoRA's form
    swappable        U and V are inputs

each with and without a CUDA graph, 1 to 64 rows of one token, everything bound on the device. Before anything is timed,
every variant's numbers are compared with those of the merged graph (int4: of the function).

Cases that would begin after the budget, in seconds, are left out and named. Without CUDA: exit code 7; a case that
fails: 1, with all other figures. `--check` compares the numbers on the CPU at toy size and times nothing.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.ceilings import clocks
from benchmarks.graph_variants import NATIVE
from benchmarks.harness import machine, report, say, work_folder
from benchmarks.llamas import SIZES, Size
from benchmarks.native_library import native_library
from hra_export import householder
from hra_export.bench import take_turns
from hra_export.contenders import Contender
from hra_export.errors import DeviceError, HraExportError
from hra_export.graph import operator
from hra_export.graph.forms import Form, lower_
from hra_export.graph.grouped_operator import declare_used_
from hra_export.graph.regrouping import group_
from hra_export.graph.session import GraphSession
from hra_export.kernels.operator_library import OperatorLibrary

RANK, BLOCK = 8, 32
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LAYERS = {"1B": 4, "8B": 1}
PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "int4": ir.DataType.FLOAT16}
FORMS: tuple[Form, ...] = ("augmented", "output")
VARIANTS = ("merged", "function", *NATIVE, "auto", *FORMS, "swappable")
# Of the largest output: fp32 products on tensor cores (TF32) have 11 bits, as fp16 has.
TOLERANCE = 2e-2
TOY = Size(64, 96, layers=2, heads=4, key_heads=2, head_width=16, tied=True, vocabulary=96)


@dataclass(frozen=True)
class Case:
    """Blocks of one size in one precision."""

    size: str
    precision: str

    @property
    def name(self) -> str:
        """As on the command line: `1B-fp16`."""
        return f"{self.size}-{self.precision}"

    @property
    def variants(self) -> tuple[str, ...]:
        """Those there are in this precision."""
        return tuple(name for name in VARIANTS if self.precision != "int4" or name != "augmented")


CASES = [Case(size, precision) for size in LAYERS for precision in ("fp16", "int4", "fp32")]


class Blocks:
    """The graph of a few blocks, with opaque reflections, folded, or as LoRA beside quantized weights.

    The same seed gives the same weights.
    """

    def __init__(self, size: Size, layers: int, precision: str, *, folded: bool, beside: bool = False) -> None:
        self._size, self._precision, self._folded, self._beside = size, precision, folded, beside
        self._dtype = PRECISIONS[precision]
        self._random = np.random.default_rng(0)
        self._pool = self._random.standard_normal(1 << 22, np.float32)
        x = ir.Value(name="x", type=ir.TensorType(self._dtype), shape=ir.Shape(("batch", 1, size.hidden)))
        self._graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name="blocks")
        for layer in range(layers):
            x = self._block(x, f"layers.{layer}")
        x.name = "y"
        self._graph.outputs.append(x)
        self.model = ir.Model(self._graph, ir_version=10)

    def _block(self, x: ir.Value, path: str) -> ir.Value:
        size = self._size
        d, kv = size.hidden, size.key_heads * size.head_width
        normed = self._norm(x, f"{path}.norm")
        q = self._linear(normed, f"{path}.q_proj", d, d)
        k, v = (self._linear(normed, f"{path}.{name}_proj", d, kv) for name in "kv")
        both = self._node("Add", [k, v], kv)
        mixed = self._node("Add", [q, self._node("Concat", [both] * (d // kv), d, axis=-1)], d)
        x = self._node("Add", [x, self._linear(mixed, f"{path}.o_proj", d, d)], d)
        normed = self._norm(x, f"{path}.post_norm")
        gate, up = (self._linear(normed, f"{path}.{name}_proj", d, size.feed_forward) for name in ("gate", "up"))
        gated = self._node("Mul", [gate, self._node("Sigmoid", [gate], size.feed_forward)], size.feed_forward)
        inner = self._node("Mul", [gated, up], size.feed_forward)
        return self._node("Add", [x, self._linear(inner, f"{path}.down_proj", size.feed_forward, d)], d)

    def _norm(self, x: ir.Value, path: str) -> ir.Value:
        scale = self._constant(f"{path}.weight", np.ones(self._size.hidden))
        return self._node("SimplifiedLayerNormalization", [x, scale], self._size.hidden, axis=-1, epsilon=1e-5)

    def _linear(self, x: ir.Value, path: str, d: int, o: int) -> ir.Value:
        u, v = _operands(d)
        weight = self._take((d, o)) / d**0.5 if self._precision != "int4" else None
        codes = self._random.integers(0, 256, (o, d // BLOCK, BLOCK // 2), np.uint8) if weight is None else None
        if not self._folded and not self._beside:
            constants = [self._constant(f"{path}.hra_{letter}", value) for letter, value in (("U", u), ("V", v))]
            node = operator.node(x, *constants, name=f"{path}/hra")
            self._graph.append(node)
            x = node.outputs[0]
        if weight is not None:
            folded = weight + u.astype(np.float32) @ (v.astype(np.float32) @ weight) if self._folded else weight
            return self._node("MatMul", [x, self._constant(f"{path}.weight", folded)], o)
        assert codes is not None
        packed = self._constant(f"{path}.qweight", codes)
        scales = self._constant(f"{path}.scales", np.full((o, d // BLOCK), 0.2 / d**0.5))
        sizes = {"K": d, "N": o, "bits": 4, "block_size": BLOCK}
        y = self._node("MatMulNBits", [x, packed, scales], o, domain="com.microsoft", **sizes)
        if not self._beside:
            return y
        factors = {"A": u, "B": v @ _dequantized(codes, 0.2 / d**0.5).T}
        a, b = (self._constant(f"{path}.lora_{letter}", value) for letter, value in factors.items())
        return self._node("Add", [y, self._node("MatMul", [self._node("MatMul", [x, a], RANK), b], o)], o)

    def _take(self, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Random numbers of a pool at a random offset: a generator takes minutes for billions."""
        count = shape[0] * shape[1]
        start = int(self._random.integers(len(self._pool)))
        return np.resize(np.roll(self._pool, start), count).reshape(shape)

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        kept = array if array.dtype == np.uint8 else array.astype(self._dtype.numpy())
        tensor = ir.tensor(kept, name=name)
        shape = ir.Shape(kept.shape)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _node(
        self, kind: str, inputs: Sequence[ir.Value], width: int, *, domain: str = "", **attributes: Any
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes, domain=domain, name=f"node_{len(self._graph)}")
        (output,) = node.outputs
        output.name, output.type = f"v{len(self._graph)}", ir.TensorType(self._dtype)
        output.shape = ir.Shape(("batch", 1, width))
        self._graph.append(node)
        return output


def write_variant(case: Case, size: Size, layers: int, name: str, folder: Path) -> Path:
    """The file of one variant."""
    beside = name == "output" and case.precision == "int4"
    model = Blocks(size, layers, case.precision, folded=name == "merged", beside=beside).model
    if name == "swappable":
        _feed_operands_(model)
    if name == "native-grouped":
        group_(model)
    if name in ("function", "swappable", *NATIVE):
        declare_used_(model)
    elif name != "merged" and not beside:
        lower_(model, name)  # type: ignore[arg-type]  # `auto` or a form
    path = folder / name / "model.onnx"
    path.parent.mkdir(parents=True)
    ir.save(model, path, external_data="model.onnx.data")
    return path


def bound_run(session: GraphSession, case: Case, size: Size, batch: int, device: torch.device) -> tuple[Any, Any]:
    """A run on memory that stays where it is, and the tensor it writes to."""
    dtype = torch.float32 if case.precision == "fp32" else torch.float16
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, size.hidden, generator=random).to(device, dtype)
    y = torch.empty_like(x)
    feeds = {"x": x}
    for spec in session.optional:  # with more than defaults: as a server does
        d = next(axis for axis in spec.shape if isinstance(axis, int))
        u, v = _operands(d)
        array = u if spec.name.endswith("U") else v
        feeds[spec.name] = torch.from_numpy(array).to(device, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return session.bind(feeds).into({"y": y}), y


def check(case: Case, answers: Mapping[str, torch.Tensor]) -> list[str]:
    """Variants that compute something else."""
    truth = answers["function" if case.precision == "int4" else "merged"].float()
    findings = []
    for name, answer in answers.items():
        error = float((answer.float() - truth).abs().max() / truth.abs().max())
        if name != "merged" or case.precision != "int4":
            findings += [] if error <= TOLERANCE else [f"{case.name}, {name}: off by {error:.1e}"]
    return findings


def run_case(
    case: Case, size: Size, layers: int, device: torch.device, rounds: int, library: OperatorLibrary | None = None
) -> dict[str, Any]:
    """Seconds by batch and variant; with rounds = 0 the numbers are compared and nothing is timed.

    The native variants take part where the library serves the device.

    Raises:
        RuntimeError: a variant computes something else.
    """
    sessions: dict[str, GraphSession] = {}
    provider: Any = device.type
    kernels = library.path if library is not None and provider in library.providers else None
    with tempfile.TemporaryDirectory(prefix="hra-export-benchmark-") as folder:
        for name in case.variants:
            if name in NATIVE and kernels is None:
                continue
            path, chosen = write_variant(case, size, layers, name, Path(folder)), kernels if name in NATIVE else None
            sessions[name] = GraphSession.open(path, provider=provider, operator=chosen)
            if device.type == "cuda":
                graphed = GraphSession.open(path, provider=provider, cuda_graph=True, operator=chosen)
                sessions[f"{name}, CUDA graph"] = graphed
    found: dict[str, Any] = {}
    for batch in BATCHES if rounds else (1, 3):
        runs = {name: bound_run(session, case, size, batch, device) for name, session in sessions.items()}
        for run, _ in runs.values():
            run.run()
            run.run()  # the second one replays the CUDA graph
        if findings := check(case, {name: y for name, (_, y) in runs.items()}):
            raise RuntimeError("\n".join(findings))
        contenders = [Contender(name, run.run) for name, (run, _) in runs.items()]
        if rounds:
            found[str(batch)] = take_turns(contenders, rounds=rounds, turn_seconds=0.05)
    return found


def _operands(d: int) -> tuple[Any, Any]:
    """U (d, r) and V (r, d) of a chain, float64; the same for the same d."""
    vectors = torch.randn(d, RANK, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    u, v = operator.operands([householder.compact_wy(vectors)], torch.float64)
    return u.numpy(), v.numpy()


def _dequantized(codes: Any, scale: float) -> Any:
    """W (o, d) of 4-bit codes (o, blocks, bytes), the lower half of a byte first; the zero point is 8."""
    halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return (halves.astype(np.float32) - 8) * np.float32(scale)


def _feed_operands_(model: ir.Model) -> None:
    """U and V become inputs, with a symbolic rank and rank 0 as their default."""
    for name, value in model.graph.initializers.items():
        if name.endswith((".hra_U", ".hra_V")):
            assert value.const_value is not None
            axis = 1 if name.endswith("U") else 0
            shape: list[Any] = list(value.const_value.shape.numpy())
            shape[axis] = 0
            value.const_value = ir.tensor(np.zeros(shape, value.const_value.dtype.numpy()), name=name)
            shape[axis] = "rank"
            value.shape = ir.Shape(shape)
            model.graph.inputs.append(value)


HEADER = ["case", "batch", "variant", "median µs", "tokens/s", "÷ merged", "÷ merged with CUDA graph"]


def table(case: Case, found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[list[str]]:
    """The rows of one case; tokens are of the few layers that the graph has."""
    rows = []
    for batch, seconds in found.items():
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        for name, middle in medians.items():
            ratios = [f"{middle / medians[base]:.3f}" for base in ("merged", "merged, CUDA graph") if base in medians]
            figures = [f"{1e6 * middle:.0f}", f"{int(batch) / middle:.0f}"]
            rows.append([case.name, batch, name, *figures, *ratios, *[""] * (2 - len(ratios))])
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no case is begun")
    parser.add_argument("--operator", type=Path, metavar="FILE", help="the library of the native variants")
    parser.add_argument("--check", action="store_true", help="compare the numbers at toy size on the CPU")
    arguments = parser.parse_args()
    if arguments.check:
        check_all(arguments.operator)
        return
    if not torch.cuda.is_available():
        error = DeviceError("this benchmark needs an NVIDIA GPU, and torch sees none", hint="`hra-export doctor`")
        say(f"error: {error}")
        sys.exit(error.exit_code)
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    with work_folder(None) as work:
        library, origin = native_library(work, arguments.operator, cuda="auto")
        say(origin)
        sys.exit(run_cases(chosen, rounds=arguments.rounds, budget=arguments.budget, library=library))


def check_all(chosen: Path | None) -> None:
    """Compare the numbers of every precision on the CPU."""
    with work_folder(None) as work:
        library, origin = native_library(work, chosen)
        say(origin)
        for case in (Case("toy", precision) for precision in PRECISIONS):
            run_case(case, TOY, TOY.layers, torch.device("cpu"), rounds=0, library=library)
            names = [name for name in case.variants if library is not None or name not in NATIVE]
            say(f"{case.name}: {', '.join(names)} agree")


def run_cases(chosen: Sequence[Case], *, rounds: int, budget: float, library: OperatorLibrary | None) -> int:
    """Measure cases until the budget is spent, and report those done, whatever happens; returns the exit code."""
    machine()  # a package that it misses is better missed before than after
    began = time.monotonic()
    rows: list[list[str]] = []
    done: dict[str, Any] = {}
    failures: list[str] = []
    try:
        for case in chosen:
            if time.monotonic() - began > budget:
                break
            say(f"{case.name}:")
            try:
                size, layers = SIZES[case.size], LAYERS[case.size]
                done[case.name] = run_case(case, size, layers, torch.device("cuda"), rounds, library)
            except (RuntimeError, HraExportError) as error:  # wrong numbers, out of memory, fallen back
                failures.append(f"{case.name}: {error}")
                continue
            rows += table(case, done[case.name])
    finally:
        left_out = [case.name for case in chosen if case.name not in done]
        about: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "rank": RANK,
            "layers": LAYERS,
            "rounds": rounds,
        }
        about |= {"clocks": clocks(), "operator": None if library is None else library.to_json()}
        report("onnx_gpu", HEADER, rows, {**about, "left_out": left_out, "failures": failures, "cases": done})
    say("\n".join([*failures, *([f"left out: {', '.join(left_out)}"] if left_out else [])]))
    return int(bool(failures))


if __name__ == "__main__":
    main()
