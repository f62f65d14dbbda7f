"""Bases that are quantized already: ggml's blocks value by value, and graphs that compute with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import onnx_ir as ir
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from hra_export import codebook, ggml
from hra_export.errors import FormatError, GraphError
from hra_export.graph.half import to_half_
from hra_export.graph.kept_bits import keep_bits_
from hra_export.graph.operator import is_reflection
from hra_export.graph.quantize import quantize_
from hra_export.quantization import QuantizedMatrix, quantize
from hra_export.registry import load_converter
from tests.real_models import smollm2_gguf
from tests.reflecting_graphs import Array, GraphMaker, constants, kinds, run, two_layers, value
from tests.test_from_gguf import write_gguf

IDS = {"input_ids": np.arange(24).reshape(2, 12)}
# Where each type keeps its half-precision numbers, which random bytes would make huge or NaN.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
# Sums of 96 float32 products in another order, at |logits| of a few.
ATOL_FLOAT32 = 2e-5


def ggml_bytes(kind: str, o: int, d: int, seed: int = 0) -> Array:
    """Random blocks: every bit pattern of codes and small scales is a valid one."""
    random = np.random.default_rng(seed)
    columns, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = random.integers(0, 256, (o * d // columns, size), dtype=np.uint8)
    for start in HALVES[kind]:
        scales = (random.random((len(blocks), 1)) * 0.02 + 0.001).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(o, -1)


def blocks_of(kind: str, o: int = 48, d: int = 512, seed: int = 0) -> QuantizedMatrix:
    matrix = ggml.read_blocks(kind, ggml_bytes(kind, o, d, seed), (o, d))
    assert matrix is not None
    return matrix


@pytest.mark.parametrize("kind", ggml.KINDS)
def test_read_blocks_gives_ggml_s_values_bit_for_bit(kind: str) -> None:
    data = ggml_bytes(kind, 48, 512)
    matrix = ggml.read_blocks(kind, data, (48, 512))
    assert matrix is not None
    np.testing.assert_array_equal(matrix.values(), gguf.dequantize(data, Type[kind]))
    assert matrix.bits == (4 if kind.startswith("Q4") else 8)


def test_read_blocks_keeps_blocks_whose_offset_is_no_float32() -> None:
    """minimum + 8 · scale would be rounded: such a block keeps its minimum, around another zero."""
    data = ggml_bytes("Q4_1", 2, 64)
    data[0, 0:2] = np.array([0.0173], np.float16).view(np.uint8)
    data[0, 2:4] = np.array([60000.0], np.float16).view(np.uint8)
    matrix = ggml.read_blocks("Q4_1", data, (2, 64))
    assert matrix is not None
    assert matrix.zero_points is not None
    assert matrix.zero_points.tolist() == [[0, 8], [8, 8]]
    np.testing.assert_array_equal(matrix.values(), gguf.dequantize(data, Type.Q4_1))


def test_read_blocks_knows_what_it_does_not_know() -> None:
    assert ggml.read_blocks("IQ2_XS", np.zeros(74, np.uint8), (1, 256)) is None
    with pytest.raises(ValueError, match="Q4_0 of shape"):
        ggml.read_blocks("Q4_0", np.zeros(17, np.uint8), (1, 32))


def quantized_base(kind: str, d: int = 256) -> tuple[ir.Model, dict[str, QuantizedMatrix]]:
    """A float graph exported from a dequantized base, and the base's matrices."""
    model = two_layers(d, d)
    sizes = {"up.weight": (d, d), "down.weight": (d, d), "head.weight": (40, d)}
    matrices = {name: blocks_of(kind, *size, seed) for seed, (name, size) in enumerate(sizes.items())}
    for name, matrix in matrices.items():
        held = model.graph.initializers[f"val_{name.removesuffix('.weight')}"]
        held.const_value = ir.tensor(np.ascontiguousarray(matrix.values().T))
    return model, matrices


def rebuilt(model: ir.Model, name: str) -> Array:
    """The matrix (o, d) that the products of one weight stand for together, in float64, from constants alone."""
    held = constants(model)
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    total: Any = 0.0
    for node in nodes:
        inputs = [str(each.name) for each in node.inputs if each is not None]
        if not inputs[1].startswith(f"{name}_"):
            continue
        bits, size = (node.attributes[key].as_int() for key in ("bits", "block_size"))
        packed, scales = held[inputs[1]], held[inputs[2]].astype(np.float64)
        codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
        zeros: Any = 2.0 ** (bits - 1)
        if len(inputs) > 3:
            stored = held[inputs[3]]
            unpacked = stored if bits == 8 else np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1)
            zeros = unpacked[:, : scales.shape[1], None].astype(np.float64)
        total = total + (codes.astype(np.float64) - zeros) * scales[..., None]
        assert total.shape[2] == size
    if f"{name}_offsets" in held:
        total = total + held[f"{name}_offsets"].T[..., None]
    matrix: Array = total.reshape(len(total), -1)
    return matrix


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_keep_bits_puts_the_base_s_own_codes_into_the_graph(kind: str) -> None:
    model, matrices = quantized_base(kind)
    exact = run(model, IDS)["logits"]
    report = keep_bits_(model, matrices, accuracy_level=0)
    assert sorted(site.name for site in report.sites) == sorted(matrices)
    assert [node.op_type for node in model.graph if node.op_type == "MatMul"] == ["MatMul"] * 3 * (
        matrices["up.weight"].offsets is not None
    )
    for name, matrix in matrices.items():
        got = rebuilt(model, f"val_{name.removesuffix('.weight')}")
        np.testing.assert_array_equal(got.astype(np.float32), matrix.values(), err_msg=name)
    for optimized in (False, True):
        got = run(model, IDS, optimized=optimized)["logits"]
        np.testing.assert_allclose(got, exact, rtol=0, atol=ATOL_FLOAT32 * np.abs(exact).max())


def test_keep_bits_costs_the_adapter_nothing_and_folding_does() -> None:
    """The effect, against the exact fold: bits kept with the reflection outside, or folded and rounded again."""
    model, matrices = quantized_base("Q4_0")
    base, folded = model.clone(), model.clone()
    bypass_(base)
    fold_(folded)
    exact, start = run(folded, IDS)["logits"], run(base, IDS)["logits"]
    quantize_(folded, "int4", family="decoder", accuracy_level=0, head_bits=None)
    keep_bits_(model, matrices, accuracy_level=0)
    effect = np.linalg.norm(exact - start)
    assert np.linalg.norm(run(model, IDS)["logits"] - exact) / effect < 1e-5
    assert np.linalg.norm(run(folded, IDS)["logits"] - exact) / effect > 0.02


def bypass_(model: ir.Model) -> None:
    for node in [node for node in model.graph if is_reflection(node)]:
        node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]  # always given
        model.graph.remove(node, safe=True)


def fold_(model: ir.Model) -> None:
    held = constants(model)
    weight = held["val_up"].astype(np.float64)  # (d, o)
    exact = weight + held["up.hra_U"].astype(np.float64) @ (held["up.hra_V"] @ weight)
    model.graph.initializers["val_up"].const_value = ir.tensor(exact.astype(np.float32))
    bypass_(model)


def swap_blocks(matrix: QuantizedMatrix) -> QuantizedMatrix:
    scales = matrix.scales.copy()
    scales[:, [0, 1]] = scales[:, [1, 0]]
    return QuantizedMatrix(matrix.bits, matrix.block_size, matrix.columns, matrix.packed, scales)


@pytest.mark.parametrize(
    "damage", [swap_blocks, lambda matrix: matrix.rows(slice(None, None, -1))], ids=["scales moved", "rows reversed"]
)
def test_keep_bits_refuses_blocks_that_are_not_the_graph_s(
    damage: Callable[[QuantizedMatrix], QuantizedMatrix],
) -> None:
    model, matrices = quantized_base("Q4_0")
    damaged = {name: damage(matrix) if name != "head.weight" else matrix for name, matrix in matrices.items()}
    with pytest.raises(GraphError, match="2 of 3 quantized matrices have no place") as caught:
        keep_bits_(model, damaged)
    assert all("equals none of the weights of its shape" in finding for finding in caught.value.findings)


def test_keep_bits_refuses_a_graph_that_was_folded() -> None:
    model, matrices = quantized_base("Q4_0")
    fold_(model)
    before = kinds(model)
    with pytest.raises(GraphError) as caught:
        keep_bits_(model, matrices)
    assert [finding.partition(":")[0] for finding in caught.value.findings] == ["up.weight"]
    assert kinds(model) == before


def test_keep_bits_finds_matrices_by_value_under_any_name() -> None:
    model, matrices = quantized_base("Q8_0")
    keep_bits_(model, {f"x.{index}": matrix for index, matrix in enumerate(reversed(matrices.values()))})
    assert "MatMul" not in kinds(model)


def test_keep_bits_serves_a_tied_embedding_and_head() -> None:
    """One matrix of the file, two readers in the graph."""
    model, matrices = quantized_base("Q8_0")
    table = matrices["head.weight"].values()
    model.graph.initializers["embed.weight"].const_value = ir.tensor(table)
    exact = run(model, IDS)["logits"]
    keep_bits_(model, matrices, accuracy_level=0)
    products = ["MatMulNBits", "MatMulNBits", "Add"]  # the two halves of 8 bits
    assert kinds(model) == ["GatherBlockQuantized", "HouseholderReflection", *products, "Relu", *products, *products]
    assert not {"embed.weight", "val_head"} & set(constants(model))
    np.testing.assert_allclose(run(model, IDS)["logits"], exact, rtol=0, atol=ATOL_FLOAT32 * np.abs(exact).max())


def test_keep_bits_shares_the_sums_of_one_input() -> None:
    """q, k and v of one x, each with offsets: one sum over blocks."""
    maker = GraphMaker(value("x", ir.DataType.FLOAT, "b", "t", 64))
    matrices = {f"w{index}": blocks_of("Q4_1", 32, 64, index) for index in range(3)}
    for name, matrix in matrices.items():
        weight = maker.constant(name, matrix.values().T.copy())
        maker.node("MatMul", [maker.graph.inputs[0], weight], ["b", "t", 32])
    model = maker.model(*((f"y{index}", node.outputs[0]) for index, node in enumerate(maker.graph)))
    feed = {"x": np.random.default_rng(1).standard_normal((2, 3, 64), np.float32)}
    exact = run(model, feed)
    keep_bits_(model, matrices)
    assert kinds(model).count("ReduceSum") == 1
    for name, got in run(model, feed).items():
        np.testing.assert_allclose(got, exact[name], rtol=0, atol=ATOL_FLOAT32 * np.abs(exact[name]).max())


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "nf4"])
def test_keep_bits_keeps_the_bias_of_a_gemm(kind: str) -> None:
    maker = GraphMaker(value("x", ir.DataType.FLOAT, "b", 64))
    if kind == "nf4":
        tensors, weight = bnb_tensors(
            torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), kind, nested=False
        )
        matrices: dict[str, Any] = dict(codebook.read_matrices(tensors))
    else:
        matrices = {"w": blocks_of(kind, 32, 64)}
        weight = matrices["w"].values()
    operands = [maker.constant("w", weight), maker.constant("bias", np.arange(32, dtype=np.float32))]
    y = maker.node("Gemm", [maker.graph.inputs[0], *operands], ["b", 32], transB=1)
    model = maker.model(("y", y))
    feed = {"x": np.random.default_rng(1).standard_normal((3, 64), np.float32)}
    exact = run(model, feed)["y"]
    keep_bits_(model, matrices)
    assert "Gemm" not in kinds(model)
    np.testing.assert_allclose(run(model, feed)["y"], exact, rtol=0, atol=ATOL_FLOAT32 * np.abs(exact).max())


def test_keep_bits_writes_8_bits_whole_where_a_kernel_is() -> None:
    """With activations rounded to 8 bits, and in half precision, as a GPU has it."""
    model, matrices = quantized_base("Q8_0")
    exact, rounded = run(model, IDS)["logits"], model.clone()
    keep_bits_(rounded, matrices, accuracy_level=4)
    to_half_(model, "float16")
    keep_bits_(model, matrices)
    for each in (rounded, model):
        bits = [node.attributes["bits"].as_int() for node in each.graph if node.op_type == "MatMulNBits"]
        assert bits == [8, 8, 8]
    got = run(rounded, IDS)["logits"]
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.02  # 8-bit activations in three layers


@pytest.mark.parametrize("half_first", [False, True])
def test_kept_bits_run_with_half_precision_activations(half_first: bool) -> None:
    """ggml's scales are halves: rounding the graph leaves them as they are, and weights are known when rounded too."""
    model, matrices = quantized_base("Q4_0")
    exact = run(model, IDS)["logits"]
    if half_first:
        to_half_(model, "float16")
    keep_bits_(model, matrices, accuracy_level=0)
    if not half_first:
        to_half_(model, "float16")
    held = constants(model)
    np.testing.assert_array_equal(held["val_up_scales"].astype(np.float32), matrices["up.weight"].scales)
    got = run(model, IDS)["logits"]
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 10 * 2.0**-11


def test_keep_bits_takes_rounded_weights_of_our_own() -> None:
    """Any affine blocks, such as those of a base that was rounded for MatMulNBits."""
    model = two_layers()
    matrices = {}
    for name in ("up", "down", "head"):
        held = model.graph.initializers[f"val_{name}"]
        matrices[name] = quantize(constants(model)[f"val_{name}"].T, bits=4, block_size=32)
        held.const_value = ir.tensor(np.ascontiguousarray(matrices[name].values().T))
    exact = run(model, IDS)["logits"]
    keep_bits_(model, matrices, accuracy_level=0)
    np.testing.assert_allclose(run(model, IDS)["logits"], exact, rtol=0, atol=ATOL_FLOAT32)


def bnb_tensors(weight: torch.Tensor, kind: str, *, nested: bool) -> tuple[dict[str, torch.Tensor], Array]:
    """A 4-bit checkpoint's tensors of one matrix, and what bitsandbytes makes of them."""
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    parts = {f"up.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"up.weight": codes, **parts}, bnb.dequantize_4bit(codes, state).float().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_keep_bits_keeps_those_of_bitsandbytes(kind: str, nested: bool, dtype: torch.dtype) -> None:
    """Of a bfloat16 model the graph's weights are rounded products; the codes are put in their place unrounded."""
    model = two_layers(64, 96)
    weight = torch.from_numpy(constants(model)["val_up"].T.copy()).to(dtype)
    tensors, expected = bnb_tensors(weight, kind, nested=nested)
    matrices = dict(codebook.read_matrices(tensors))
    np.testing.assert_array_equal(matrices["up.weight"].loaded_values(), expected)
    np.testing.assert_array_equal(matrices["up.weight"].loaded_values(slice(3, 7)), expected[3:7])
    unrounded = model.clone()
    model.graph.initializers["val_up"].const_value = ir.tensor(np.ascontiguousarray(expected.T))
    unrounded.graph.initializers["val_up"].const_value = ir.tensor(matrices["up.weight"].values().T.copy())
    exact = run(unrounded, IDS)["logits"]
    keep_bits_(model, matrices)
    assert kinds(model)[1:3] == ["HouseholderReflection", "MatMulBnb4"]
    for optimized in (False, True):
        np.testing.assert_allclose(run(model, IDS, optimized=optimized)["logits"], exact, rtol=0, atol=ATOL_FLOAT32)


def test_read_matrices_names_a_damaged_matrix() -> None:
    tensors, _ = bnb_tensors(torch.ones(4, 64), "nf4", nested=False)
    with pytest.raises(FormatError, match=r"`up\.weight` is no 4-bit matrix of bitsandbytes: .*64 bytes"):
        list(codebook.read_matrices({**tensors, "up.weight": tensors["up.weight"][:64]}))
    del tensors["up.weight.absmax"]
    with pytest.raises(FormatError, match=r"up\.weight\.absmax"):
        list(codebook.read_matrices(tensors))


from_gguf = load_converter("from_gguf")


@pytest.mark.parametrize("matrices", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_quantized_matrices_are_transformers_parameters(tmp_path: Path, matrices: Type) -> None:
    """Rows of q and k are in llama.cpp's order in the file."""
    path = write_gguf(tmp_path / "tiny.gguf", matrices)
    state = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    found = dict(from_gguf.quantized_matrices(path))
    assert sorted(found) == sorted(name for name, tensor in state.items() if tensor.ndim == 2)
    for name, matrix in found.items():
        np.testing.assert_array_equal(matrix.values(), state[name].numpy(), err_msg=name)


def test_quantized_matrices_leaves_floats_out(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", Type.F16, types={"blk.0.ffn_up": Type.Q8_0})
    assert [name for name, _ in from_gguf.quantized_matrices(path)] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.real
def test_quantized_matrices_of_a_real_model_are_its_parameters() -> None:
    """SmolLM2 in Q4_1, its tied embedding in Q8_0."""
    path = smollm2_gguf()
    state = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    found = dict(from_gguf.quantized_matrices(path))
    assert len(found) == 211
    assert all(np.array_equal(matrix.values(), state[name].numpy()) for name, matrix in found.items())
