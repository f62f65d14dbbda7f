"""Tiny models with an adapter on every layer, exported, to be judged by `validate_graph`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hra_export.adapter import read_adapter, write_adapter
from hra_export.export import export_graphs, plan_export
from hra_export.graph.document import open_graph, save_graph
from hra_export.graph.operator import is_reflection
from hra_export.graph.options import GraphOptions
from hra_export.graph.regrouping import ungroup_
from hra_export.parity import ParityReport
from hra_export.validation.graphs import validate_graph
from tests.graph_scene import BUILDERS, random_adapter


def prepare(name: str, folder: Path) -> Path:
    """A folder with `base` and `adapter`."""
    model: Any = BUILDERS[name]()
    model.save_pretrained(folder / "base")
    write_adapter(random_adapter(model), folder / "adapter")
    return folder


def export(folder: Path, output: str, **options: Any) -> Path:
    """The adapter in the base as ONNX."""
    plan = plan_export(folder / "base", [read_adapter(folder / "adapter")], GraphOptions(**options))
    export_graphs(plan, folder / output)
    return folder / output


def mutate(source: Path, target: Path, change: Callable[[ir.Model], None]) -> Path:
    """A copy of an exported directory whose graph was changed."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (target / path.name).write_bytes(path.read_bytes())
    model = open_graph(source / "model.onnx")
    change(model)
    save_graph(model, target)
    return target


def judge(folder: Path, candidate: Path, **options: Any) -> ParityReport:
    return validate_graph([read_adapter(folder / "adapter")], folder / "base", candidate, **options)


def reflections(model: ir.Model) -> list[ir.Node]:
    """Nodes of one reflection each; those of several are taken apart."""
    ungroup_(model)
    return [node for node in model.graph if is_reflection(node)]


def constant(value: ir.Value | None) -> Any:
    """An initializer's numbers, as a copy."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().copy()


def set_constant(value: ir.Value | None, array: Any) -> None:
    assert value is not None
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)
