"""Variants of a graph that exist only to be measured: without its adapter, and with its layers' outputs shown.

A variant is written into a scratch folder: the small graph anew, its large tensors as further names of the same files.

Limits: where a pass joined the reflection with a weight (`packed`, `augmented`), the graph cannot run without it.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from hra_export.filesystem import as_output_error
from hra_export.graph.document import open_graph, save_graph
from hra_export.graph.grouped_operator import is_operator
from hra_export.graph.half import widened
from hra_export.graph.products import REFLECTION_SUFFIXES, module_path

# The last factor of a reflection, by the ends of its name: with zeros there, a reflection does nothing.
LAST_FACTORS = (".hra_V", ".hra_B", "_hra_VW")
JOINED = ("_hra_packed", "_hra_W_VW")
LAYERS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MatMulBnb4", "Conv", "Gather")
# A node of the GenAI builder: `/model/layers.3/attn/q_proj/MatMul`, `MatMul_Q4` when quantized.
BUILDER_NAME = re.compile(r"/(model/layers\.\d+/(?:attn|mlp)/\w+|lm_head)/MatMul\w*")
BUILDER_WORDS = {"attn": "self_attn"}


@dataclass(frozen=True)
class Tap:
    """One layer's output in a variant.

    Attributes:
        path: module path.
        output: of the graph.
        has_bias: whether the layer's bias is in it.
    """

    path: str
    output: str
    has_bias: bool


def make_variant(source: Path, folder: Path, change: Callable[[ir.Model], None]) -> Path:
    """Write a changed copy of a graph.

    Args:
        source: the graph; not changed.
        folder: scratch, on the same file system if large tensors are not to be copied.
        change: of the model in memory.

    Returns:
        The copy.
    """
    model = open_graph(source)
    change(model)
    return _write(model, source, folder)


def widen(source: Path, folder: Path) -> Path:
    """Write a copy of a half-precision graph that computes in float32 with the same weights."""
    wide = widened(open_graph(source))
    save_graph(wide, folder, source.stem)
    return folder / source.name


def silence_(model: ir.Model) -> bool:
    """Make every reflection of constants do nothing.

    Returns:
        Whether the model is its base then; false when it has no reflection, or one that is joined with a weight.
    """
    values = list(model.graph.initializers.values())
    if any(str(value.name).endswith(JOINED) for value in values):
        return False
    silenced = [value for value in values if str(value.name).endswith(LAST_FACTORS) and value.uses()]
    for value in silenced:
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.Tensor(np.zeros(tensor.shape.numpy(), tensor.dtype.numpy()), tensor.dtype)
    return bool(silenced)


def tap_(model: ir.Model, paths: Collection[str]) -> list[Tap]:
    """Make the outputs of layers outputs of the graph, as far as the graph tells which is which.

    Args:
        model: traced by torch (its nodes know their modules), or of the GenAI builder (their names do).
        paths: of the modules that are wanted.
    """
    taps: dict[str, Tap] = {}
    for node in list(model.graph):
        path = path_of(node)
        if node.op_type not in LAYERS or path not in paths or path in taps or _is_of_reflection(node):
            continue
        value = _whole(node, path)
        if not value.is_graph_output():
            model.graph.outputs.append(value)
        bias = node.op_type in ("Gemm", "Conv") and len(node.inputs) > 2 and node.inputs[2] is not None
        taps[path] = Tap(path, str(value.name), bias)
    return list(taps.values())


def path_of(node: ir.Node) -> str:
    """The module path of a layer's node, as torch's tracer or the GenAI builder tells it; empty where neither does."""
    found = BUILDER_NAME.fullmatch(node.name or "")
    if found is None:
        return module_path(node)
    return ".".join(BUILDER_WORDS.get(word, word) for word in found[1].split("/"))


def _whole(node: ir.Node, path: str) -> ir.Value:
    """What a layer gives, with the adapter's part where that stands behind it or beside it."""
    (value, *_) = node.outputs
    for use in value.uses():
        is_behind = use.node.name in (f"{node.name}/hra", f"{path}/hra")
        others = (each.producer() for each in use.node.inputs if each is not None and each is not value)
        is_beside = use.node.op_type == "Add" and any(other and _is_of_reflection(other) for other in others)
        if is_behind or is_beside:
            return use.node.outputs[0]
    return value


def _is_of_reflection(node: ir.Node) -> bool:
    """Whether a node multiplies with an operand of a reflection, and is no layer of the model."""
    if is_operator(node):
        return False
    return any(value is not None and str(value.name).endswith(REFLECTION_SUFFIXES) for value in node.inputs)


def _write(model: ir.Model, source: Path, folder: Path) -> Path:
    """The graph without its external tensors, which it finds under the same names beside it."""
    target = folder / source.name
    with as_output_error(f"write `{target}`"):
        proto = ir.serde.serialize_model(model)
        target.write_bytes(proto.SerializeToString())
        for location in sorted(_locations(model)):
            place = folder / location
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                _same_file(source.parent / location, place)
    return target


def _locations(model: ir.Model) -> set[str]:
    return {
        str(value.const_value.location)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def _same_file(source: Path, place: Path) -> None:
    """A second name of a file; a copy where the file system gives none."""
    try:
        os.link(source.resolve(), place)
    except OSError:
        shutil.copyfile(source, place)
