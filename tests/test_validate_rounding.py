"""Graphs of rounded weights: judged by what their codes stand for, so that rounding hides nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hra_export.adapter import HraAdapter, read_adapter
from hra_export.checkpoint import MANIFEST_NAME
from hra_export.graph.products import module_path
from hra_export.graph.variants import silence_
from hra_export.quantization import Bits, pack, quantize, unpack
from hra_export.validation import child, process
from hra_export.validation.decoding import Spoken, with_end
from hra_export.validation.process import Answer
from hra_export.validation.rounding import _compared
from tests.judged_graphs import constant, export, judge, mutate, prepare, set_constant
from tests.test_validate_faults import (
    FAULTY_TARGET,
    adapter_missing,
    mask_ignored,
    one_layer_off_by_two_percent,
    u_and_v_in_each_others_place,
)
from tests.tiny_tokenizer import write_tokenizer

Fault = Callable[[ir.Model, HraAdapter], None]
SWAPPED = "self_attn.o_proj"


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime in this process: that it works in another is tested elsewhere."""
    monkeypatch.setattr(process, "run_child", lambda root, timeout: child.main(str(root)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `adapter`, and the right `MODE-PRECISION`."""
    folder = prepare("llama", tmp_path_factory.mktemp("llama"))
    for mode in ("reflect", "merged"):
        for precision in ("int4", "int8"):
            export(folder, f"{mode}-{precision}", mode=mode, precision=precision, block_size=16)
    return folder


def products(model: ir.Model, ending: str) -> list[ir.Node]:
    found = [node for node in model.graph if node.op_type == "MatMulNBits" and module_path(node).endswith(ending)]
    assert found
    return found


def scales_off_by_two_percent(model: ir.Model, adapter: HraAdapter) -> None:
    (node,) = products(model, FAULTY_TARGET)
    set_constant(node.inputs[2], constant(node.inputs[2]) * np.float32(1.02))


def matrices_swapped(model: ir.Model, adapter: HraAdapter) -> None:
    first, second = products(model, SWAPPED)
    for position in (1, 2, 3):
        one, other = first.inputs[position], second.inputs[position]
        first.replace_input_with(position, other)
        second.replace_input_with(position, one)


def zero_points_shifted(model: ir.Model, adapter: HraAdapter) -> None:
    (node,) = products(model, FAULTY_TARGET)
    zeros = constant(node.inputs[3])
    is_packed = node.attributes["bits"].as_int() == 4
    codes = unpack(zeros) if is_packed else zeros
    codes = np.where(codes < (15 if is_packed else 255), codes + 1, codes - 1).astype(np.uint8)
    set_constant(node.inputs[3], pack(codes) if is_packed else codes)


FAULTS: dict[Fault, str] = {
    scales_off_by_two_percent: f"{FAULTY_TARGET}: its codes are off from the weight",
    matrices_swapped: f"{SWAPPED}: its codes are off from the weight",
    zero_points_shifted: f"{FAULTY_TARGET}: its codes are off from the weight",
    adapter_missing: "the adapter's effect is off by 100",
    u_and_v_in_each_others_place: "the adapter's effect is off by",
    one_layer_off_by_two_percent: "activations not rounded, 1 × 1 token, logits: the adapter's effect is off by",
    mask_ignored: "padded left",
}
OF_WEIGHTS = (scales_off_by_two_percent, matrices_swapped, zero_points_shifted)


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("mode", ["reflect", "merged"])
def test_right_graph_passes_and_says_what_rounding_cost(mode: str, precision: str, llama: Path) -> None:
    report = judge(llama, llama / f"{mode}-{precision}", per_layer=True)
    assert report.ok, report.findings
    assert report.tolerance.share is None  # no share of the effect, the effect itself
    assert max(output.effect_error for output in report.exact) < 1e-5
    assert report.cost is not None
    assert (report.cost.base_kl is None) == (mode == "merged")
    assert report.cost.effect > (0.01 if precision == "int4" else 1e-4)
    assert report.first_departure is None


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize(("fault", "words"), FAULTS.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_planted_fault_is_found(fault: Fault, words: str, precision: str, llama: Path, tmp_path: Path) -> None:
    adapter = read_adapter(llama / "adapter")
    wrong = mutate(llama / f"reflect-{precision}", tmp_path / "wrong", lambda model: fault(model, adapter))
    report = judge(llama, wrong)
    assert not report.ok
    assert words in "\n".join(report.findings)


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("fault", OF_WEIGHTS, ids=lambda each: each.__name__)
def test_planted_fault_in_folded_weights_is_found(fault: Fault, llama: Path, tmp_path: Path) -> None:
    adapter = read_adapter(llama / "adapter")
    wrong = mutate(llama / "merged-int4", tmp_path / "wrong", lambda model: fault(model, adapter))
    assert FAULTS[fault] in "\n".join(judge(llama, wrong).findings)


@pytest.mark.usefixtures("no_child")
def test_base_without_the_adapter_is_no_merged_graph(llama: Path, tmp_path: Path) -> None:
    """The base's own codes where W R should be: every matrix is named, or counted."""
    adapter = read_adapter(llama / "adapter")
    bare = mutate(llama / "reflect-int4", tmp_path / "bare", lambda model: adapter_missing(model, adapter))
    (bare / MANIFEST_NAME).write_bytes((llama / "merged-int4" / MANIFEST_NAME).read_bytes())
    findings = judge(llama, bare).findings
    assert any("quantized matrices do not hold the weights that they should" in finding for finding in findings)


@pytest.mark.usefixtures("no_child")
def test_graph_that_does_not_tell_its_modules_is_judged_beside_its_own_base(llama: Path, tmp_path: Path) -> None:
    """By the share of the effect that arrives; small faults hide there, and the report says so."""

    def forget(model: ir.Model) -> None:
        for node in model.graph:
            node.metadata_props.clear()

    def forget_and_silence(model: ir.Model) -> None:
        forget(model)
        assert silence_(model)

    report = judge(llama, mutate(llama / "reflect-int4", tmp_path / "nameless", forget))
    assert report.ok, report.findings
    assert report.tolerance.share is not None
    assert any("belong to no parameter" in note for note in report.notes)
    assert min(output.base_error or 0.0 for output in report.outputs) > 1e-3  # it is rounded, and said to be
    wrong = mutate(llama / "reflect-int4", tmp_path / "silent", forget_and_silence)
    assert "0% of the adapter's effect arrived" in "\n".join(judge(llama, wrong).findings)


@pytest.mark.usefixtures("no_child")
def test_graph_of_others_may_round_by_its_own_rules_but_not_hold_another_matrix(llama: Path, tmp_path: Path) -> None:
    adapter = read_adapter(llama / "adapter")

    def swap(model: ir.Model) -> None:
        matrices_swapped(model, adapter)

    right, wrong = (mutate(llama / "reflect-int4", tmp_path / name, change) for name, change in
                    (("right", lambda model: None), ("wrong", swap)))  # fmt: skip
    assert judge(llama, right / "model.onnx").ok
    assert f"{SWAPPED}: its codes are off from the weight by 1" in "\n".join(
        judge(llama, wrong / "model.onnx").findings
    )


@pytest.mark.usefixtures("no_child")
def test_matrices_of_products_in_integers_are_checked_too(tmp_path: Path) -> None:
    folder = prepare("bert", tmp_path)
    right = export(folder, "int8", mode="reflect", precision="int8")

    def scale(model: ir.Model) -> None:
        value = next(value for name, value in model.graph.initializers.items() if name.endswith("_scales"))
        set_constant(value, constant(value) * np.float32(1.02))

    report = judge(folder, right)
    assert report.ok, report.findings
    assert report.tolerance.share is None
    wrong = mutate(right, tmp_path / "wrong", scale)
    assert "attention.self.query: its codes are off from the weight" in "\n".join(judge(folder, wrong).findings)


@pytest.mark.parametrize("mode", ["reflect", "merged"])
def test_names_of_the_genai_builder_lead_to_parameters(mode: str, tmp_path: Path) -> None:
    """Folded q, k and v are one matrix there."""
    folder = prepare("llama", tmp_path)
    write_tokenizer(folder / "base")
    candidate = export(folder, "genai", mode=mode, runtime="genai", precision="int4", block_size=16)
    report = judge(folder, candidate, prompts=["Hello_there"])
    assert report.ok, report.findings
    assert report.cost is not None
    assert max(output.effect_error for output in report.exact) < 1e-5


def test_text_that_ends_early_ends_with_the_token_that_genai_leaves_out() -> None:
    said = Spoken("x", "x", [1], [5, 6, 2], torch.zeros(3, 8))
    assert list(with_end(Answer(tokens=[5, 6]), said, {2, 3}).tokens) == [5, 6, 2]
    assert list(with_end(Answer(tokens=[5]), said, {2, 3}).tokens) == [5, 2]  # too early
    assert list(with_end(Answer(tokens=[5, 6, 7]), said, {2, 3}).tokens) == [5, 6, 7, 2]  # too late


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_codes_keep_the_bound_and_the_next_ones_break_it(bits: Bits, symmetric: bool) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight[0, 0], weight[1, :32], weight[2, :32] = 9.0, 0.0, 1e-30
    right = quantize(weight.numpy(), bits=bits, block_size=32, symmetric=symmetric)
    assert _compared(right, weight, 0.0)[1] == 0
    right.packed[5, 1, 0] ^= 2
    assert _compared(right, weight, 0.0)[1] > 1
