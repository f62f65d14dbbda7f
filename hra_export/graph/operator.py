"""The reflection as an ONNX operator: `hra::HouseholderReflection`, version 1.

    Y = X + (X U) V        X (…, d), U (d, r), V (r, d), Y (…, d), all of one float type; no attributes

U V = Rᵀ − I, so that a product with W after it equals a product with W R. The sign lies inside V: an addition can be
fused into the second product, a subtraction cannot. r may be 0, and Y is then X.

In a file the operator is a model-local function, which every runtime with functions inlines, the checker checks and
the reference evaluator runs. A runtime with a kernel of this domain and name uses the kernel instead.

Letters: d in_features, r rank.
"""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from hra_export import householder
from hra_export.householder import BlockReflector

DOMAIN = "hra"
OPERATOR = "HouseholderReflection"
VERSION = 1
STEPS = ("XU", "XUV", "Y")  # what the body's nodes compute


def operands(
    blocks: Sequence[BlockReflector], dtype: torch.dtype, *, rows: bool = False, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """U and V of a target's chains, computed in float64, balanced, and rounded once.

    As −U S Uᵀ they would cancel in half precision: the paired start of PEFT leaves nearly parallel columns, whose
    products are large beside what the pair does. Balanced, U V has factors of its own size.

    Args:
        blocks: the chains of one target in the order of W R_1 R_2 …, float64.
        dtype: of the activations.
        rows: R and not Rᵀ, for the looked-up rows of an embedding.
        strength: s in I + s (R − I).

    Returns:
        U (d, r) and V (r, d), contiguous; r is the sum of the ranks.
    """
    left, right = householder.balanced(*exact_operands(blocks, rows=rows, strength=strength))
    return left.to(dtype).contiguous(), right.to(dtype).contiguous()


def exact_operands(
    blocks: Sequence[BlockReflector], *, rows: bool = False, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """U (d, r) and V (r, d) in float64, not balanced; arguments as of `operands`."""
    whole = householder.compose(blocks[0], *blocks[1:])
    s = whole.t if rows else whole.t.T
    return whole.u, -strength * (s @ whole.u.T)


def trace(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """X + (X U) V for a model that is being exported: one node, whatever the exporter's passes do around it.

    Args:
        x: (…, d).
        u: (d, r), a buffer; its name becomes that of the initializer.
        v: (r, d), a buffer.
    """
    name = f"{DOMAIN}::{OPERATOR}"
    result: Tensor = torch.onnx.ops.symbolic(name, (x, u, v), attrs={}, dtype=x.dtype, shape=x.shape, version=VERSION)
    return result


def node(x: ir.Value, u: ir.Value, v: ir.Value, *, name: str) -> ir.Node:
    """A node of the operator; its output has x's type and shape."""
    made = ir.node(OPERATOR, [x, u, v], domain=DOMAIN, version=VERSION, name=name)
    (output,) = made.outputs
    output.type, output.shape, output.name = x.type, x.shape, f"{name}_output"
    return made


def is_reflection(candidate: ir.Node) -> bool:
    """Whether a node is the operator."""
    return candidate.domain == DOMAIN and candidate.op_type == OPERATOR


def function(opset: int) -> ir.Function:
    """The operator's body: MatMul, MatMul, Add.

    Args:
        opset: version of the ONNX domain in the model that carries it.
    """
    x, u, v = (ir.Value(name=name) for name in ("X", "U", "V"))
    nodes = steps(x, u, v)
    for made, name in zip(nodes, STEPS, strict=True):
        made.outputs[0].name = name
    graph = ir.Graph([x, u, v], [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": opset}, name=OPERATOR)
    return ir.Function(DOMAIN, OPERATOR, graph=graph, attributes=[])


def steps(x: ir.Value, u: ir.Value, v: ir.Value) -> list[ir.Node]:
    """The plain nodes of one reflection; the last one's output is Y, and no output has a name yet."""
    coefficients = ir.node("MatMul", [x, u])  # (…, r)
    change = ir.node("MatMul", [coefficients.outputs[0], v])  # (…, d)
    return [coefficients, change, ir.node("Add", [x, change.outputs[0]])]


def declare_(model: ir.Model) -> None:
    """Give a model the operator's body and its domain; to be called after every optimizer, which would inline it."""
    model.graph.opset_imports[DOMAIN] = VERSION
    body = function(model.graph.opset_imports[""])
    model.functions[body.identifier()] = body
