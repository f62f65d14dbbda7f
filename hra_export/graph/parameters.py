"""Trained biases and saved modules of an adapter in a graph that exists: which constants they replace.

A parameter of a module that a product came from is that product's weight or bias; any other is the initializer of its
name. What is shared with another module is left to it: the product gets a constant of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from hra_export.graph.matching import Matches, SiteIndex
from hra_export.graph.sites import Site, weight_of

BIAS_POSITION = {"Gemm": 2, "Conv": 2, "MatMulNBits": 5}


@dataclass(frozen=True)
class ParameterChange:
    """A trained parameter and the place of the constant that it replaces.

    Attributes:
        name: of the parameter, and of the new initializer.
        users: nodes and the input that holds the constant.
        tensor: as those nodes see it.
        dtype: of the constant.
        old: the initializer that goes when nothing else uses it.
    """

    name: str
    users: tuple[tuple[ir.Node, int], ...]
    tensor: Tensor
    dtype: ir.DataType
    old: ir.Value

    def apply_(self) -> None:
        """Put the parameter in place of the base's."""
        graph = self.old.graph or self.users[0][0].graph
        assert isinstance(graph, ir.Graph)
        content = ir.tensor(self.tensor.detach().contiguous(), dtype=self.dtype, name=self.name)
        value = ir.Value(name=self.name, type=ir.TensorType(self.dtype), shape=ir.Shape(self.tensor.shape))
        value.const_value = content
        for node, position in self.users:
            node.replace_input_with(position, value)
        if self.old.is_initializer() and not self.old.uses() and not self.old.is_graph_input():
            graph.initializers.pop(self.old.name or "")
        elif self.old.name == self.name:
            value.name = content.name = f"{self.name}.trained"
        graph.register_initializer(value)


def find_parameters(
    trained: Mapping[str, Tensor], matches: Matches, sites: Sequence[Site], model: ir.Model
) -> tuple[list[ParameterChange], list[str]]:
    """The place of every trained parameter, and a finding for each that has none.

    Args:
        trained: parameter name in the base model → value.
        matches: how the adapter's names are spelled in the graph.
        sites: of the graph.
        model: the graph.
    """
    index = SiteIndex(sites)
    changes, findings = [], []
    for name, tensor in trained.items():
        change = _place(name, tensor, matches, index, model)
        if isinstance(change, str):
            findings.append(f"{name}: {change}")
        else:
            changes.append(change)
    return changes, findings


def _place(name: str, tensor: Tensor, matches: Matches, index: SiteIndex, model: ir.Model) -> ParameterChange | str:
    module, _, leaf = name.rpartition(".")
    found = next((sites for spelling in matches.spellings(module) if (sites := index.find(spelling))), [])
    places = list(_constants(found, leaf)) if leaf in ("weight", "bias") else []
    if found and len(places) < len(found):
        return f"{found[0].label} has no {leaf} that can be replaced"
    if not places:
        values = (model.graph.initializers.get(f"{spelling}.{leaf}") for spelling in matches.spellings(module))
        value = next((value for value in values if value is not None), None)
        if value is None:
            return "no initializer of this name, and no product of its module"
        places = [(usage.node, usage.idx) for usage in value.uses()]
    is_transposed = _is_transposed(found[0], name, tensor) if found and leaf == "weight" else False
    return is_transposed if isinstance(is_transposed, str) else _change(name, tensor, places, is_transposed)


def _change(
    name: str, tensor: Tensor, places: Sequence[tuple[ir.Node, int]], is_transposed: bool
) -> ParameterChange | str:
    weights = [weight_of(node.inputs[position]) for node, position in places]
    if not weights or any(weight is None or not weight.is_plain for weight in weights):
        return "what it would replace is not a plain constant"
    first = weights[0]
    assert first is not None
    seen = tensor.mT if is_transposed else tensor
    shapes = {weight.shape for weight in weights if weight is not None}
    if shapes != {tuple(seen.shape)}:
        return f"expected shape {min(shapes)}, got {tuple(seen.shape)}"
    if not first.tensor.dtype.is_floating_point():
        return f"what it would replace is of type {first.tensor.dtype}"
    if not torch.isfinite(seen).all():
        return "it is not finite"
    return ParameterChange(name, tuple(places), seen, first.tensor.dtype, first.value)


def _constants(sites: Sequence[Site], leaf: str) -> Iterator[tuple[ir.Node, int]]:
    for site in sites:
        if leaf == "weight" and site.weight is not None:
            yield site.node, 0 if site.kind == "lookup" else 1
        elif leaf == "bias":
            yield from _bias(site.node)


def _bias(node: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """The constant that is added to a product: an input of its own, or the other side of the addition behind it."""
    position = BIAS_POSITION.get(node.op_type)
    if position is not None and position < len(node.inputs) and node.inputs[position] is not None:
        yield node, position
        return
    consumers = list(node.outputs[0].consumers())
    if len(consumers) == 1 and consumers[0].op_type == "Add":
        (added,) = consumers
        yield from ((added, i) for i, value in enumerate(added.inputs) if _is_vector(value))


def _is_vector(value: ir.Value | None) -> bool:
    weight = weight_of(value)
    return weight is not None and len(weight.shape) == 1


def _is_transposed(site: Site, name: str, tensor: Tensor) -> bool | str:
    """Whether a product sees the transpose of the parameter, or why that cannot be told.

    A weight under the parameter's own name may be as stored: (o, d), or (d, o) for transformers' Conv1D.
    """
    if site.kind != "product" or site.weight is None or _transposes(site.node):
        return False
    is_stored = site.weight.value.name == name and site.weight.permutation == (0, 1)
    if is_stored and tensor.shape[0] == tensor.shape[-1]:
        return f"{site.label} has a square weight of this name, whose orientation cannot be told"
    return not is_stored or tuple(tensor.shape) != site.weight.shape


def _transposes(node: ir.Node) -> bool:
    return "transB" in node.attributes and node.attributes["transB"].as_int() == 1
