"""Reflections in graphs that exist: ONNX text → insertion → operators → numbers without optimization → checker.

The reference is the explicit chain in float64: W H_1 H_2 … as a dense matrix.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from hra_export import attach
from hra_export.adapter import HraAdapter
from hra_export.errors import MismatchError
from hra_export.graph.document import open_graph
from hra_export.graph.insertion import insert_reflections_
from hra_export.graph.reflections import reflection_sites
from hra_export.graph.soundness import check_graph
from tests.graph_text import Array, finished, graph, operators, run, scope_

# Sums of at most 32 terms of size 1, of 6 roundings of 2⁻²⁴ each: products with U, V and W, and two additions.
RTOL32 = 32 * 6 * 2.0**-24
# The same roundings of 2⁻¹¹; the terms of a sum are rounded at random, so their errors grow with √32.
RTOL16 = 6 * 6 * 2.0**-11
D, OUT, RANK = 16, 24, 4
Dense = NDArray[np.float64]


def gaussian(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def chain(features: int, *, rank: int = RANK, seed: int = 0) -> Tensor:
    return torch.from_numpy(gaussian(features, rank, seed=seed + 100))


def an_adapter(chains: Mapping[str, Tensor], **fields: object) -> HraAdapter:
    return HraAdapter(dict(chains), rank=next(iter(chains.values())).shape[1], **fields)  # type: ignore[arg-type]  # tests name real fields


def rotation(*chains: Tensor) -> Dense:
    """H_1 H_2 … of one chain after the other, one reflection at a time."""
    product = np.eye(chains[0].shape[0])
    for vectors in chains:
        for column in vectors.double().numpy().T:
            product = product - 2 * np.outer(product @ column, column) / (column @ column)
    return product


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def numbers(model: ir.Model, folder: Path, feeds: Mapping[str, Array]) -> Array:
    """The first output, of a graph that the checker has passed."""
    path = finished(model, folder / "written")
    check_graph(path)
    return run(path, feeds)[0]


MATMUL = 'g (float[n, 16] x) => (float[n, 24] y) { y = MatMul (x, "a.b.weight") }'
GEMM = 'g (float[n, 16] x) => (float[n, 24] y) { y = Gemm <transB = 1> (x, "a.b.weight") }'


@pytest.mark.parametrize(("body", "transposed"), [(MATMUL, False), (GEMM, True)])
def test_insertion_reflects_the_input_of_a_product(tmp_path: Path, body: str, transposed: bool) -> None:
    weight, u, x = gaussian(OUT, D), chain(D), gaussian(5, D, seed=1)
    model = graph(body, {"a.b.weight": weight if transposed else np.ascontiguousarray(weight.T)})
    report = insert_reflections_(model, [an_adapter({"a.b": u})])
    assert operators(model) == ["HouseholderReflection", "Gemm" if transposed else "MatMul"]
    (node, _) = model.graph
    assert (node.name, [value.name for value in node.inputs if value]) == ("a.b/hra", ["x", "a.b.hra_U", "a.b.hra_V"])
    assert (report.reflections["a.b"].rank, report.reflections["a.b"].form, report.notes) == (RANK, "front", ())
    expected = x @ (weight @ rotation(u)).T
    assert relative(numbers(model, tmp_path, {"x": x}), expected) < RTOL32


@pytest.mark.parametrize("body", [MATMUL.replace("24", "16"), GEMM.replace("24", "16")])
def test_a_square_weight_is_read_the_way_its_product_does(tmp_path: Path, body: str) -> None:
    """Both orientations fit in shape; a chain on the wrong side, or reversed, would give other numbers."""
    weight, u, x = gaussian(D, D), chain(D), gaussian(5, D, seed=1)
    model = graph(body, {"a.b.weight": weight})
    insert_reflections_(model, [an_adapter({"a.b": u})])
    seen = weight if "Gemm" in body else weight.T  # (o, d)
    got, r = numbers(model, tmp_path, {"x": x}), rotation(u)
    assert relative(got, x @ (seen @ r).T) < RTOL32
    for wrong in (seen @ r.T, r @ seen, seen):
        assert relative(got, x @ wrong.T) > 0.1


@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (2, 1, 3, D)], ids=len)
def test_insertion_takes_batches_of_any_rank(tmp_path: Path, shape: tuple[int, ...]) -> None:
    sizes = ", ".join(map(str, shape))
    weight, u, x = gaussian(D, OUT), chain(D), gaussian(*shape, seed=1)
    outputs = ", ".join(map(str, (*shape[:-1], OUT)))
    body = f'g (float[{sizes}] x) => (float[{outputs}] y) {{ y = MatMul (x, "a.b.weight") }}'
    model = graph(body, {"a.b.weight": weight})
    insert_reflections_(model, [an_adapter({"a.b": u})])
    assert relative(numbers(model, tmp_path, {"x": x}), x @ (weight.T @ rotation(u)).T) < RTOL32


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    d=st.integers(1, 32),
    o=st.integers(1, 32),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_insertion_is_the_chain_for_all_sizes(
    tmp_path: Path, d: int, o: int, ranks: list[int], transposed: bool, seed: int
) -> None:
    weight, x = gaussian(o, d, seed=seed), gaussian(3, d, seed=seed + 1)
    chains = [chain(d, rank=min(r, d), seed=seed + 2 + i) for i, r in enumerate(ranks)]
    op = "Gemm <transB = 1>" if transposed else "MatMul"
    body = f'g (float[n, {d}] x) => (float[n, {o}] y) {{ y = {op} (x, "a.b.weight") }}'
    model = graph(body, {"a.b.weight": weight if transposed else np.ascontiguousarray(weight.T)})
    insert_reflections_(model, [an_adapter({"a.b": u}) for u in chains])
    error = np.abs(numbers(model, tmp_path, {"x": x}) - x @ (weight @ rotation(*chains)).T).max()
    assert error < RTOL32 * np.linalg.norm(weight) * np.linalg.norm(x)


def test_two_adapters_compose_in_the_order_given(tmp_path: Path) -> None:
    weight, x = gaussian(OUT, D), gaussian(5, D, seed=1)
    a, b = chain(D, seed=1), chain(D, rank=3, seed=2)
    model = graph(GEMM, {"a.b.weight": weight})
    report = insert_reflections_(model, [an_adapter({"a.b": a}), an_adapter({"a.b": b})])
    assert report.reflections["a.b"].rank == RANK + 3
    got = numbers(model, tmp_path, {"x": x})
    assert relative(got, x @ (weight @ rotation(a) @ rotation(b)).T) < RTOL32
    assert relative(got, x @ (weight @ rotation(b) @ rotation(a)).T) > 0.1


def test_gram_schmidt_adapters_are_orthogonalized(tmp_path: Path) -> None:
    weight, u, x = gaussian(OUT, D), chain(D), gaussian(5, D, seed=1)
    model = graph(GEMM, {"a.b.weight": weight})
    insert_reflections_(model, [an_adapter({"a.b": u}, orthogonalize=True)])
    q = torch.linalg.qr(u.double()).Q
    got = numbers(model, tmp_path, {"x": x})
    assert relative(got, x @ (weight @ rotation(q)).T) < RTOL32
    assert relative(got, x @ (weight @ rotation(u)).T) > 0.1


def test_half_graphs_get_half_constants(tmp_path: Path) -> None:
    weight, u, x = gaussian(OUT, D).astype(np.float16), chain(D), gaussian(5, D, seed=1).astype(np.float16)
    model = graph(GEMM.replace("float[", "float16["), {"a.b.weight": weight})
    report = insert_reflections_(model, [an_adapter({"a.b": u})])
    assert report.reflections["a.b"].dtype == ir.DataType.FLOAT16
    expected = x.astype(np.float64) @ (weight.astype(np.float64) @ rotation(u)).T
    assert relative(numbers(model, tmp_path, {"x": x}), expected) < RTOL16


def test_bfloat16_graphs_get_bfloat16_constants() -> None:
    weight = gaussian(OUT, D).astype(ir.DataType.BFLOAT16.numpy())
    model = graph(GEMM.replace("float[", "bfloat16["), {"a.b.weight": weight})
    report = insert_reflections_(model, [an_adapter({"a.b": chain(D)})])
    assert report.reflections["a.b"].dtype == ir.DataType.BFLOAT16
    assert model.graph.initializers["a.b.hra_U"].const_value.numpy().dtype == ir.DataType.BFLOAT16.numpy()


# One product under every name that exporters give it; the target is `model.layers.0.self_attn.q_proj`.
TARGET = "model.layers.0.self_attn.q_proj"
NAMES = {
    "torch": ("node_linear", "val_74", TARGET),
    "legacy": ("/model/layers.0/self_attn/q_proj/MatMul", "onnx::MatMul_123", None),
    "genai": ("/model/layers.0/attn/q_proj/MatMul", "model.layers.0.attn.q_proj.MatMul.weight", None),
    "genai, node only": ("/model/layers.0/attn/q_proj/MatMul", "w", None),
    "weight": ("MatMul_7", f"{TARGET}.weight", None),
    "weight with a note": ("MatMul_7", f"{TARGET}.weight_quantized", None),
    "prefix dropped": ("/layers.0/self_attn/q_proj/MatMul", "onnx::MatMul_123", None),
    "prefix added": ("/wrapped/model/layers.0/self_attn/q_proj/MatMul", "onnx::MatMul_123", None),
    "prefix dropped, genai": ("/layers.0/attn/q_proj/MatMul", "w", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_insertion_finds_a_product_by_each_kind_of_name(tmp_path: Path, name: str) -> None:
    node, weight_name, scope = NAMES[name]
    weight, u, x = gaussian(D, OUT), chain(D), gaussian(5, D, seed=1)
    body = f"""g (float[n, 16] x) => (float[n, 24] y) {{
        ["/model/layers.1/self_attn/q_proj/MatMul"] h = MatMul (x, other)
        ["{node}"] y = MatMul (h, "{weight_name}")
    }}"""
    model = graph(body, {weight_name: weight, "other": np.eye(D, dtype=np.float32)})
    if scope:
        scope_(model, {"y": scope})
    report = insert_reflections_(model, [an_adapter({TARGET: u})])
    assert operators(model) == ["MatMul", "HouseholderReflection", "MatMul"]
    assert bool(report.notes) == name.startswith("prefix")
    assert relative(numbers(model, tmp_path, {"x": x}), x @ (weight.T @ rotation(u)).T) < RTOL32


TIED = """g (int64[n] ids) => (float[n, 20] y, float[n, 16] rows) {
    rows = Gather ("embed.weight", ids)
    head = Transpose <perm = [1, 0]> ("embed.weight")
    y = MatMul (rows, head)
}"""


def tied(table: Array) -> ir.Model:
    return graph(TIED, {"embed.weight": table})


def test_a_tied_head_is_reflected_and_its_embedding_is_not(tmp_path: Path) -> None:
    table, u, ids = gaussian(20, D), chain(D), np.arange(5)
    model = scope_(tied(table), {"rows": "embed", "y": "lm_head"})
    insert_reflections_(model, [an_adapter({"lm_head": u})])
    assert operators(model) == ["Gather", "HouseholderReflection", "Transpose", "MatMul"]
    assert model.graph.outputs[1].producer().op_type == "Gather"
    assert relative(numbers(model, tmp_path, {"ids": ids}), table[ids] @ (table @ rotation(u)).T) < RTOL32


def test_a_tied_embedding_is_reflected_behind_and_its_head_is_not(tmp_path: Path) -> None:
    table, u, ids = gaussian(20, D), chain(D), np.arange(5)
    model = scope_(tied(table), {"rows": "embed", "y": "lm_head"})
    report = insert_reflections_(model, [an_adapter({"embed": u})])
    assert operators(model) == ["Gather", "HouseholderReflection", "Transpose", "MatMul"]
    assert [value.name for value in model.graph.outputs] == ["y", "rows"]
    assert model.graph.outputs[1].producer().op_type == "HouseholderReflection"
    assert report.reflections["embed"].form == "behind"
    rows = table[ids] @ rotation(u)  # rows of the folded embedding E R, not of E Rᵀ
    path = finished(model, tmp_path)
    got = run(path, {"ids": ids})
    assert relative(got[1], rows) < RTOL32
    assert relative(got[0], rows @ table.T) < RTOL32


def test_one_name_for_embedding_and_head_is_refused() -> None:
    with pytest.raises(MismatchError) as caught:
        insert_reflections_(tied(gaussian(20, D)), [an_adapter({"embed": chain(D)})])
    (finding,) = caught.value.findings
    assert "2 places" in finding
    assert "Gather" in finding
    assert "MatMul" in finding


def test_rename_leads_to_a_node(tmp_path: Path) -> None:
    table, u, ids = gaussian(20, D), chain(D), np.arange(5)
    model = tied(table)
    model.graph[2].name = "the_head"
    insert_reflections_(model, [an_adapter({"lm_head": u})], rename={"lm_head": "the_head"})
    assert relative(numbers(model, tmp_path, {"ids": ids}), table[ids] @ (table @ rotation(u)).T) < RTOL32


def convolved(x: Array, kernel: Dense, options: Mapping[str, int], bias: Array) -> Array:
    result = nn.functional.conv2d(
        torch.from_numpy(x).double(), torch.from_numpy(kernel), torch.from_numpy(bias).double(), **options
    )
    return result.numpy()


CONVOLUTIONS: list[tuple[int, str, dict[str, int]]] = [
    (1, "kernel_shape = [1, 1]", {}),
    (3, "kernel_shape = [3, 3], pads = [1, 1, 1, 1]", {"padding": 1}),
    (3, "strides = [2, 2], dilations = [2, 2], pads = [2, 2, 2, 2]", {"stride": 2, "dilation": 2, "padding": 2}),
    (3, 'auto_pad = "SAME_UPPER"', {"padding": 1}),
]


@pytest.mark.parametrize(("size", "attributes", "options"), CONVOLUTIONS)
def test_a_convolution_gets_its_change_beside(
    tmp_path: Path, size: int, attributes: str, options: dict[str, int]
) -> None:
    kernel, bias = gaussian(6, 4, size, size), gaussian(6, seed=3)
    u, x = chain(4 * size * size, rank=2), gaussian(2, 4, 8, 8, seed=1)
    body = f'g (float[n, 4, 8, 8] x) => (float[n, 6, h, w] y) {{ y = Conv <{attributes}> (x, "c.weight", "c.bias") }}'
    model = graph(body, {"c.weight": kernel, "c.bias": bias})
    report = insert_reflections_(model, [an_adapter({"c": u})])
    assert operators(model) == ["Conv", "Conv", "Conv", "Add"]
    assert (report.reflections["c"].form, report.reflections["c"].rank) == ("beside", 2)
    assert model.graph.initializers["c.hra_A"].shape == ir.Shape([2, 4, size, size])
    folded = (kernel.reshape(6, -1) @ rotation(u)).reshape(kernel.shape)
    got = numbers(model, tmp_path, {"x": x})
    assert relative(got, convolved(x, folded, options, bias)) < RTOL32
    assert relative(got, convolved(x, kernel.astype(np.float64), options, bias)) > 0.1


THROUGH = {
    "Transpose": ('t = Transpose <perm = [1, 0]> ("a.b.weight")', np.float32),
    "Transpose, twice": ('s = Transpose ("a.b.weight") r = Transpose (s) t = Transpose (r)', np.float32),
    "Cast": ('c = Cast <to = 1> ("a.b.weight") t = Transpose (c)', np.float16),
    "DequantizeLinear": ('c = DequantizeLinear ("a.b.weight", step) t = Transpose (c)', np.int8),
}


@pytest.mark.parametrize("name", THROUGH)
def test_a_weight_is_followed_to_its_initializer(tmp_path: Path, name: str) -> None:
    steps, dtype = THROUGH[name]
    stored = (gaussian(OUT, D) * (20 if dtype == np.int8 else 1)).astype(dtype)
    step = np.float32(0.05)
    u, x = chain(D), gaussian(5, D, seed=1)
    tensors = {"a.b.weight": stored} | ({"step": np.array(step)} if dtype == np.int8 else {})
    model = graph(f"g (float[n, 16] x) => (float[n, 24] y) {{ {steps} y = MatMul (x, t) }}", tensors)
    insert_reflections_(model, [an_adapter({"a.b": u})])
    seen = stored.astype(np.float64) * (step if dtype == np.int8 else 1)
    assert relative(numbers(model, tmp_path, {"x": x}), x @ (seen @ rotation(u)).T) < RTOL32


def nbits(d: int, o: int, *, block: int = 16, seed: int = 0) -> tuple[dict[str, Array], Dense]:
    """The constants of a MatMulNBits of 4 bits, and the weight (o, d) that they stand for."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (o, d // block, block), dtype=np.uint8)
    scales = random.uniform(0.05, 0.2, (o, d // block)).astype(np.float32)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    weight = ((codes.astype(np.float64) - 8) * scales[..., None]).reshape(o, d)
    return {"weight_Q4": packed, "weight_scales": scales}, weight


def test_a_block_quantized_product_is_reflected_in_front(tmp_path: Path) -> None:
    constants, weight = nbits(32, OUT)
    u, x = chain(32), gaussian(5, 32, seed=1)
    body = """g (float[n, 32] x) => (float[n, 24] y) {
        ["/model/layers.0/attn/q_proj/MatMul_Q4"] y = com.microsoft.MatMulNBits
            <K = 32, N = 24, bits = 4, block_size = 16> (x, "q.weight_Q4", "q.weight_scales")
    }"""
    model = graph(body, {f"q.{name}": array for name, array in constants.items()})
    insert_reflections_(model, [an_adapter({TARGET: u})])
    assert operators(model) == ["HouseholderReflection", "MatMulNBits"]
    assert relative(numbers(model, tmp_path, {"x": x}), x @ (weight @ rotation(u)).T) < RTOL32


def test_a_fused_product_is_reflected_in_front(tmp_path: Path) -> None:
    weight, u, x = gaussian(OUT, D), chain(D), gaussian(5, D, seed=1)
    body = """g (float[n, 16] x) => (float[n, 24] y) {
        y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (x, "a.b.weight")
    }"""
    model = graph(body, {"a.b.weight": weight})
    insert_reflections_(model, [an_adapter({"a.b": u})])
    assert relative(numbers(model, tmp_path, {"x": x}), x @ (weight @ rotation(u)).T / 2) < RTOL32


QKV = ("q_proj", "k_proj", "v_proj")
SIZES = (16, 8, 8)
STEM = "model.layers.0.self_attn"


def packed_float() -> tuple[ir.Model, Dense]:
    weight = gaussian(32, 32)
    body = """g (float[b, t, 32] x) => (float[b, t, 32] y) {
        ["/model/layers.0/attn/qkv_proj/MatMul"] y = MatMul (x, "model.layers.0.attn.qkv_proj.MatMul.weight")
    }"""
    return graph(body, {"model.layers.0.attn.qkv_proj.MatMul.weight": np.ascontiguousarray(weight.T)}), weight.astype(
        float
    )


def packed_blocks(*, flat: bool) -> tuple[ir.Model, Dense]:
    constants, weight = nbits(32, 32)
    name = "model.layers.0.attn.qkv_proj.MatMul"
    tensors = {
        f"{name}.{key}": array.reshape(-1) if flat and "scales" in key else array for key, array in constants.items()
    }
    zero_points = np.full(32 * 1, 0x88, np.uint8)
    body = f"""g (float[b, t, 32] x) => (float[b, t, 32] y) {{
        ["/model/layers.0/attn/qkv_proj/MatMul_Q4"] y = com.microsoft.MatMulNBits
            <K = 32, N = 32, bits = 4, block_size = 16>
            (x, "{name}.weight_Q4", "{name}.weight_scales", "{name}.weight_zp")
    }}"""
    return graph(body, {**tensors, f"{name}.weight_zp": zero_points}), weight


@pytest.mark.parametrize("kind", ["float", "blocks", "flat blocks"])
def test_a_packed_product_is_split_for_its_targets(tmp_path: Path, kind: str) -> None:
    """The key has no chain: its part is the base's, to the bit."""
    model, weight = packed_float() if kind == "float" else packed_blocks(flat=kind == "flat blocks")
    x = gaussian(2, 3, 32, seed=1)
    base = numbers(model.clone(), tmp_path, {"x": x})
    chains = {f"{STEM}.q_proj": chain(32, seed=1), f"{STEM}.v_proj": chain(32, seed=2)}
    sizes = {f"{STEM}.{name}": size for name, size in zip(QKV, SIZES, strict=True)}
    report = insert_reflections_(model, [an_adapter(chains)], out_features=sizes)
    product = "MatMul" if kind == "float" else "MatMulNBits"
    assert sorted(operators(model)) == sorted(["HouseholderReflection"] * 2 + [product] * 3 + ["Concat"])
    assert len(report.split) == 1
    assert not [name for name in model.graph.initializers if "qkv" in name]
    got = numbers(model, tmp_path, {"x": x})
    q, k, v = np.split(weight, np.cumsum(SIZES)[:-1])
    folded = np.concatenate([q @ rotation(chains[f"{STEM}.q_proj"]), k, v @ rotation(chains[f"{STEM}.v_proj"])])
    assert relative(got, x @ folded.T) < RTOL32
    assert relative(got[..., 16:24], base[..., 16:24].astype(np.float64)) < RTOL32


def grouped_attention(heads: int, kv_heads: int) -> ir.Model:
    body = f"""g (float[b, t, 32] x, float[32] bias) => (float[b, t, 16] y) {{
        ["/model/layers.0/attn/qkv_proj/MatMul"] h = MatMul (x, w)
        s = Add (h, bias)
        y = com.microsoft.GroupQueryAttention <num_heads = {heads}, kv_num_heads = {kv_heads}> (s)
    }}"""
    return graph(body, {"w": gaussian(32, 32)})


def test_the_parts_of_a_packed_product_are_read_from_its_attention() -> None:
    model = grouped_attention(4, 2)
    insert_reflections_(model, [an_adapter({f"{STEM}.k_proj": chain(32)})])
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert [node.inputs[1].shape.numpy()[1] for node in products] == [16, 8, 8]
    assert [node.inputs[0].producer() is not None for node in products] == [False, True, False]


def test_a_packed_product_whose_parts_are_not_told_is_refused() -> None:
    for model in (packed_float()[0], grouped_attention(5, 2)):
        before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        with pytest.raises(MismatchError) as caught:
            insert_reflections_(model, [an_adapter({f"{STEM}.q_proj": chain(32), f"{STEM}.v_proj": chain(32)})])
        assert ["out_features" in finding for finding in caught.value.findings] == [True, True]
        assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def test_a_fused_target_reflects_all_the_products_that_it_was_split_into(tmp_path: Path) -> None:
    """Output rows commute with the chain: one operator in front of three products."""
    weights = {
        f"model.layers.0.attn.{name}.MatMul.weight": gaussian(32, size, seed=i)
        for i, (name, size) in enumerate(zip(QKV, SIZES, strict=True))
    }
    calls = "\n".join(f'["{n.replace(".", "/")}"] h{i} = MatMul (x, "{n}")' for i, n in enumerate(weights))
    body = f"g (float[n, 32] x) => (float[n, 32] y) {{ {calls} y = Concat <axis = 1> (h0, h1, h2) }}"
    model, u, x = graph(body, weights), chain(32), gaussian(5, 32, seed=9)
    report = insert_reflections_(model, [an_adapter({f"{STEM}.qkv_proj": u})])
    assert operators(model).count("HouseholderReflection") == 1
    assert "3 products" in report.notes[0]
    whole = np.concatenate([weight.T for weight in weights.values()])
    assert relative(numbers(model, tmp_path, {"x": x}), x @ (whole @ rotation(u)).T) < RTOL32


TWICE = """g (float[n, 16] x) => (float[n, 16] y) {
    ["/block/fc/MatMul"] h = MatMul (x, w)
    ["/block_1/fc/MatMul"] y = MatMul (h, w)
}"""


def test_a_module_that_runs_twice_is_reflected_twice(tmp_path: Path) -> None:
    weight, u, x = gaussian(D, D), chain(D), gaussian(5, D, seed=1)
    model = scope_(graph(TWICE, {"w": weight}), {"h": "block.fc", "y": "block.fc"})
    report = insert_reflections_(model, [an_adapter({"block.fc": u})])
    assert [node.name for node in report.reflections["block.fc"].nodes] == ["block.fc/hra", "block.fc/hra_1"]
    folded = weight.T @ rotation(u)
    assert relative(numbers(model, tmp_path, {"x": x}), x @ folded.T @ folded.T) < RTOL32


def test_a_module_of_which_only_one_run_is_found_is_refused() -> None:
    """The old exporter names the second run after a module that does not exist."""
    with pytest.raises(MismatchError, match="disagree") as caught:
        insert_reflections_(graph(TWICE, {"w": gaussian(D, D)}), [an_adapter({"block.fc": chain(D)})])
    assert "`/block_1/fc/MatMul` uses the same weight" in caught.value.findings[0]


def test_a_product_inside_a_branch_is_reflected_there(tmp_path: Path) -> None:
    body = """g (bool c, float[n, 16] x) => (float[n, 16] y) {
        y = If (c) <
            then_branch = a () => (float[n, 16] p) { p = MatMul (x, "a.b.weight") },
            else_branch = b () => (float[n, 16] q) { q = Neg (x) }
        >
    }"""
    weight, u, x = gaussian(D, D), chain(D), gaussian(5, D, seed=1)
    model = graph(body, {"a.b.weight": weight})
    insert_reflections_(model, [an_adapter({"a.b": u})])
    path = finished(model, tmp_path / "written")
    got = [run(path, {"x": x, "c": np.array(c)})[0] for c in (True, False)]
    assert relative(got[0], x @ (weight.T @ rotation(u)).T) < RTOL32
    assert np.array_equal(got[1], -x)


REFUSED: dict[str, tuple[str, dict[str, Array], str]] = {
    "no such product": (MATMUL.replace("a.b", "a.c"), {"a.c.weight": gaussian(D, OUT)}, "no product.*nearest: `a.c`"),
    "another width": (
        MATMUL.replace("16", "18"),
        {"a.b.weight": gaussian(18, OUT)},
        r"expected U of shape \(18, r\), got \(16, r\)",
    ),
    "two products": (
        """g (float[n, 16] x) => (float[n, 24] y, float[n, 8] z) {
            y = MatMul (x, "a.b.weight") z = MatMul (x, "a.b.weight_2")
        }""",
        {"a.b.weight": gaussian(D, OUT), "a.b.weight_2": gaussian(D, 8)},
        "2 places go by this name",
    ),
    "input transposed": (
        'g (float[16, n] x) => (float[n, 24] y) { y = Gemm <transA = 1> (x, "a.b.weight") }',
        {"a.b.weight": gaussian(D, OUT)},
        "transposes its input",
    ),
    "grouped convolution": (
        'g (float[n, 32, 8, 8] x) => (float[n, 6, 8, 8] y) { y = Conv <group = 2> (x, "a.b.weight") }',
        {"a.b.weight": gaussian(6, 16, 1, 1)},
        r"grouped convolution \(groups=2\)",
    ),
    "quantized input": (
        'g (uint8[n, 16] x) => (int32[n, 24] y) { y = MatMulInteger (x, "a.b.weight") }',
        {"a.b.weight": gaussian(D, OUT).astype(np.int8)},
        "insert reflections before quantizing",
    ),
    "fused activation": (
        'g (float[n, 16, 8, 8] x) => (float[n, 6, 8, 8] y) { y = com.microsoft.FusedConv (x, "a.b.weight") }',
        {"a.b.weight": gaussian(6, 16, 1, 1)},
        "before that fusion",
    ),
    "stacked experts": (
        'g (float[4, n, 16] x) => (float[4, n, 24] y) { y = MatMul (x, "a.b.weight") }',
        {"a.b.weight": gaussian(4, D, OUT)},
        "no product",
    ),
    "weight on the left": (
        'g (float[24, n] x) => (float[16, n] y) { y = MatMul ("a.b.weight", x) }',
        {"a.b.weight": gaussian(D, OUT)},
        "no product",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_insertion_refuses(name: str) -> None:
    body, tensors, message = REFUSED[name]
    model = graph(body, tensors)
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    with pytest.raises(MismatchError) as caught:
        insert_reflections_(model, [an_adapter({"a.b": chain(D)})])
    assert re.search(message, "\n".join(caught.value.findings)), caught.value.findings
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def test_insertion_names_everything_that_does_not_fit() -> None:
    model = graph(MATMUL, {"a.b.weight": gaussian(D, OUT)})
    adapters = [
        an_adapter({"a.b": chain(8), "x.y": chain(D), "x.z": chain(D)}, parameters={"n.bias": torch.ones(3)}),
        an_adapter({"a.b": chain(D)}),
    ]
    with pytest.raises(MismatchError) as caught:
        insert_reflections_(model, adapters)
    assert len(caught.value.findings) == 5
    assert operators(model) == ["MatMul"]


def test_two_targets_on_one_product_are_refused() -> None:
    model = graph(MATMUL, {"a.b.weight": gaussian(D, OUT)})
    with pytest.raises(MismatchError) as caught:
        insert_reflections_(model, [an_adapter({"a.b": chain(D), "c": chain(D)})], rename={"c": "a.b"})
    assert caught.value.findings == ("a.b, c: all lead to MatMul ``",)


LOOKUP = 'g (int64[n] x) => (float[n, 16] y) { y = Gather ("a.b.weight", x) }'


@pytest.mark.parametrize("body", [MATMUL, LOOKUP])
def test_a_reflected_graph_is_not_reflected_again(body: str) -> None:
    model = graph(body, {"a.b.weight": gaussian(D, OUT) if "MatMul" in body else gaussian(20, D)})
    insert_reflections_(model, [an_adapter({"a.b": chain(D)})])
    with pytest.raises(MismatchError) as caught:
        insert_reflections_(model, [an_adapter({"a.b": chain(D)})])
    assert "already" in caught.value.findings[0]


CONV = 'g (float[n, 4, 2, 2] x) => (float[n, 6, 2, 2] y) { y = Conv (x, "a.b.weight") }'


@pytest.mark.parametrize("body", [MATMUL, LOOKUP, CONV])
def test_a_product_is_not_reflected_again_under_another_name(body: str) -> None:
    """Chains of two adapters on one layer compose in one operator; a second one would be in the wrong order."""
    weight = {MATMUL: gaussian(D, OUT), LOOKUP: gaussian(20, D), CONV: gaussian(6, 4, 1, 1)}[body]
    model = graph(body, {"a.b.weight": weight})
    u = chain(4 if body == CONV else D, rank=2)
    insert_reflections_(model, [an_adapter({"mine": u})], rename={"mine": "a.b"})
    with pytest.raises(MismatchError) as caught:
        insert_reflections_(model, [an_adapter({"a.b": u})])
    assert "is reflected already" in caught.value.findings[0]


def test_neighbours_of_reflected_layers_can_be_reflected_later(tmp_path: Path) -> None:
    """Two convolutions of one input, and a product right behind an embedding."""
    body = """g (int64[4] ids, float[n, 4, 2, 2] i) => (float[4, 24] y, float[n, 6, 2, 2] a, float[n, 6, 2, 2] b) {
        rows = Gather ("embed.weight", ids) y = MatMul (rows, "fc.weight")
        a = Conv (i, "c1.weight") b = Conv (i, "c2.weight")
    }"""
    table, weight = gaussian(20, D), gaussian(D, OUT)
    kernels = {"c1.weight": gaussian(6, 4, 1, 1), "c2.weight": gaussian(6, 4, 1, 1, seed=1)}
    model = graph(body, {"embed.weight": table, "fc.weight": weight, **kernels})
    chains = {"embed": chain(D), "c1": chain(4), "fc": chain(D, seed=1), "c2": chain(4, seed=1)}
    for target, u in chains.items():
        insert_reflections_(model, [an_adapter({target: u})])
    ids = np.arange(4)
    got = numbers(model, tmp_path, {"ids": ids, "i": gaussian(1, 4, 2, 2)})
    expected = table[ids] @ rotation(chains["embed"]) @ (weight.T @ rotation(chains["fc"])).T
    assert relative(got, expected) < RTOL32
    assert reflection_sites(model).keys() == chains.keys()


def test_two_prefixes_that_fit_equally_are_refused() -> None:
    body = """g (float[n, 16] x) => (float[n, 16] y) {
        ["/text/layers.0/fc/MatMul"] h = MatMul (x, v)
        ["/vision/layers.0/fc/MatMul"] y = MatMul (h, w)
    }"""
    model = graph(body, {"v": gaussian(D, D), "w": gaussian(D, D, seed=1)})
    with pytest.raises(MismatchError, match="1 things"):
        insert_reflections_(model, [an_adapter({"layers.0.fc": chain(D)})])


WITH_BIAS = """g (float[n, 16] x) => (float[n, 24] z) {
    h = MatMul (x, val_1)
    s = Add ("fc.bias", h)
    z = Mul (s, "norm.weight")
}"""


def test_trained_parameters_replace_the_bases(tmp_path: Path) -> None:
    weight, u, x = gaussian(OUT, D), chain(D), gaussian(5, D, seed=1)
    tensors = {
        "val_1": np.ascontiguousarray(weight.T),
        "fc.bias": np.zeros(OUT, np.float32),
        "norm.weight": np.ones(OUT, np.float32),
    }
    model = scope_(graph(WITH_BIAS, tensors), {"h": "fc"})
    bias, scale = torch.from_numpy(gaussian(OUT, seed=5)), torch.from_numpy(gaussian(OUT, seed=6))
    report = insert_reflections_(model, [an_adapter({"fc": u}, parameters={"fc.bias": bias, "norm.weight": scale})])
    assert report.parameters == ("fc.bias", "norm.weight")
    expected = (x @ (weight @ rotation(u)).T + bias.numpy()) * scale.numpy()
    assert relative(numbers(model, tmp_path, {"x": x}), expected) < RTOL32


def test_a_saved_module_replaces_a_transposed_weight_and_leaves_the_tied_embedding(tmp_path: Path) -> None:
    table, u, ids = gaussian(20, D), chain(D), np.arange(5)
    model = scope_(tied(table), {"rows": "embed", "y": "lm_head"})
    head = torch.from_numpy(gaussian(20, D, seed=7))
    body_adapter = an_adapter({"embed": u}, parameters={"lm_head.weight": head})
    insert_reflections_(model, [body_adapter])
    expected = table[ids] @ rotation(u) @ head.double().numpy().T
    assert relative(numbers(model, tmp_path, {"ids": ids}), expected) < RTOL32


PARAMETERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown": ({"nowhere.weight": torch.ones(3)}, "no initializer of this name"),
    "another shape": ({"fc.bias": torch.ones(OUT + 1)}, r"expected shape \(24,\), got \(25,\)"),
    "no bias in the graph": ({"gate.bias": torch.ones(OUT)}, "no bias that can be replaced"),
    "not finite": ({"fc.bias": torch.full((OUT,), torch.nan)}, "not finite"),
    "square under its own name": ({"gate.weight": torch.ones(OUT, OUT)}, "orientation cannot be told"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_insertion_refuses_a_parameter_without_a_place(name: str) -> None:
    body = """g (float[n, 16] x) => (float[n, 24] y) {
        h = MatMul (x, "fc.weight")
        s = Add (h, "fc.bias")
        y = MatMul (s, "gate.weight")
    }"""
    tensors = {"fc.weight": gaussian(D, OUT), "fc.bias": gaussian(OUT), "gate.weight": gaussian(OUT, OUT)}
    model = graph(body, tensors)
    parameters, message = PARAMETERS[name]
    with pytest.raises(MismatchError) as caught:
        insert_reflections_(model, [an_adapter({"fc": chain(D)}, parameters=parameters)])
    (finding,) = caught.value.findings
    assert re.search(message, finding), finding


def test_reflection_sites_reads_what_insertion_wrote(tmp_path: Path) -> None:
    body = """g (float[n, 4, 2, 2] i, float[n, 16] x) => (float[n, 6, 2, 2] c, float[n, 24] y) {
        c = Conv (i, "c.weight") y = MatMul (x, "a.b.weight")
    }"""
    model = graph(body, {"c.weight": gaussian(6, 4, 1, 1), "a.b.weight": gaussian(D, OUT)})
    report = insert_reflections_(model, [an_adapter({"a.b": chain(D, rank=2), "c": chain(4, rank=2)})])
    found = reflection_sites(open_graph(finished(model, tmp_path / "written")))
    assert {(t, r.rank, r.dtype, r.form) for t, r in found.items()} == {
        ("a.b", 2, ir.DataType.FLOAT, "front"),
        ("c", 2, ir.DataType.FLOAT, "beside"),
    }
    assert found.keys() == report.reflections.keys()


class Tower(nn.Module):
    """An embedding, a layer and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D, bias=False)])
        self.lm_head = nn.Linear(D, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        result: Tensor = self.lm_head(x)
        return result


@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")  # the old exporter warns of itself
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*TreeSpec.*is_leaf:FutureWarning")  # torch 2.13's exporter calls its own past
@pytest.mark.parametrize("route", ["dynamo", "torchscript"])
def test_insertion_agrees_with_live_layers_in_what_torch_exports(tmp_path: Path, route: str) -> None:
    torch.manual_seed(0)
    model, ids = Tower().eval(), torch.arange(6).reshape(2, 3)
    path = str(tmp_path / "base.onnx")
    if route == "dynamo":
        torch.onnx.export(model, (ids,), path, input_names=["ids"], opset_version=18, external_data=False)
    else:
        torch.onnx.export(model, (ids,), path, input_names=["ids"], opset_version=18, dynamo=False)
    targets = ["layers.0", "layers.1", "lm_head"]
    adapters = [an_adapter({t: chain(D, seed=10 * i + j) for j, t in enumerate(targets)}) for i in range(2)]
    base = open_graph(tmp_path / "base.onnx")
    insert_reflections_(base, adapters)
    got = numbers(base, tmp_path, {"ids": ids.numpy()})
    with torch.no_grad():
        before = model(ids)
        attach(model, *adapters)
        expected = model(ids)
    assert relative(expected.numpy(), before.double().numpy()) > 0.1
    assert relative(got, expected.double().numpy()) < 2 * RTOL32  # both sides round
