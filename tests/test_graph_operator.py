"""The operator `hra::HouseholderReflection`: body, factors and trace against the explicit chain in float64."""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hra_export import attach, householder
from hra_export.adapter import HraAdapter
from hra_export.graph.document import MAX_OPSET, MIN_OPSET
from hra_export.graph.operator import DOMAIN, OPERATOR, VERSION, declare_, function, is_reflection, node, operands
from hra_export.graph.provenance import clean_, declare_versions_
from hra_export.graph.reflections import reflection_sites
from hra_export.graph.soundness import check_graph
from hra_export.graph.tracing import make_traceable_
from hra_export.householder import BlockReflector, compact_wy
from tests.graph_text import Array, finished, run

D, RANK = 24, 4
ULP: dict[object, float] = {np.float32: 2.0**-24, np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8}
TORCH: dict[object, torch.dtype] = {
    np.float64: torch.float64,
    np.float32: torch.float32,
    np.float16: torch.float16,
    ml_dtypes.bfloat16: torch.bfloat16,
}
# x U, the product with V and the sum round once each, x, U and V once before; sums of D terms grow as √D.
ROUNDINGS = 6 * D**0.5
# Float64 with T of at most 4 and rank 8: the algebra itself.
ATOL64 = 1e-12
Dense = NDArray[np.float64]


def gaussian(*shape: int, seed: int = 0) -> Dense:
    return np.random.default_rng(seed).standard_normal(shape)


def chain(rank: int = RANK, *, seed: int = 0) -> Tensor:
    return torch.from_numpy(gaussian(D, rank, seed=seed + 50))


def pairs(angle: float, rank: int = 8) -> Tensor:
    """PEFT's start after a little training: each vector and its copy, turned by `angle`."""
    first, away = np.linalg.qr(gaussian(D, rank, seed=3))[0].reshape(D, 2, rank // 2).transpose(1, 0, 2)
    turned = np.cos(angle) * first + np.sin(angle) * away
    return torch.from_numpy(np.stack([first, turned], axis=2).reshape(D, rank))


def rotation(*chains: Tensor) -> Dense:
    """H_1 H_2 … of one chain after the other, one reflection at a time."""
    product = np.eye(D)
    for vectors in chains:
        for column in vectors.double().numpy().T:
            product = product - 2 * np.outer(product @ column, column) / (column @ column)
    return product


def factors(u: Tensor, dtype: type = np.float64, *, rows: bool = False) -> tuple[Array, Array]:
    """U and V of one chain as numpy."""
    pair = operands([compact_wy(u)], TORCH[dtype], rows=rows)
    left, right = (ir.tensor(tensor).numpy() for tensor in pair)
    return left, right


def model_of(u: Array, v: Array, *, opset: int = 20, shape: Sequence[int | str] = ("n", D)) -> ir.Model:
    """One node with constant factors, and its body."""
    dtype = ir.TensorType(ir.DataType.from_numpy(u.dtype))
    x = ir.Value(name="x", type=dtype, shape=ir.Shape(shape))
    constants = [
        ir.Value(name=name, type=dtype, shape=ir.Shape(array.shape), const_value=ir.Tensor(array, name=name))
        for name, array in (("t.hra_U", u), ("t.hra_V", v))
    ]
    made = node(x, *constants, name="t/hra")
    graph = ir.Graph([x], made.outputs, nodes=[made], initializers=constants, opset_imports={"": opset}, name="g")
    model = ir.Model(graph, ir_version=10)
    declare_(model)
    declare_versions_(model)
    return model


def evaluated(path: Path, x: Array) -> Array:
    """The output in onnx's own evaluator."""
    outputs: list[Array] = onnx.reference.ReferenceEvaluator(onnx.load(path)).run(None, {"x": x})  # type: ignore[assignment]  # one tensor
    return outputs[0]


def change_of(left: Array, right: Array) -> Dense:
    """R − I or Rᵀ − I from its factors."""
    return left.astype(np.float64) @ right.astype(np.float64)


def relative(got: Array, expected: Dense) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("opset", range(MIN_OPSET, MAX_OPSET + 1))
def test_the_body_is_the_chain_at_every_opset(tmp_path: Path, opset: int) -> None:
    u, x = chain(), gaussian(5, D, seed=1).astype(np.float32)
    path = finished(model_of(*factors(u, np.float32), opset=opset), tmp_path)
    check_graph(path)
    expected = x @ rotation(u).T
    got = [run(path, {"x": x})[0], run(path, {"x": x}, optimized=True)[0]]
    got.append(evaluated(path, x))
    for result in got:
        assert relative(result, expected) < ROUNDINGS * ULP[np.float32]


@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (2, 1, 3, D)], ids=len)
def test_the_operator_takes_any_number_of_axes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    u, x = chain(), gaussian(*shape, seed=1).astype(np.float32)
    path = finished(model_of(*factors(u, np.float32), shape=shape), tmp_path)
    check_graph(path)
    for optimized in (False, True):
        got = run(path, {"x": x}, optimized=optimized)[0]
        assert got.shape == shape
        assert relative(got, x @ rotation(u).T) < ROUNDINGS * ULP[np.float32]


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rank_0_changes_no_bit(tmp_path: Path, dtype: type, optimized: bool) -> None:
    x: Array = gaussian(2, 5, D, seed=1).astype(dtype)
    model = model_of(np.zeros((D, 0), dtype), np.zeros((0, D), dtype), shape=("b", "t", D))
    path = finished(model, tmp_path)
    check_graph(path)
    assert np.array_equal(run(path, {"x": x}, optimized=optimized)[0], x)
    assert np.array_equal(evaluated(path, x), x)


@pytest.mark.parametrize("optimized", [False, True])
def test_half_precision_stays_within_its_roundings(tmp_path: Path, optimized: bool) -> None:
    u, x = chain(), gaussian(5, D, seed=1).astype(np.float16)
    path = finished(model_of(*factors(u, np.float16)), tmp_path)
    check_graph(path)
    got = run(path, {"x": x}, optimized=optimized)[0]
    assert got.dtype == np.float16
    assert relative(got, x.astype(np.float64) @ rotation(u).T) < ROUNDINGS * ULP[np.float16]


def test_bfloat16_stays_within_its_roundings(tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 product on the CPU: the checker, and numpy with each step rounded."""
    u = chain()
    x: Array = gaussian(5, D, seed=1).astype(ml_dtypes.bfloat16)
    left, right = factors(u, ml_dtypes.bfloat16)
    check_graph(finished(model_of(left, right), tmp_path))
    coefficients = (x.astype(np.float32) @ left.astype(np.float32)).astype(ml_dtypes.bfloat16)
    change = (coefficients.astype(np.float32) @ right.astype(np.float32)).astype(ml_dtypes.bfloat16)
    assert relative(x + change, x.astype(np.float64) @ rotation(u).T) < ROUNDINGS * ULP[ml_dtypes.bfloat16]


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, D])
def test_factors_are_the_chain(rank: int) -> None:
    """Odd ranks are reflections: det R = −1."""
    u = chain(rank)
    left, right = factors(u)
    assert (left.shape, right.shape) == ((D, rank), (rank, D))
    r = rotation(u)
    np.testing.assert_allclose(np.eye(D) + change_of(left, right), r.T, rtol=0, atol=ATOL64)
    assert np.sign(np.linalg.det(np.eye(D) + change_of(left, right))) == (-1) ** rank


def test_factors_of_rows_are_the_chain_itself() -> None:
    """The looked-up rows of E R are rows of E times R."""
    u = chain()
    left, right = factors(u, rows=True)
    np.testing.assert_allclose(np.eye(D) + change_of(left, right), rotation(u), rtol=0, atol=ATOL64)
    assert np.abs(rotation(u) - rotation(u).T).max() > 0.1


def test_factors_of_two_chains_are_their_product_in_order() -> None:
    a, b = chain(seed=1), chain(3, seed=2)
    left, right = operands([compact_wy(a), compact_wy(b)], torch.float64)
    assert left.shape == (D, RANK + 3)
    change = (left @ right).numpy()
    np.testing.assert_allclose(np.eye(D) + change, (rotation(a) @ rotation(b)).T, rtol=0, atol=ATOL64)
    assert np.abs(np.eye(D) + change - (rotation(b) @ rotation(a)).T).max() > 0.1


def test_factors_of_gram_schmidt_chains_are_the_orthonormal_chain() -> None:
    u = chain()
    left, right = operands([compact_wy(u, orthogonalize=True)], torch.float64)
    q = torch.linalg.qr(u).Q
    np.testing.assert_allclose(np.eye(D) + (left @ right).numpy(), rotation(q).T, rtol=0, atol=ATOL64)


def naive(block: BlockReflector, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """−U S Uᵀ as it is written, each factor rounded."""
    return block.u.to(dtype), (-block.t.T @ block.u.T).to(dtype)


def effect_error(left: Tensor, right: Tensor, u: Tensor) -> float:
    """What rounding the factors did to the change R − I, relative to the change."""
    return relative((left.double() @ right.double()).numpy(), rotation(u).T - np.eye(D))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
def test_balanced_factors_keep_the_effect_of_nearly_parallel_pairs(angle: float, dtype: type) -> None:
    """A rounded pair of factors is off by 2 ε |U| |V|, and ‖|U| |V|‖ ≤ Σσ ≤ √r ‖U V‖ when they are balanced."""
    u = pairs(angle)
    left, right = operands([compact_wy(u)], TORCH[dtype])
    bound = 2 * ULP[dtype] * u.shape[1] ** 0.5
    assert effect_error(left, right, u) < bound
    if angle == 0.005 and dtype is not np.float32:
        assert effect_error(*naive(compact_wy(u), TORCH[dtype]), u) > 5 * bound


def test_factors_are_rounded_once_and_lie_in_rows() -> None:
    left, right = operands([compact_wy(chain())], torch.float16)
    exact = operands([compact_wy(chain())], torch.float64)
    assert left.is_contiguous()
    assert right.is_contiguous()
    assert torch.equal(left, exact[0].half())
    assert torch.equal(right, exact[1].half())


def test_a_node_has_the_type_and_shape_of_its_input() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["b", "t", D]))
    made = node(x, ir.Value(name="u"), ir.Value(name="v"), name="a.b/hra")
    assert (made.domain, made.op_type, made.version, made.name) == (DOMAIN, OPERATOR, VERSION, "a.b/hra")
    assert (made.outputs[0].type, made.outputs[0].shape) == (x.type, x.shape)
    assert is_reflection(made)
    assert not is_reflection(ir.node("MatMul", [x, x]))
    assert not is_reflection(ir.node(OPERATOR, [x], domain="other"))


def test_the_body_is_two_products_and_a_sum() -> None:
    body = function(21)
    assert [step.op_type for step in body.graph] == ["MatMul", "MatMul", "Add"]
    assert dict(body.graph.opset_imports) == {"": 21}
    assert [value.name for value in (*body.inputs, *body.outputs)] == ["X", "U", "V", "Y"]


def test_declare_gives_one_body_of_the_models_opset() -> None:
    model = model_of(*factors(chain(), np.float32), opset=18)
    declare_(model)
    assert list(model.functions) == [(DOMAIN, OPERATOR, "")]
    assert dict(model.functions[DOMAIN, OPERATOR, ""].graph.opset_imports) == {"": 18}
    assert dict(model.graph.opset_imports) == {"": 18, DOMAIN: VERSION}


class Layers(nn.Module):
    """One of each kind of layer that a chain is defined for."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.fc = nn.Linear(D, D)
        self.mix = Conv1D(D, D)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.mix(torch.tanh(self.fc(self.embed(ids)))), self.conv(image)


@pytest.mark.filterwarnings("ignore:.*TreeSpec.*is_leaf:FutureWarning")  # torch 2.13's exporter calls its own past
def test_live_layers_trace_to_one_node_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    inputs = (torch.arange(6).reshape(2, 3), torch.randn(2, 3, 8, 8))
    widths = {"embed": D, "fc": D, "mix": D, "conv": 27}
    chains = {name: torch.from_numpy(gaussian(d, 4, seed=i)).float() for i, (name, d) in enumerate(widths.items())}
    attachment = attach(model, HraAdapter(chains, rank=4))
    with torch.no_grad():
        expected = [tensor.double().numpy() for tensor in model(*inputs)]
    assert make_traceable_(attachment) == ()
    program = torch.onnx.export(model, inputs, input_names=["ids", "image"], opset_version=20, verbose=False)
    assert program is not None
    graph = program.model
    clean_(graph)
    assert {(t, len(r.nodes), r.form) for t, r in reflection_sites(graph).items()} == {
        ("embed", 1, "behind"),
        ("fc", 1, "front"),
        ("mix", 1, "front"),
        ("conv", 1, "beside"),
    }
    path = finished(graph, tmp_path)
    check_graph(path)
    for got, wanted in zip(run(path, {"ids": inputs[0].numpy(), "image": inputs[1].numpy()}), expected, strict=True):
        assert relative(got, wanted) < 3 * ROUNDINGS * ULP[np.float32]  # three layers, one after the other


def test_the_dense_rotation_agrees_with_the_explicit_chain() -> None:
    """The reference of these tests and the algebra's own."""
    u = chain(8)
    np.testing.assert_allclose(householder.dense(compact_wy(u)).numpy(), rotation(u), rtol=0, atol=ATOL64)
