"""Is a graph sound? The checker and strict shape inference of ONNX, as far as they know its operators."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from hra_export.errors import GraphError
from hra_export.graph.operator import DOMAIN

FOREIGN = "com.microsoft"  # a domain the checker does not judge
LARGE_BYTES = 1024  # no shape or axis is that long
ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)


def check_graph(path: Path) -> None:
    """Check a file with `onnx.checker` and strict shape inference.

    Operators that ONNX does not define are taken as they are, and what comes from them has the shapes that the file
    declares. ONNX Runtime's fusions stand in ONNX's own domain in part; those are foreign too.

    Raises:
        GraphError: what the checker says, or the reflection operator has no body, which the checker would overlook.
    """
    model = onnx.load(path, load_external_data=False)
    nodes = list(_nodes(model.graph))
    bodies = {function.name for function in model.functions if function.domain == DOMAIN}
    if missing := sorted({node.op_type for node in nodes if node.domain == DOMAIN} - bodies):
        raise GraphError(
            f"`{path}` is not sound: it uses operators of the domain `{DOMAIN}` and does not define them",
            findings=missing,
        )
    try:
        if any(_is_foreign(node, model) for node in nodes):
            onnx.checker.check_model(_checkable(model), full_check=True)
        else:
            onnx.checker.check_model(str(path), full_check=True)
    except ERRORS as error:
        raise GraphError(f"`{path}` is not sound: {error}") from error


def structure_finding(model: onnx.ModelProto) -> str | None:
    """What is wrong with a graph apart from shapes: names, order of nodes, attributes; None when nothing is.

    Args:
        model: its tensors are not looked at.
    """
    try:
        onnx.checker.check_model(_checkable(model))
    except ERRORS as error:
        return (str(error).splitlines() or ["the checker refuses it"])[0]
    return None


def is_text(message: Any) -> bool:
    """Whether every string of a protobuf message is UTF-8; protobuf gives those that are not as bytes, or raises."""
    try:
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING:
                if any(isinstance(text, bytes) for text in ([value] if isinstance(value, str | bytes) else value)):
                    return False
            elif field.type == field.TYPE_MESSAGE:
                inner = [value] if hasattr(value, "ListFields") else value
                if not all(is_text(entry) for entry in inner):
                    return False
    except UnicodeDecodeError:
        return False
    return True


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)
            for inner in attribute.graphs:
                yield from _nodes(inner)


def _is_foreign(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether ONNX has no schema for a node; bodies of functions count as schemas."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if (node.domain, node.op_type) in {(function.domain, function.name) for function in model.functions}:
        return False
    return not onnx.defs.has(node.op_type, versions.get(node.domain, 0), node.domain)


def _checkable(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the content of large tensors, and with foreign operators in a domain of their own.

    The GenAI builder declares shapes of constants that they do not have; those declarations are left out.
    """
    copy = onnx.ModelProto(ir_version=model.ir_version, functions=model.functions, opset_import=model.opset_import)
    graph = model.graph
    constants = {node.output[0] for node in graph.node if node.op_type == "Constant" and node.output}
    declared = [value for value in graph.value_info if value.name not in constants]
    copy.graph.MergeFrom(
        onnx.GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output, value_info=declared)
    )
    copy.graph.initializer.extend(tensor for tensor in graph.initializer if not _is_large(tensor))
    known = {value.name for value in graph.input}
    for tensor in (*graph.initializer, *_inner_tensors_(copy.graph)):
        if _is_large(tensor) and tensor.name not in known:
            known.add(tensor.name)
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for node in _nodes(copy.graph):
        if node.domain in ("", "ai.onnx") and _is_foreign(node, model):
            node.domain = FOREIGN
    imported = {entry.domain for entry in copy.opset_import}
    for domain in sorted({node.domain for node in _nodes(copy.graph)} - imported - {"", "ai.onnx"}):
        copy.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return copy


def _inner_tensors_(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Take the large initializers out of the graphs inside a graph, and the content out of external constants."""
    for attribute in (attribute for node in _nodes(graph) for attribute in node.attribute):
        if attribute.t.data_location == onnx.TensorProto.EXTERNAL:
            attribute.t.CopyFrom(onnx.TensorProto(name=attribute.t.name, data_type=attribute.t.data_type, dims=[0]))
        for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
            large = [tensor for tensor in inner.initializer if _is_large(tensor)]
            for tensor in large:
                inner.initializer.remove(tensor)
            yield from large


def _is_large(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.raw_data) > LARGE_BYTES
