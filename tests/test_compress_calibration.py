"""Calibration: the moments are those of what the layers are given, and they choose otherwise than angles do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hra_export.adapter import HraAdapter
from hra_export.attachment import attach
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.compression import calibration as calibration_module
from hra_export.compression.calibration import calibrate
from hra_export.compression.outcome import compress_adapter
from hra_export.compression.plan import plan_compression
from hra_export.errors import FormatError, OutputError, UnsupportedModelError
from hra_export.householder import compact_wy
from hra_export.rotation import decompose, shortest_chain
from tests.test_compress import turning
from tests.tiny_models import build
from tests.train_scene import chats, save_base, save_encoder, sums, write_jsonl

# Activations are float32, sums of a few dozen of their squares.
MOMENTS = 1e-5
# Of an output error that is computed from float32 activations on both sides.
OUTPUTS = 1e-4
Q_PROJ = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"
WIDTH = 32


def chain(seed: int, angles: tuple[float, ...] = (0.9, 0.6, 0.3)) -> Tensor:
    return shortest_chain(turning(list(angles), seed=seed, width=WIDTH)).float()


def bases_of(adapter: HraAdapter) -> dict[str, Tensor]:
    return {module: decompose(adapter.reflector(module)).basis for module in adapter.chains}


def inputs_of(folder: Path, adapter: HraAdapter, module: str, tokens: list[list[int]]) -> Tensor:
    """What a layer of the adapted model is given, by transformers' own loading and a hook."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    attachment = attach(model, adapter)
    seen: list[Tensor] = []
    attachment.layers[module].register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    with torch.no_grad():
        for ids in tokens:
            model(input_ids=torch.tensor([ids]))
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in seen])


def moment(root: Tensor) -> Tensor:
    return root.T @ root


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save_base(tmp_path / "base"))


def token_ids(base: Checkpoint, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.root)
    return [list(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("rows", ["prompts", "messages", "text rows", "text"])
def test_moments_are_those_of_what_the_adapted_layers_are_given(rows: str, base: Checkpoint, tmp_path: Path) -> None:
    adapter = HraAdapter({Q_PROJ: chain(0), "model.layers.1.mlp.up_proj": chain(1)}, rank=6)
    texts = [row["prompt"] + row["completion"] for row in sums(5)]
    path = tmp_path / "rows.jsonl"
    if rows == "prompts":
        write_jsonl(path, sums(5))
    elif rows == "messages":
        write_jsonl(path, chats(5))
        texts = [f"<user> {row['prompt']} <assistant> {row['completion'].strip()} </s>" for row in sums(5)]
    elif rows == "text rows":
        write_jsonl(path, [{"text": text} for text in texts])
    else:
        path = tmp_path / "notes.txt"
        texts = [" ".join(texts)]
        path.write_text(texts[0])
    found = calibrate(base, adapter, path)
    ids = token_ids(base, texts)
    assert found.tokens == sum(map(len, ids))
    assert not found.unseen
    for module, basis in bases_of(adapter).items():
        x = inputs_of(base.root, adapter, module, ids).double() @ basis
        torch.testing.assert_close(moment(found.roots[module] @ basis), x.T @ x / len(x), rtol=MOMENTS, atol=MOMENTS)


def test_an_embedding_is_measured_on_the_rows_that_are_looked_up(base: Checkpoint, tmp_path: Path) -> None:
    adapter = HraAdapter({EMBEDDING: chain(0)}, rank=6)
    path = write_jsonl(tmp_path / "rows.jsonl", sums(7))
    plan = plan_compression(adapter, rank=2, base=base, calibration=calibrate(base, adapter, path))
    ids = [token for row in token_ids(base, [row["prompt"] + row["completion"] for row in sums(7)]) for token in row]
    rows = build_weight(base, f"{EMBEDDING}.weight")[ids]
    assert plan.predicted["outputs"] == pytest.approx(
        output_error(adapter, plan.targets[0].vectors(), rows), rel=OUTPUTS
    )


def build_weight(base: Checkpoint, name: str) -> Tensor:
    from safetensors.torch import load_file

    return load_file(base.root / "model.safetensors")[name].double()


def output_error(adapter: HraAdapter, kept: Tensor, rows: Tensor) -> float:
    """‖rows (R − R')‖ / ‖rows (R − I)‖ by dense matrices; for a layer, rows are X and W comes behind."""
    (vectors,) = adapter.chains.values()
    before, after = (dense(each) for each in (vectors, kept))
    return float((rows @ (before - after)).norm() / (rows @ (before - torch.eye(len(before)).double())).norm())


def dense(vectors: Tensor) -> Tensor:
    block = compact_wy(vectors)
    product: Tensor = torch.eye(block.features).double() - block.u @ block.t @ block.u.T
    return product


def test_predicted_output_error_is_that_of_the_layer_on_its_inputs(base: Checkpoint, tmp_path: Path) -> None:
    """x (W R)ᵀ against x (W R')ᵀ, and again after the file is written."""
    adapter = HraAdapter({Q_PROJ: chain(0)}, rank=6)
    path = write_jsonl(tmp_path / "rows.jsonl", sums(9))
    plan = plan_compression(adapter, rank=4, base=base, calibration=calibrate(base, adapter, path))
    ids = token_ids(base, [row["prompt"] + row["completion"] for row in sums(9)])
    x = inputs_of(base.root, adapter, Q_PROJ, ids).double()
    weight = build_weight(base, f"{Q_PROJ}.weight")
    before, after = dense(adapter.chains[Q_PROJ]), dense(plan.targets[0].vectors())
    changed, whole = (x @ (weight @ each).T for each in (before - after, before - torch.eye(WIDTH).double()))
    expected = float(changed.norm() / whole.norm())
    assert plan.predicted["outputs"] == pytest.approx(expected, rel=OUTPUTS)
    report = compress_adapter(plan, tmp_path / "out")
    assert report.achieved["outputs"] == pytest.approx(expected, rel=OUTPUTS)


def test_a_text_beats_angles_where_inputs_lie_in_few_directions(base: Checkpoint, tmp_path: Path) -> None:
    """The widest turn is of a plane that the inputs hardly enter."""
    path = write_jsonl(tmp_path / "rows.jsonl", sums(9))
    plain = HraAdapter({Q_PROJ: chain(0)}, rank=6)
    ids = token_ids(base, [row["prompt"] + row["completion"] for row in sums(9)])
    x = inputs_of(base.root, plain, Q_PROJ, ids).double()
    directions = torch.linalg.eigh(x.T @ x).eigenvectors  # the least seen first
    basis = torch.stack([directions[:, 0], directions[:, 1], directions[:, -1], directions[:, -2]], dim=1)
    rotation = turning([0.9, 0.4], width=WIDTH)
    adapter = HraAdapter({Q_PROJ: shortest_chain(type(rotation)(basis, rotation.angles)).float()}, rank=4)
    by_angle = plan_compression(adapter, rank=2)
    by_text = plan_compression(adapter, rank=2, base=base, calibration=calibrate(base, adapter, path))
    kept_by_angle = (
        plan_compression(adapter, rank=2, base=base, calibration=calibrate(base, adapter, path))
        .targets[0]
        .parts.deviation(by_text.targets[0].parts.chain([0]))
    )
    assert by_angle.predicted["rotation"] < 0.5
    assert by_text.predicted["outputs"] < 0.1 < 0.5 < kept_by_angle.relative


@pytest.mark.parametrize("tolerance", [0.05, 0.2, 0.5])
def test_a_tolerance_of_outputs_is_kept_with_less_than_by_dropping(
    tolerance: float, base: Checkpoint, tmp_path: Path
) -> None:
    modules = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"]
    angles = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    adapter = HraAdapter({module: chain(seed, angles) for seed, module in enumerate(modules)}, rank=12)
    path = write_jsonl(tmp_path / "rows.jsonl", sums(9))
    seen = calibrate(base, adapter, path)
    plan, dropping = (
        plan_compression(adapter, tolerance=tolerance, base=base, calibration=seen, refine=refine)
        for refine in (True, False)
    )
    assert plan.predicted["outputs"] <= tolerance
    assert dropping.predicted["outputs"] <= tolerance
    assert sum(target.rank for target in plan.targets) < sum(target.rank for target in dropping.targets)


def test_an_encoder_and_a_classifier_head_are_read(tmp_path: Path) -> None:
    """The head is the adapter's own; the base has none."""
    base = open_checkpoint(save_encoder(tmp_path / "base"))
    module = "bert.encoder.layer.0.attention.self.query"
    head = {"classifier.weight": torch.ones(3, WIDTH), "classifier.bias": torch.zeros(3)}
    adapter = HraAdapter({module: chain(0)}, rank=6, parameters=head, modules_to_save=("classifier",), task="SEQ_CLS")
    found = calibrate(base, adapter, write_jsonl(tmp_path / "rows.jsonl", [{"text": "the one is good"}]))
    assert not found.unseen


def test_an_encoder_decoder_is_read(tmp_path: Path) -> None:
    base = open_checkpoint(save_base(tmp_path / "base", "t5", chat=False))
    modules = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.q"]
    adapter = HraAdapter({module: chain(0) for module in modules}, rank=6, task="SEQ_2_SEQ_LM")
    found = calibrate(base, adapter, write_jsonl(tmp_path / "rows.jsonl", sums(3)))
    assert not found.unseen


def test_a_text_that_is_too_short_is_said(base: Checkpoint, tmp_path: Path) -> None:
    adapter = HraAdapter({Q_PROJ: chain(0)}, rank=6)
    for count, is_short in ((9, True), (30, False)):
        seen = calibrate(base, adapter, write_jsonl(tmp_path / "rows.jsonl", sums(count)))
        notes = plan_compression(adapter, rank=2, base=base, calibration=seen).notes
        assert any("Take a longer one" in note for note in notes) == is_short


def test_no_more_than_the_limit_is_read(base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "MAX_TOKENS", 20)
    adapter = HraAdapter({Q_PROJ: chain(0)}, rank=6)
    found = calibrate(base, adapter, write_jsonl(tmp_path / "rows.jsonl", sums(50)))
    assert 20 <= found.tokens < 30


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "one"}\n[]\nnonsense\n', ["row 1", "row 2", "row 3"]),
        ("", ["no text"]),
        ('{"text": ""}\n', ["no text"]),
    ],
)
def test_rows_that_cannot_be_read_are_refused_all_at_once(
    content: str, says: list[str], base: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(FormatError) as error:
        calibrate(base, HraAdapter({Q_PROJ: chain(0)}, rank=6), path)
    assert all(word in str(error.value) for word in says)


def test_what_is_no_text_or_not_there_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    adapter = HraAdapter({Q_PROJ: chain(0)}, rank=6)
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="UTF-8"):
        calibrate(base, adapter, tmp_path / "picture.txt")
    with pytest.raises(OutputError, match="nowhere"):
        calibrate(base, adapter, tmp_path / "nowhere.txt")


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one"}))
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        calibrate(open_checkpoint(tmp_path / "base"), HraAdapter({Q_PROJ: chain(0)}, rank=6), tmp_path / "rows.jsonl")
