"""Which operators lose what they compute in half precision, and which only hand values on. ONNX's own domain.

Everything that is not named here (products, convolutions, reflections, the runtime's fused operators) takes and gives
half precision and accumulates in float32.
"""

from collections.abc import Mapping

import onnx_ir as ir


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


WIDE = _names(
    "ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceProd Pow Sqrt "
    "Reciprocal Exp Log Softmax LogSoftmax Cos Sin CumSum Range InstanceNormalization GroupNormalization "
    "LpNormalization MeanVarianceNormalization BatchNormalization"
)
ARITHMETIC = _names(
    "Add Sub Mul Div Neg Abs Where Min Max Mean Sum Clip Relu Sigmoid Tanh Erf Gelu Mod Sign Equal Less LessOrEqual "
    "Greater GreaterOrEqual IsNaN IsInf Mish HardSigmoid LeakyRelu Elu Softplus PRelu Floor Ceil Round"
)
MOVEMENT = _names(
    "Reshape Transpose Squeeze Unsqueeze Slice Expand Gather GatherElements GatherND Concat Split Identity Tile Pad "
    "Flatten Dropout ScatterND ScatterElements Trilu ReduceMax ReduceMin ArgMax ArgMin TopK MaxPool DepthToSpace "
    "SpaceToDepth Shape Size NonZero"
)
MAKERS = _names("ConstantOfShape EyeLike RandomNormal RandomUniform RandomNormalLike RandomUniformLike")
INTEGERS = _names("DynamicQuantizeLinear MatMulInteger QuantizeLinear DequantizeLinear ConvInteger")
# Inputs that the operator's definition wants in float32 whatever the data is.
FLOAT32_INPUTS: Mapping[str, tuple[int, ...]] = {"Resize": (1, 2), "Upsample": (1,)}


def feeders(graph: ir.Graph) -> frozenset[ir.Node]:
    """Arithmetic whose results go into sums, roots and the like and nowhere else: the squares of a norm."""
    found: set[ir.Node] = set()
    for node in reversed(graph):
        readers = [use.node for output in node.outputs for use in output.uses()]
        is_result = any(output.is_graph_output() for output in node.outputs)
        is_arithmetic = node.op_type in ARITHMETIC and not node.domain and not is_result
        if is_arithmetic and readers and all(reader in found or _is_wide_kind(reader) for reader in readers):
            found.add(node)
    return frozenset(found)


def _is_wide_kind(node: ir.Node) -> bool:
    return node.op_type in WIDE and not node.domain
