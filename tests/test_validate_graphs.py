"""Right graphs pass: every family, with real child processes where the child is the point."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hra_export.adapter import read_adapter, write_adapter
from hra_export.errors import DeviceError, GraphError
from hra_export.export import export_graphs, plan_export
from hra_export.graph.options import GraphOptions
from hra_export.graph.products import module_path
from hra_export.validation import child, process
from hra_export.validation.graphs import validate_graph
from hra_export.validation.job import ANSWER
from tests.command_line import Outcome, run
from tests.judged_graphs import export, judge, mutate, prepare
from tests.tiny_tokenizer import write_tokenizer

MORE = ("roberta", "gpt2", "clip")


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime in this process, which saves a second for each."""
    monkeypatch.setattr(process, "run_child", lambda root, timeout: child.main(str(root)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `adapter`, and the right `reflect`."""
    folder = prepare("llama", tmp_path_factory.mktemp("llama"))
    export(folder, "reflect", mode="reflect")
    return folder


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(
    "name", ["bert", "t5", "vit", "unet", *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)]
)
def test_right_graph_passes(name: str, tmp_path: Path) -> None:
    folder = prepare(name, tmp_path)
    report = judge(folder, export(folder, "reflect", mode="reflect"), per_layer=True)
    assert report.ok, report.findings
    assert report.first_departure is None
    assert min(output.effect_size for output in report.outputs) > 1e-3


@pytest.mark.usefixtures("no_child")
def test_decoder_is_fed_in_pieces_and_padded_on_both_sides(llama: Path) -> None:
    report = judge(llama, llama / "reflect")
    assert report.ok, report.findings
    names = "\n".join(output.name for output in report.outputs)
    for words in ("1 × 1 token,", "in pieces of 6, 1", "in pieces of 20, 13", "padded left", "padded right"):
        assert words in names
    (decoding,) = report.decodings
    assert decoding.agreed == decoding.count


@pytest.mark.usefixtures("no_child")
def test_merged_graph_passes(llama: Path) -> None:
    report = judge(llama, export(llama, "merged", mode="merged"), per_layer=True)
    assert report.ok, report.findings
    assert len(report.layers) >= 15  # seven in each of two layers, and the head


def test_single_file_is_a_candidate(llama: Path) -> None:
    report = judge(llama, llama / "reflect" / "model.onnx")
    assert report.ok, report.findings
    assert report.dtype == "fp32"


DYING = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANGING = "import time; time.sleep(60)"
SILENT = "pass"


@pytest.mark.parametrize(
    ("start", "words"),
    [(DYING, "SIGSEGV"), (HANGING, "did not answer within 1 s"), (SILENT, "exit code 0")],
    ids=["dies", "hangs", "says nothing"],
)
def test_child_that_gives_no_answer_is_a_failure(
    start: str, words: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "START", start)
    report = judge(llama, llama / "reflect", timeout=1.0)
    assert not report.ok
    assert words in report.findings[0]
    assert "nothing was compared" in report.findings


@pytest.mark.skipif(torch.cuda.is_available(), reason="the provider is there")
def test_provider_that_is_not_there_ends_with_7(llama: Path) -> None:
    outcome = validate(llama, "reflect", "--provider", "cuda", "--json")
    assert outcome.code == 7
    assert outcome.json["error"]["kind"] == "DeviceError"


def test_child_raises_what_the_session_raised(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fall-back is no finding among others: nothing was asked of the provider yet."""

    def fall_back(root: Path, timeout: float) -> int:
        details = {"message": "2 of 9 nodes fall back", "findings": ["MatMul `a`: CPU"], "hint": None}
        (root / ANSWER).write_text(json.dumps({"error": {"kind": "DeviceError", **details}}))
        return 0

    monkeypatch.setattr(process, "run_child", fall_back)
    with pytest.raises(DeviceError) as caught:
        judge(llama, llama / "reflect")
    assert caught.value.findings == ("MatMul `a`: CPU",)


def test_command_prints_layers_and_writes_a_page(llama: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    outcome = validate(llama, "reflect", "--per-layer", "--html", str(page))
    assert outcome.code == 0, outcome.stderr
    assert "parity holds: fp32 graph on `cpu`" in outcome.stdout.splitlines()[-1]
    assert "model.layers.1.mlp.down_proj" in outcome.stdout
    text = page.read_text()
    assert text.count("<svg") == 3  # effect, layers, agreement
    assert "http" not in text.replace('xmlns="http', "")


def test_command_refuses_options_of_the_other_kind(llama: Path) -> None:
    outcome = validate(llama, "reflect", "--dtype", "float16")
    assert outcome.code == 2
    assert "--dtype" in outcome.stderr


def validate(folder: Path, candidate: str, *more: str) -> Outcome:
    paths: list[str | Path] = ["--base", folder / "base", "--candidate", folder / candidate]
    return run("validate", folder / "adapter", *paths, *more)


@pytest.mark.usefixtures("no_child")
def test_swappable_graph_is_judged_by_each_adapter_file(llama: Path, tmp_path: Path) -> None:
    """Two adapters, two files; the report says which is which, and what the graph does without either."""
    base, first = llama / "base", read_adapter(llama / "adapter")
    write_adapter(replace(first, chains={path: u.flip(0) for path, u in first.chains.items()}), tmp_path / "second")
    second = read_adapter(tmp_path / "second")
    candidate = tmp_path / "swap"
    export_graphs(plan_export(base, [first, second], GraphOptions(mode="reflect", swap="adapter")), candidate)
    report = validate_graph([first, second], base, candidate)
    assert report.ok, report.findings
    assert {output.name.partition(":")[0] for output in report.outputs} == {"adapter", "second"}
    assert max(output.base_error or 1.0 for output in report.outputs) < 1e-6
    third = replace(first, digest="0" * 64)
    report = validate_graph([first, third], base, candidate)
    assert "the candidate has no file of this adapter" in "\n".join(report.findings)
    assert "`second.onnx_adapter` was not judged" in "\n".join(report.notes)


@pytest.mark.usefixtures("no_child")
def test_rows_that_name_their_adapters_are_judged_in_one_batch(llama: Path) -> None:
    report = judge(llama, export(llama, "rows", mode="reflect", swap="rows"))
    assert report.ok, report.findings
    assert any("the adapter in every second row" in output.name for output in report.outputs)


@pytest.mark.usefixtures("no_child")
def test_folder_of_others_is_judged_without_a_manifest(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(llama / "reflect" / name, tmp_path / "onnx" / name)
    report = judge(llama, tmp_path)
    assert report.ok, report.findings


def test_folder_with_graphs_that_nobody_can_tell_apart_is_refused(llama: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(llama / "reflect" / "model.onnx", tmp_path / name)
    with pytest.raises(GraphError) as caught:
        judge(llama, tmp_path)
    assert len(caught.value.findings) == 2


@pytest.mark.usefixtures("no_child")
def test_half_graph_passes_and_its_clamped_overflow_does_not(llama: Path, tmp_path: Path) -> None:
    right = export(llama, "fp16", mode="reflect", precision="fp16")
    assert judge(llama, right).ok
    wrong = mutate(right, tmp_path / "wrong", clamp_down_projection)
    assert not judge(llama, wrong).ok


def clamp_down_projection(model: ir.Model) -> None:
    """What does not fit is cut, and finite: as an overflow that saturates."""
    (node,) = [
        node for node in model.graph if node.op_type == "MatMul" and module_path(node) == "model.layers.0.mlp.down_proj"
    ]
    value = node.outputs[0]
    uses = [(use.node, use.idx) for use in value.uses()]
    bounds = [ir.Value(name=f"bound{sign}", const_value=ir.tensor(np.float16(sign * 1e-4))) for sign in (-1, 1)]
    for bound in bounds:
        model.graph.register_initializer(bound)
    clip = ir.node("Clip", [value, *bounds], name="clip")
    clip.outputs[0].type, clip.outputs[0].shape = value.type, value.shape
    model.graph.insert_after(node, clip)
    for user, index in uses:
        user.replace_input_with(index, clip.outputs[0])


def test_genai_directory_is_run_by_both_runtimes(tmp_path: Path) -> None:
    folder = prepare("llama", tmp_path)
    write_tokenizer(folder / "base")
    candidate = export(folder, "genai", mode="reflect", runtime="genai")
    report = judge(folder, candidate, prompts=["Hello_there"], per_layer=True)
    assert report.ok, report.findings
    assert "model.layers.0.self_attn.q_proj" in {layer.name for layer in report.layers}
    assert [decoding.runtime for decoding in report.decodings] == ["ONNX Runtime", "ONNX Runtime GenAI"]
    assert all(decoding.agreed == decoding.count for decoding in report.decodings)


@pytest.mark.usefixtures("no_child")
def test_text_is_scored_on_all_sides(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-tokenizer"
    shutil.copytree(llama / "base", folder / "base")
    shutil.copytree(llama / "adapter", folder / "adapter")
    write_tokenizer(folder / "base")
    text = tmp_path / "text.txt"
    text.write_text("some_words_without_a_space,_which_the_tiny_vocabulary_has_not." * 5)
    report = judge(folder, llama / "reflect", text=text, prompts=["One", "Three_and_four"])
    assert report.perplexity is not None
    assert report.perplexity.candidate == pytest.approx(report.perplexity.reference, rel=1e-5)
    assert abs(report.perplexity.base - report.perplexity.reference) > 1e-3
    assert any("2 prompts" in output.name for output in report.outputs)
