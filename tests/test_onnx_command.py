"""`hra-export onnx` as a user runs it: what lies in the directory, what the runtime makes of it, how it ends."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hra_export import attach
from hra_export.adapter import HraAdapter, write_adapter
from hra_export.graph import operator, tracing
from hra_export.graph.document import open_graph, save_graph
from hra_export.graph.exporting import export_graph
from hra_export.graph.families import graph_specs
from hra_export.graph.grouped_operator import members
from hra_export.graph.provenance import declare_versions_
from hra_export.kernels.operator_library import VARIABLE
from tests.command_line import Outcome, run
from tests.tiny_models import VOCABULARY, build

RANK = 4
# Two float32 runs of one model differ by 3e-7 of its outputs; the adapters move these by a fiftieth and more.
EFFECT_ATOL = 1e-4
CLASSIFIER = "classifier"


@dataclass(frozen=True)
class Scene:
    """A folder with `base`, the adapters `first` and `second`, and the model they belong to."""

    folder: Path
    kind: str

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def adapter(self, name: str) -> Path:
        return self.folder / name

    def model(self) -> nn.Module:
        return build(self.kind)


def linears(model: nn.Module) -> dict[str, int]:
    """Module path → d, of every linear layer inside the blocks."""
    found = model.named_modules()
    return {path: module.in_features for path, module in found if isinstance(module, nn.Linear) and "layer" in path}


def put_adapter(scene: Scene, name: str, *, seed: int, rank: int = RANK, **more: Any) -> HraAdapter:
    random = torch.Generator().manual_seed(seed)
    chains = {path: torch.randn(d, rank, generator=random) for path, d in linears(scene.model()).items()}
    adapter = HraAdapter(chains, rank, **more)
    write_adapter(adapter, scene.adapter(name))
    return adapter


def made(folder: Path, kind: str) -> Scene:
    scene = Scene(folder, kind)
    scene.model().save_pretrained(scene.base)
    put_adapter(scene, "first", seed=1)
    put_adapter(scene, "second", seed=2, rank=6)
    return scene


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return made(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def reflect(bert: Scene) -> tuple[Scene, Outcome]:
    """One export that several tests look at."""
    outcome = run("onnx", bert.adapter("first"), "--base", bert.base, "-o", bert.folder / "out", "--mode", "reflect")
    return bert, outcome


def tokens() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (3, 11), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def logits_of(model: nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        result: np.ndarray[Any, Any] = model(**tokens()).logits.numpy()
    return result


def live_logits(scene: Scene, *names: str) -> np.ndarray[Any, Any]:
    """PyTorch with live layers, from the files."""
    from hra_export import read_adapter

    model = scene.model()
    attach(model, *(read_adapter(scene.adapter(name)) for name in names))
    return logits_of(model)


def run_graph(path: Path, **more: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Stock ONNX Runtime, without anything of ours."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    feeds = {name: value.numpy() for name, value in tokens().items() if name in known}
    result: np.ndarray[Any, Any] = session.run(["logits"], {**feeds, **more})[0]
    return result


def effect_error(candidate: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], scene: Scene) -> float:
    return float(np.linalg.norm(candidate - reference) / np.linalg.norm(reference - logits_of(scene.model())))


def test_reflect_ends_with_the_figures_of_its_own_validation(reflect: tuple[Scene, Outcome]) -> None:
    scene, outcome = reflect
    assert outcome.code == 0, outcome.stderr
    assert "model.onnx: text-classification" in outcome.stdout
    assert f"{len(linears(scene.model()))} reflections" in outcome.stdout
    assert outcome.stdout.rstrip().splitlines()[-1].startswith("parity holds: fp32 graph on `cpu`")


def test_reflect_computes_what_pytorch_computes(reflect: tuple[Scene, Outcome]) -> None:
    scene, _ = reflect
    assert (
        effect_error(run_graph(scene.folder / "out" / "model.onnx"), live_logits(scene, "first"), scene) < EFFECT_ATOL
    )


def test_reflect_keeps_the_base_s_weights_and_names_every_target(reflect: tuple[Scene, Outcome]) -> None:
    scene, _ = reflect
    model = open_graph(scene.folder / "out" / "model.onnx")
    joint = [[each.target for each in members(node)] for node in model.graph if members(node)]
    assert sorted(itertools.chain(*joint)) == sorted(linears(scene.model()))
    assert sum(len(targets) == 3 for targets in joint) == scene.model().config.num_hidden_layers  # query, key, value
    # Products hold Wᵀ, biases and embeddings their own shape.
    stored = {value.const_value.numpy().tobytes() for value in model.graph.initializers.values() if value.const_value}
    weights = [parameter.detach() for _, parameter in scene.model().named_parameters() if parameter.ndim == 2]
    held = [w.numpy().tobytes() in stored or w.T.contiguous().numpy().tobytes() in stored for w in weights]
    assert all(held)


def test_the_directory_is_complete_and_says_where_it_comes_from(reflect: tuple[Scene, Outcome]) -> None:
    scene, _ = reflect
    out = scene.folder / "out"
    assert {path.name for path in out.iterdir()} == {
        *("model.onnx", "model.onnx.data", "config.json", "README.md", "hra_export_manifest.json")
    }
    manifest = json.loads((out / "hra_export_manifest.json").read_text())
    assert manifest["kind"] == "onnx"
    assert (manifest["mode"], manifest["precision"], manifest["family"]) == ("reflect", "fp32", "encoder")
    (graph,) = manifest["graphs"]
    assert [each["name"] for each in graph["inputs"]][:2] == ["input_ids", "attention_mask"]
    assert graph["reflections"] == dict.fromkeys(linears(scene.model()), RANK)
    proto = onnx.load(out / "model.onnx", load_external_data=False)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert properties["hra.mode"] == "reflect"
    assert properties["hra.base"] == manifest["base"]["fingerprint"]
    text = (out / "model.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in text
    assert b"site-packages" not in text


def test_onnx_s_own_tools_accept_the_file(reflect: tuple[Scene, Outcome]) -> None:
    path = reflect[0].folder / "out" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes_path(str(path), str(path.with_suffix(".inferred")), strict_mode=True)
    path.with_suffix(".inferred").unlink()


def test_equal_inputs_make_equal_bytes(reflect: tuple[Scene, Outcome]) -> None:
    scene, _ = reflect
    again = scene.folder / "again"
    outcome = run(
        *("onnx", scene.adapter("first"), "--base", scene.base, "-o", again, "--mode", "reflect", "--no-validate")
    )
    assert outcome.code == 0, outcome.stderr
    first, second = (
        {path.name: path.read_bytes() for path in each.iterdir()} for each in (scene.folder / "out", again)
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_merged_adapters_compose_in_the_order_given(bert: Scene) -> None:
    out = bert.folder / "merged"
    adapters = (bert.adapter("first"), bert.adapter("second"))
    outcome = run("onnx", *adapters, "--base", bert.base, "-o", out, "--plain-ops", "--json", "--no-validate")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["options"]["mode"] == "merged"
    assert not [node for node in open_graph(out / "model.onnx").graph if node.domain == "hra"]
    logits = run_graph(out / "model.onnx")
    assert effect_error(logits, live_logits(bert, "first", "second"), bert) < EFFECT_ATOL
    assert effect_error(logits, live_logits(bert, "second", "first"), bert) > 0.1


def test_plain_operators_compute_the_same_without_a_function(bert: Scene) -> None:
    out = bert.folder / "plain"
    outcome = run(
        *("onnx", bert.adapter("first"), "--base", bert.base, "-o", out, "--mode", "reflect", "--plain-ops"),
        "--no-validate",
    )
    assert outcome.code == 0, outcome.stderr
    model = open_graph(out / "model.onnx")
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions
    assert effect_error(run_graph(out / "model.onnx"), live_logits(bert, "first"), bert) < EFFECT_ATOL


def test_a_trained_head_is_part_of_the_graph(bert: Scene) -> None:
    head = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    parameters = {f"{CLASSIFIER}.weight": head, f"{CLASSIFIER}.bias": torch.tensor([1.0, -2.0, 0.5])}
    put_adapter(bert, "headed", seed=4, parameters=parameters, modules_to_save=(CLASSIFIER,))
    out = bert.folder / "with-head"
    outcome = run("onnx", bert.adapter("headed"), "--base", bert.base, "-o", out, "--mode", "reflect", "--no-validate")
    assert outcome.code == 0, outcome.stderr
    assert effect_error(run_graph(out / "model.onnx"), live_logits(bert, "headed"), bert) < EFFECT_ATOL


def test_one_swappable_graph_serves_every_adapter_through_the_runtime_s_own_files(bert: Scene) -> None:
    out = bert.folder / "swappable"
    adapters = (bert.adapter("first"), bert.adapter("second"))
    outcome = run("onnx", *adapters, "--base", bert.base, "-o", out, "--swappable")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {value.name: tokens()[value.name].numpy() for value in session.get_inputs() if "hra" not in value.name}
    np.testing.assert_allclose(session.run(["logits"], feeds)[0], logits_of(bert.model()), rtol=0, atol=1e-6)
    for name in ("first", "second"):
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(out / "adapters" / f"{name}.onnx_adapter"))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        (logits,) = session.run(["logits"], feeds, options)
        assert effect_error(logits, live_logits(bert, name), bert) < EFFECT_ATOL


def test_a_swappable_graph_can_start_with_an_adapter(bert: Scene) -> None:
    out = bert.folder / "started"
    options = ("--swappable", "--default", "adapter", "--no-validate")
    outcome = run("onnx", bert.adapter("first"), "--base", bert.base, "-o", out, *options)
    assert outcome.code == 0, outcome.stderr
    assert effect_error(run_graph(out / "model.onnx"), live_logits(bert, "first"), bert) < EFFECT_ATOL


def test_each_row_of_a_batch_can_name_its_adapter(bert: Scene) -> None:
    out = bert.folder / "rows"
    adapters = (bert.adapter("first"), bert.adapter("second"))
    options = ("--per-row", "--default", "adapter", "--no-validate")
    outcome = run("onnx", *adapters, "--base", bert.base, "-o", out, *options)
    assert outcome.code == 0, outcome.stderr
    logits = run_graph(out / "model.onnx", adapter_index=np.array([2, 0, 1]))
    expected = [live_logits(bert, "second")[0], logits_of(bert.model())[1], live_logits(bert, "first")[2]]
    np.testing.assert_allclose(logits, np.stack(expected), rtol=0, atol=1e-6)


def test_a_chain_in_the_wrong_order_ends_with_parity_failed(bert: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    right = operator.operands

    def backwards(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        u, v = right(*arguments, **options)
        return v.T.contiguous(), u.T.contiguous()

    monkeypatch.setattr(tracing, "operands", backwards)
    out = bert.folder / "wrong"
    outcome = run("onnx", bert.adapter("first"), "--base", bert.base, "-o", out, "--mode", "reflect", "--json")
    assert outcome.code == 3
    assert outcome.json["validation"]["ok"] is False
    assert outcome.json["validation"]["findings"]


def test_dry_run_tells_the_plan_and_writes_nothing(bert: Scene) -> None:
    out = bert.folder / "dry"
    outcome = run("onnx", bert.adapter("first"), "--base", bert.base, "-o", out, "--mode", "reflect", "--dry-run")
    assert outcome.code == 0
    assert f"an operator before each of {len(linears(bert.model()))} targets" in outcome.stdout
    assert not out.exists()


def test_an_operator_library_that_cannot_be_used_is_told_before_the_export(
    bert: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison at the end would meet it, when the output is there already."""
    monkeypatch.setenv(VARIABLE, str(bert.folder / "none.so"))
    out = bert.folder / "unused"
    outcome = run("onnx", bert.adapter("first"), "--base", bert.base, "-o", out)
    assert outcome.code == 4
    assert "no such operator library" in outcome.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--swappable", "--mode", "merged"), "no adapter to swap"),
        (("--per-row", "--runtime", "genai"), "one adapter"),
        (("--block-size", "48"), "power of two"),
        (("--opset", "16"), "--opset"),
        (("--precision", "int2"), "--precision"),
    ],
)
def test_wishes_that_exclude_each_other_are_a_matter_of_usage(bert: Scene, options: tuple[str, ...], says: str) -> None:
    outcome = run("onnx", bert.adapter("first"), "--base", bert.base, "-o", bert.folder / "usage", *options)
    assert outcome.code == 2
    assert says in outcome.stderr
    assert not (bert.folder / "usage").exists()


# Bases that are graphs already.


@pytest.fixture(scope="module")
def base_graph(bert: Scene) -> Path:
    """The base alone, as somebody exported it."""
    (spec,) = graph_specs(bert.model())
    model = export_graph(spec)
    declare_versions_(model)
    folder = bert.folder / "exported"
    folder.mkdir()
    save_graph(model, folder, "base")
    (folder / "special_tokens_map.json").write_text("{}")
    return folder / "base.onnx"


def test_reflections_are_inserted_into_a_graph_of_the_base(bert: Scene, base_graph: Path) -> None:
    before = base_graph.read_bytes()
    out = bert.folder / "inserted"
    outcome = run("onnx", bert.adapter("first"), "--base", base_graph, "-o", out, "--mode", "reflect")
    assert outcome.code == 0, outcome.stderr
    assert "hra-export validate" in outcome.stderr  # there is no PyTorch model to compare with
    assert effect_error(run_graph(out / "model.onnx"), live_logits(bert, "first"), bert) < EFFECT_ATOL
    assert base_graph.read_bytes() == before
    assert (out / "special_tokens_map.json").exists()
    judged = run("validate", bert.adapter("first"), "--base", bert.base, "--candidate", out)
    assert judged.code == 0, judged.stdout + judged.stderr


def test_a_graph_of_the_base_can_be_made_swappable(bert: Scene, base_graph: Path) -> None:
    out = bert.folder / "inserted-swappable"
    outcome = run("onnx", bert.adapter("second"), "--base", base_graph.parent, "-o", out, "--swappable")
    assert outcome.code == 0, outcome.stderr
    np.testing.assert_allclose(run_graph(out / "model.onnx"), logits_of(bert.model()), rtol=0, atol=1e-6)
    assert (out / "adapters" / "second.onnx_adapter").exists()
