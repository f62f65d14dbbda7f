"""Graphs that take LoRA factors as inputs: which pairs there are, and how the graph multiplies by them.

    Y = X W + s ((X A) B)        A and B inputs; s, where the graph has a scale of its own, a constant

Such graphs come from Olive's ExtractAdapters, from exports of PEFT models, and from anybody who kept the names
`<module path>.lora_A…` and `<module path>.lora_B…`. Nothing but names says which module a pair belongs to; everything
else is read off the nodes: whether a factor is stored as PEFT has it, A (r, d) and B (o, r), or transposed, the scale,
and the product with W that the pair stands beside.

Limits: factors of convolutions and embeddings, and factors that are quantized, are refused; so is a factor that is
used twice.

Letters: d in_features, o out_features, r rank.
Source: Olive, `olive/passes/onnx/extract_adapters.py`; ONNX Runtime GenAI, `models/builders/base.py`,
`make_matmul_lora`.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from hra_export.errors import GraphError, UnsupportedModelError
from hra_export.graph.lora_products import PASSED, alpha, as_multiplied, product_of, scale_behind, scale_between
from hra_export.graph.matching import common_shift, spellings
from hra_export.graph.sites import Weight, sites_of, weight_of

Side = Literal["A", "B"]

# `base_model.model.encoder.query.lora_A.default.weight`, `model.layers.0.attn.q_proj.lora_A.MatMul.weight`, …
NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<target>.+?)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[\w.-]+?))?(?:\.weight)?"
)
HINT = "`hra-export onnx --swappable` makes a graph that takes adapters, and so does Olive's ExtractAdapters"


@dataclass(frozen=True)
class Factor:
    """One factor of a pair, as the graph takes it.

    Attributes:
        name: of the input.
        dtype: NumPy's name of it.
        is_transposed: stored as PEFT has it, A (r, d) and B (o, r), and not as a product takes it.
        size: d of A, o of B.
        rank: r where it is fixed, its symbol where it is named, None where it is open.
        has_default: the graph runs without it.
    """

    name: str
    dtype: str
    is_transposed: bool
    size: int
    rank: int | str | None
    has_default: bool


@dataclass(frozen=True)
class LoraSite:
    """A pair of factors.

    Attributes:
        target: module path, by the names of the inputs.
        a: the factor that the layer's input meets first.
        b: the other one.
        scale: s, by which the graph multiplies.
        weight: W (d, o) of the product beside the pair; None when it is no plain constant.
    """

    target: str
    a: Factor
    b: Factor
    scale: float
    weight: Weight | None

    @property
    def rank(self) -> int | None:
        """r where it is fixed."""
        return next((factor.rank for factor in (self.a, self.b) if isinstance(factor.rank, int)), None)

    @property
    def symbols(self) -> set[str]:
        """What the graph calls r where it is not fixed."""
        return {factor.rank for factor in (self.a, self.b) if isinstance(factor.rank, str)}


def lora_sites(model: ir.Model) -> tuple[LoraSite, ...]:
    """Every pair of LoRA factors among the inputs of a graph, by target.

    Raises:
        GraphError: there is none, or what the graph does with one cannot be followed; all findings at once.
        UnsupportedModelError: factors of convolutions, or quantized ones.
    """
    named = _named_inputs(model)
    if not named:
        raise GraphError("the graph takes no adapters", findings=_baked(model), hint=HINT)
    reader = _Reader(model)
    sites, findings, unsupported = [], [], []
    for target, sides in sorted(named.items()):
        try:
            sites.append(reader.site(target, sides))
        except GraphError as error:
            findings.append(f"{target}: {error.message}")
        except UnsupportedModelError as error:
            unsupported.append(f"{target}: {error.message}")
    if findings:
        raise GraphError("what the graph does with its LoRA inputs cannot be followed", findings=findings)
    if unsupported:
        raise UnsupportedModelError("LoRA inputs of another kind than float matrices", findings=unsupported)
    return tuple(sites)


def shared_ranks(sites: Sequence[LoraSite]) -> frozenset[str]:
    """Targets whose ranks must be equal, because the graph calls them by one symbol.

    A runtime plans its memory by symbols: two sizes under one name end in an error, or in a buffer that is too small.
    """
    users: dict[str, set[str]] = defaultdict(set)
    for site in sites:
        for symbol in site.symbols:
            users[symbol].add(site.target)
    return frozenset(target for targets in users.values() if len(targets) > 1 for target in targets)


def match_sites(modules: Sequence[str], sites: Sequence[LoraSite]) -> tuple[dict[str, LoraSite], list[str]]:
    """The pair of every module, and a finding for each that has none.

    Args:
        modules: module paths. The graph may spell them as the GenAI builder does, and lack or add one prefix.
        sites: of the graph.
    """
    known = {site.target: site for site in sites}
    pending = [module for module in modules if not known.keys() & set(spellings(module))]
    shift = common_shift(pending, list(known)) or ("", "")
    found: dict[str, LoraSite] = {}
    findings, taken = [], dict[str, str]()
    for module in modules:
        name = next((name for name in spellings(module, shift) if name in known), None)
        if name is None:
            findings.append(f"{module}: the graph has no LoRA inputs for it")
        elif name in taken:
            findings.append(f"{module} and {taken[name]} both lead to the inputs of `{name}`")
        else:
            found[module], taken[name] = known[name], module
    return found, findings


def _named_inputs(model: ir.Model) -> dict[str, list[tuple[Side, str, ir.Value]]]:
    """Target → side, adapter's name and value of each of its inputs."""
    found: dict[str, list[tuple[Side, str, ir.Value]]] = defaultdict(list)
    for value in {str(value.name): value for value in model.graph.inputs}.values():
        match = _parsed(str(value.name))
        if match is not None:
            side: Side = "A" if match["side"] == "A" else "B"
            found[match["target"]].append((side, match["adapter"] or "", value))
    return found


def _parsed(name: str) -> re.Match[str] | None:
    return NAME.fullmatch(name.strip("/").replace("/", "."))


def _baked(model: ir.Model) -> list[str]:
    """What tells that a graph has LoRA factors that are no inputs."""
    names = [name for name in model.graph.initializers if _parsed(name) is not None]
    return [f"{len(names)} LoRA factors are constants, `{names[0]}` for one: make them inputs"] if names else []


class _Reader:
    """Follows the factors of one graph through its nodes."""

    def __init__(self, model: ir.Model) -> None:
        self._initializers = model.graph.initializers
        self._sites = {site.node: site for site in sites_of(model)}

    def site(self, target: str, sides: Sequence[tuple[Side, str, ir.Value]]) -> LoraSite:
        values = {side: value for side, _, value in sides}
        adapters = sorted({adapter for _, adapter, _ in sides})
        if any(adapter.partition(".")[0] == "quant" for adapter in adapters):  # Olive's name for what is no float
            raise UnsupportedModelError(f"`{sides[0][2].name}` is a part of a quantized factor")
        if len(adapters) > 1:
            raise GraphError(f"inputs for {len(adapters)} adapters, {', '.join(adapters)}: expected one")
        if missing := {"A", "B"} - values.keys():
            raise GraphError(f"no input `lora_{missing.pop()}` beside `{next(iter(values.values())).name}`")
        first, a = self._factor(values["A"], "A")
        second, b = self._factor(values["B"], "B")
        ranks = {factor.rank for factor in (a, b) if isinstance(factor.rank, int)}
        if len(ranks) > 1:
            raise GraphError(f"A has rank {a.rank}, B has rank {b.rank}")
        if a.dtype != b.dtype:
            raise GraphError(f"A is of type {a.dtype}, B of type {b.dtype}")
        between = scale_between(first, second)
        behind, other = scale_behind(second)
        scale = between * behind * alpha(first) * alpha(second)
        if scale == 0:
            raise GraphError("the graph multiplies it by 0")
        return LoraSite(target, a, b, scale, self._weight(other))

    def _factor(self, value: ir.Value, side: Side) -> tuple[ir.Node, Factor]:
        product, is_transposed = product_of(value)
        shape = value.shape
        if shape is None or len(shape) != 2 or value.dtype is None:
            raise GraphError(f"`{value.name}`: expected a matrix of a known type, got {value.dtype} {shape}")
        sizes = [size if isinstance(size, int) else size.value for size in shape]
        if (side == "A") == is_transposed:
            sizes.reverse()
        size, rank = sizes  # A as a product takes it is (d, r), B (r, o)
        if not isinstance(size, int):
            raise GraphError(f"`{value.name}`: expected a fixed width, got {shape}")
        has_default = value.name in self._initializers
        return product, Factor(str(value.name), value.dtype.numpy().name, is_transposed, size, rank, has_default)

    def _weight(self, value: ir.Value | None) -> Weight | None:
        """W (d, o) of the product that a value comes from, with no more than a bias between."""
        while value is not None and (node := value.producer()) is not None:
            site = self._sites.get(node)
            if site is not None:
                plain = site.weight if site.weight is not None and site.weight.is_plain else None
                return as_multiplied(plain, node) if plain is not None and site.kind == "product" else None
            if node.op_type not in ("Add", *PASSED):
                return None
            value = next((each for each in node.inputs if each is not None and weight_of(each) is None), None)
        return None
