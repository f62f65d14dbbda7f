"""The ONNX benchmarks at toy size on the CPU: that they compare what they say they compare."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from benchmarks import ceilings, graph_variants, onnx_gpu
from benchmarks import onnx as onnx_benchmark
from benchmarks.graph_variants import NATIVE, VARIANTS, Case, make_variants, time_variants
from benchmarks.roofline import Machine
from hra_export.graph.operator import is_reflection
from hra_export.kernels.operator_library import open_library
from hra_export.workload import Load


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two siblings and one product behind, of no architecture."""
    x = ir.Value(name="sample", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("batch", "sequence", 96)))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="base")
    random = np.random.default_rng(0)

    def node(kind: str, inputs: list[ir.Value], width: int, name: str) -> ir.Value:
        made = ir.node(kind, inputs, name=name)
        output = made.outputs[0]
        output.name, output.type = f"{name}_output", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape(("batch", "sequence", width))
        graph.append(made)
        return output

    def linear(inputs: ir.Value, name: str, d: int, o: int) -> ir.Value:
        tensor = ir.tensor(random.standard_normal((d, o), np.float32) / d**0.5, name=f"{name}.weight")
        weight = ir.Value(name=f"{name}.weight", type=ir.TensorType(tensor.dtype), shape=ir.Shape((d, o)))
        weight.const_value = tensor
        graph.register_initializer(weight)
        return node("MatMul", [inputs, weight], o, f"/{name}/MatMul")

    both = node("Add", [linear(x, "gate", 96, 48), linear(x, "up", 96, 48)], 48, "sum")
    graph.outputs.append(linear(both, "down", 48, 8))
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx", external_data="model.onnx.data")
    return tmp_path / "model.onnx"


def time_apart(
    folder: Path, names: Sequence[str], case: Case, library: Path | None = None
) -> dict[str, dict[str, list[float]]]:
    """In a process of its own: the pool of threads that all its sessions share would be the test run's as well."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        return apart.submit(time_variants, folder, names, [case], rounds=1, threads=1, library=library).result()


def test_variants_are_what_they_are_called_and_agree(base: Path, tmp_path: Path) -> None:
    make_variants(base, {"gate": 96, "up": 96, "down": 48}, 4, tmp_path / "r4", VARIANTS)
    kinds = {name: [node.op_type for node in ir.load(tmp_path / "r4" / name / "model.onnx").graph] for name in VARIANTS}
    assert kinds["merged"] == ["MatMul", "MatMul", "Add", "MatMul"]
    assert len(kinds["materialized"]) == 4 + 3
    assert sum(is_reflection(node) for node in ir.load(tmp_path / "r4" / "function" / "model.onnx").graph) == 3
    assert kinds["auto"] == kinds["augmented"]
    assert len({tuple(kinds[name]) for name in ("add", "sub", "grouped", "output", "packed", "augmented")}) == 6
    case = Case("toy", Load("length 5", "model", 2, 5))
    taken = time_apart(tmp_path / "r4", VARIANTS, case)
    assert taken[case.name].keys() == set(VARIANTS)


def test_native_variants_agree(base: Path, native_library: Path, tmp_path: Path) -> None:
    names, case = ["merged", *NATIVE], Case("toy", Load("length 5", "model", 2, 5))
    make_variants(base, {"gate": 96, "up": 96, "down": 48}, 4, tmp_path / "r4", names)
    kinds = [node.op_type for node in ir.load(tmp_path / "r4" / "native-grouped" / "model.onnx").graph]
    assert kinds.count("HouseholderReflectionGroup2") == kinds.count("HouseholderReflection") == 1
    assert time_apart(tmp_path / "r4", names, case, native_library)[case.name].keys() == set(names)


def test_only_native_variants_are_given_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Path | None] = {}
    monkeypatch.setattr(graph_variants, "_session", lambda path, library: given.update({path.parent.name: library}))
    monkeypatch.setattr(onnxruntime, "set_global_thread_pool_sizes", lambda *sizes: None)
    time_variants(Path("r4"), VARIANTS, [], rounds=1, threads=1, library=Path("library.so"))
    assert {name for name, library in given.items() if library is not None} == set(NATIVE)
    assert given.keys() == set(VARIANTS)


def test_variant_that_computes_something_else_is_not_timed(base: Path, tmp_path: Path) -> None:
    make_variants(base, {"gate": 96, "up": 96, "down": 48}, 4, tmp_path / "r4", ["merged", "add"])
    path = tmp_path / "r4" / "add" / "model.onnx"
    model = ir.load(path)
    operand = model.graph.initializers["down.hra_V"]
    assert operand.const_value is not None
    operand.const_value = ir.tensor(-operand.const_value.numpy(), name="down.hra_V")
    ir.save(model, path, external_data="wrong.data")
    with pytest.raises(RuntimeError, match="`add` departs from `merged`"):
        time_apart(tmp_path / "r4", ["merged", "add"], Case("toy", Load("length 5", "model", 2, 5)))


def test_rows_hold_the_plain_form_of_rank_8_to_its_bar() -> None:
    passes = [{"smollm2 decode at 128, batch 1": {"merged": [1.0], "auto": [ratio]}} for ratio in (1.05, 1.25)]
    floors = {"smollm2 decode at 128, batch 1": 0.02}
    rows = onnx_benchmark._rows(passes, 8, ["merged", "auto"], floors)
    assert rows[1][4:] == ["1.150", "1.050", "1.250", "", "≤ 1.10: FAILS"]
    assert onnx_benchmark._rows(passes, 32, ["merged", "auto"], floors)[1][-1] == ""


@pytest.mark.parametrize(
    ("case", "rank", "verdict"),
    [
        ("smollm2 decode at 128, batch 1", 8, "≤ 1.05: FAILS"),
        ("smollm2 decode at 128, batch 1", 32, "≤ 1.10: holds"),
        ("smollm2 prefill 128, batch 1", 8, "≤ 1.06: holds"),
        ("minilm length 128, batch 8", 32, ""),
    ],
)
def test_rows_hold_grouped_native_kernels_to_their_bars(case: str, rank: int, verdict: str) -> None:
    passes = [{case: {"merged": [1.0], "native": [1.06], "native-grouped": [1.06]}}]
    rows = onnx_benchmark._rows(passes, rank, ["merged", *NATIVE], {case: 0.02})
    assert [row[-2:] for row in rows] == [["", ""], ["1.020", ""], ["1.020", verdict]]


def test_floor_of_decoding_is_the_bytes_of_u_and_m(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sites of 576 and 1536 columns at r = 8, in float32."""
    machine = Machine("toy", 1e6, {"float32": 1e12})
    monkeypatch.setattr(ceilings, "measured", lambda device: machine)
    floors = onnx_benchmark._floors("smollm2", {"q": 576, "down": 1536}, 8, torch.get_num_threads())
    assert floors["smollm2 decode at 128, batch 1"] == pytest.approx(4 * 8 * (576 + 8 + 1536 + 8) / 1e6)


@pytest.mark.parametrize("precision", onnx_gpu.PRECISIONS)
def test_gpu_variants_agree(precision: str) -> None:
    assert not onnx_gpu.run_case(onnx_gpu.Case("toy", precision), onnx_gpu.TOY, 1, torch.device("cpu"), rounds=0)


def test_gpu_variants_agree_with_native_kernels(native_library: Path) -> None:
    library = open_library(native_library)
    case, device = onnx_gpu.Case("toy", "int4"), torch.device("cpu")
    assert not onnx_gpu.run_case(case, onnx_gpu.TOY, 1, device, rounds=0, library=library)


def test_lora_beside_quantized_weights_is_made_of_their_values() -> None:
    """Against the runtime's own reading of the codes: a product with the identity."""
    codes = np.random.default_rng(0).integers(0, 256, (8, 2, 16), np.uint8)
    sizes: dict[str, Any] = {"K": 64, "N": 8, "bits": 4, "block_size": 32}
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64, width])
        for name, width in (("x", 64), ("y", 8))
    )
    node = onnx.helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes)
    constants = {"codes": codes, "scales": np.full((8, 2), 0.25, np.float32)}
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph([node], "product", [x], [y], initializers)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (weights,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    np.testing.assert_allclose(weights.T, onnx_gpu._dequantized(codes, 0.25), rtol=1e-6)


def test_gpu_check_names_what_departs() -> None:
    case, right = onnx_gpu.Case("toy", "fp16"), torch.ones(3)
    answers: dict[str, Any] = {"merged": right, "auto": right, "output": 1.1 * right}
    assert onnx_gpu.check(case, answers) == ["toy-fp16, output: off by 1.0e-01"]


def test_gpu_benchmark_ends_with_7_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["onnx_gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        onnx_gpu.main()
    assert caught.value.code == 7
