"""The ONNX benchmarks at toy size on the CPU: that they compare what they say they compare."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks import onnx as onnx_benchmark
from benchmarks import onnx_gpu
from benchmarks.graph_variants import VARIANTS, Case, make_variants, time_variants
from hra_export.graph.operator import is_reflection
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


def time_apart(folder: Path, names: Sequence[str], case: Case) -> dict[str, dict[str, list[float]]]:
    """In a process of its own: the pool of threads that all its sessions share would be the test run's as well."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        return apart.submit(time_variants, folder, names, [case], rounds=1, threads=1).result()


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
    rows = onnx_benchmark._rows(passes, 8, ["merged", "auto"])
    assert rows[1][4:] == ["1.150", "1.050", "1.250", "≤ 1.10: FAILS"]
    assert onnx_benchmark._rows(passes, 32, ["merged", "auto"])[1][-1] == ""


@pytest.mark.parametrize("precision", onnx_gpu.PRECISIONS)
def test_gpu_variants_agree(precision: str) -> None:
    assert not onnx_gpu.run_case(onnx_gpu.Case("toy", precision), onnx_gpu.TOY, 1, torch.device("cpu"), rounds=0)


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
