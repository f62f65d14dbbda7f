"""Small ONNX graphs from text, and their numbers: as they stand in the reference evaluator and in ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from hra_export.graph.document import save_graph
from hra_export.graph.operator import declare_
from hra_export.graph.provenance import NAME_SCOPES, declare_versions_

Array = NDArray[np.generic]
HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'


def graph(body: str, tensors: Mapping[str, Array], *, header: str = HEADER) -> ir.Model:
    """A model from ONNX's text form, whose values of the given names are initializers."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(f"{header} {body}"))
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    values = {value.name: value for node in nodes for value in node.inputs if value is not None}
    for name, array in tensors.items():
        value = values[name]
        content = ir.Tensor(array, name=name)
        value.const_value, value.type, value.shape = content, ir.TensorType(content.dtype), ir.Shape(array.shape)
        (value.graph or model.graph).register_initializer(value)
    return model


def scope_(model: ir.Model, modules: Mapping[str, str]) -> ir.Model:
    """Say of nodes, found by their output, which module torch's exporter made them from."""
    for node in model.graph:
        module = modules.get(str(node.outputs[0].name))
        if module is not None:
            parts = module.split(".")
            scopes = ["", *(".".join(parts[: i + 1]) for i in range(len(parts))), f"{node.op_type.lower()}_7"]
            node.metadata_props[NAME_SCOPES] = repr(scopes)
    return model


def operators(model: ir.Model) -> list[str]:
    """The operators of a model, in order."""
    return [node.op_type for node in model.graph]


def finished(model: ir.Model, folder: Path) -> Path:
    """Give the operator its body and write the model."""
    declare_(model)
    declare_versions_(model)
    folder.mkdir(exist_ok=True)
    name = f"model{len(list(folder.glob('*.onnx')))}"
    save_graph(model, folder, name)
    return folder / f"{name}.onnx"


def run(path: Path, feeds: Mapping[str, Array], *, optimized: bool = False) -> list[Array]:
    """The outputs in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, dict(feeds))
    return outputs
