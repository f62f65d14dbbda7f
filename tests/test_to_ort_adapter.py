"""Adapter files for graphs that exist, judged by ONNX Runtime itself: the adapter's effect against PyTorch's."""

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import onnxruntime_genai
import pytest
import torch
import transformers
from torch import Tensor, nn

from hra_export import attach
from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.converted import ConvertReport
from hra_export.errors import HraExportError, MismatchError, OutputError
from hra_export.export import export_graphs, plan_export
from hra_export.graph.adapter_file import AdapterContent
from hra_export.graph.document import open_graph, save_graph
from hra_export.graph.exporting import export_graph
from hra_export.graph.families import graph_specs
from hra_export.graph.operator import declare_
from hra_export.graph.options import GraphOptions
from hra_export.graph.provenance import NAME_SCOPES
from hra_export.graph.session import GraphSession
from hra_export.graph.swapping import make_swappable_
from hra_export.registry import load_converter
from tests import graph_text, tiny_models
from tests.real_models import smollm2_gguf
from tests.refusals import Case, Refusals
from tests.synthetic import dense_chain
from tests.tiny_models import VOCABULARY
from tests.tiny_tokenizer import write_tokenizer

# ‖candidate − reference‖ / ‖reference − base‖ over logits; 1 when the adapter is not there.
FP32_EFFECT = 1e-4  # the project's bar; what is seen is 1e-6
# Of float32: one rounding of each factor, and the balanced factors have few directions.
FP32_DELTA = 1e-6
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # wide enough for an effect that can be seen
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

convert = load_converter("to_ort_adapter").convert


def llama(*, seed: int = 0, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes})).eval()
    return model


def widths(model: nn.Module, names: Sequence[str] = LINEARS) -> dict[str, int]:
    """Module path → d."""
    found = model.named_modules()
    return {path: int(m.in_features) for path, m in found if isinstance(m, nn.Linear) and path.endswith(tuple(names))}


def random_adapter(model: nn.Module, *, seed: int, rank: int = 4, names: Sequence[str] = LINEARS) -> HraAdapter:
    generator = torch.Generator().manual_seed(seed)
    return HraAdapter(
        {path: torch.randn(d, rank, generator=generator) for path, d in widths(model, names).items()}, rank
    )


def near_parallel(model: nn.Module) -> HraAdapter:
    """Pairs of vectors 0.05 rad apart, as a lightly trained adapter has them."""
    generator = torch.Generator().manual_seed(5)
    chains = {}
    for path, d in widths(model).items():
        first, other = torch.randn(d, 1, generator=generator), torch.randn(d, 1, generator=generator)
        chains[path] = torch.cat([first, first + 0.05 * other], dim=1)
    return HraAdapter(chains, 2)


def feeds_of(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray[Any, Any]]:
    """Random tokens for a decoder, with an empty cache."""
    ids = torch.randint(4, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3)).numpy()
    found: dict[str, np.ndarray[Any, Any]] = {}
    for value in session.get_inputs():
        if value.name == "input_ids":
            found[value.name] = ids
        elif value.name == "attention_mask":
            found[value.name] = np.ones_like(ids)
        elif value.name == "position_ids":
            found[value.name] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        else:
            heads, size = int(value.shape[1]), int(value.shape[3])
            dtype = np.float16 if "float16" in value.type else np.float32
            found[value.name] = np.zeros((len(ids), heads, 0, size), dtype)
    return found


def run_stock(graph: Path, adapter: Path | None = None) -> np.ndarray[Any, Any]:
    """The logits of ONNX Runtime with one of its own active adapters, and nothing of ours."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # it warns of each default that may be overridden
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    options = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    result: np.ndarray[Any, Any] = session.run(["logits"], feeds_of(session), options)[0]
    return result


@torch.no_grad()
def logits_of(model: nn.Module) -> np.ndarray[Any, Any]:
    ids = torch.randint(4, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    result: np.ndarray[Any, Any] = model(input_ids=ids).logits.numpy()
    return result


def effect_error(graph: Path, adapter: Path, model: nn.Module, *live: HraAdapter, strength: float = 1.0) -> float:
    """Of the runtime's answer, against live layers in PyTorch."""
    base = logits_of(model)
    attachment = attach(model, *live, strength=strength, interpolation="linear")
    reference = logits_of(model)
    attachment.detach()
    assert np.linalg.norm(reference - base) > 0.05 * np.linalg.norm(base)  # or there would be nothing to see
    return float(np.linalg.norm(run_stock(graph, adapter) - reference) / np.linalg.norm(reference - base))


@dataclass(frozen=True)
class Scene:
    """A folder with `base`, adapter directories, and graphs of the base that take adapters.

    Attributes:
        swappable: of `hra-export onnx --swappable`.
        lora: with LoRA factors as inputs, made as Olive makes them.
    """

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def swappable(self) -> Path:
        return self.folder / "swappable"

    @property
    def lora(self) -> Path:
        return self.folder / "lora.onnx"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    made = Scene(tmp_path_factory.mktemp("scene"))
    model = llama()
    model.save_pretrained(made.base)
    write_adapter(random_adapter(model, seed=1), made.folder / "first")
    options = GraphOptions(mode="reflect", swap="adapter")
    export_graphs(plan_export(made.base, [read_adapter(made.folder / "first")], options), made.swappable)
    save_graph(lora_graph(model), made.folder, "lora")
    return made


# ------------------------------------------------------------------------------------------- swappable graphs

ADAPTERS: Mapping[str, tuple[Callable[[nn.Module], Sequence[HraAdapter]], float]] = {
    "one": (lambda model: [random_adapter(model, seed=7, rank=6)], 1.0),
    "near-parallel": (lambda model: [near_parallel(model)], 1.0),
    "some targets": (lambda model: [random_adapter(model, seed=8, names=["q_proj", "down_proj"])], 1.0),
    "two": (lambda model: [random_adapter(model, seed=9), random_adapter(model, seed=10, rank=3)], 1.0),
    "Gram-Schmidt": (lambda model: [HraAdapter(random_adapter(model, seed=11).chains, 4, orthogonalize=True)], 1.0),
    "half": (lambda model: [random_adapter(model, seed=12)], 0.5),
    "beyond": (lambda model: [random_adapter(model, seed=12), random_adapter(model, seed=13)], -1.25),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_swappable_graph_runs_the_file_as_pytorch_runs_the_adapter(scene: Scene, kind: str, tmp_path: Path) -> None:
    model = llama()
    make, strength = ADAPTERS[kind]
    adapters = make(model)
    report = convert(adapters, tmp_path / "a.onnx_adapter", graph=scene.swappable, strength=strength)
    graph = scene.swappable / "model.onnx"
    assert effect_error(graph, report.output, model, *adapters, strength=strength) < FP32_EFFECT
    assert report.error < FP32_DELTA
    GraphSession.open(scene.swappable).load_adapter("a", report.output)


def test_strength_zero_is_the_base_to_the_bit(scene: Scene, tmp_path: Path) -> None:
    adapter = random_adapter(llama(), seed=7)
    report = convert([adapter], tmp_path / "a.onnx_adapter", graph=scene.swappable, strength=0.0)
    graph = scene.swappable / "model.onnx"
    np.testing.assert_array_equal(run_stock(graph, report.output), run_stock(graph))


def test_pairs_that_cancel_take_no_room(scene: Scene, tmp_path: Path) -> None:
    """As PEFT starts them, and as longer chains are filled up."""
    whole = random_adapter(llama(), seed=7, rank=3)
    longer = {path: torch.cat([u[:, :2], u[:, :1], u[:, :1], u[:, 2:]], dim=1) for path, u in whole.chains.items()}
    longer["model.layers.0.mlp.up_proj"] = torch.randn(32, 1).expand(-1, 6)
    report = convert([HraAdapter(longer, 6)], tmp_path / "a.onnx_adapter", graph=scene.swappable)
    ranks = {target.module: target.rank for target in report.targets}
    assert ranks == {**dict.fromkeys(whole.chains, 3), "model.layers.0.mlp.up_proj": 0}
    assert json.loads((tmp_path / "a.onnx_adapter.json").read_bytes())["ranks"] == ranks
    graph = scene.swappable / "model.onnx"
    assert effect_error(graph, report.output, llama(), HraAdapter(longer, 6)) < FP32_EFFECT


def test_export_and_conversion_write_the_same_file(scene: Scene, tmp_path: Path) -> None:
    adapter = read_adapter(scene.folder / "first")
    convert([adapter], tmp_path / "first.onnx_adapter", graph=scene.swappable, base=open_checkpoint(scene.base))
    for name in ("first.onnx_adapter", "first.onnx_adapter.json"):
        assert (tmp_path / name).read_bytes() == (scene.swappable / "adapters" / name).read_bytes()


def test_report_says_what_was_written(scene: Scene, tmp_path: Path) -> None:
    adapter = random_adapter(llama(), seed=7, rank=6, names=["q_proj"])
    report: ConvertReport = convert([adapter], tmp_path / "a.onnx_adapter", graph=scene.swappable)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["a.onnx_adapter", "a.onnx_adapter.json"]
    assert report.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert {target.module: target.rank for target in report.targets} == dict.fromkeys(adapter.chains, 6)
    # ‖R − I‖² = 2 d − 2 tr R, and R is the explicit chain.
    chain = torch.eye(32, dtype=torch.float64)
    for column in adapter.chains["model.layers.0.self_attn.q_proj"].double().T:
        chain = chain - 2 * torch.outer(chain @ column, column) / column.dot(column)
    expected = float((chain - torch.eye(32)).norm())
    assert report.targets[0].delta_norm == pytest.approx(expected, rel=1e-9)


def test_target_that_was_renamed_since_keeps_its_place(tmp_path: Path) -> None:
    """GPT-NeoX's head was `embed_out` when the adapter was trained, and is `lm_head` in the graph."""
    model = tiny_models.build("gpt-neox-head")
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    for name in ("first", "later"):
        chains = {
            path: torch.randn(32, 4, generator=generator)
            for path in ("embed_out", "gpt_neox.layers.0.mlp.dense_h_to_4h")
        }
        write_adapter(HraAdapter(chains, 4), tmp_path / name)
    first, later = (read_adapter(tmp_path / name) for name in ("first", "later"))
    options = GraphOptions(mode="reflect", swap="adapter")
    export_graphs(plan_export(tmp_path / "base", [first], options), tmp_path / "out")
    graph, theirs = tmp_path / "out" / "model.onnx", tmp_path / "out" / "adapters" / "first.onnx_adapter"
    assert effect_error(graph, theirs, model, first) < FP32_EFFECT
    report = convert([later], tmp_path / "later.onnx_adapter", graph=tmp_path / "out")
    assert effect_error(graph, report.output, model, later) < FP32_EFFECT
    assert report.targets[0].module == "embed_out" or report.targets[1].module == "embed_out"


def test_encoder_and_decoder_get_a_file_each(tmp_path: Path) -> None:
    """Each with the chains of its own graph, and nothing when a target is in neither."""
    generator = torch.Generator().manual_seed(0)
    adapter = HraAdapter({path: torch.randn(8, 2, generator=generator) for path in ("encoder.q", "decoder.q")}, 2)
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    for side in ("encoder", "decoder"):
        save_graph(one_layer(f"{side}.q"), graphs, f"{side}_model")
    other = replace(adapter, chains={**adapter.chains, "encoder.k": torch.randn(8, 2)})
    with pytest.raises(MismatchError, match=r"encoder\.k: no such place"):
        convert([other], tmp_path / "a.onnx_adapter", graph=graphs)
    report = convert([adapter], tmp_path / "a.onnx_adapter", graph=graphs)
    assert sorted(target.module for target in report.targets) == ["decoder.q", "encoder.q"]
    for side in ("encoder", "decoder"):
        session = GraphSession.open(graphs / f"{side}_model.onnx")
        session.load_adapter("a", tmp_path / f"a.{side}_model.onnx_adapter")
        x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
        expected = x @ dense_chain(adapter.chains[f"{side}.q"].double().numpy()).T
        np.testing.assert_allclose(session.run({"x": x}, adapter="a")["y"], expected, rtol=0, atol=1e-5)


def one_layer(target: str) -> ir.Model:
    """y = x W with W = I behind a chain that is an input."""
    body = "g (float[n, 8] x) => (float[n, 8] y) { z = hra.HouseholderReflection (x, u, v) y = MatMul (z, w) }"
    header = '<ir_version: 10, opset_import: ["" : 20, "hra" : 1]>'
    constants = {"u": np.zeros((8, 1)), "v": np.zeros((1, 8)), "w": np.eye(8)}
    model = graph_text.graph(body, {name: array.astype(np.float32) for name, array in constants.items()}, header=header)
    for name, new in (("u", f"{target}.hra_U"), ("v", f"{target}.hra_V"), ("w", f"{target}.weight")):
        model.graph.initializers[name].name = new
    make_swappable_(model)
    declare_(model)
    return model


# ------------------------------------------------------------------------------------------- LoRA inputs


class LoraLinear(nn.Module):
    """A linear layer with a pair of factors beside it, named and scaled as PEFT does."""

    def __init__(self, base: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scale
        return result


def lora_graph(model: nn.Module, *, scale: float = 2.0, rank: int | None = None) -> ir.Model:
    """The graph of a decoder whose linear layers have LoRA factors, which are inputs that default to rank 0.

    Made as Olive's ExtractAdapters makes it: weights of `lora_A` and `lora_B` become inputs of these names as their
    products take them, the rank is one symbol, and the default has rank 0. With a fixed rank they have zeros instead.
    """
    for path in widths(model):
        model.set_submodule(path, LoraLinear(model.get_submodule(path), rank=2, scale=scale))  # type: ignore[arg-type]  # all are linear
    (spec,) = graph_specs(model)
    made = export_graph(spec)
    for node in list(made.graph):
        *_, path, _ = json.loads(node.metadata_props.get(NAME_SCOPES, "['','']").replace("'", '"'))
        if node.op_type == "MatMul" and path.endswith((".lora_A.default", ".lora_B.default")):
            axis = 1 if path.endswith(".lora_A.default") else 0
            _make_input_(made, node.inputs[1], f"{path.removesuffix('.default')}.weight", axis, rank)
    return made


def _make_input_(model: ir.Model, value: ir.Value | None, name: str, axis: int, rank: int | None) -> None:
    assert value is not None
    assert value.const_value is not None
    shape = list(value.const_value.shape.numpy())
    shape[axis] = rank or 0
    value.const_value = ir.tensor(np.zeros(shape, np.float32), name=name)
    value.name = name
    value.shape = ir.Shape([rank or "lora_r" if i == axis else size for i, size in enumerate(shape)])
    model.graph.inputs.append(value)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_graph_with_lora_inputs_runs_the_file_as_pytorch_runs_the_adapter(
    scene: Scene, kind: str, tmp_path: Path
) -> None:
    model = llama()
    make, strength = ADAPTERS[kind]
    adapters = make(model)
    base = open_checkpoint(scene.base)
    report = convert(adapters, tmp_path / "a.onnx_adapter", graph=scene.lora, base=base, strength=strength)
    assert effect_error(scene.lora, report.output, model, *adapters, strength=strength) < FP32_EFFECT
    assert report.error < FP32_DELTA
    assert any("multiplies by 2" in note for note in report.notes)


# ------------------------------------------------------------------------------------------- ONNX Runtime GenAI


def generated(
    directory: Path, files: Mapping[str, Path], prompt: Sequence[int], *, new_tokens: int
) -> dict[str, tuple[int, ...]]:
    """Greedy tokens of ONNX Runtime GenAI, one model and all adapters at once: for each of them, and for none (``)."""
    model = onnxruntime_genai.Model(str(directory))
    adapters = onnxruntime_genai.Adapters(model)
    for name, path in files.items():
        adapters.load(str(path), name)
    found = {}
    for name in ("", *files):
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, batch_size=1, max_length=len(prompt) + new_tokens)
        generator = onnxruntime_genai.Generator(model, parameters)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found[name] = tuple(int(token) for token in generator.get_sequence(0)[len(prompt) :])
    return found


@torch.no_grad()
def torch_generated(
    model: nn.Module, adapters: Mapping[str, HraAdapter], prompt: Sequence[int], *, new_tokens: int
) -> dict[str, tuple[int, ...]]:
    """The same of PyTorch with live chains."""
    found = {}
    for name, live in {"": (), **{name: (adapter,) for name, adapter in adapters.items()}}.items():
        attachment = attach(model, *live)
        row = torch.tensor([prompt])
        made: Any = model.generate(row, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        attachment.detach()
        found[name] = tuple(made[0, len(prompt) :].tolist())
    return found


def test_genai_serves_two_adapters_of_two_ranks_and_the_base(tmp_path: Path) -> None:
    """One model in memory; the tokens of each are PyTorch's, and no two are alike."""
    model = llama(hidden_size=64)  # heads of 16, as the builder's attention takes them
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    write_adapter(random_adapter(model, seed=1), tmp_path / "first")
    first, second = read_adapter(tmp_path / "first"), random_adapter(model, seed=2, rank=6, names=["q_proj", "up_proj"])
    options = GraphOptions(mode="reflect", runtime="genai", swap="adapter")
    export_graphs(plan_export(tmp_path / "base", [first], options), tmp_path / "out")
    files = {}
    for name, adapter in {"first": first, "second": second}.items():
        files[name] = tmp_path / f"{name}.onnx_adapter"
        convert([adapter], files[name], graph=tmp_path / "out")
    assert "GroupQueryAttention" in {node.op_type for node in open_graph(tmp_path / "out" / "model.onnx").graph}
    prompt = [35, 61, 17, 60, 8]
    found = generated(tmp_path / "out", files, prompt, new_tokens=12)
    expected = torch_generated(model, {"first": first, "second": second}, prompt, new_tokens=12)
    assert found == expected
    assert len(set(expected.values())) == 3  # an adapter that is ignored would show


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_genai_serves_adapters_of_a_real_model(tmp_path: Path) -> None:
    """SmolLM2: thirty layers, a chain before every linear layer, pairs of vectors some 27 degrees apart."""
    load_converter("from_gguf").convert(smollm2_gguf(), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapters = {name: turning(model, seed=seed) for seed, name in enumerate(("first", "second"))}
    write_adapter(adapters["first"], tmp_path / "first")
    options = GraphOptions(mode="reflect", runtime="genai", swap="adapter")
    export_graphs(plan_export(tmp_path / "base", [read_adapter(tmp_path / "first")], options), tmp_path / "out")
    files = {name: tmp_path / f"{name}.onnx_adapter" for name in adapters}
    for name, adapter in adapters.items():
        convert([adapter], files[name], graph=tmp_path / "out", base=open_checkpoint(tmp_path / "base"))
    prompt = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")("The three primary colours are")["input_ids"]
    found = generated(tmp_path / "out", files, prompt, new_tokens=16)
    expected = torch_generated(model, adapters, prompt, new_tokens=16)
    assert found == expected
    assert len(set(expected.values())) == 3


def turning(model: nn.Module, *, seed: int) -> HraAdapter:
    """A plane before each linear layer turns a little: the model still speaks, and says something else."""
    generator = torch.Generator().manual_seed(seed)
    chains = {}
    for path, d in widths(model).items():
        first = torch.randn(d, 1, generator=generator)
        chains[path] = torch.cat([first, first + 0.5 * torch.randn(d, 1, generator=generator)], 1)
    return HraAdapter(chains, 2)


# ------------------------------------------------------------------------------------------- what is refused


@dataclass
class Attempt:
    """A conversion that is about to go wrong.

    Attributes:
        scene: to be left as it is.
        output: where nothing may appear.
        source: adapters, or another source.
        arguments: of `convert`.
    """

    scene: Scene
    output: Path
    source: Any
    arguments: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.output.parent


refused: Refusals[Attempt] = Refusals()


@refused(4, "takes no adapters", "--swappable")
def a_graph_that_takes_no_adapters(attempt: Attempt) -> None:
    model = graph_text.graph("g (float[n, 8] x) => (float[n, 8] y) { y = MatMul (x, w) }", {"w": np.eye(8, dtype="f4")})
    save_graph(model, attempt.folder, "plain")
    attempt.arguments["graph"] = attempt.folder / "plain.onnx"


@refused(4, "holds no ONNX file")
def a_directory_without_a_graph(attempt: Attempt) -> None:
    attempt.arguments["graph"] = attempt.scene.base


@refused(4, "no such file")
def a_graph_that_is_not_there(attempt: Attempt) -> None:
    attempt.arguments["graph"] = attempt.folder / "nowhere.onnx"


@refused(4, "model.layers.0.mlp.other: no such place", "model.layers.1.mlp.up_proj: expected 32 rows of U, got 48")
def targets_that_the_graph_lacks_or_has_otherwise(attempt: Attempt) -> None:
    (adapter,) = attempt.source
    chains = {**adapter.chains, "model.layers.0.mlp.other": torch.randn(32, 4)}
    chains["model.layers.1.mlp.up_proj"] = torch.randn(48, 4)
    attempt.source = [replace(adapter, chains=chains)]


@refused(4, "model.embed_tokens: no such place")
def an_embedding_that_the_graph_does_not_rotate(attempt: Attempt) -> None:
    (adapter,) = attempt.source
    attempt.source = [replace(adapter, chains={**adapter.chains, "model.embed_tokens": torch.randn(32, 4)})]


@refused(4, "parameters beside the chains", "lm_head.weight")
def saved_modules_that_are_not_in_the_graph(attempt: Attempt) -> None:
    (adapter,) = attempt.source
    attempt.source = [replace(adapter, parameters={"lm_head.weight": torch.zeros(VOCABULARY, 32)})]


@refused(4, "two adapters carry different values")
def adapters_that_do_not_compose(attempt: Attempt) -> None:
    (adapter,) = attempt.source
    attempt.source = [replace(adapter, parameters={"lm_head.weight": torch.full((2,), float(i))}) for i in range(2)]


@refused(4, "not of base", "down_proj: its weight is off by 1")
def a_base_that_the_swappable_graph_is_not_of(attempt: Attempt) -> None:
    llama(seed=1).save_pretrained(attempt.folder / "other")
    attempt.arguments["base"] = open_checkpoint(attempt.folder / "other")


@refused(4, "not of base", "down_proj: its weight is off by 1")
def a_base_that_the_graph_with_lora_inputs_is_not_of(attempt: Attempt) -> None:
    llama(seed=1).save_pretrained(attempt.folder / "other")
    attempt.arguments |= {"graph": attempt.scene.lora, "base": open_checkpoint(attempt.folder / "other")}


@refused(4, "ΔW, which is made of the base's weights", "--base")
def lora_inputs_without_a_base(attempt: Attempt) -> None:
    attempt.arguments["graph"] = attempt.scene.lora


@refused(4, "lm_head: the graph has no LoRA inputs for it")
def a_target_without_lora_inputs(attempt: Attempt) -> None:
    (adapter,) = attempt.source
    attempt.source = [replace(adapter, chains={**adapter.chains, "lm_head": torch.randn(32, 4)})]
    attempt.arguments |= {"graph": attempt.scene.lora, "base": open_checkpoint(attempt.scene.base)}


@refused(8, "model.embed_tokens: an embedding")
def an_embedding_as_lora(attempt: Attempt) -> None:
    (adapter,) = attempt.source
    attempt.source = [replace(adapter, chains={**adapter.chains, "model.embed_tokens": torch.randn(32, 4)})]
    attempt.arguments |= {"graph": attempt.scene.lora, "base": open_checkpoint(attempt.scene.base)}


@refused(8, "pass one of the files")
def several_graphs_with_lora_inputs(attempt: Attempt) -> None:
    for name in ("one", "two"):
        save_graph(open_graph(attempt.scene.lora), attempt.folder, name)
    attempt.arguments |= {"graph": attempt.folder, "base": open_checkpoint(attempt.scene.base)}


@refused(4, "no chain before a layer", "--to lora")
def a_source_that_is_no_chain(attempt: Attempt) -> None:
    attempt.source = Unchained()


@refused(6, "a.bin", "ends in `.onnx_adapter`")
def an_output_with_another_ending(attempt: Attempt) -> None:
    attempt.output = attempt.folder / "a.bin"


@refused(6, "exists", "--overwrite")
def an_output_that_exists(attempt: Attempt) -> None:
    attempt.output.write_bytes(b"something of the user's")


@refused(6, "exists", "--overwrite")
def a_description_that_exists(attempt: Attempt) -> None:
    attempt.output.with_name(attempt.output.name + ".json").write_bytes(b"{}")


@refused(6, "lies in the input")
def an_output_inside_the_adapter(attempt: Attempt) -> None:
    attempt.source = [read_adapter(attempt.scene.folder / "first")]
    attempt.output = attempt.scene.folder / "first" / "a.onnx_adapter"


class Unchained:
    """What the authors' llama code trains: it acts behind a layer."""

    label = "`soft`"
    paths = ()
    notes = ()


@pytest.mark.parametrize("case", refused.cases, ids=lambda case: case.damage.__name__)
def test_convert_refuses(scene: Scene, case: Case[Attempt], tmp_path: Path) -> None:
    """With its exit code and all that it names, and nothing is written or changed."""
    adapters = [random_adapter(llama(), seed=7)]
    attempt = Attempt(scene, tmp_path / "a.onnx_adapter", adapters, {"graph": scene.swappable})
    case.damage(attempt)
    before = contents(scene.folder), contents(tmp_path)
    with pytest.raises(HraExportError) as caught:
        convert(attempt.source, attempt.output, **attempt.arguments)
    assert caught.value.exit_code == case.code
    for text in case.says:
        assert text in str(caught.value)
    assert (contents(scene.folder), contents(tmp_path)) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_overwrite_replaces_both_files(scene: Scene, tmp_path: Path) -> None:
    output = tmp_path / "a.onnx_adapter"
    convert([random_adapter(llama(), seed=7)], output, graph=scene.swappable)
    before = contents(tmp_path)
    convert([random_adapter(llama(), seed=8)], output, graph=scene.swappable, overwrite=True)
    after = contents(tmp_path)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


def test_a_disk_that_is_full_leaves_nothing_behind(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: AdapterContent, path: Path, beside: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AdapterContent, "write", fail)
    with pytest.raises(OutputError, match="No space left"):
        convert([random_adapter(llama(), seed=7)], tmp_path / "a.onnx_adapter", graph=scene.swappable)
    assert not list(tmp_path.iterdir())
