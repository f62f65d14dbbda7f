"""Rounding a graph's weights to 4 or 8 bits. Reflections stay outside: their U and V keep the activations' precision.

- weight-only (decoders, and int4 everywhere): MatMulNBits, blocks of codes with a scale each.
- dynamic int8 (encoders, images): activations are rounded in every call, products run in integers. Not for decoders:
  a few activations of Llama's are a hundred times the others, and one scale for all leaves the rest a few codes
  (SmolLM2: KL 0.42 nats, top-1 69 %; 8-bit weights alone 0.0025 and 97 %).

A rotation keeps ‖Q(W) − W‖, so that folding the adapter before or reflecting after makes no difference to the error of
a float base. A base that is quantized already is another matter: see `kept_bits`.
"""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from hra_export.errors import GraphError, NumericalError
from hra_export.graph import dynamic_int8
from hra_export.graph.blocks import BlockWriter
from hra_export.graph.products import Array, Product, lookups, module_path, weight_products
from hra_export.quantization import Bits, QuantizedMatrix, quantize, relative_error

Scheme = Literal["weights", "dynamic"]

DYNAMIC_FAMILIES = frozenset({"encoder", "image"})
# Activations rounded to 8 bits within each product, on the CPU provider: a quarter more speed for 4 bits, and 8 bits
# have no other fast kernel there. Beside the error of the weights it is small: SmolLM2 in int4, KL 0.448 for 0.442.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class QuantizedSite:
    """One weight.

    Attributes:
        name: module path, or the weight's name.
        bits: of a code.
        shape: (o, d).
        error: ‖Q(W) − W‖ / ‖W‖; 0 where the codes are the base's own.
    """

    name: str
    bits: int
    shape: tuple[int, int]
    error: float


@dataclass(frozen=True)
class QuantizationReport:
    """What became of a graph's weights.

    Attributes:
        scheme: weight-only or dynamic.
        sites: quantized weights.
        float_sites: products whose weights stayed as they were.
        size_before: bytes of all constants in the graph.
        size_after: the same, afterwards.
    """

    scheme: Scheme
    sites: tuple[QuantizedSite, ...]
    float_sites: tuple[str, ...]
    size_before: int
    size_after: int

    @property
    def worst(self) -> QuantizedSite:
        """The site with the largest error."""
        return max(self.sites, key=lambda site: site.error)


def scheme_for(precision: Literal["int8", "int4"], family: str) -> Scheme:
    """Weight-only or dynamic, for a precision and the model's family."""
    return "dynamic" if precision == "int8" and family in DYNAMIC_FAMILIES else "weights"


def quantize_(
    model: ir.Model,
    precision: Literal["int8", "int4"],
    *,
    family: str,
    block_size: int = 32,
    symmetric: bool = False,
    head_bits: Bits | None = 8,
    embedding_bits: Bits | None = None,
    accuracy_level: int = ACCURACY_LEVEL,
) -> QuantizationReport:
    """Round the weights of a float graph, in place. Reflections must still be operators.

    Args:
        model: a float32, float16 or bfloat16 graph.
        precision: of the codes.
        family: of the model, which decides the scheme for int8.
        block_size: columns that share a scale; weight-only.
        symmetric: no zero points; weight-only.
        head_bits: for the product that makes `logits`, at least as many as the others have; None leaves it in float.
        embedding_bits: for rows of embeddings, None to leave them in float; one that is tied to a product has that
            product's bits. Weight-only.
        accuracy_level: MatMulNBits' attribute for the CPU provider: 4 for activations rounded to 8 bits, 0 for their
            own precision.

    Raises:
        GraphError: no product with a constant matrix, or quantized activations asked of a graph in half precision.
        NumericalError: a weight is not finite.
        UnsupportedModelError: the graph has branches or loops.
    """
    products = weight_products(model)
    if not products:
        raise GraphError(
            "nothing to quantize: no MatMul or Gemm has a constant matrix",
            hint="quantize before anything else is done to the exported graph; a quantized graph is not taken again",
        )
    if scheme_for(precision, family) == "dynamic":
        return _quantize_dynamically_(model, products)
    bits: Bits = 4 if precision == "int4" else 8
    before, tables = constants_size(model), _whole_lookups(model, block_size)
    writer, head = BlockWriter(model, accuracy_level), _head(model)
    done: dict[ir.Value, tuple[QuantizedMatrix, QuantizedSite]] = {}
    kept = []
    for product in products:
        used = head_bits and max(head_bits, bits) if product.node is head else bits
        if used is None:
            kept.append(product.name)
            continue
        if product.weight not in done:  # ALBERT's layers share theirs
            done[product.weight] = _rounded(product.name, product.matrix(), used, block_size, symmetric)
        writer.replace_product_(product, done[product.weight][0])
    sites = [site for _, site in done.values()]
    for node in tables:
        table = node.inputs[0]
        assert table is not None
        if table in done:
            writer.replace_lookup_(node, done[table][0])
        elif embedding_bits is not None and table.const_value is not None:
            name = module_path(node) or str(table.name)
            matrix, site = _rounded(name, table.const_value.numpy(), embedding_bits, block_size, symmetric)
            writer.replace_lookup_(node, matrix)
            sites.append(site)
    return QuantizationReport("weights", tuple(sites), tuple(kept), before, constants_size(model))


def _rounded(
    name: str, weight: Array, bits: Bits, block_size: int, symmetric: bool
) -> tuple[QuantizedMatrix, QuantizedSite]:
    try:
        matrix = quantize(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    except NumericalError as error:
        raise NumericalError(f"`{name}`: {error}") from error
    return matrix, QuantizedSite(name, bits, matrix.shape, relative_error(matrix, weight))


def _whole_lookups(model: ir.Model, block_size: int) -> list[ir.Node]:
    """Embeddings whose rows are whole blocks; there is no node for others."""
    found = []
    for node in lookups(model):
        table = node.inputs[0]
        assert table is not None
        assert table.const_value is not None
        if table.const_value.shape.numpy()[1] % block_size == 0:
            found.append(node)
    return found


def _head(model: ir.Model) -> ir.Node | None:
    """The node that makes the output `logits`, or the one before it when that only adds, casts or selects."""
    values = [output for output in model.graph.outputs if output.name == "logits"]
    node = values[0].producer() if values else None
    while node is not None and node.op_type in ("Add", "Cast", "Identity", "Reshape", "Slice", "Gather", "Mul", "Div"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def _quantize_dynamically_(model: ir.Model, products: tuple[Product, ...]) -> QuantizationReport:
    before = constants_size(model)
    halves = [product.name for product in products if product.x.dtype not in (None, ir.DataType.FLOAT)]
    if halves:
        raise GraphError(
            "dynamic int8 rounds float32 activations, and the graph's are in half precision",
            hint="quantize the float32 graph",
        )
    sites = [
        QuantizedSite(product.name, 8, product.shape, error)
        for product, error in zip(products, dynamic_int8.replace_products_(model, products), strict=True)
    ]
    return QuantizationReport("dynamic", tuple(sites), (), before, constants_size(model))


def constants_size(model: ir.Model) -> int:
    """Bytes of all constants of a graph."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)
