"""A torch module as an ONNX graph in memory, through transformers' exporter.

That exporter is marked experimental: all that is used of it is in this file. It adds to `torch.onnx.export` the
patches that make transformers' models traceable, and fusions into ONNX Runtime's own operators.
"""

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from hra_export.errors import GraphError, HraExportError, UnsupportedModelError
from hra_export.graph import labelling
from hra_export.graph.ports import GraphSpec, Nested, nested
from hra_export.graph.provenance import clean_

Fusions = Literal["none", "cpu", "cuda"]
# Before 17 there is no LayerNormalization; for 26 and later torch writes graphs that no runtime accepts.
OPSETS = range(17, 26)
# Loggers that report on packages that are not installed, on versions beside the tested ones, and whole graphs.
CHATTY = ("onnxscript", "torch.fx", "torch.onnx", "transformers.exporters")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def export_graph(spec: GraphSpec, *, opset: int = 20, fusions: Fusions = "none") -> ir.Model:
    """Trace one graph.

    Args:
        spec: as `graph_specs` gives it; its module is as before afterwards.
        opset: version of the ONNX domain, 17 to 25.
        fusions: also use ONNX Runtime's own operators (`com.microsoft`) that suit this kind of device.

    Returns:
        The graph, with reflections as opaque nodes `<target>/hra` of domain `hra`; `operator.declare_` gives them a
        body. Initializers may share memory with the model's parameters.

    Raises:
        UnsupportedModelError: the module cannot be traced, or the installed exporter is not the one known.
        GraphError: inputs or outputs of the graph are not those of `spec`.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset: expected {OPSETS.start} to {OPSETS.stop - 1}, got {opset}")
    if fusions not in get_args(Fusions):
        raise ValueError(f"fusions: expected one of {', '.join(get_args(Fusions))}, got {fusions!r}")
    exporter, config = _exporter(
        dynamic=True,
        dynamic_shapes=_free_axes(spec),
        opset_version=opset,
        ort_fusions=None if fusions == "none" else fusions,
    )
    with _stand_ins(spec.module) as operands, _quiet():
        model = _export(exporter, spec, config)
    _install_(model, operands)
    _check_ports(model, spec)
    labelling.name_reflections_(model)
    labelling.name_axes_(model, spec)
    clean_(model)
    for node in model.graph.all_nodes():
        node.metadata_props.pop("namespace", None)  # classes along the module path, which `name_scopes` tell
    return model


def _exporter(**settings: Any) -> tuple[Any, Any]:
    """transformers' exporter and its configuration.

    Raises:
        UnsupportedModelError: there is none in the installed version, or it takes other settings.
    """
    import transformers

    hint = "the tested versions are in constraints.txt"
    try:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no ONNX exporter", hint=hint
        ) from error
    known = {field.name for field in dataclasses.fields(OnnxConfig)}
    if missing := [name for name in settings if name not in known]:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has another ONNX exporter than the one known",
            findings=[f"OnnxConfig: no setting `{name}`" for name in missing],
            hint=hint,
        )
    with _quiet():
        return OnnxExporter(), OnnxConfig(**settings)


def _export(exporter: Any, spec: GraphSpec, config: Any) -> ir.Model:
    try:
        model: ir.Model = exporter.export(spec.module, spec.example(), config).program
    except (HraExportError, MemoryError):
        raise
    except Exception as error:  # the tracer runs the model's code, which may raise anything
        raise UnsupportedModelError(
            f"{type(spec.module).__name__}: torch cannot trace `{spec.name}`",
            findings=list(_reasons(error)),
            hint="`--debug` shows where",
        ) from error
    return model


def _reasons(error: BaseException | None) -> Iterator[str]:
    """The first line of an error and of each that caused it; the exporter says what failed in the last."""
    while error is not None:
        lines = COLOUR.sub("", str(error)).strip().splitlines() or [""]
        yield f"{type(error).__name__}: {lines[0]}"
        error = error.__cause__


def _free_axes(spec: GraphSpec) -> Nested:
    """Axes that may change, as torch wants them told: it finds their bounds; that they stayed free is checked after."""
    free = torch.export.Dim.AUTO
    return nested(
        {
            port.name: {index: free for index, axis in enumerate(port.axes) if isinstance(axis, str)}
            for port in spec.inputs
        }
    )


@contextlib.contextmanager
def _stand_ins(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside the block, every operand of a reflection is a constant like no other; yields the true ones by name.

    Optimizers merge equal constants and then equal nodes: the targets of an untrained adapter would become one.
    """
    operands = {name: buffer for name, buffer in module.named_buffers() if name.endswith((".hra_U", ".hra_V"))}
    try:
        for number, (name, operand) in enumerate(operands.items(), 1):
            _set_buffer_(module, name, torch.full_like(operand, number / 1024))
        yield operands
    finally:
        for name, operand in operands.items():
            _set_buffer_(module, name, operand)


def _set_buffer_(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, value)


def _install_(model: ir.Model, operands: dict[str, Tensor]) -> None:
    """Put the true operands in place of what stood in for them."""
    for name, operand in operands.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = TorchTensor(operand, name=name)


def _check_ports(model: ir.Model, spec: GraphSpec) -> None:
    got = [[str(value.name) for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    expected = [[port.name for port in spec.inputs], list(spec.outputs)]
    if got != expected:
        raise GraphError(
            f"{spec.name}: the graph has other inputs or outputs than asked for",
            findings=[f"expected {names}, got {found}" for names, found in zip(expected, got, strict=True)],
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress lines, no dumps of graphs, no reports on versions and on packages that are not installed."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    unread = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
