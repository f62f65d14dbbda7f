"""One look at a library of operators: does ONNX Runtime take it, and does it compute what the operators' bodies do?

Single and grouped operators, for the whole batch and for rows that name their adapters, are run both ways on small
numbers. bfloat16 is left out: the CPU provider multiplies no such matrices, so that the bodies do not run.

Letters: a adapters, b batch, t tokens, d features, r rank.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from hra_export.errors import DeviceError, NumericalError
from hra_export.graph import grouped_operator
from hra_export.graph.operator import DOMAIN, VERSION
from hra_export.graph.session import GraphSession
from hra_export.graph.values import Array
from hra_export.kernels.operator_library import OperatorLibrary

OPSET = 20
IR_VERSION = 10
CHECKED = ("", "Rows", "Group3", "RowsGroup2")
# dtype: its unit roundoff
DTYPES: dict[np.dtype[Any], float] = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float16): 2.0**-11}
SHAPE = (3, 5, 33)  # b, t, d: nothing that vectors of a power of two divide
RANKS = (8, 0, 17)
ADAPTERS = 4


def check_library(library: OperatorLibrary) -> None:
    """Compare a library's CPU kernels with the operators' bodies.

    Raises:
        DeviceError: the runtime does not take the library, or does not run its kernels.
        NumericalError: the numbers differ; all operators that do are named.
    """
    rng = np.random.default_rng(0)
    findings = []
    with TemporaryDirectory(prefix="hra-export-operator-") as folder:
        for ending in CHECKED:
            for dtype in DTYPES:
                name = f"HouseholderReflection{ending}"
                path = Path(folder, f"{name}-{dtype}.onnx")
                ir.save(one_node_model(name, dtype), path)
                off = _largest_excess(path, library, random_feeds(name, dtype, rng))
                if not off <= 1:
                    findings.append(f"{name}, {dtype}: off by {off:.3g} times what rounding explains")
    if findings:
        raise NumericalError(
            f"`{library.path}` does not compute what the operators' bodies do",
            findings=findings,
            hint="another compiler may not make this error",
        )


def one_node_model(name: str, dtype: np.dtype[Any]) -> ir.Model:
    """A model of one operator of domain `hra` with its body, every size free.

    Args:
        name: of the operator.
        dtype: float32, float16 or `ml_dtypes.bfloat16`, of everything but A.
    """
    body = grouped_operator.function(name, OPSET)
    sizes = {"X": ["b", "t", "d"], "A": ["b"]}
    stacked = ["a"] if "Rows" in name else []
    for value in body.inputs:
        label = str(value.name)
        if label not in sizes:
            rank = "r" + label[1:]
            sizes[label] = [*stacked, *(["d", rank] if label[0] == "U" else [rank, "d"])]
    inputs = [_value(str(value.name), dtype, sizes[str(value.name)]) for value in body.inputs]
    node = ir.node(name, inputs, domain=DOMAIN, version=VERSION, num_outputs=len(body.outputs), name="reflection")
    for made, value in zip(node.outputs, body.outputs, strict=True):
        made.name, made.type, made.shape = value.name, inputs[0].type, inputs[0].shape
    graph = ir.Graph(
        inputs, list(node.outputs), nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION}, name="operator"
    )
    return ir.Model(graph, ir_version=IR_VERSION, functions=[body])


def random_feeds(
    name: str,
    dtype: np.dtype[Any],
    rng: np.random.Generator,
    *,
    shape: tuple[int, int, int] = SHAPE,
    ranks: Sequence[int] = RANKS,
    adapters: int = ADAPTERS,
) -> dict[str, Array]:
    """Inputs of an operator: X of size 1, U and V such that the reflection changes it by about as much.

    Args:
        name: of the operator.
        dtype: of everything but A.
        rng: where the numbers come from.
        shape: (b, t, d) of X.
        ranks: of the members, repeated where there are more.
        adapters: how many A names, where the operator has it.
    """
    (b, _, d), rows = shape, "Rows" in name
    feeds: dict[str, Array] = {"X": rng.standard_normal(shape).astype(dtype)}
    if rows:
        feeds["A"] = rng.integers(0, adapters, b)
    kind = grouped_operator.OPERATORS.fullmatch(name)
    assert kind is not None
    endings = [f"_{i}" for i in range(1, int(kind["count"]) + 1)] if kind["count"] else [""]
    stacked = (adapters,) if rows else ()
    for i, ending in enumerate(endings):
        r = ranks[i % len(ranks)]
        feeds[f"U{ending}"] = (rng.standard_normal((*stacked, d, r)) / max(d, 1) ** 0.5).astype(dtype)
        feeds[f"V{ending}"] = (rng.standard_normal((*stacked, r, d)) / max(r, 1) ** 0.5).astype(dtype)
    return feeds


def exact_outputs(feeds: Mapping[str, Array]) -> list[tuple[Array, Array]]:
    """What an operator gives in float64, and |X| + |X| |U| |V|, which errors are measured by; for each output."""
    wide = {label: value.astype(np.float64) for label, value in feeds.items() if label != "A"}
    results = []
    for label in [label for label in wide if label[0] == "U"]:
        x, u, v = wide["X"], wide[label], wide[f"V{label[1:]}"]
        if "A" in feeds:
            u, v = u[feeds["A"]], v[feeds["A"]]
        results.append((x + x @ u @ v, np.abs(x) + np.abs(x) @ np.abs(u) @ np.abs(v)))
    return results


def allowed_roundings(dtype: np.dtype[Any], feeds: Mapping[str, Array]) -> float:
    """How many unit roundoffs two ways to compute the same may differ by, relative to |X| + |X| |U| |V|.

    In float32 each of d + r + 2 operations rounds, on both sides. In half precision sums are float32, which hardly
    counts: the body rounds three times, the kernel once, and one more covers the products of errors.
    """
    if dtype.itemsize == 2:
        return 5
    ranks = [value.shape[-1] for label, value in feeds.items() if label[0] == "U"]
    return 2 * (feeds["X"].shape[-1] + max(ranks) + 2)


def _largest_excess(path: Path, library: OperatorLibrary, feeds: Mapping[str, Array]) -> float:
    native = GraphSession.open(path, operator=library.path, threads=1)
    if native.native is None:
        raise DeviceError(
            f"ONNX Runtime does not run the kernels of `{library.path}`",
            findings=[node.op_type for node in native.nodes],
        )
    got, wanted = native.run(feeds), GraphSession.open(path, operator=None, threads=1).run(feeds)
    dtype = feeds["X"].dtype
    unit = DTYPES[dtype] * allowed_roundings(dtype, feeds)
    pairs = zip(got.values(), wanted.values(), exact_outputs(feeds), strict=True)
    return max(
        float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)) / (unit * size))) for a, b, (_, size) in pairs
    )


def _value(name: str, dtype: np.dtype[Any], sizes: Sequence[str]) -> ir.Value:
    kind = ir.DataType.INT64 if name == "A" else ir.DataType.from_numpy(dtype)
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(list(sizes)))
