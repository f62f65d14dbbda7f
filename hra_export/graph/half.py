"""A float32 graph in half precision: products and what lies between them in float16 or bfloat16, sums in float32.

- products (MatMul, Gemm, Conv, reflections, the runtime's fused operators) take and give half precision; every kernel
  of theirs accumulates in float32;
- norms, softmax and other reductions, powers and roots, the angles of RoPE: float32;
- layer norms that have a `stash_type` compute in float32 inside: they stay one node of half precision;
- arithmetic is float32 where one of its inputs is, where only sums read it (squares of 256 overflow float16), or where
  a constant is out of half precision's range: a mask of −3·10³⁸ would become −∞, and 0 · −∞ is no number;
- graph inputs and outputs stay float32, caches excepted: `past_key_values.*` and `present.*` are half.

The graph is converted and not the model that it is traced from: every source of graphs takes this one road, and the
residual stream rounds at the same places. Measured on tiny models, it is as near to float32 as tracing in float16.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from hra_export.errors import NumericalError, UnsupportedModelError
from hra_export.graph.sensitivity import ARITHMETIC, FLOAT32_INPUTS, INTEGERS, MAKERS, MOVEMENT, WIDE, feeders

Half = Literal["float16", "bfloat16"]
DTYPES: Mapping[Half, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
LIMITS = {ir.DataType.FLOAT16: torch.finfo(torch.float16), ir.DataType.BFLOAT16: torch.finfo(torch.bfloat16)}

HALVES = tuple(DTYPES.values())
CACHES = ("past_key_values.", "present.", "past_", "present_")


def to_half_(model: ir.Model, dtype: Half, *, float_io: bool = True) -> None:
    """Convert a float32 graph to half precision, in place. Reflections must still be operators.

    Args:
        model: exported, quantized by weights or not; its constants are rounded once.
        dtype: of products.
        float_io: inputs and outputs other than caches stay float32.

    Raises:
        NumericalError: constants beyond the dtype's range, all of them.
        UnsupportedModelError: branches, loops, or activations in integers.
    """
    graph = model.graph
    _refuse(graph)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    conversion = _Conversion(graph, DTYPES[dtype], feeders(graph))
    for value in graph.inputs:
        conversion.take_input(value, stays_wide=float_io and not str(value.name).startswith(CACHES))
    for node in list(graph):
        conversion.convert(node)
    conversion.round_constants()
    for position, value in enumerate(graph.outputs):
        conversion.give_output(position, stays_wide=float_io and not str(value.name).startswith(CACHES))


def widened(model: ir.Model) -> ir.Model:
    """The same graph in float32: every half-precision tensor, type and attribute widened, nothing recomputed.

    ONNX Runtime's CPU provider has no products of bfloat16. This graph shows there what the stored weights and the
    structure are worth; the rounding of activations it does not show.

    Args:
        model: not changed.

    Returns:
        A copy that shares no values with the model.
    """
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in HALVES:
            value.const_value = _cast(value.const_value, ir.DataType.FLOAT)
    for value in _values(copy.graph):
        if value.dtype in HALVES:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in copy.graph:
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
                node.attributes[name] = ir.AttrTensor(name, _cast(attribute.as_tensor(), ir.DataType.FLOAT))
            elif name in ("to", "dtype") and attribute.type == ir.AttributeType.INT and attribute.as_int() in HALVES:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
    return copy


@dataclass
class _Conversion:
    """One conversion on its way through a graph.

    Attributes:
        graph: changed in place.
        dtype: the half precision.
        feeders: arithmetic that is read by sums alone.
        wide: activations that are float32.
        uses: constants, and where each is wanted: (node, position of the input, in float32).
        casts: what has been made of an activation for its readers on the other side.
    """

    graph: ir.Graph
    dtype: ir.DataType
    feeders: frozenset[ir.Node]
    wide: set[ir.Value] = field(default_factory=set)
    uses: dict[ir.Value, list[tuple[ir.Node, int, bool]]] = field(default_factory=dict)
    casts: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def take_input(self, value: ir.Value, *, stays_wide: bool) -> None:
        """Decide a graph input; one with a default value is converted with it."""
        if value.dtype != ir.DataType.FLOAT or value.is_initializer():
            return
        if stays_wide:
            self.wide.add(value)
        else:
            value.type = ir.TensorType(self.dtype)

    def convert(self, node: ir.Node) -> None:
        """Decide a node, and bring its inputs and outputs to where it is."""
        is_wide = self._is_wide(node)
        exceptions = FLOAT32_INPUTS.get(node.op_type, ()) if not node.domain else ()
        for position, value in enumerate(node.inputs):
            if value is None or not (value.dtype == ir.DataType.FLOAT or value in self.casts or self._is_half(value)):
                continue
            wanted = is_wide or position in exceptions
            if _is_constant(value):
                self.uses.setdefault(value, []).append((node, position, wanted))
            elif (value in self.wide) != wanted:
                node.replace_input_with(position, self._cast_of(value))
        if node.op_type == "Cast" and not node.domain:
            return
        for output in node.outputs:
            if output.dtype in (ir.DataType.FLOAT, None) and _gives_floats(node, output):
                if is_wide:
                    self.wide.add(output)
                output.type = ir.TensorType(ir.DataType.FLOAT if is_wide else self.dtype)

    def round_constants(self) -> None:
        """Round every constant that half precision is wanted of, and keep float32 where that is wanted.

        Raises:
            NumericalError: some do not fit.
        """
        findings = []
        for value, uses in self.uses.items():
            assert value.const_value is not None
            exact = value.const_value
            narrow = [use for use in uses if not use[2]]
            if not narrow and not value.is_graph_input():
                continue
            rounded = _cast(exact, self.dtype)
            findings += list(_overflow(value, exact, rounded))
            for node, position, wanted in uses:
                if wanted:
                    node.replace_input_with(position, self._wide_copy(value, exact))
            value.const_value, value.type = rounded, ir.TensorType(self.dtype)
        if findings:
            raise NumericalError(
                f"{len(findings)} constants do not fit {self.dtype.name.lower()}",
                findings=findings,
                hint="bf16 has float32's range; fp32 loses nothing",
            )

    def give_output(self, position: int, *, stays_wide: bool) -> None:
        """Bring a graph output to its type, under its name."""
        value = self.graph.outputs[position]
        is_wide = value in self.wide
        if not (is_wide or self._is_half(value)) or is_wide == stays_wide:
            return
        name, value.name = value.name, f"{value.name}_{'float32' if is_wide else 'half'}"
        cast = self._cast_of(value)
        cast.name = name
        self.graph.outputs[position] = cast

    def _is_wide(self, node: ir.Node) -> bool:
        kind = "" if node.domain else node.op_type
        floats = [value for value in node.inputs if value is not None and not _is_constant(value)]
        wide = [value in self.wide for value in floats if value in self.wide or self._is_half(value)]
        if kind == "Cast":
            return node.outputs[0].dtype == ir.DataType.FLOAT and self._settle_cast(node)
        if kind in WIDE | MAKERS:
            return True
        if kind not in ARITHMETIC | MOVEMENT:
            return False
        if node in self.feeders or any(map(self._is_out_of_range, node.inputs)):
            return True
        return any(wide) if kind in ARITHMETIC else bool(wide) and all(wide)

    def _settle_cast(self, node: ir.Node) -> bool:
        """A cast to float32, of integers or truth values: its output is float32."""
        self.wide.add(node.outputs[0])
        return True

    def _is_half(self, value: ir.Value) -> bool:
        return value.dtype == self.dtype

    def _is_out_of_range(self, value: ir.Value | None) -> bool:
        """A scalar constant that half precision would make infinite or zero."""
        if value is None or not _is_constant(value) or value.dtype != ir.DataType.FLOAT:
            return False
        assert value.const_value is not None
        if value.const_value.size > 1:
            return False
        number = abs(float(value.const_value.numpy().reshape(-1)[0])) if value.const_value.size else 0.0
        limits = LIMITS[self.dtype]
        return number > limits.max or 0 < number < limits.tiny

    def _cast_of(self, value: ir.Value) -> ir.Value:
        """The value on the other side, by one cast for all its readers."""
        if value not in self.casts:
            target = self.dtype if value in self.wide else ir.DataType.FLOAT
            node = ir.node("Cast", [value], {"to": target}, name=f"{value.name}_to_{target.name.lower()}")
            output = node.outputs[0]
            output.name, output.type, output.shape = node.name, ir.TensorType(target), value.shape
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                node.metadata_props.update(producer.metadata_props)
                self.graph.insert_after(producer, node)
            if target == ir.DataType.FLOAT:
                self.wide.add(output)
            self.casts[value] = output
        return self.casts[value]

    def _wide_copy(self, value: ir.Value, exact: ir.TensorProtocol) -> ir.Value:
        name = f"{value.name}_float32"
        if name not in self.graph.initializers:
            copy = ir.Value(name=name, type=ir.TensorType(exact.dtype), shape=value.shape, const_value=exact)
            self.graph.register_initializer(copy)
        return self.graph.initializers[name]


def _refuse(graph: ir.Graph) -> None:
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    findings = []
    for node in graph:
        if node.op_type in INTEGERS and not node.domain:
            findings.append(f"{node.name}: {node.op_type} takes float32 activations only")
        if any(attribute.type in graphs for attribute in node.attributes.values()):
            findings.append(f"{node.name}: {node.op_type} holds a graph of its own")
    if findings:
        raise UnsupportedModelError("this graph cannot be converted to half precision", findings=findings)


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.is_initializer()


def _gives_floats(node: ir.Node, output: ir.Value) -> bool:
    """Whether an output whose type may be unknown is a float; unknown ones follow their first input."""
    if output.dtype is not None:
        return output.dtype == ir.DataType.FLOAT
    first = next((value for value in node.inputs if value is not None), None)
    return first is not None and first.dtype in (ir.DataType.FLOAT, *HALVES)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _cast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """Rounded once, to nearest; read from its file when it is written, if it is in one."""

    def convert() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # `_overflow` tells
            return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=tensor.name)

    if isinstance(tensor, ir.ExternalTensor):
        return ir.LazyTensor(convert, dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)
    return convert()


def _overflow(value: ir.Value, exact: ir.TensorProtocol, rounded: ir.TensorProtocol) -> Iterator[str]:
    largest = np.abs(exact.numpy()).max(initial=0)
    limit = LIMITS[rounded.dtype].max
    if limit < largest < np.inf:
        yield f"{value.name}: {largest:.4g}, the largest that fits is {limit:.4g}"
    elif not largest <= limit:
        yield f"{value.name}: not finite"
