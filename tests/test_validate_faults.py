"""Planted faults: each is a finite, plausible graph that computes something else, and validation must say so."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hra_export.adapter import HraAdapter, read_adapter
from hra_export.graph.operator import operands
from hra_export.graph.products import module_path
from hra_export.graph.variants import silence_
from hra_export.validation import child, process
from tests.judged_graphs import constant, export, judge, mutate, prepare, reflections, set_constant

FAULTY_TARGET = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime in this process: that it works in another is tested elsewhere."""
    monkeypatch.setattr(process, "run_child", lambda root, timeout: child.main(str(root)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `adapter`, and the right `reflect`."""
    folder = prepare("llama", tmp_path_factory.mktemp("llama"))
    export(folder, "reflect", mode="reflect")
    return folder


def adapter_missing(model: ir.Model, adapter: HraAdapter) -> None:
    assert silence_(model)


def u_and_v_in_each_others_place(model: ir.Model, adapter: HraAdapter) -> None:
    """V transposed: x + (x Vᵀ) Uᵀ, which is orthogonal too."""
    for node in reflections(model):
        u, v = (constant(value) for value in node.inputs[1:3])
        set_constant(node.inputs[1], np.ascontiguousarray(v.T))
        set_constant(node.inputs[2], np.ascontiguousarray(u.T))


def chain_reversed(model: ir.Model, adapter: HraAdapter) -> None:
    turned = replace(adapter, chains={path: u.flip(1) for path, u in adapter.chains.items()})
    for node in reflections(model):
        path = str(node.name).removesuffix("/hra")
        rows = path.endswith("embed_tokens")
        for value, tensor in zip(
            node.inputs[1:3], operands([turned.reflector(path)], torch.float32, rows=rows), strict=True
        ):
            set_constant(value, tensor.numpy())


def one_layer_off_by_two_percent(model: ir.Model, adapter: HraAdapter) -> None:
    (node,) = [node for node in reflections(model) if node.name == f"{FAULTY_TARGET}/hra"]
    set_constant(node.inputs[2], constant(node.inputs[2]) * np.float32(1.02))


def base_weights_swapped(model: ir.Model, adapter: HraAdapter) -> None:
    """o_proj of one layer holds what belongs to the other."""
    first, second = (
        node.inputs[1]
        for node in model.graph
        if node.op_type == "MatMul" and module_path(node).endswith("self_attn.o_proj")
    )
    weights = constant(first), constant(second)
    set_constant(first, weights[1])
    set_constant(second, weights[0])


def overflow_clamped(model: ir.Model, adapter: HraAdapter) -> None:
    """A hidden state is cut at the largest number that its dtype had room for."""
    (node,) = [
        node for node in model.graph if node.op_type == "MatMul" and module_path(node) == "model.layers.0.mlp.down_proj"
    ]
    largest = ir.Value(name="largest", const_value=ir.tensor(np.float32(1e-4), name="largest"))
    lowest = ir.Value(name="lowest", const_value=ir.tensor(np.float32(-1e-4), name="lowest"))
    for value in (lowest, largest):
        model.graph.register_initializer(value)
    insert_behind(model, node.outputs[0], "Clip", [lowest, largest])


def cache_shifted_by_one(model: ir.Model, adapter: HraAdapter) -> None:
    """Each key comes back one position late."""
    cache = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    names = {"first": 0, "one": 1, "end": 2**62, "axis": 2}
    made = {}
    for name, number in names.items():
        made[name] = ir.Value(name=f"shift_{name}", const_value=ir.tensor(np.array([number]), name=f"shift_{name}"))
        model.graph.register_initializer(made[name])
    tail = ir.node("Slice", [cache, made["one"], made["end"], made["axis"]], name="tail")
    head = ir.node("Slice", [cache, made["first"], made["one"], made["axis"]], name="head")
    turned = ir.node("Concat", [tail.outputs[0], head.outputs[0]], {"axis": 2}, name="turned")
    uses = [(use.node, use.idx) for use in cache.uses() if use.node not in (tail, head)]
    model.graph.insert_before(model.graph[0], [tail, head, turned])
    for user, index in uses:
        user.replace_input_with(index, turned.outputs[0])


def mask_ignored(model: ir.Model, adapter: HraAdapter) -> None:
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    uses = [(use.node, use.idx) for use in mask.uses()]
    same = ir.node("Equal", [mask, mask], name="same")
    ones = ir.node("Cast", [same.outputs[0]], {"to": ir.DataType.INT64}, name="ones")
    model.graph.insert_before(model.graph[0], [same, ones])
    for user, index in uses:
        user.replace_input_with(index, ones.outputs[0])


def not_a_number(model: ir.Model, adapter: HraAdapter) -> None:
    node = reflections(model)[-1]
    array = constant(node.inputs[2])
    array[0, 0] = np.nan
    set_constant(node.inputs[2], array)


def nothing_comparable(model: ir.Model, adapter: HraAdapter) -> None:
    model.graph.outputs[0].name = "something_else"


def insert_behind(model: ir.Model, value: ir.Value, operator: str, further: list[ir.Value]) -> None:
    uses = [(use.node, use.idx) for use in value.uses()]
    made = ir.node(operator, [value, *further], name=f"planted_{operator}")
    made.outputs[0].type, made.outputs[0].shape = value.type, value.shape
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, made)
    for user, index in uses:
        user.replace_input_with(index, made.outputs[0])


FAULTS = {
    adapter_missing: "the adapter's effect is off by 100",
    u_and_v_in_each_others_place: "the adapter's effect is off by",
    chain_reversed: "the adapter's effect is off by",
    one_layer_off_by_two_percent: "the adapter's effect is off by",
    base_weights_swapped: "the adapter's effect is off by",
    overflow_clamped: "the adapter's effect is off by",
    cache_shifted_by_one: "in pieces of",
    mask_ignored: "padded left",
    not_a_number: "not finite",
    nothing_comparable: "nothing was compared",
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_planted_fault_is_found(
    fault: Callable[[ir.Model, HraAdapter], None], words: str, llama: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(llama / "adapter")
    wrong = mutate(llama / "reflect", tmp_path / "wrong", lambda model: fault(model, adapter))
    report = judge(llama, wrong)
    assert not report.ok
    assert words in "\n".join(report.findings)


def test_copy_without_a_fault_passes(llama: Path, tmp_path: Path) -> None:
    """What `mutate` itself does is no fault: the tests above find what they planted."""
    report = judge(llama, mutate(llama / "reflect", tmp_path / "same", lambda model: None), per_layer=True)
    assert report.ok, report.findings
    assert report.first_departure is None
    assert {layer.name for layer in report.layers} >= {FAULTY_TARGET, "lm_head", "model.embed_tokens"}


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (one_layer_off_by_two_percent, FAULTY_TARGET),
        (base_weights_swapped, "model.layers.0.self_attn.o_proj"),
        (adapter_missing, "model.embed_tokens"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_first_layer_that_departs_is_named(
    fault: Callable[[ir.Model, HraAdapter], None], first: str, llama: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(llama / "adapter")
    wrong = mutate(llama / "reflect", tmp_path / "wrong", lambda model: fault(model, adapter))
    departure = judge(llama, wrong, per_layer=True).first_departure
    assert departure is not None
    assert departure.name == first
