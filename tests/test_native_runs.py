"""Graphs run by the operator library's kernels: sessions, bound runs, ONNX Runtime GenAI, `validate` and `bench`.

Where a graph's operators have no bodies, only kernels can have run it.
"""

import ctypes
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from numpy.typing import NDArray

from hra_export.adapter import HraAdapter, write_adapter
from hra_export.errors import DeviceError, FormatError, GraphError, UnsupportedModelError
from hra_export.graph import genai, operator, runtime
from hra_export.graph.document import open_graph, save_graph
from hra_export.graph.genai import GenaiModel
from hra_export.graph.genai_config import check_loadable, provider_settings
from hra_export.graph.genai_library import name_for_loader
from hra_export.graph.native import OperatorChoice, choose_operator
from hra_export.graph.session import GraphSession
from hra_export.graph.values import to_array
from hra_export.kernels import operator_library
from hra_export.kernels.operator_library import FILE_NAME, VARIABLE
from hra_export.validation import child, process
from hra_export.validation.job import Generation, Job
from hra_export.validation.process import Ending, run_job
from hra_export.validation.trial import Trial
from tests.command_line import run
from tests.tiny_tokenizer import write_tokenizer

PROMPT = [35, 117, 203, 60, 8]
NEW_TOKENS = 12
ROWS, FEATURES, RANK = 5, 37, 8
# Unit roundoff of what is stored; sums are in float32. X U is kept in float32 or rounded once, V and Y are rounded:
# three roundings, of values up to ‖x‖‖U‖‖V‖, which is below 8 with the operands below.
ROUNDOFF = {"FLOAT": 2.0**-24, "FLOAT16": 2.0**-11, "BFLOAT16": 2.0**-8}
LARGEST = 8.0
SUMS = {"FLOAT": FEATURES + RANK, "FLOAT16": 3, "BFLOAT16": 3}  # float32 rounds each sum's steps instead


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer, an adapter, and both as a swappable directory of ONNX Runtime GenAI."""
    folder = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    generator = torch.Generator().manual_seed(1)
    paths = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    chains = {path: torch.randn(64, 4, generator=generator) for path in [*paths, "model.layers.0.mlp.up_proj"]}
    write_adapter(HraAdapter(chains, 4, base=str(folder / "base"), task="CAUSAL_LM"), folder / "adapter")
    options = ("--runtime", "genai", "--swappable", "--no-validate")
    written = run("onnx", folder / "adapter", "--output", folder / "graph", *options)
    assert written.code == 0, written.stderr
    return folder


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A file of the right name that is no library."""
    path = tmp_path / "foreign" / FILE_NAME
    path.parent.mkdir()
    path.write_bytes(b"no library")
    return path


def without_bodies(directory: Path, to: Path) -> Path:
    """A copy whose operators only kernels can run."""
    shutil.copytree(directory, to, ignore=shutil.ignore_patterns("model.onnx*"))
    model = open_graph(directory / "model.onnx")
    model.functions.clear()
    save_graph(model, to)
    return to


def generated(directory: Path, library: Path | None, adapter: Path | None) -> Ending:
    """What ONNX Runtime GenAI says in a process of its own."""
    asked = [Generation("asked", PROMPT, NEW_TOKENS)]
    adapters = {} if adapter is None else {"model": adapter}
    return run_job(Job({}, "cpu", (), adapters, directory, asked, library), timeout=120)


def test_genai_answers_alike_with_kernels_and_bodies(folder: Path, native_library: Path, tmp_path: Path) -> None:
    """With an adapter swapped in; the directory names no library."""
    bare = without_bodies(folder / "graph", tmp_path / "bare")
    adapter = folder / "graph" / "adapters" / "adapter.onnx_adapter"
    inlined, native = generated(folder / "graph", None, adapter), generated(bare, native_library, adapter)
    assert len(set(inlined.answers["asked"].tokens)) > 1
    assert native.answers["asked"].tokens == inlined.answers["asked"].tokens
    assert native.operators["genai"]["library"]["path"] == str(native_library)
    assert native.operators["genai"]["nodes"] > 0
    assert inlined.operators["genai"]["library"] is None
    with pytest.raises(GraphError, match="cannot load"):
        GenaiModel.open(bare, operator=None)


def test_validate_says_what_ran(
    folder: Path,
    native_library: Path,
    foreign: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library that is found by itself, none, and a file that is none; the generator has a test of its own."""
    monkeypatch.setattr(Trial, "_take_generations", lambda *_: None)
    monkeypatch.setattr(process, "run_child", lambda root, timeout: child.main(str(root)))
    monkeypatch.setenv(VARIABLE, str(native_library))
    asked: list[str | Path] = ["validate", folder / "adapter", "--candidate", folder / "graph", "--prompt", "ab"]
    native = run(*asked, "--json")
    assert native.code == 0, native.stderr
    (said,) = native.json["operators"]
    assert (said["runtime"], said["graph"], said["library"]) == ("ONNX Runtime", "model.onnx", str(native_library))
    assert said["version"] == operator_library.open_library(native_library).version
    inlined = run(*asked, "--operator", "none")
    assert "reflection nodes of `model.onnx` inlined, no library was asked for" in inlined.stdout
    broken = run(*asked, "--operator", foreign)
    assert broken.code == 4
    assert str(foreign) in broken.stderr


@pytest.mark.slow
def test_validate_holds_with_kernels_in_both_runtimes(folder: Path, native_library: Path) -> None:
    options = ("--candidate", folder / "graph", "--prompt", "ab", "--operator", native_library)
    outcome = run("validate", folder / "adapter", *options, "--json")
    assert outcome.code == 0, outcome.stderr
    assert {each["runtime"] for each in outcome.json["operators"]} == {"ONNX Runtime", "ONNX Runtime GenAI"}
    assert {each["library"] for each in outcome.json["operators"]} == {str(native_library)}


def test_validate_of_weights_takes_no_operator(folder: Path, native_library: Path) -> None:
    options = ("--candidate", folder / "base", "--operator", native_library)
    outcome = run("validate", folder / "adapter", *options)
    assert outcome.code == 2
    assert "--operator" in outcome.stderr


def test_bench_shows_kernels_beside_bodies(folder: Path, native_library: Path) -> None:
    options = ("--operator", "none", "--operator", native_library, "--tokens", "3", "--rounds", "1", "--threads", "1")
    outcome = run("bench", folder / "graph", *options, "--json")
    assert outcome.code == 0, outcome.stderr
    path = folder / "graph"
    found = [(each["contender"], each["operator"]) for each in outcome.json["timings"]]
    names = [f"{path}, inlined", f"{path} + adapter, inlined", f"{path}, native", f"{path} + adapter, native"]
    assert found == [(name, name.rpartition(" ")[2]) for name in names] * 2
    assert any(f"reflections native, `{native_library}`" in note for note in outcome.json["notes"])


def test_bench_refuses_a_comparison_without_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hra_export.graph.native.find", lambda: None)
    outcome = run("bench", folder / "graph", "--operator", "none", "--operator", "auto", "--rounds", "1")
    assert outcome.code == 7
    assert "no library was found" in outcome.stderr


def test_library_without_kernels_for_the_provider_is_not_used(
    native_library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Registered, its CPU kernels would take the nodes from the GPU."""
    monkeypatch.setenv(VARIABLE, str(native_library))
    choice = choose_operator("auto", "cuda")
    assert choice.library is None
    assert "none for cuda" in choice.reason
    with pytest.raises(DeviceError, match="none for cuda"):
        choose_operator(native_library, "cuda")


def test_broken_library_is_an_error_wherever_it_was_found(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(foreign))
    with pytest.raises(FormatError, match=VARIABLE):
        choose_operator("auto", "cpu")
    assert choose_operator(None, "cpu") == OperatorChoice(None, "no library was asked for")


# ---------------------------------------------------------------------------------------------------- bound runs


def single_node(dtype: ir.DataType, path: Path) -> Path:
    """One reflection whose U and V are inputs, without a body."""
    shapes: dict[str, list[int | str]] = {"x": ["n", FEATURES], "u": [FEATURES, "r"], "v": ["r", FEATURES]}
    values = [ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)) for name, shape in shapes.items()]
    node = operator.node(*values, name="reflection")
    node.outputs[0].name = "y"
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 20, operator.DOMAIN: 1}, name="g")
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def operands(dtype: ir.DataType, seed: int) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    sizes = {"x": (ROWS, FEATURES), "u": (FEATURES, RANK), "v": (RANK, FEATURES)}
    scale = {"x": 1.0, "u": FEATURES**-0.5, "v": RANK**-0.5}
    return {name: (random.standard_normal(size) * scale[name]).astype(dtype.numpy()) for name, size in sizes.items()}


@pytest.mark.parametrize("name", ROUNDOFF)
def test_bound_run_with_kernels_in_every_type(name: str, native_library: Path, tmp_path: Path) -> None:
    """Twice on the same memory, which is written over in between, as the body computes it in float64."""
    dtype = ir.DataType[name]
    session = GraphSession.open(single_node(dtype, tmp_path / "model.onnx"), threads=1, operator=native_library)
    assert session.native is not None
    assert session.native_nodes == 1
    feeds = operands(dtype, 0)
    bound = session.bind(feeds)
    for seed in (0, 1):
        fresh = operands(dtype, seed)
        for each in feeds:
            feeds[each][...] = fresh[each]
        y = to_array(bound.run()["y"])
        x, u, v = (fresh[each].astype(np.float64) for each in "xuv")
        assert y.dtype == dtype.numpy()
        assert np.abs(x).max() + np.abs(x @ u @ v).max() < LARGEST
        np.testing.assert_allclose(
            y.astype(np.float64), x + x @ u @ v, rtol=0, atol=SUMS[name] * ROUNDOFF[name] * LARGEST
        )


PRODUCT = '<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (float[n] y) { y = Add (x, x) }'


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[GraphSession, list[int], list[int]]:
    """A session that believes it records, with the numbers of CUDA graphs it began and gave back."""
    ir.save(ir.from_onnx_text(PRODUCT), tmp_path / "model.onnx")
    plain = GraphSession.open(tmp_path, threads=1, operator=None)
    choice = OperatorChoice(None)
    session = GraphSession(plain._session, plain.path, "cpu", nodes=(), operator=choice, device=0, cuda_graph=True)
    began: list[int] = []
    released: list[int] = []
    options = runtime.run_options

    def run_options(number: int) -> Any:
        began.append(number)
        return options(number)

    monkeypatch.setattr(runtime, "run_options", run_options)
    monkeypatch.setattr(runtime, "release_cuda_graph", lambda _, number: released.append(number))
    return session, began, released


def test_each_binding_records_its_own_cuda_graph_and_gives_it_back(
    recording: tuple[GraphSession, list[int], list[int]],
) -> None:
    session, began, released = recording
    bound = session.bind({"x": np.ones(2, np.float32)})
    first = bound.run()["y"]
    assert bound.run()["y"].data_ptr() == first.data_ptr()  # a replay writes to the same memory
    assert (began, released) == ([1], [])
    bound.feed({"x": np.ones(3, np.float32)}).run()  # other addresses
    assert (began, released) == ([1, 2], [1])
    session.run({"x": np.ones(2, np.float32)})
    assert began == [1, 2, -1]  # what is not bound is not recorded
    del bound
    assert released == [1, 2]


def test_results_of_a_bound_run_follow_its_feeds(recording: tuple[GraphSession, list[int], list[int]]) -> None:
    x = np.ones(2, np.float32)
    bound = recording[0].bind({"x": x})
    assert bound.run()["y"].numpy().tolist() == [2, 2]
    x[:] = 5
    assert bound.run()["y"].numpy().tolist() == [10, 10]
    assert bound.feed({"x": np.ones(3, np.float32)}).run()["y"].numpy().tolist() == [2, 2, 2]


# ------------------------------------------------------------------------------------------ ONNX Runtime GenAI


def test_genai_records_only_what_it_can(folder: Path) -> None:
    with pytest.raises(ValueError, match="only the `cuda` provider"):
        GenaiModel.open(folder / "graph", cuda_graph=True)
    config = json.loads((folder / "graph" / "genai_config.json").read_bytes())
    check_loadable(config | {"search": {"past_present_share_buffer": True}}, "d", cuda_graph=True)
    for search in ({"past_present_share_buffer": False}, {}):
        with pytest.raises(UnsupportedModelError, match="past_present_share_buffer"):
            check_loadable(config | {"search": search}, "d", cuda_graph=True)
        check_loadable(config | {"search": search}, "d", cuda_graph=False)


def test_genai_provider_is_told_what_was_asked(
    folder: Path,
    native_library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the directory says: recording on or off, no TF32, and no provider's options on the CPU."""
    assert provider_settings("cuda", cuda_graph=True) == {"enable_cuda_graph": "1", "use_tf32": "0"}
    assert provider_settings("cuda", cuda_graph=False)["enable_cuda_graph"] == "0"
    assert provider_settings("cpu", cuda_graph=False) == {}
    said: list[tuple[str, ...]] = []

    class Config:
        def __init__(self, directory: str) -> None:
            said.append(("open", directory))

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: said.append((name, *arguments))

    def refuse(config: Config) -> None:
        raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

    monkeypatch.setattr(genai, "_import", lambda: SimpleNamespace(Config=Config, Model=refuse))
    monkeypatch.setattr(genai, "check_loadable", lambda *_, **__: None)
    with pytest.raises(GraphError, match="cannot load") as caught:
        GenaiModel.open(folder / "graph", provider="cuda", cuda_graph=True)
    assert caught.value.hint == "open it without `cuda_graph`"
    assert said[1:] == [
        ("clear_providers",),
        ("append_provider", "cuda"),
        ("set_provider_option", "cuda", "enable_cuda_graph", "1"),
        ("set_provider_option", "cuda", "use_tf32", "0"),
    ]
    monkeypatch.setattr(genai, "name_for_loader", lambda library, directory: library.name)
    with pytest.raises(GraphError):
        GenaiModel.open(folder / "graph", operator=native_library)
    options = {"custom_ops_library": FILE_NAME}
    assert said[-1] == ("overlay", json.dumps({"model": {"decoder": {"session_options": options}}}))


def test_genai_loads_no_library_that_a_directory_brings(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "graph", tmp_path / "graph")
    path = tmp_path / "graph" / "genai_config.json"
    config = json.loads(path.read_bytes())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "theirs.so"
    path.write_text(json.dumps(config))
    with pytest.raises(GraphError, match=r"`theirs\.so`"):
        GenaiModel.open(tmp_path / "graph")


def test_library_of_the_same_name_in_the_directory_is_not_taken(
    native_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The runtime looks into the model's directory and the working directory before it asks the system."""
    copy = shutil.copy(native_library, tmp_path / "mine.so")
    held = ctypes.CDLL(str(copy))._handle
    monkeypatch.setattr("hra_export.graph.genai_library._handle", lambda name: held)
    assert name_for_loader(Path(copy), tmp_path) == "mine.so"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.so").write_bytes(b"another")
    with pytest.raises(GraphError, match="it would take"):
        name_for_loader(Path(copy), tmp_path / "model")
    monkeypatch.setattr("hra_export.graph.genai_library._handle", lambda name: None)
    with pytest.raises(DeviceError, match="DT_SONAME"):
        name_for_loader(Path(copy), tmp_path)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
def test_recorded_runs_give_each_adapter_its_numbers(folder: Path) -> None:
    """Adapters of one session in CUDA graphs of their own, replayed in turn."""
    adapter = folder / "graph" / "adapters" / "adapter.onnx_adapter"
    plain = GraphSession.open(folder / "graph", provider="cuda")
    recorded = GraphSession.open(folder / "graph", provider="cuda", cuda_graph=True)
    feeds: dict[str, Any] = {"input_ids": np.array([PROMPT]), "attention_mask": np.ones((1, len(PROMPT)), np.int64)}
    for spec in plain.inputs:
        if spec.name.startswith("past_key_values"):
            feeds[spec.name] = np.zeros((1, 2, 0, 16), np.float32)
    for session in (plain, recorded):
        session.load_adapter("one", adapter)
    runs = {name: recorded.bind(feeds, adapter=name, outputs=["logits"]) for name in ("one", None)}
    found = {name: [to_array(runs[name].run()["logits"]).copy() for _ in range(2)] for name in ("one", None, "one")}
    for name, arrays in found.items():
        expected = plain.run(feeds, adapter=name)["logits"]
        for array in arrays:
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found["one"][0] - found[None][0]).max() > 1e-2


@pytest.mark.gpu
def test_genai_records_each_generation_with_its_adapter(folder: Path, tmp_path: Path) -> None:
    """The builder's graph for CUDA, whose cache stays where it is."""
    options = ("--runtime", "genai", "--swappable", "--provider", "cuda", "--precision", "fp16", "--no-validate")
    written = run("onnx", folder / "adapter", "--output", tmp_path / "graph", *options)
    assert written.code == 0, written.stderr
    answers = {}
    for recorded in (False, True):
        model = GenaiModel.open(tmp_path / "graph", provider="cuda", cuda_graph=recorded)
        model.load_adapter("one", tmp_path / "graph" / "adapters" / "adapter.onnx_adapter")
        order = ("one", None, "one")
        answers[recorded] = [model.generate(PROMPT, max_new_tokens=NEW_TOKENS, adapter=each).tokens for each in order]
    assert answers[True] == answers[False]
    assert answers[True][0] == answers[True][2] != answers[True][1]
