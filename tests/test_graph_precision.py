"""Weights of few bits and graphs in half precision, against float64 and against ONNX Runtime's own quantizer."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.capi import _pybind_state

from hra_export.errors import GraphError, NumericalError, UnsupportedModelError
from hra_export.graph import operator
from hra_export.graph.half import to_half_, widened
from hra_export.graph.quantize import quantize_, scheme_for
from hra_export.quantization import QuantizedMatrix, pack, quantize, unpack
from tests.reflecting_graphs import (
    VOCABULARY,
    Array,
    GraphMaker,
    constants,
    kinds,
    reflection_operands,
    run,
    two_layers,
    value,
)

IDS = {"input_ids": np.arange(24).reshape(2, 12)}
# Sums of up to 256 float32 products, in any order: 256 · 2⁻²⁴ of Σ|x||w|.
FLOAT32_SUM = 256 * 2.0**-24
# One rounding of an 11-bit (8-bit) significand at each of the ten places where such a graph rounds.
RTOL_FLOAT16, RTOL_BFLOAT16 = 10 * 2.0**-11, 10 * 2.0**-8


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def random_matrix(o: int = 24, d: int = 96, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((o, d), np.float32)


def one_product(weight: Array, *, bias: Array | None = None, reflect: bool = False) -> ir.Model:
    """x (b, t, d) → y (b, t, o); with a bias, a Gemm of x (b, d)."""
    o, d = weight.shape
    sizes: list[Any] = ["b", d] if bias is not None else ["b", "t", d]
    maker = GraphMaker(value("x", ir.DataType.FLOAT, *sizes))
    x = maker.graph.inputs[0]
    if reflect:
        x = maker.reflection(x, "layer", *reflection_operands(d))
    if bias is None:
        y = maker.node("MatMul", [x, maker.constant("w", np.ascontiguousarray(weight.T))], [*sizes[:-1], o])
    else:
        operands = [x, maker.constant("w", weight), maker.constant("bias", bias)]
        y = maker.node("Gemm", operands, [*sizes[:-1], o], transB=1)
    return maker.model(("y", y))


def stored_matrix(model: ir.Model) -> QuantizedMatrix:
    """What a graph's only MatMulNBits holds, read back from its constants."""
    (node,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    held = [constants(model)[str(each.name)] if each is not None else None for each in node.inputs[1:4]]
    packed, scales, zeros = [*held, None, None][:3]
    assert packed is not None
    assert scales is not None
    bits, block_size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    if zeros is not None and bits == 4:
        zeros = unpack(zeros)[:, : scales.shape[1]]
    assert bits in (4, 8)
    return QuantizedMatrix(bits, block_size, node.attributes["K"].as_int(), packed, scales, zeros)  # type: ignore[arg-type]  # checked above


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_makes_the_codes_of_onnx_runtime(bits: Any, symmetric: bool) -> None:
    weight = random_matrix(16, 128)
    weight[3, :32], weight[4, :32] = 0.0, np.abs(weight[4, :32])  # nothing, and nothing below zero
    got = quantize(weight, bits=bits, block_size=32, symmetric=symmetric)
    packed, scales = np.zeros_like(got.packed), np.zeros(got.scales.size, np.float32)
    zeros = np.zeros((16, 4 * bits // 8), np.uint8)
    theirs = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    theirs(packed, np.ascontiguousarray(weight.T), scales, zeros, 32, 16, 128, symmetric)
    is_zero = got.scales == 0  # whatever their codes are, such a block is 0
    np.testing.assert_array_equal(got.scales, scales.reshape(16, 4))
    np.testing.assert_array_equal(got.packed[~is_zero], packed[~is_zero])
    if not symmetric:
        assert got.zero_points is not None
        unpacked = unpack(zeros) if bits == 4 else zeros
        np.testing.assert_array_equal(got.zero_points[~is_zero], unpacked[~is_zero])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block_size"), [(4, 16), (4, 32), (8, 64), (8, 256)])
def test_quantize_is_off_by_half_a_step(bits: Any, block_size: int, symmetric: bool) -> None:
    """Also where the last block is not full, and for one step at the far end of a symmetric block."""
    weight = random_matrix(5, 80)
    matrix = quantize(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    steps = np.repeat(np.abs(matrix.scales), block_size, axis=1)[:, :80]
    allowed = steps * (1.0 if symmetric else 0.5) * (1 + 1e-5)
    assert (np.abs(matrix.values() - weight) <= allowed).all()


def test_quantized_matrix_refuses_parts_that_do_not_fit() -> None:
    scales = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"packed: expected shape \(3, 2, 16\), got \(3, 2, 32\)"):
        QuantizedMatrix(4, 32, 64, np.zeros((3, 2, 32), np.uint8), scales)


def test_pack_puts_the_first_code_low() -> None:
    codes = np.array([[1, 15, 0, 8]], np.uint8)
    np.testing.assert_array_equal(pack(codes), [[0xF1, 0x80]])
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "block_size", "d"), [(4, 16, 64), (4, 32, 96), (8, 32, 96), (4, 128, 256), (4, 32, 80)]
)
def test_quantize_computes_with_the_rounded_weights(
    bits: int, block_size: int, d: int, symmetric: bool, optimized: bool
) -> None:
    weight = random_matrix(24, d)
    model = one_product(weight)
    quantize_(
        model, f"int{bits}", family="decoder", block_size=block_size, symmetric=symmetric, accuracy_level=0  # type: ignore[arg-type]  # int4 or int8
    )  # fmt: skip
    x = np.random.default_rng(1).standard_normal((2, 3, d), np.float32)
    rounded = stored_matrix(model).values().astype(np.float64)
    expected = quantize(weight, bits=8 if bits == 8 else 4, block_size=block_size, symmetric=symmetric)
    np.testing.assert_array_equal(rounded, expected.values())
    exact, bound = x.astype(np.float64) @ rounded.T, FLOAT32_SUM * (np.abs(x) @ np.abs(rounded).T)
    assert kinds(model) == ["MatMulNBits"]
    assert model.graph.opset_imports["com.microsoft"] == 1
    assert (np.abs(run(model, {"x": x}, optimized=optimized)["y"] - exact) <= bound).all()


def test_quantize_keeps_the_bias_of_a_gemm() -> None:
    weight, bias = random_matrix(24, 64), np.arange(24, dtype=np.float32)
    model = one_product(weight, bias=bias)
    quantize_(model, "int4", family="decoder", accuracy_level=0)
    x = np.random.default_rng(1).standard_normal((3, 64), np.float32)
    exact = x @ stored_matrix(model).values().T + bias
    np.testing.assert_allclose(run(model, {"x": x})["y"], exact, rtol=0, atol=1e-4)


def test_quantize_leaves_reflections_alone() -> None:
    model = two_layers()
    before = constants(model)
    report = quantize_(model, "int4", family="decoder", symmetric=True)
    after = constants(model)
    reflected = [name for name in before if ".hra_" in name]
    assert [node.op_type for node in model.graph if operator.is_reflection(node)] == ["HouseholderReflection"]
    assert reflected
    assert all(np.array_equal(before[name], after[name]) for name in reflected)
    assert [(site.name, site.bits) for site in report.sites] == [("up", 4), ("down", 4), ("head", 8)]
    assert not any(name.startswith("val_") and after[name].dtype == np.float32 for name in ("val_up",) if name in after)
    assert report.size_after < report.size_before / 2


def test_quantize_leaves_the_operands_of_lowered_reflections() -> None:
    """Such a graph may come from elsewhere: its small products are told by their names."""
    u, v = reflection_operands(64)
    maker = GraphMaker(value("x", ir.DataType.FLOAT, "b", 64))
    x = maker.graph.inputs[0]
    change = maker.node("MatMul", [x, maker.constant("layer.hra_U", u)], ["b", 4])
    change = maker.node("MatMul", [change, maker.constant("layer.hra_V", v)], ["b", 64])
    x = maker.node("Add", [x, change], ["b", 64])
    model = maker.model(("y", maker.node("MatMul", [x, maker.constant("w", random_matrix(64, 64))], ["b", 64])))
    quantize_(model, "int4", family="decoder")
    assert kinds(model) == ["MatMul", "MatMul", "Add", "MatMulNBits"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_takes_embeddings_and_spares_the_head_when_told(bits: Any) -> None:
    model = two_layers()
    report = quantize_(model, "int4", family="decoder", head_bits=None, embedding_bits=bits)
    assert kinds(model)[0] == "GatherBlockQuantized"
    assert report.float_sites == ("head",)
    assert kinds(model)[-1] == "MatMul"
    plain = two_layers()
    quantize_(plain, "int4", family="decoder", head_bits=None)
    table = plain.graph.initializers["embed.weight"]
    exact = quantize(constants(plain)["embed.weight"], bits=bits, block_size=32).values()
    table.const_value = ir.tensor(exact)
    np.testing.assert_allclose(run(model, IDS)["logits"], run(plain, IDS)["logits"], rtol=0, atol=1e-5)


def test_quantize_writes_a_shared_weight_once() -> None:
    """ALBERT's layers share their parameters."""
    maker = GraphMaker(value("x", ir.DataType.FLOAT, "b", 64))
    weight = maker.constant("w", random_matrix(64, 64))
    x = maker.node("MatMul", [maker.graph.inputs[0], weight], ["b", 64])
    model = maker.model(("y", maker.node("MatMul", [x, weight], ["b", 64])))
    report = quantize_(model, "int4", family="decoder")
    first, second = model.graph
    assert [held.name for held in first.inputs[1:]] == [held.name for held in second.inputs[1:]]
    assert len(report.sites) == 1


def tied_model() -> ir.Model:
    """ids → embedding → MatMul with the transposed embedding → `logits`."""
    maker = GraphMaker(value("input_ids", ir.DataType.INT64, "b", "t"))
    table = maker.constant("embed.weight", random_matrix(VOCABULARY, 64))
    x = maker.node("Gather", [table, maker.graph.inputs[0]], ["b", "t", 64])
    turned = maker.node("Transpose", [table], [64, VOCABULARY], perm=[1, 0])
    return maker.model(("logits", maker.node("MatMul", [x, turned], ["b", "t", VOCABULARY])))


def test_quantize_gives_a_tied_head_and_its_embedding_one_matrix() -> None:
    model = tied_model()
    exact = tied_model()
    rounded = quantize(constants(exact)["embed.weight"], bits=8, block_size=32).values()
    exact.graph.initializers["embed.weight"].const_value = ir.tensor(rounded)
    report = quantize_(model, "int4", family="decoder", accuracy_level=0)
    assert kinds(model) == ["GatherBlockQuantized", "MatMulNBits"]
    assert "embed.weight" not in constants(model)
    assert [site.bits for site in report.sites] == [8]
    np.testing.assert_allclose(run(model, IDS)["logits"], run(exact, IDS)["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["encoder", "image"])
def test_quantize_computes_encoders_in_integers(family: str) -> None:
    weight, bias = random_matrix(24, 64), np.arange(24, dtype=np.float32)
    model = one_product(weight, bias=bias)
    report = quantize_(model, "int8", family=family)
    assert report.scheme == "dynamic"
    assert kinds(model) == ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul", "Add"]
    x = np.random.default_rng(1).standard_normal((3, 64), np.float32)
    held = constants(model)
    rounded = ((held["w_codes"].astype(np.float64) - 128) * held["w_scales"]).T  # (o, d)
    step = (x.max() - x.min()) / 255
    np.testing.assert_allclose(rounded, weight, rtol=0, atol=float(np.abs(weight).max() / 127 / 2 * 1.0001))
    for optimized in (False, True):
        error = np.abs(run(model, {"x": x}, optimized=optimized)["y"] - (x @ rounded.T + bias))
        assert (error <= step / 2 * 1.01 * np.abs(rounded).sum(1)).all()


def test_quantize_rounds_shared_activations_once() -> None:
    maker = GraphMaker(value("x", ir.DataType.FLOAT, "b", 64))
    x = maker.graph.inputs[0]
    parts = [maker.node("MatMul", [x, maker.constant(f"w{i}", random_matrix(64, 32, i))], ["b", 32]) for i in range(2)]
    model = maker.model(("y", maker.node("Add", parts, ["b", 32])))
    quantize_(model, "int8", family="encoder")
    assert kinds(model).count("DynamicQuantizeLinear") == 1
    assert kinds(model).count("MatMulInteger") == 2


def test_scheme_for_never_rounds_a_decoder_s_activations() -> None:
    assert scheme_for("int8", "decoder") == "weights"
    assert scheme_for("int8", "encoder") == "dynamic"
    assert scheme_for("int4", "encoder") == "weights"


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantize_keeps_the_effect_of_the_adapter(precision: Any) -> None:
    """Rounding the base moves both sides alike; what the reflection changes stays what it was, to the rounding of W."""
    weight, d = random_matrix(48, 64), 64
    u, v = reflection_operands(d)
    x = np.random.default_rng(1).standard_normal((2, 3, d), np.float32)
    outputs = {}
    for reflect in (False, True):
        model = one_product(weight, reflect=reflect)
        quantize_(model, precision, family="decoder", accuracy_level=0)
        outputs[reflect] = run(model, {"x": x})["y"]
    rounded = quantize(weight, bits=4 if precision == "int4" else 8, block_size=32).values()
    effect = (x.astype(np.float64) @ u) @ v @ rounded.T
    assert relative(outputs[True] - outputs[False], effect) < 1e-5  # float32 sums; the rounding of W is in both


def test_quantize_names_a_weight_that_is_not_finite() -> None:
    model = two_layers()
    held = model.graph.initializers["val_down"]
    broken = constants(model)["val_down"].copy()
    broken[3, 4] = np.nan
    held.const_value = ir.tensor(broken)
    for family in ("decoder", "encoder"):
        with pytest.raises(NumericalError, match="`down`: a weight to be quantized is not finite"):
            quantize_(model.clone(), "int8", family=family)


def test_quantize_refuses_a_graph_without_constant_matrices() -> None:
    model = one_product(random_matrix())
    quantize_(model, "int4", family="decoder")
    with pytest.raises(GraphError, match="nothing to quantize"):
        quantize_(model, "int4", family="decoder")


def test_quantize_refuses_half_precision_activations_in_integers() -> None:
    model = one_product(random_matrix())
    to_half_(model, "float16")
    with pytest.raises(GraphError, match="float32 activations"):
        quantize_(model, "int8", family="encoder")


@pytest.mark.parametrize("change", [lambda m: quantize_(m, "int4", family="decoder"), lambda m: to_half_(m, "float16")])
def test_branches_are_refused_by_name(change: Callable[[ir.Model], object]) -> None:
    model = one_product(random_matrix())
    condition = value("c", ir.DataType.BOOL)
    model.graph.inputs.append(condition)
    branch = ir.Graph([], [], nodes=[], name="empty")
    model.graph.append(ir.Node("", "If", [condition], [ir.AttrGraph("then_branch", branch)], name="choice"))
    with pytest.raises(UnsupportedModelError, match="choice: If"):
        change(model)


def normed_attention(*, factor: float = 1.0) -> ir.Model:
    """RMS norm, reflection, product, mask of −3.4e38, softmax, with a cache: where half precision goes wrong.

    `factor` scales the weight.
    """
    d = 32
    rows = ["b", "t", d]
    maker = GraphMaker(
        value("input_ids", ir.DataType.INT64, "b", "t"),
        value("past_key_values.0.key", ir.DataType.FLOAT, "b", "t", d),
        value("mask", ir.DataType.FLOAT, "b", "t", "t"),
    )
    ids, past, mask = maker.graph.inputs
    table = maker.constant("embed.weight", 300 * random_matrix(VOCABULARY, d))
    x = maker.node("Gather", [table, ids], rows)
    square = maker.node("Mul", [x, x], rows)
    mean = maker.node("ReduceMean", [square, maker.constant("axis", np.array([-1]))], ["b", "t", 1])
    shifted = maker.node("Add", [mean, maker.constant("eps", np.array(1e-6, np.float32))], ["b", "t", 1])
    scale = maker.node("Reciprocal", [maker.node("Sqrt", [shifted], ["b", "t", 1])], ["b", "t", 1])
    x = maker.node("Mul", [x, scale], rows)
    x = maker.node("Mul", [x, maker.constant("norm", np.ones(d, np.float32))], rows)
    x = maker.reflection(x, "q", *reflection_operands(d))
    query = maker.node("MatMul", [x, maker.constant("w", factor * random_matrix(d, d) / d**0.5)], rows)
    key = maker.node("Add", [query, past], rows)
    turned = maker.node("Transpose", [key], ["b", d, "t"], perm=[0, 2, 1])
    scores = maker.node("MatMul", [query, turned], ["b", "t", "t"])
    lowest = maker.constant("lowest", np.array(np.finfo(np.float32).min))
    scores = maker.node("Add", [scores, maker.node("Mul", [mask, lowest], ["b", "t", "t"])], ["b", "t", "t"])
    weights = maker.node("Softmax", [scores], ["b", "t", "t"], axis=-1)
    return maker.model(("logits", maker.node("MatMul", [weights, key], rows)), ("present.0.key", key))


def attention_feed(past: Any) -> dict[str, Array]:
    random = np.random.default_rng(2)
    mask = np.broadcast_to(np.triu(np.ones((5, 5), np.float32), 1), (2, 5, 5)).copy()
    cache = random.standard_normal((2, 5, 32), np.float32).astype(past)
    return {"input_ids": random.integers(0, VOCABULARY, (2, 5)), "past_key_values.0.key": cache, "mask": mask}


@pytest.mark.parametrize("optimized", [False, True])
def test_to_half_is_near_float32(optimized: bool) -> None:
    """A mask of −3.4e38, an ε of 1e-6 and squares beyond 65504 would each ruin it in float16."""
    exact = run(normed_attention(), attention_feed(np.float32))
    model = normed_attention()
    to_half_(model, "float16")
    got = run(model, attention_feed(np.float16), optimized=optimized)
    for name, expected in exact.items():
        assert relative(got[name], expected) < RTOL_FLOAT16, name


def test_to_half_puts_sums_in_float32_and_products_in_half() -> None:
    model = normed_attention()
    to_half_(model, "float16")
    types = {(node.op_type, node.outputs[0].dtype) for node in model.graph if node.op_type != "Cast"}
    wide = ("Mul", "ReduceMean", "Sqrt", "Reciprocal", "Softmax")
    assert {(kind, ir.DataType.FLOAT) for kind in wide} <= types
    assert {("MatMul", ir.DataType.FLOAT16), ("HouseholderReflection", ir.DataType.FLOAT16)} <= types
    assert not {(kind, ir.DataType.FLOAT16) for kind in wide} & types
    assert ("MatMul", ir.DataType.FLOAT) not in types
    ports = {str(port.name): port.dtype for port in (*model.graph.inputs, *model.graph.outputs)}
    assert ports["mask"] == ports["logits"] == ir.DataType.FLOAT
    assert ports["past_key_values.0.key"] == ports["present.0.key"] == ir.DataType.FLOAT16
    assert {name: array.dtype for name, array in constants(model).items() if name in ("w", "q.hra_U", "norm")} == {
        "w": np.float16,
        "q.hra_U": np.float16,
        "norm": np.float32,
    }
    operator.declare_(model)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


def test_to_half_rounds_inputs_and_outputs_too_when_told() -> None:
    model = normed_attention()
    to_half_(model, "float16", float_io=False)
    ports = {str(port.name): port.dtype for port in (*model.graph.inputs, *model.graph.outputs)}
    assert {dtype for name, dtype in ports.items() if name != "input_ids"} == {ir.DataType.FLOAT16}


def test_to_half_names_every_constant_that_overflows() -> None:
    model = normed_attention(factor=1e6)
    huge = ir.tensor(constants(model)["q.hra_V"] * 1e6)
    model.graph.initializers["q.hra_V"].const_value = huge
    with pytest.raises(NumericalError, match="2 constants do not fit float16") as caught:
        to_half_(model, "float16")
    assert [finding.partition(":")[0] for finding in caught.value.findings] == ["q.hra_V", "w"]
    fine = normed_attention(factor=1e6)
    to_half_(fine, "bfloat16")  # has float32's range


@pytest.mark.parametrize(("kind", "bound"), [("Min", 3e38), ("Max", 1e-30), ("Min", 1.0)])
def test_to_half_computes_in_float32_with_scalars_beyond_half(kind: str, bound: float) -> None:
    """As a half, the first would be ∞ and the second 0, by which something may be divided."""
    maker = GraphMaker(value("x", ir.DataType.FLOAT, "b", 32))
    weights = [maker.constant(f"w{index}", random_matrix(32, 32, index)) for index in range(2)]
    product = maker.node("MatMul", [maker.graph.inputs[0], weights[0]], ["b", 32])
    bounded = maker.node(kind, [product, maker.constant("bound", np.array(bound, np.float32))], ["b", 32])
    model = maker.model(("y", maker.node("MatMul", [bounded, weights[1]], ["b", 32])))
    x = np.random.default_rng(1).standard_normal((4, 32), np.float32)
    exact = run(model, {"x": x})["y"]
    to_half_(model, "float16")
    (node,) = [node for node in model.graph if node.op_type == kind]
    assert node.outputs[0].dtype == (ir.DataType.FLOAT16 if bound == 1.0 else ir.DataType.FLOAT)
    assert relative(run(model, {"x": x})["y"], exact) < RTOL_FLOAT16


def test_to_half_keeps_a_constant_in_both_when_both_want_it() -> None:
    maker = GraphMaker(value("x", ir.DataType.FLOAT, "b", 32))
    weight = maker.constant("w", random_matrix(32, 32))
    product = maker.node("MatMul", [maker.graph.inputs[0], weight], ["b", 32])
    square = maker.node("ReduceSum", [weight], [], keepdims=0)
    model = maker.model(("y", maker.node("Mul", [product, square], ["b", 32])))
    to_half_(model, "float16")
    assert {name: array.dtype for name, array in constants(model).items()} == {"w": np.float16, "w_float32": np.float32}


def test_to_half_after_quantize_gives_float16_scales() -> None:
    """Weights in 4 bits with activations in half precision, as for a GPU."""
    exact = two_layers()
    quantize_(exact, "int4", family="decoder", accuracy_level=0)
    half = two_layers()
    quantize_(half, "int4", family="decoder", accuracy_level=0)
    to_half_(half, "float16")
    held = constants(half)
    assert {held[name].dtype for name in held if name.endswith("_scales")} == {np.dtype(np.float16)}
    assert relative(run(half, IDS)["logits"], run(exact, IDS)["logits"]) < RTOL_FLOAT16


def test_widened_runs_a_bfloat16_graph_with_its_own_weights() -> None:
    model = normed_attention()
    to_half_(model, "bfloat16")
    wide = widened(model)
    got = run(wide, attention_feed(np.float32))
    rounded = normed_attention()
    for held in rounded.graph.initializers.values():
        assert held.const_value is not None
        if held.name in ("embed.weight", "w", "q.hra_U", "q.hra_V"):
            held.const_value = ir.tensor(held.const_value.numpy().astype(ml_dtypes.bfloat16).astype(np.float32))
    expected = run(rounded, attention_feed(np.float32))
    np.testing.assert_allclose(got["logits"], expected["logits"], rtol=0, atol=1e-6)
    assert relative(got["logits"], run(normed_attention(), attention_feed(np.float32))["logits"]) < RTOL_BFLOAT16
    assert any(held.dtype == ir.DataType.BFLOAT16 for held in model.graph.initializers.values())
    assert not any(held.dtype == ir.DataType.BFLOAT16 for held in wide.graph.initializers.values())
