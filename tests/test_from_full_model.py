"""A fine-tuned model → HRA: what was merged comes back, and nothing that changed is left behind."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hra_export.adapter import HraAdapter, read_adapter
from hra_export.attachment import attach
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.converted import ConvertReport
from hra_export.errors import HraExportError
from hra_export.merge import merge_checkpoint
from hra_export.planning import plan_merge
from hra_export.registry import load_converter
from tests import synthetic, tiny_models
from tests.refusals import Refusals

# The merged weights are float32: ΔW is a fifth of W, and W is known to 1e-7.
RECOVERED = 1e-5
# float32 outputs of tiny models: sums in another order.
SAME_OUTPUT = 1e-5
RANK = 4
NORM, Q = "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj"


@dataclass
class Scene:
    """A base, and what its fine-tuned copy will hold instead."""

    folder: Path
    changes: dict[str, Tensor] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Checkpoint:
        return open_checkpoint(self.folder / "base")

    @property
    def tuned(self) -> Path:
        return self.folder / "tuned"

    def write(self) -> Path:
        if self.tuned.exists():
            shutil.rmtree(self.tuned)
        shutil.copytree(self.folder / "base", self.tuned)
        path = self.tuned / "model.safetensors"
        tensors = {key: value for key, value in load_file(path).items() if key not in self.removed}
        tensors |= {key: value.contiguous().clone() for key, value in self.changes.items()}
        save_file(tensors, path, metadata={"format": "pt"})
        config = json.loads((self.tuned / "config.json").read_text())
        synthetic.write_json(self.tuned / "config.json", {**config, **self.config})
        return self.tuned

    def convert(self, **options: Any) -> tuple[HraAdapter, ConvertReport]:
        convert = load_converter("from_full_model").convert
        report = convert(self.write(), self.folder / "hra", base=self.base, **{"rank": RANK, **self.options, **options})
        return read_adapter(self.folder / "hra"), report


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def rotated(weight: Tensor, *, seed: int = 0) -> Tensor:
    """W times a small rotation of two planes."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(2, weight.shape[1], 2, dtype=torch.float64, generator=generator)
    turn = torch.linalg.matrix_exp(0.01 * (half[0] @ half[1].T - half[1] @ half[0].T))
    return (weight.double() @ turn).to(weight.dtype)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A tiny llama of random weights, one matrix of which is rotated."""
    synthetic.write_base(tmp_path / "base", synthetic.toy_tensors(dtype="F32"))
    weights = weights_of(tmp_path / "base")
    return Scene(tmp_path, {f"{Q}.weight": rotated(weights[f"{Q}.weight"])})


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return tiny_models.scores(model.eval()(**inputs))


def live(name: str, base: Path, adapter: HraAdapter) -> nn.Module:
    """The base with the adapter's layers in it."""
    model_class: Any = type(tiny_models.build(name))
    model: nn.Module = model_class.from_pretrained(base)
    attach(model, adapter)
    return model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt-neox", "bert", "t5", "vit", "unet"])
def test_merged_model_becomes_its_adapter_again(name: str, tmp_path: Path) -> None:
    """The chains that were folded in come back from the two models, and the outputs with them."""
    model: Any = tiny_models.build(name)
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    chains = {}
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.Linear | nn.Conv2d)
            and min(module.weight.flatten(1).shape) > RANK
            and "head" not in path
        ):
            half = torch.randn(module.weight[0].numel(), RANK // 2, generator=generator).repeat_interleave(2, dim=1)
            chains[path] = half + 0.2 * torch.randn(half.shape, generator=generator)
    base = open_checkpoint(tmp_path / "base")
    merge_checkpoint(plan_merge(base, [HraAdapter(chains, rank=RANK)]), tmp_path / "merged")
    report = load_converter("from_full_model").convert(tmp_path / "merged", tmp_path / "hra", base=base, rank=RANK)
    assert report.error < RECOVERED
    assert {target.module for target in report.targets} == set(chains)
    inputs = tiny_models.MODELS[name].inputs()
    merged = outputs(type(model).from_pretrained(tmp_path / "merged"), inputs)
    adapted = outputs(live(name, tmp_path / "base", read_adapter(tmp_path / "hra")), inputs)
    effect = torch.linalg.vector_norm(merged - outputs(model, inputs))
    assert float(torch.linalg.vector_norm(adapted - merged) / effect) < 1e-3  # of the adapter's own effect


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert", "opt", "mixtral"])
def test_everything_that_changed_is_in_the_adapter(name: str, tmp_path: Path) -> None:
    """Matrices turn; norms, biases, embeddings and heads change in ways of their own. Merged, the adapter is that."""
    model: Any = tiny_models.build(name)
    model.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    generator = torch.Generator().manual_seed(2)
    tensors = weights_of(tmp_path / "base")
    for i, (path, value) in enumerate(tensors.items()):
        is_matrix = value.ndim == 2 and not any(word in path for word in ("embed", "head", "classifier"))
        noise = 0.1 * torch.randn(value.shape, generator=generator)
        tensors[path] = rotated(value, seed=i) if is_matrix else value + noise
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    base = open_checkpoint(tmp_path / "base")
    report = load_converter("from_full_model").convert(tmp_path / "tuned", tmp_path / "hra", base=base, rank=RANK)
    assert report.error < RECOVERED
    assert any("kept whole" in note for note in report.notes)
    merge_checkpoint(plan_merge(base, [read_adapter(tmp_path / "hra")]), tmp_path / "merged")
    inputs = tiny_models.MODELS[name].inputs()
    tuned, again = (type(model).from_pretrained(tmp_path / folder) for folder in ("tuned", "merged"))
    torch.testing.assert_close(outputs(again, inputs), outputs(tuned, inputs), atol=SAME_OUTPUT, rtol=0)


def test_new_head_is_kept_whole(tmp_path: Path) -> None:
    """A classifier that the pretrained base never had."""
    model: Any = tiny_models.build("bert")
    model.bert.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        weight = model.bert.encoder.layer[0].output.dense.weight
        weight.copy_(rotated(weight))
    model.save_pretrained(tmp_path / "tuned")
    base = open_checkpoint(tmp_path / "base")
    load_converter("from_full_model").convert(tmp_path / "tuned", tmp_path / "hra", base=base, rank=RANK)
    adapter = read_adapter(tmp_path / "hra")
    assert list(adapter.chains) == ["bert.encoder.layer.0.output.dense"]
    assert adapter.modules_to_save == ("classifier",)
    merge_checkpoint(plan_merge(base, [adapter]), tmp_path / "merged")
    inputs = tiny_models.MODELS["bert"].inputs()
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(again, inputs), outputs(model, inputs), atol=SAME_OUTPUT, rtol=0)


def test_only_what_changed_gets_a_chain(scene: Scene) -> None:
    adapter, report = scene.convert()
    assert list(adapter.chains) == [Q]
    assert not adapter.parameters
    assert report.error < RECOVERED


def test_norm_is_kept_whole_and_named(scene: Scene) -> None:
    scene.changes[f"{NORM}.weight"] = torch.full((32,), 2.0)
    adapter, report = scene.convert()
    assert adapter.modules_to_save == (NORM,)
    assert torch.equal(adapter.parameters[f"{NORM}.weight"], scene.changes[f"{NORM}.weight"])
    assert any(f"`{NORM}`" in note for note in report.notes)


def test_matrix_with_few_rows_is_kept_whole(scene: Scene) -> None:
    """As many reflections as rows are no smaller than the rows."""
    scene.options = {"rank": 32}
    other = "model.layers.0.mlp.up_proj"
    scene.changes[f"{other}.weight"] = rotated(weights_of(scene.folder / "base")[f"{other}.weight"])
    adapter, _ = scene.convert()
    assert list(adapter.chains) == [other]
    assert adapter.modules_to_save == (Q,)


def test_targets_may_be_chosen(scene: Scene) -> None:
    """What is not chosen is kept whole, an embedding that is chosen turns."""
    weights = weights_of(scene.folder / "base")
    scene.changes["model.embed_tokens.weight"] = rotated(weights["model.embed_tokens.weight"])
    scene.options = {"targets": ["embed_tokens"]}
    adapter, report = scene.convert()
    assert list(adapter.chains) == ["model.embed_tokens"]
    assert adapter.modules_to_save == (Q,)
    assert report.error < RECOVERED


def test_model_that_was_only_rounded_is_the_base(scene: Scene) -> None:
    """A bfloat16 copy of a float32 base: every value differs, and nothing changed but the one that was turned."""
    rounded = {key: value.bfloat16() for key, value in weights_of(scene.folder / "base").items()}
    scene.changes = {**rounded, **{key: value.bfloat16() for key, value in scene.changes.items()}}
    adapter, report = scene.convert()
    assert list(adapter.chains) == [Q]
    assert RECOVERED < report.error < 0.2  # what bfloat16 costs of a ΔW a fifth of W


def test_large_weights_are_read_by_every_product(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chain comes of weights that are not held."""
    monkeypatch.setattr("hra_export.nearest.chains.HELD_ELEMENTS", 0)
    _, report = scene.convert()
    assert report.error < RECOVERED


def test_equal_inputs_give_equal_bytes(scene: Scene) -> None:
    scene.convert()
    first = synthetic.read_tree(scene.folder / "hra")
    scene.convert(overwrite=True)
    assert synthetic.read_tree(scene.folder / "hra") == first


refused = Refusals[Scene]()


@refused(4, "no matrix", "is this the base itself?")
def nothing_changed(scene: Scene) -> None:
    scene.changes = {}


@refused(4, "no matrix", f"{NORM}: changed, and would be kept whole")
def only_a_norm(scene: Scene) -> None:
    scene.changes = {f"{NORM}.weight": torch.full((32,), 2.0)}


@refused(4, "other shapes", f"{Q}.weight: expected shape (32, 32), got (32, 48)", f"{NORM}.weight")
def other_sizes(scene: Scene) -> None:
    scene.changes = {f"{Q}.weight": torch.ones(32, 48), f"{NORM}.weight": torch.ones(48)}


@refused(4, "model_type", "`qwen2`", "`llama`")
def other_architecture(scene: Scene) -> None:
    scene.config = {"model_type": "qwen2"}


@refused(8, "quantized", "gptq")
def quantized(scene: Scene) -> None:
    scene.config = {"quantization_config": {"quant_method": "gptq"}}


@refused(8, "belong to no module", "scale")
def bare_parameter(scene: Scene) -> None:
    scene.changes["scale"] = torch.ones(3)


@refused(4, "nowhere", "no such module")
def unknown_target(scene: Scene) -> None:
    scene.options = {"targets": ["q_proj", "nowhere"]}


@refused(4, "33 reflections, but 32 features")
def more_reflections_than_features(scene: Scene) -> None:
    scene.options = {"targets": ["q_proj"], "rank": 33}


@refused(5, "NaN or Inf")
def not_finite(scene: Scene) -> None:
    scene.changes[f"{Q}.weight"][0, 0] = float("inf")


@pytest.mark.parametrize("case", refused.cases, ids=lambda case: case.damage.__name__)
def test_bad_input_is_refused_and_nothing_is_written(scene: Scene, case: Any) -> None:
    case.damage(scene)
    with pytest.raises(HraExportError) as caught:
        scene.convert()
    assert caught.value.exit_code == case.code
    assert [words for words in case.says if words not in str(caught.value)] == []
    assert not (scene.folder / "hra").exists()


def adapter_directory(scene: Scene) -> Path:
    scene.convert()
    return scene.folder / "hra"


def empty_directory(scene: Scene) -> Path:
    (scene.folder / "empty").mkdir()
    return scene.folder / "empty"


@pytest.mark.parametrize(
    ("make", "says"), [(adapter_directory, "--from lora"), (empty_directory, "has no model.safetensors")]
)
def test_directory_that_is_no_model_is_refused(scene: Scene, make: Callable[[Scene], Path], says: str) -> None:
    with pytest.raises(HraExportError, match=says) as caught:
        load_converter("from_full_model").plan(make(scene), base=scene.base, rank=RANK)
    assert caught.value.exit_code == 4


def test_missing_tensors_of_the_base_are_told(scene: Scene) -> None:
    scene.removed = ["lm_head.weight"]
    _, report = scene.convert()
    assert any("`lm_head.weight`" in note and "stay as they are" in note for note in report.notes)
