"""From a model to graphs: every family, against PyTorch with live layers, at sizes that were not traced."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from torch import nn

from hra_export import attach
from hra_export.adapter import HraAdapter
from hra_export.errors import GraphError, UnsupportedModelError
from hra_export.graph import exporting, operator
from hra_export.graph.exporting import export_graph
from hra_export.graph.families import FAMILIES, graph_specs
from hra_export.graph.labelling import check_reflections
from hra_export.graph.provenance import NAME_SCOPES
from hra_export.graph.tracing import make_traceable_
from tests.graph_effect import Case, candidate, effect_error
from tests.graph_scene import BUILDERS, Scene, make_scene
from tests.tiny_models import build

# Both sides compute in float32, in another order: 1e-6 of the effect, measured. A target that is missing costs 1e-2.
EFFECT = 1e-4
MERGED = ("bert-tokens", "qwen2", "gpt2")
ONE_RUN = (
    Case(1, (1,)),
    Case(2, (7,), "right"),
    Case(3, (33,), "left"),
    Case(3, (2,), "left"),
)
THROUGH_CACHE = (
    Case(1, (7, 1, 1)),
    Case(3, (7, 2, 1), "left"),
    Case(2, (33, 1), "right"),
    Case(2, (1, 1, 5)),
)


SCENES = [
    *BUILDERS,
    *(f"{name}, merged" for name in MERGED),
    *(pytest.param(f"{name}, merged", marks=pytest.mark.slow) for name in BUILDERS if name not in MERGED),
]


@pytest.fixture(scope="module", params=SCENES)
def scene(request: pytest.FixtureRequest) -> Scene:
    name, _, mode = request.param.partition(", ")
    return make_scene(name, mode=mode or "reflect")


@pytest.fixture(scope="module")
def folder(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(scene.name)


@pytest.fixture(scope="module")
def bert() -> Scene:
    return make_scene("bert-tokens")


@pytest.mark.parametrize("optimized", [False, True], ids=["as written", "optimized"])
def test_export_graph_has_the_effect_of_live_layers(scene: Scene, folder: Path, optimized: bool) -> None:
    """Batches, lengths, pasts and paddings that were not traced."""
    graphs = candidate(scene, folder, optimized=optimized)
    for case in THROUGH_CACHE if scene.family == "decoder" else ONE_RUN:
        errors = effect_error(scene, graphs, case)
        assert max(errors.values()) <= EFFECT, (case, errors)


def test_export_graph_is_sound(scene: Scene, folder: Path) -> None:
    """The checker and strict shape inference accept it; no path of this machine is in it."""
    candidate(scene, folder, optimized=False)
    for spec in scene.specs:
        path = folder / f"{spec.name}.onnx"
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        assert b"site-packages" not in path.read_bytes()
        assert b"/hra_export/" not in path.read_bytes()
        assert [value.name for value in model.graph.output] == list(spec.outputs)
        for value, port in zip(model.graph.input, spec.inputs, strict=True):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert (value.name, dims) == (port.name, list(port.axes))


def test_export_graph_keeps_every_target_by_name(scene: Scene) -> None:
    """Nodes `<target>/hra` with operands `<target>.hra_U` and `.hra_V`; a convolution's kernels `.hra_A`, `.hra_B`."""
    if not any(operator.is_reflection(node) for graph in scene.graphs.values() for node in graph.graph):
        return  # merged
    check_reflections(list(scene.graphs.values()), scene.targets)
    for graph in scene.graphs.values():
        names = [node.name for node in graph.graph]
        assert len(set(names)) == len(names)
        for node in filter(operator.is_reflection, graph.graph):
            target = str(node.name).split("/hra")[0]
            assert [value and value.name for value in node.inputs[1:]] == [f"{target}.hra_U", f"{target}.hra_V"]
            assert target in node.metadata_props[NAME_SCOPES]


def test_export_graph_runs_in_the_reference_evaluator(bert: Scene, tmp_path: Path) -> None:
    candidate(bert, tmp_path, optimized=False)
    evaluator = onnx.reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    ids = torch.arange(6, 21).reshape(3, 5)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    (logits,) = evaluator.run(None, {name: value.numpy() for name, value in feeds.items()})
    with torch.no_grad():
        expected = bert.live(**feeds).logits
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-5)


def test_effect_error_sees_a_target_that_does_nothing(bert: Scene, tmp_path: Path) -> None:
    """What the comparisons above would say of a graph that lost one of its chains."""
    (graph,) = bert.graphs.values()
    operand = graph.graph.initializers["bert.encoder.layer.0.attention.self.key.hra_V"]
    kept = operand.const_value
    assert kept is not None
    operand.const_value = ir.tensor(np.zeros_like(kept.numpy()), name=operand.name)
    try:
        errors = effect_error(bert, candidate(bert, tmp_path, optimized=False), ONE_RUN[1])
    finally:
        operand.const_value = kept
    assert max(errors.values()) > 10 * EFFECT


def test_export_graph_keeps_targets_apart_when_their_chains_are_equal() -> None:
    """Optimizers merge equal constants, and then equal nodes: q, k and v of an untrained adapter."""
    model = BUILDERS["bert-tokens"]()
    chain = torch.ones(32, 2)
    targets = [f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")]
    make_traceable_(attach(model, HraAdapter(dict.fromkeys(targets, chain), 2)))
    before = {name: buffer for name, buffer in model.named_buffers() if ".hra_" in name}
    (spec,) = graph_specs(model)
    graph = export_graph(spec)
    check_reflections([graph], targets)
    for name, buffer in before.items():
        assert model.get_buffer(name) is buffer
        np.testing.assert_array_equal(graph.graph.initializers[name].const_value.numpy(), buffer)


def test_export_graph_writes_the_same_bytes_again(bert: Scene, tmp_path: Path) -> None:
    again = make_scene("bert-tokens")
    for name, one in (("first", bert), ("second", again)):
        (tmp_path / name).mkdir()
        candidate(one, tmp_path / name, optimized=False)
    assert (tmp_path / "first/model.onnx").read_bytes() == (tmp_path / "second/model.onnx").read_bytes()


@pytest.mark.parametrize("fusions", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["bert-tokens", "qwen2"])
def test_export_graph_keeps_targets_under_the_runtimes_own_operators(
    name: str, fusions: exporting.Fusions, tmp_path: Path
) -> None:
    fused = make_scene(name, fusions=fusions)
    (graph,) = fused.graphs.values()
    assert any(node.domain == "com.microsoft" for node in graph.graph)
    check_reflections([graph], fused.targets)
    graphs = candidate(fused, tmp_path, optimized=True)
    for case in THROUGH_CACHE if fused.family == "decoder" else ONE_RUN:
        assert max(effect_error(fused, graphs, case).values()) <= EFFECT, case


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_export_graph_declares_the_opset_asked_for(opset: int, tmp_path: Path) -> None:
    other = make_scene("roberta", opset=opset)
    (graph,) = other.graphs.values()
    assert graph.graph.opset_imports[""] == opset
    assert max(effect_error(other, candidate(other, tmp_path, optimized=False), ONE_RUN[2]).values()) <= EFFECT


def test_export_graph_neither_prints_nor_logs(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = build("vit")
    levels = {name: logging.getLogger(name).level for name in exporting.CHATTY}
    (spec,) = graph_specs(model)
    export_graph(spec)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert levels == {name: logging.getLogger(name).level for name in exporting.CHATTY}


def test_export_graph_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    before = dict(vars(model))
    graph_specs(model)
    assert vars(model) == before


@pytest.mark.parametrize(("option", "value"), [("opset", 16), ("opset", 26), ("fusions", "tpu")])
def test_export_graph_refuses_settings_that_give_no_usable_graph(option: str, value: Any) -> None:
    (spec,) = graph_specs(build("vit"))
    with pytest.raises(ValueError, match=option):
        export_graph(spec, **{option: value})


def test_export_graph_says_which_operator_it_has_no_translation_for() -> None:
    (spec,) = graph_specs(build("vit"))

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": torch.linalg.eigvalsh(inputs["pixel_values"])}

    spec.module.forward = forward
    with pytest.raises(UnsupportedModelError, match="ViTForImageClassification: torch cannot trace `model`") as caught:
        export_graph(spec)
    assert caught.value.exit_code == 8
    assert "No ONNX function found for <OpOverload(op='aten._linalg_eigh'" in caught.value.findings[-1]


def test_export_graph_refuses_an_exporter_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.exporters import exporter_onnx

    (spec,) = graph_specs(build("vit"))
    monkeypatch.setattr(exporter_onnx, "OnnxConfig", Case)
    with pytest.raises(UnsupportedModelError, match="another ONNX exporter") as caught:
        export_graph(spec)
    assert "OnnxConfig: no setting `dynamic_shapes`" in caught.value.findings


def test_export_graph_names_axes_that_did_not_stay_free() -> None:
    (spec,) = graph_specs(build("vit"))

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": inputs["pixel_values"] + torch.ones(2, 1, 1, 1)}

    spec.module.forward = forward
    with pytest.raises(UnsupportedModelError, match="some sizes only") as caught:
        export_graph(spec)
    assert caught.value.findings == ("pixel_values: expected `batch` to be free, got 2",)


def test_check_reflections_names_all_that_is_missing_and_all_that_is_too_much(bert: Scene) -> None:
    (graph,) = bert.graphs.values()
    targets = [*bert.targets[2:], "bert.encoder.layer.7.output.dense"]
    with pytest.raises(GraphError) as caught:
        check_reflections([graph], targets)
    assert [finding.split(":")[0] for finding in caught.value.findings] == [targets[-1], *sorted(bert.targets[:2])]


def _unknown() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1))


def _headless() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=96, **sizes))


def _conditioned() -> nn.Module:
    model = build("unet")
    model.register_to_config(class_embed_type="timestep")
    return model


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (_unknown, "no ONNX graph is known for `mamba`"),
        (_headless, "LlamaModel: expected a causal language model"),
        (_conditioned, "class_embed_type: expected None, got 'timestep'"),
        (lambda: nn.Linear(2, 2), "no ONNX graph is known for `Linear`"),
    ],
    ids=["family", "head", "conditions", "no transformer"],
)
def test_graph_specs_refuses_what_it_has_no_graph_for(made: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        graph_specs(made().eval())
    assert message in str(caught.value)


def test_graph_specs_refuses_a_model_for_another_task() -> None:
    with pytest.raises(UnsupportedModelError, match="expected a model for fill-mask, got one for text-classification"):
        graph_specs(build("bert"), task="fill-mask")


def test_graph_specs_refuses_a_model_in_training_mode() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        graph_specs(build("vit").train())


def test_every_family_is_in_the_tests() -> None:
    kinds = {getattr(model.config, "model_type", type(model).__name__) for model in _all_models()}
    assert kinds >= set(FAMILIES)


def _all_models() -> Iterator[nn.Module]:
    for made in BUILDERS.values():
        yield made()
