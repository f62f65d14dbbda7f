"""LoRA → HRA: chains that were made into LoRA come back, other LoRAs come as near as is said, bad input is refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hra_export.adapter import HraAdapter, read_adapter
from hra_export.checkpoint import MANIFEST_NAME, Checkpoint, open_checkpoint
from hra_export.converted import ConvertReport
from hra_export.errors import HraExportError
from hra_export.householder import compact_wy, low_rank_factors
from hra_export.low_rank import HraSource
from hra_export.registry import load_converter
from tests import synthetic
from tests.refusals import Refusals

# Factors and vectors are rounded to float32, and the pairs of these chains stand at angles of a tenth and more.
RECOVERED = 5e-6
RANK = 4
PREFIX = "base_model.model."
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@dataclass
class Scene:
    """A LoRA directory before it is written: what is to be ΔW, and the configuration."""

    folder: Path
    base: Checkpoint
    factors: dict[str, tuple[Tensor, Tensor]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rank: int = RANK

    @property
    def source(self) -> Path:
        return self.folder / "lora"

    def write(self) -> Path:
        """`tensors` wins over what the factors give."""
        self.source.mkdir(exist_ok=True)
        stored = {}
        for module, (left, right) in self.factors.items():
            stored[f"{PREFIX}{module}.lora_A.weight"], stored[f"{PREFIX}{module}.lora_B.weight"] = right, left
        stored |= {PREFIX + name: value for name, value in self.tensors.items()}
        save_file(
            {key: value.contiguous().clone() for key, value in stored.items()},
            self.source / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "modules_to_save": None}
        synthetic.write_json(self.source / "adapter_config.json", {**config, **self.config})
        return self.source

    def convert(self, **options: Any) -> tuple[HraAdapter, ConvertReport]:
        output = self.folder / "hra"
        convert = load_converter("from_lora").convert
        report = convert(self.write(), output, base=self.base, **{"rank": self.rank, **options})
        return read_adapter(output), report


def chain(d: int, *, rank: int = RANK, seed: int = 0) -> Tensor:
    """Unit-sized vectors whose pairs stand at about half a radian."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(d, (rank + 1) // 2, generator=generator).repeat_interleave(2, dim=1)[:, :rank]
    return half + 0.4 * torch.randn(d, rank, generator=generator)


def explicit_chain(vectors: Tensor) -> Tensor:
    """H_1 H_2 … in float64, one dense reflection after the other."""
    product = torch.eye(vectors.shape[0], dtype=torch.float64)
    for u in vectors.double().T:
        product = product - 2 * torch.outer(product @ u, u) / (u @ u)
    return product


def factors_of(weight: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """B and A, float32, of W R − W."""
    left, right = low_rank_factors(weight.double(), compact_wy(vectors))
    return left.float(), right.float()


def miss(weight: Tensor, delta: Tensor, vectors: Tensor) -> float:
    """‖W R − W − ΔW‖ / ‖ΔW‖ by dense matrices."""
    moved = weight.double() @ explicit_chain(vectors) - weight.double()
    return float(torch.linalg.matrix_norm(moved - delta) / torch.linalg.matrix_norm(delta))


def weights_of(base: Checkpoint) -> dict[str, Tensor]:
    return {name: value for file in base.files for name, value in load_file(file.path).items()}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A LoRA on two layers of a tiny llama, made of chains."""
    base = open_checkpoint(synthetic.write_base(tmp_path / "base", synthetic.toy_tensors(dtype="F32")))
    weights = weights_of(base)
    factors = {
        module: factors_of(weights[f"{module}.weight"], chain(weights[f"{module}.weight"].shape[1], seed=i))
        for i, module in enumerate((Q, UP))
    }
    return Scene(tmp_path, base, factors)


def assert_recovered(scene: Scene, adapter: HraAdapter, report: ConvertReport) -> None:
    weights = weights_of(scene.base)
    for module, vectors in adapter.chains.items():
        weight = weights[f"{module}.weight"]
        expected = explicit_chain(chain(weight.shape[1], seed=list(scene.factors).index(module)))
        assert miss(weight, weight.double() @ expected - weight, vectors) < RECOVERED
    assert report.error < RECOVERED
    assert set(adapter.chains) == {each.module for each in report.targets} == set(scene.factors)


def test_lora_made_of_chains_comes_back(scene: Scene) -> None:
    adapter, report = scene.convert()
    assert_recovered(scene, adapter, report)
    assert adapter.rank == RANK


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 16}, {Q: 4, UP: 4}),
        ({"lora_alpha": 3, "use_rslora": True}, {Q: 1.5, UP: 1.5}),
        ({"alpha_pattern": {"q_proj": 12}}, {Q: 3, UP: 1}),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 12, "up_proj": 400}}, {Q: 1, UP: 3}),
        ({"alpha_pattern": {f"^{UP}": 12, "^q_proj": 400}}, {Q: 1, UP: 3}),
        ({"alpha_pattern": {"oj": 400, "self_attn": 400}}, {Q: 1, UP: 1}),
    ],
    ids=["alpha", "rslora", "end of a name", "first match", "tied to the start", "no part of a name"],
)
def test_scaling_is_that_of_peft(scene: Scene, config: dict[str, Any], scaling: Mapping[str, float]) -> None:
    """ΔW is a rotation only with the right factor in front."""
    scene.config = config
    scene.factors = {module: (left / scaling[module], right) for module, (left, right) in scene.factors.items()}
    adapter, report = scene.convert()
    assert_recovered(scene, adapter, report)


def test_ranks_of_the_source_may_differ(scene: Scene) -> None:
    weight = weights_of(scene.base)[f"{UP}.weight"]
    scene.factors[UP] = factors_of(weight, chain(weight.shape[1], rank=6, seed=1))
    scene.config = {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"up_proj": 6}}
    adapter, report = scene.convert(rank=6)
    assert report.error < RECOVERED
    assert {vectors.shape[1] for vectors in adapter.chains.values()} == {6}


def test_odd_chains_come_back_at_an_odd_rank(scene: Scene) -> None:
    weights = weights_of(scene.base)
    scene.factors = {
        module: factors_of(weights[f"{module}.weight"], chain(weights[f"{module}.weight"].shape[1], rank=3, seed=i))
        for i, module in enumerate((Q, UP))
    }
    scene.config = {"r": 3, "lora_alpha": 3}
    _, report = scene.convert(rank=3)
    assert report.error < RECOVERED


def test_convolution_and_conv1d_and_embedding(tmp_path: Path) -> None:
    """A convolution's A carries its kernel; Conv1D stores (d, o); an embedding's factors change places."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40)).save_pretrained(tmp_path / "gpt2")
    base = open_checkpoint(tmp_path / "gpt2")
    weights = weights_of(base)
    attention, embedding = "transformer.h.0.attn.c_attn", "transformer.wte"
    scene = Scene(tmp_path, base, {attention: factors_of(weights[f"{attention}.weight"].T, chain(16))})
    left, right = factors_of(weights[f"{embedding}.weight"], chain(16, seed=1))
    scene.tensors = {f"{embedding}.lora_embedding_A": left.T, f"{embedding}.lora_embedding_B": right.T}
    scene.config = {"fan_in_fan_out": True}
    adapter, report = scene.convert()
    assert report.error < RECOVERED
    assert adapter.chains[embedding].shape == adapter.chains[attention].shape == (16, RANK)
    assert any("stock PEFT" in note for note in report.notes)

    synthetic.write_base(tmp_path / "conv", {"conv.weight": synthetic.random_tensor(6, 3, 3, 2)}, config={})
    scene = Scene(tmp_path / "2", open_checkpoint(tmp_path / "conv"), {})
    scene.folder.mkdir()
    left, right = factors_of(weights_of(scene.base)["conv.weight"].flatten(1), chain(18))
    scene.factors = {"conv": (left[:, :, None, None], right.reshape(RANK, 3, 3, 2))}
    adapter, report = scene.convert()
    assert report.error < RECOVERED
    assert adapter.chains["conv"].shape == (18, RANK)


def test_distances_of_any_lora_are_those_of_dense_matrices(scene: Scene) -> None:
    """No rotation is such a LoRA; what is said about it holds, in the report and in the manifest."""
    generator = torch.Generator().manual_seed(7)
    scene.factors = {
        module: (
            torch.randn(left.shape, generator=generator) * 0.1,
            torch.randn(right.shape, generator=generator) * 0.1,
        )
        for module, (left, right) in scene.factors.items()
    }
    adapter, report = scene.convert()
    weights, missed = weights_of(scene.base), 0.0
    manifest = json.loads((scene.folder / "hra" / "hra_export_manifest.json").read_text())
    for target in report.targets:
        weight, (left, right) = weights[f"{target.module}.weight"].double(), scene.factors[target.module]
        delta = left.double() @ right.double()
        assert target.error == pytest.approx(miss(weight, delta, adapter.chains[target.module]), rel=1e-5)
        assert target.delta_norm == pytest.approx(float(torch.linalg.matrix_norm(delta)), rel=1e-6)
        nearest = torch.linalg.svd(weight.T @ (weight + delta))
        floor = torch.linalg.matrix_norm(weight @ (nearest.U @ nearest.Vh) - weight - delta) / target.delta_norm
        assert manifest["targets"][target.module]["floor"] == pytest.approx(float(floor), rel=1e-5)
        assert float(floor) < target.error < 1
        missed += (float(floor) * target.delta_norm) ** 2
    total = math.sqrt(missed) / report.delta_norm
    assert manifest["totals"]["floor"] == pytest.approx(total, rel=1e-5)
    assert any(f"{total:.2g} of it" in note and f"{report.error:.2g}" in note for note in report.notes)


def test_more_reflections_leave_less(scene: Scene) -> None:
    scene.factors = {module: (left, torch.flip(right, [1])) for module, (left, right) in scene.factors.items()}
    errors = [scene.convert(rank=rank, overwrite=True)[1].error for rank in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_what_was_trained_beside_the_factors_is_carried(scene: Scene) -> None:
    bias, norm, head = torch.randn(32), torch.randn(32), torch.randn(96, 32)
    scene.tensors = {f"{Q}.base_layer.bias": bias, "model.norm.weight": norm, "lm_head.weight": head}
    scene.config = {"bias": "lora_only", "modules_to_save": ["norm", "lm_head"], "task_type": "CAUSAL_LM"}
    scene.write()
    (scene.source / "tokenizer.json").write_text("{}")
    adapter, _ = scene.convert()
    assert (scene.folder / "hra" / "tokenizer.json").read_text() == "{}"
    assert adapter.bias == "hra_only"
    assert adapter.modules_to_save == ("norm", "lm_head")
    assert adapter.task == "CAUSAL_LM"
    assert adapter.parameters.keys() == {f"{Q}.bias", "model.norm.weight", "lm_head.weight"}
    assert torch.equal(adapter.parameters[f"{Q}.bias"], bias)


def test_untrained_targets_keep_chains_that_cancel(scene: Scene) -> None:
    left, right = scene.factors[Q]
    scene.factors[Q] = (torch.zeros_like(left), right)
    adapter, report = scene.convert()
    weight = weights_of(scene.base)[f"{Q}.weight"].double()
    torch.testing.assert_close(weight @ explicit_chain(adapter.chains[Q]), weight, atol=1e-12, rtol=0)  # float64
    assert any("1 of 2 targets change nothing" in note for note in report.notes)


def test_factors_that_were_made_for_another_base_are_said_to_be(scene: Scene) -> None:
    """The names and shapes fit; only the manifest of `--to lora` knows."""
    adapter = HraAdapter({Q: chain(32)}, rank=RANK)
    load_converter("to_lora").convert(HraSource([adapter]), scene.source, base=scene.base)
    tensors = {name: value + 1 for name, value in weights_of(scene.base).items()}
    (scene.folder / "other").mkdir()
    save_file(tensors, scene.folder / "other" / "model.safetensors")
    other = open_checkpoint(scene.folder / "other")
    plan = load_converter("from_lora").plan
    assert plan(scene.source, base=scene.base, rank=RANK).notes == ()
    (note,) = plan(scene.source, base=other, rank=RANK).notes
    assert note.startswith(f"`{scene.source}` was made for other weights than those of `{other.root}`")
    for manifest in ("{", "[]", '{"base": null}'):
        (scene.source / MANIFEST_NAME).write_text(manifest)
        assert plan(scene.source, base=other, rank=RANK).notes == ()


def test_weight_that_peft_saved_along_is_left_out(scene: Scene) -> None:
    scene.tensors = {f"{Q}.base_layer.weight": weights_of(scene.base)[f"{Q}.weight"]}
    adapter, _ = scene.convert()
    assert not adapter.parameters


def test_equal_inputs_give_equal_bytes(scene: Scene) -> None:
    scene.convert()
    first = synthetic.read_tree(scene.folder / "hra")
    scene.convert(overwrite=True)
    assert synthetic.read_tree(scene.folder / "hra") == first


refused = Refusals[Scene]()


@refused(4, "not a LoRA adapter", "'HRA'", "--from hra")
def hra_adapter(scene: Scene) -> None:
    scene.config = {"peft_type": "HRA"}


@refused(8, "DoRA")
def dora(scene: Scene) -> None:
    scene.config = {"use_dora": True}


@refused(8, "lora_magnitude_vector", "DoRA")
def dora_by_its_tensors(scene: Scene) -> None:
    scene.tensors = {f"{Q}.lora_magnitude_vector": torch.ones(32)}


@refused(8, "lora_B.bias")
def biases_in_b(scene: Scene) -> None:
    scene.tensors = {f"{Q}.lora_B.bias": torch.ones(32)}


@refused(8, "'pissa'", "path_initial_model_for_weight_conversion")
def changed_base(scene: Scene) -> None:
    scene.config = {"init_lora_weights": "pissa"}


@refused(8, "target_parameters", "layer_replication")
def two_variants(scene: Scene) -> None:
    scene.config = {"target_parameters": ["experts.gate_up_proj"], "layer_replication": [[0, 2]]}


@refused(8, "alpha_pattern", "regular expression")
def regular_expression(scene: Scene) -> None:
    scene.config = {"alpha_pattern": {"(q|up)_proj": 8}}


@refused(4, "lora_alpha", "bias", "modules_to_save")
def wrong_fields(scene: Scene) -> None:
    scene.config = {"lora_alpha": "8", "bias": "some", "modules_to_save": "norm"}


@refused(4, "r: expected a positive integer", "rank_pattern")
def ranks_that_are_none(scene: Scene) -> None:
    scene.config |= {"r": "x", "rank_pattern": {"q_proj": 0}}


@refused(4, Q, "the config says r = 3, got 4", UP, "the config says r = 2, got 4")
def ranks_of_another_file(scene: Scene) -> None:
    scene.config |= {"r": 3, "rank_pattern": {"mlp.up_proj": 2}}


@refused(5, Q, UP, "NaN or Inf")
def alpha_beyond_all_numbers(scene: Scene) -> None:
    scene.config = {"lora_alpha": 1.7e308}
    scene.factors = {module: (8 * left.sign(), right) for module, (left, right) in scene.factors.items()}


@refused(5, Q, "its norm overflows")
def norm_beyond_all_numbers(scene: Scene) -> None:
    scene.config = {"lora_alpha": 1e300}


@refused(4, "lora_C")
def foreign_tensor(scene: Scene) -> None:
    scene.tensors = {f"{Q}.lora_C.weight": torch.ones(3)}


@refused(4, Q, "A (4, 32)", UP, "B (48, 3)")
def misfitting_factors(scene: Scene) -> None:
    right = scene.factors.pop(Q)[1]
    scene.tensors = {f"{Q}.lora_A.weight": right, f"{UP}.lora_B.weight": torch.ones(48, 3)}


@refused(4, Q, "expected ΔW of shape (32, 32), got (32, 48)")
def other_base(scene: Scene) -> None:
    scene.factors[Q] = (torch.ones(32, RANK), torch.ones(RANK, 48))


@refused(4, "model.layers.7.mlp.up_proj")
def other_layers(scene: Scene) -> None:
    scene.factors["model.layers.7.mlp.up_proj"] = scene.factors[UP]


@refused(5, Q, "NaN")
def diverged(scene: Scene) -> None:
    scene.factors[Q][0][3, 1] = float("nan")


@refused(4, "nothing changes")
def untrained(scene: Scene) -> None:
    scene.factors = {module: (left * 0, right) for module, (left, right) in scene.factors.items()}


@refused(4, "34 reflections, but 32 features", Q, UP)
def more_reflections_than_features(scene: Scene) -> None:
    scene.rank = 34


@refused(4, Q, "no odd number of reflections is the identity")
def odd_and_idle(scene: Scene) -> None:
    left, right = scene.factors[Q]
    scene.factors[Q], scene.rank = (left * 0, right), 3


@refused(4, f"{Q}.weight", "differs from the base's", "--from full-model")
def own_weight(scene: Scene) -> None:
    scene.tensors = {f"{Q}.base_layer.weight": torch.ones(32, 32)}


@refused(8, "quantized", "bitsandbytes")
def quantized_base(scene: Scene) -> None:
    config = {**synthetic.llama_config(), "quantization_config": {"quant_method": "bitsandbytes"}}
    synthetic.write_json(scene.base.root / "config.json", config)


@pytest.mark.parametrize("case", refused.cases, ids=lambda case: case.damage.__name__)
def test_bad_input_is_refused_and_nothing_is_written(scene: Scene, case: Any) -> None:
    case.damage(scene)
    scene.base = open_checkpoint(scene.base.root)
    with pytest.raises(HraExportError) as caught:
        scene.convert()
    assert caught.value.exit_code == case.code
    assert [words for words in case.says if words not in str(caught.value)] == []
    assert not (scene.folder / "hra").exists()


@pytest.mark.parametrize(
    ("missing", "says"),
    [("adapter_config.json", "no adapter_config.json"), ("adapter_model.safetensors", "no adapter_model.safetensors")],
)
def test_directory_that_is_no_adapter_is_refused(scene: Scene, missing: str, says: str) -> None:
    (scene.write() / missing).unlink()
    with pytest.raises(HraExportError, match=says) as caught:
        load_converter("from_lora").plan(scene.source, base=scene.base, rank=RANK)
    assert caught.value.exit_code == 4


def test_pickle_is_refused(scene: Scene) -> None:
    (scene.write() / "adapter_model.safetensors").rename(scene.source / "adapter_model.bin")
    with pytest.raises(HraExportError, match="pickle") as caught:
        load_converter("from_lora").plan(scene.source, base=scene.base, rank=RANK)
    assert caught.value.exit_code == 4


def test_rank_below_one_is_a_wrong_value(scene: Scene) -> None:
    with pytest.raises(ValueError, match="rank"):
        scene.convert(rank=0)
