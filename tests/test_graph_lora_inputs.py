"""LoRA factors among the inputs of a graph: what the nodes say of them, and files that ONNX Runtime runs so."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.errors import GraphError, MismatchError, NumericalError, UnsupportedModelError
from hra_export.graph.document import open_graph, save_graph
from hra_export.graph.lora_content import lora_content
from hra_export.graph.lora_inputs import lora_sites, match_sites, shared_ranks
from hra_export.graph.runtime import write_adapter_format
from hra_export.low_rank import HraSource
from tests import graph_text
from tests.synthetic import dense_chain

Array = NDArray[Any]

WIDTHS = {"first": (8, 6), "second": (6, 5)}  # (d, o)
RANK = 3
# float32 sums of a few dozen products of size 1.
ATOL = 1e-5
# float16 rounds both factors to 2⁻¹¹.
ATOL_HALF = 2e-2
HALF_DELTA = 2**-10  # two factors, each rounded by 2⁻¹² in the mean

OLIVE = """
    {m}_h = MatMul(x, {m}_A)
    {m}_l = MatMul({m}_h, {m}_B)
    {m}_y = MatMul(x, {m}_W)
    {m} = Add({m}_y, {m}_l)
"""
PEFT = """
    {m}_At = Transpose <perm = [1, 0]> ({m}_A)
    {m}_Bt = Transpose <perm = [1, 0]> ({m}_B)
    {m}_Wt = Transpose <perm = [1, 0]> ({m}_W)
    {m}_h = MatMul(x, {m}_At)
    {m}_l = MatMul({m}_h, {m}_Bt)
    {m}_s = Mul({m}_l, scale)
    {m}_y = MatMul(x, {m}_Wt)
    {m}_b = Add({m}_y, {m}_bias)
    {m} = Add({m}_b, {m}_s)
"""
GEMM = """
    {m}_h = Gemm <transB = 1, alpha = 2.0> (x, {m}_A)
    {m}_l = Gemm <alpha = 0.25> ({m}_h, {m}_B)
    {m}_y = Gemm <transB = 1> (x, {m}_W, {m}_bias)
    {m} = Add({m}_l, {m}_y)
"""
BETWEEN = """
    {m}_h = MatMul(x, {m}_A)
    {m}_s = Mul(scale, {m}_h)
    {m}_l = MatMul({m}_s, {m}_B)
    {m}_y = MatMul(x, {m}_W)
    {m} = Add({m}_y, {m}_l)
"""
HALF = """
    {m}_Af = Cast <to = 1> ({m}_A)
    {m}_Bf = Cast <to = 1> ({m}_B)
    {m}_h = MatMul(x, {m}_Af)
    {m}_l = MatMul({m}_h, {m}_Bf)
    {m}_y = MatMul(x, {m}_W)
    {m} = Add({m}_y, {m}_l)
"""


@dataclass(frozen=True)
class Form:
    """How a graph takes its factors.

    Attributes:
        text: nodes of a module `m`.
        transposed: which of A, B and W are stored as PyTorch does.
        names: of the inputs; `{m}` is the module, `{s}` A or B.
        rank: its symbol, or a number.
        scale: the graph's own.
    """

    text: str
    transposed: str = ""
    names: str = "{m}.lora_{s}.weight"
    rank: str | int = "lora_r"
    scale: float = 1.0
    dtype: Any = np.float32


FORMS = {
    "olive": Form(OLIVE),
    "peft": Form(PEFT, "ABW", "base_model.model.{m}.lora_{s}.default.weight", "{m}.r", 4.0),
    "gemm": Form(GEMM, "AW", "/{m}/lora_{s}/MatMul.weight", scale=0.5),
    "scale between": Form(BETWEEN, scale=4.0),
    "fixed rank": Form(OLIVE, rank=5),
    "half factors": Form(HALF, dtype=np.float16),
}


@dataclass(frozen=True)
class Scene:
    """Weights on disk and a graph of them."""

    folder: Path
    form: Form
    weights: Mapping[str, Array] = field(default_factory=dict)

    @property
    def graph(self) -> Path:
        return self.folder / "graph.onnx"

    @property
    def base(self) -> Checkpoint:
        return open_checkpoint(self.folder / "base")


def made(folder: Path, form: Form, *, changes: Mapping[str, str] | None = None) -> Scene:
    """A base of two layers, and its graph in a form.

    Args:
        folder: an empty one.
        form: of the graph.
        changes: what to put in place of which text of the nodes.
    """
    random = np.random.default_rng(0)
    weights = {m: random.normal(size=(o, d)).astype(np.float32) for m, (d, o) in WIDTHS.items()}
    (folder / "base").mkdir()
    tensors = {f"{m}.weight": torch.from_numpy(w) for m, w in weights.items()}
    save_file(tensors, folder / "base" / "model.safetensors")
    body = "".join(
        form.text.replace("{m}", m).replace("(x,", f"({x},") for m, x in (("first", "x"), ("second", "first"))
    )
    for old, new in (changes or {}).items():
        assert old in body
        body = body.replace(old, new)
    constants: dict[str, Array] = {"scale": np.array(4.0, np.float32)} if "scale" in body else {}
    for m, (d, o) in WIDTHS.items():
        constants[f"{m}_W"] = weights[m] if "W" in form.transposed else weights[m].T.copy()
        if f"{m}_bias" in body:
            constants[f"{m}_bias"] = np.full(o, 0.5, np.float32)
        rank = form.rank if isinstance(form.rank, int) else 0
        constants[f"{m}_A"] = stored_zeros(d, rank, "A" in form.transposed, form.dtype)
        constants[f"{m}_B"] = stored_zeros(rank, o, "B" in form.transposed, form.dtype)
    model = graph_text.graph(f"g (float[n, 8] x) => (float[n, 5] second) {{ {body} }}", constants)
    for m in WIDTHS:
        for side in "AB":
            make_input_(model, f"{m}_{side}", form.names.format(m=m, s=side), form, m, side)
        model.graph.initializers[f"{m}_W"].name = f"{m}.weight"
    save_graph(model, folder, "graph")
    return Scene(folder, form, weights)


def stored_zeros(rows: int, columns: int, is_transposed: bool, dtype: Any) -> Array:
    """(rows, columns), or the transpose of it."""
    return np.zeros((columns, rows) if is_transposed else (rows, columns), dtype)


def make_input_(model: ir.Model, old: str, name: str, form: Form, module: str, side: str) -> None:
    value = model.graph.initializers[old]
    rank = form.rank if isinstance(form.rank, int) else form.rank.format(m=module)
    axis = int((side == "A") != (side in form.transposed))
    assert value.shape is not None
    value.shape = ir.Shape([rank if i == axis else size for i, size in enumerate(value.shape)])
    value.name = name
    assert value.const_value is not None
    value.const_value.name = name
    model.graph.inputs.append(value)


def chains(ranks: Mapping[str, int], *, seed: int = 1) -> HraAdapter:
    generator = torch.Generator().manual_seed(seed)
    found = {m: torch.randn(WIDTHS[m][0], r, generator=generator) for m, r in ranks.items()}
    return HraAdapter(found, max(ranks.values()))


def expected(scene: Scene, x: Array, adapter: HraAdapter | None, strength: float = 1.0) -> Array:
    """Both layers with W + s (W R − W), R the explicit chain, in float64."""
    value = x.astype(np.float64)
    for m in WIDTHS:
        weight = scene.weights[m].astype(np.float64)
        if adapter is not None and m in adapter.chains:
            weight = weight + strength * (weight @ dense_chain(adapter.chains[m].double().numpy()) - weight)
        value = value @ weight.T + (0.5 if "bias" in scene.form.text else 0.0)
    return value


def run_stock(graph: Path, adapter: Path | None, x: Array) -> Array:
    """ONNX Runtime with its own active adapter."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # it warns of each default that may be overridden
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    options = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    result: Array = session.run(None, {"x": x}, options)[0]
    return result


def x_of(rows: int = 4) -> Array:
    return np.random.default_rng(3).normal(size=(rows, 8)).astype(np.float32)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_lora_content_is_the_adapter_in_every_form(name: str, strength: float, tmp_path: Path) -> None:
    scene = made(tmp_path, FORMS[name])
    adapter = chains({"first": RANK, "second": 2})
    found = lora_content(HraSource([adapter], strength=strength), open_graph(scene.graph), scene.base)
    write_adapter_format(tmp_path / "a.onnx_adapter", found.content.parameters, adapter=1, model=1)
    result = run_stock(scene.graph, tmp_path / "a.onnx_adapter", x_of())
    exact = expected(scene, x_of(), adapter, strength)
    assert np.abs(exact - expected(scene, x_of(), None)).max() > 1  # a file that does nothing would show
    atol = ATOL_HALF if scene.form.dtype == np.float16 else ATOL
    np.testing.assert_allclose(result, exact, rtol=0, atol=atol)
    # ‖ΔW‖ of the first layer, from the explicit chain
    weight = scene.weights["first"].astype(np.float64)
    delta = strength * (weight @ dense_chain(adapter.chains["first"].double().numpy()) - weight)
    assert found.targets[0].delta_norm == pytest.approx(float(np.linalg.norm(delta)), rel=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_lora_sites_say_how_the_graph_takes_its_factors(name: str, tmp_path: Path) -> None:
    scene = made(tmp_path, FORMS[name])
    sites = lora_sites(open_graph(scene.graph))
    form = scene.form
    assert [site.target for site in sites] == list(WIDTHS)
    assert [(site.a.size, site.b.size) for site in sites] == list(WIDTHS.values())
    for site in sites:
        assert (site.a.is_transposed, site.b.is_transposed) == ("A" in form.transposed, "B" in form.transposed)
        assert (site.scale, site.a.dtype, site.rank) == (
            form.scale,
            np.dtype(form.dtype).name,
            form.rank if isinstance(form.rank, int) else None,
        )
        assert site.weight is not None
        np.testing.assert_array_equal(site.weight.array(), scene.weights[site.target].T)


def ranks_of(scene: Scene, ranks: Mapping[str, int]) -> dict[str, int]:
    found = lora_content(HraSource([chains(ranks)]), open_graph(scene.graph), scene.base)
    return {
        m: found.content.parameters[scene.form.names.format(m=m, s="A")].shape[0 if "A" in scene.form.transposed else 1]
        for m in WIDTHS
    }


def test_ranks_are_those_that_the_graph_can_tell_apart(tmp_path: Path) -> None:
    """One symbol for all asks for one rank, a fixed one for zeros behind; else each target has its own."""
    found = {}
    for name in ("olive", "peft", "fixed rank"):
        (tmp_path / name).mkdir()
        scene = made(tmp_path / name, FORMS[name])
        found[name] = [ranks_of(scene, {"first": 4, "second": 2}), ranks_of(scene, {"second": 2})]
    assert found["olive"] == [{"first": 4, "second": 4}, {"first": 2, "second": 2}]
    assert found["peft"] == [{"first": 4, "second": 2}, {"first": 0, "second": 2}]
    assert found["fixed rank"] == [{"first": 5, "second": 5}] * 2


def test_runtime_breaks_off_on_two_ranks_under_one_symbol(tmp_path: Path) -> None:
    """Why they are padded to one: it plans its memory by symbols."""
    scene = made(tmp_path, FORMS["olive"])
    assert shared_ranks(lora_sites(open_graph(scene.graph))) == {"first", "second"}
    parameters: dict[str, Array] = {}
    for (m, (d, o)), r in zip(WIDTHS.items(), (4, 7), strict=True):
        parameters |= {
            f"{m}.lora_A.weight": np.ones((d, r), np.float32),
            f"{m}.lora_B.weight": np.ones((r, o), np.float32),
        }
    write_adapter_format(tmp_path / "a.onnx_adapter", parameters, adapter=1, model=1)
    with pytest.raises(Exception, match="re-use buffer"):  # the runtime's classes have no public name
        run_stock(scene.graph, tmp_path / "a.onnx_adapter", x_of())


def test_match_sites_takes_the_builder_s_spelling_and_one_prefix(tmp_path: Path) -> None:
    form = Form(OLIVE, names="bert.{m}.attn.q.lora_{s}.weight")
    sites = lora_sites(open_graph(made(tmp_path, form).graph))
    found, findings = match_sites(["first.self_attn.q", "second.self_attn.q"], sites)
    assert {module: site.target for module, site in found.items()} == {
        "first.self_attn.q": "bert.first.attn.q",
        "second.self_attn.q": "bert.second.attn.q",
    }
    assert not findings
    _, findings = match_sites(["first.attn.q", "first.self_attn.q", "first.attn.k"], sites)
    assert len(findings) == 2


FLAWS: Mapping[str, tuple[dict[str, str], str]] = {
    "activation between": ({"first_l = MatMul(first_h": "first_r = Relu(first_h)\n first_l = MatMul(first_r"}, "lead"),
    "never added": ({"Add(first_y, first_l)": "Mul(first_y, first_l)"}, "not added"),
    "multiplied by itself": (
        {"MatMul(x, first_A)": "MatMul(x, first_q)", "first_h =": "first_q = Mul(first_A, first_A)\n first_h ="},
        "used 2",
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_lora_sites_refuse_what_cannot_be_followed(flaw: str, tmp_path: Path) -> None:
    changes, says = FLAWS[flaw]
    model = open_graph(made(tmp_path, FORMS["olive"], changes=changes).graph)
    with pytest.raises(GraphError, match="cannot be followed") as caught:
        lora_sites(model)
    (finding,) = caught.value.findings
    assert finding.startswith("first: ")
    assert says in finding


def test_lora_sites_refuse_half_a_pair_and_several_adapters(tmp_path: Path) -> None:
    model = open_graph(made(tmp_path, FORMS["olive"]).graph)
    model.graph.inputs.remove(model.graph.initializers["second.lora_B.weight"])
    other = model.graph.initializers["first.lora_B.weight"]
    other.name = "first.lora_B.french.weight"
    with pytest.raises(GraphError) as caught:
        lora_sites(model)
    assert len(caught.value.findings) == 2
    assert "french" in caught.value.findings[0]
    assert "no input `lora_B`" in caught.value.findings[1]


def test_lora_sites_say_that_factors_are_constants(tmp_path: Path) -> None:
    model = open_graph(made(tmp_path, FORMS["olive"]).graph)
    while len(model.graph.inputs) > 1:
        model.graph.inputs.pop()
    with pytest.raises(GraphError, match="takes no adapters") as caught:
        lora_sites(model)
    assert "4 LoRA factors are constants" in caught.value.findings[0]


def test_inputs_that_are_listed_twice_are_read_once(tmp_path: Path) -> None:
    """As Olive's pass leaves them; ONNX Runtime takes such a file."""
    scene = made(tmp_path, FORMS["olive"])
    model = open_graph(scene.graph)
    model.graph.inputs.append(model.graph.initializers["first.lora_A.weight"])
    ir.save(model, tmp_path / "twice.onnx")
    assert len(open_graph(tmp_path / "twice.onnx").graph.inputs) == 5
    assert run_stock(tmp_path / "twice.onnx", None, x_of()).shape == (4, 5)


def test_lora_content_refuses_other_weights_and_says_which(tmp_path: Path) -> None:
    scene = made(tmp_path, FORMS["peft"])
    save_file(
        {"first.weight": torch.randn(6, 8), "second.weight": torch.from_numpy(scene.weights["second"])},
        tmp_path / "base" / "model.safetensors",
    )
    with pytest.raises(MismatchError, match="not of base") as caught:
        lora_content(HraSource([chains({"first": 2, "second": 2})]), open_graph(scene.graph), scene.base)
    (finding,) = caught.value.findings
    assert finding.startswith("first: its weight is off by 1")


def test_lora_content_takes_a_graph_whose_weights_were_rounded(tmp_path: Path) -> None:
    scene = made(tmp_path, FORMS["olive"])
    rounded = {f"{m}.weight": torch.from_numpy(w).bfloat16() for m, w in scene.weights.items()}
    save_file(rounded, tmp_path / "base" / "model.safetensors")
    found = lora_content(HraSource([chains({"first": 2})]), open_graph(scene.graph), scene.base)
    assert found.notes == ("1 of 2 pairs of inputs have no target in the adapter: they are zeros",)


def test_lora_content_names_all_that_does_not_fit(tmp_path: Path) -> None:
    scene = made(tmp_path, Form(OLIVE, rank=2))
    weights = {f"{m}.weight": torch.from_numpy(w) for m, w in scene.weights.items()}
    weights |= {"third.weight": torch.randn(4, 4), "second.weight": torch.randn(7, 6)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    adapter = HraAdapter(
        {"first": torch.randn(8, 3), "second": torch.randn(6, 2), "third": torch.randn(4, 2)},
        3,
        parameters={"first.bias": torch.ones(6)},
    )
    with pytest.raises(MismatchError) as caught:
        lora_content(HraSource([adapter]), open_graph(scene.graph), scene.base)
    text = "\n".join(caught.value.findings)
    assert len(caught.value.findings) == 4
    for says in (
        "third: the graph has no",
        "rank 2, the adapter has 3",
        "o = 7",
        "first.bias: a file of factors cannot",
    ):
        assert says in text


def test_lora_content_refuses_factors_that_leave_their_type(tmp_path: Path) -> None:
    scene = made(tmp_path, FORMS["half factors"])
    huge = {f"{m}.weight": torch.from_numpy(w) * 1e12 for m, w in scene.weights.items()}
    save_file(huge, tmp_path / "base" / "model.safetensors")
    model = open_graph(scene.graph)
    for m in WIDTHS:
        value = model.graph.initializers[f"{m}.weight"]
        value.const_value = ir.tensor(huge[f"{m}.weight"].numpy().T.copy(), name=value.name)
    with pytest.raises(NumericalError) as caught:
        lora_content(HraSource([chains({"first": 2, "second": 2})]), model, scene.base)
    assert len(caught.value.findings) == 2


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
def test_lora_content_keeps_the_digits_of_near_parallel_pairs(angle: float, tmp_path: Path) -> None:
    """As −(W U) T and Uᵀ, factors of 0.005 rad in float16 would lose a twentieth of ΔW, and balanced ones do not."""
    scene = made(tmp_path, FORMS["half factors"])
    generator = torch.Generator().manual_seed(2)
    first, other = torch.linalg.qr(torch.randn(8, 2, generator=generator, dtype=torch.float64)).Q.T
    pair = torch.stack([first, np.cos(angle) * first + np.sin(angle) * other], dim=1)
    found = lora_content(HraSource([HraAdapter({"first": pair}, 2)]), open_graph(scene.graph), scene.base)
    assert found.targets[0].error < HALF_DELTA


def test_lora_sites_refuse_quantized_factors(tmp_path: Path) -> None:
    form = Form(OLIVE, names="{m}.lora_{s}.quant.weight")
    with pytest.raises(UnsupportedModelError) as caught:
        lora_sites(open_graph(made(tmp_path, form).graph))
    assert len(caught.value.findings) == 2


def test_lora_content_refuses_convolutions(tmp_path: Path) -> None:
    scene = made(tmp_path, FORMS["olive"])
    save_file({"first.weight": torch.randn(6, 2, 2, 2)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UnsupportedModelError) as caught:
        lora_content(HraSource([chains({"first": 2})]), open_graph(scene.graph), scene.base)
    assert caught.value.findings == ("first: a convolution",)
