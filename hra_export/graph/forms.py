"""The reflections of a graph as plain operators, in a form that is fast where the graph will run.

| form | for x of k reflections | operators beside the products |
|---|---|---|
| `add` | x + (x U) V | 3 k |
| `sub` | x − (x U)(−V) | 3 k |
| `gemm` | Gemm(x U, V, x), for x of two dimensions | 2 k |
| `grouped` | x + (x [U_1 … U_k]) V_i, V_i among zeros | 1 + 2 k |
| `output` | x W + (x U)(V W), as LoRA has it | 3 k |
| `output-grouped` | x W + (x [U_1 … U_k])(V_i W), V_i W among zeros | 1 + 2 k |
| `packed` | x [W U], split, x W + (x U)(V W) | 3 k |
| `augmented` | [x, x U_1 … x U_k] [W; V W] | 2 |

A form that does not apply to a reflection gives way to `add`, which always does: U or V is an input, so nothing may be
computed from them; or something else than products with constant matrices reads the output, an int4 product for one.

Letters: d in_features, r rank, k reflections that share an input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import onnx_ir as ir

from hra_export.graph.constants import dtype_of
from hra_export.graph.grouping import ReflectionSite, forget_operator_, groups, matrix_shape
from hra_export.graph.input_forms import add_, gemm_, grouped_, subtract_
from hra_export.graph.output_forms import augmented_, output_, output_grouped_, packed_
from hra_export.graph.products import drop_constant_
from hra_export.graph.regrouping import ungroup_

Form = Literal["add", "sub", "gemm", "grouped", "output", "output-grouped", "packed", "augmented"]
Choice = Form | Literal["auto"]
Share = tuple[Form, Sequence[ReflectionSite]]
ADD: Form = "add"

# Above this share of d, the zeros in joint factors cost more than the operators that they save.
JOINT_RANK_OF_FEATURES = 1 / 12

LOWERINGS: Mapping[Form, Callable[[Sequence[ReflectionSite]], None]] = {
    "add": add_,
    "sub": subtract_,
    "gemm": gemm_,
    "grouped": grouped_,
    "output": output_,
    "output-grouped": output_grouped_,
    "packed": packed_,
    "augmented": augmented_,
}


def lower_(model: ir.Model, form: Choice = "auto") -> dict[str, Form]:
    """Replace every reflection of a model by plain operators, in place; the last of all passes.

    Constants that nobody reads any more are dropped, and so is the operator's body, if there is one.

    `auto` is `augmented` where it applies and else `grouped`, for reflections that share an input together where their
    ranks add up to at most d / 12, and else for each by itself. Times over that of the merged graph at r = 8, on an AMD
    EPYC (2 cores) with ONNX Runtime 1.31, from `benchmarks/onnx.py`; differences below 0.03 are noise:

    |                        | `add` | `grouped` | `output` | `packed` | `augmented` |
    |------------------------|-------|-----------|----------|----------|-------------|
    | MiniLM, 128 tokens     | 1.22  | 1.22      | 1.19     | 1.22     | 1.15        |
    | MiniLM, 8 × 128        | 1.09  | 1.09      | 1.09     | 1.14     | 1.07        |
    | SmolLM2, prefill 128   | 1.12  | 1.13      | 1.13     | 1.17     | 1.07        |
    | SmolLM2, decode at 128 | 1.11  | 1.11      | 1.14     | 1.18     | 1.10        |

    Decoding pays for operators: 19 a layer more with `grouped`, 21 with `add`, 8 with `augmented`. A dense (d, d)
    matrix costs 2.

    Args:
        model: with opaque reflections or with functions.
        form: for all, where it applies.

    Returns:
        Target → the form that it got.
    """
    ungroup_(model)
    got: dict[str, Form] = {}
    touched: set[ir.Value] = set()
    for sites in groups(model):
        touched |= {value for site in sites for value in (site.u, site.v, *(each.weight for each in site.products))}
        for chosen, together in _fastest(sites) if form == "auto" else _wherever_it_applies(form, sites):
            got |= {site.target: chosen for site in together}
            LOWERINGS[chosen](together)
    for value in touched:
        if isinstance(value.graph, ir.Graph) and not value.is_graph_input():
            drop_constant_(value.graph, value)
    forget_operator_(model)
    return got


def _wherever_it_applies(form: Form, sites: Sequence[ReflectionSite]) -> Iterator[Share]:
    fit, rest = _parted(form, sites)
    yield from ((chosen, part) for chosen, part in ((form, fit), (ADD, rest)) if part)


def _fastest(sites: Sequence[ReflectionSite]) -> Iterator[Share]:
    augmentable, others = _parted("augmented", sites)
    for together in _small_enough(augmentable):
        yield "augmented", together
    for together in _small_enough(others):
        yield "grouped" if len(together) > 1 else ADD, together  # fed ones are alone


def _parted(form: Form, sites: Sequence[ReflectionSite]) -> tuple[list[ReflectionSite], list[ReflectionSite]]:
    """Those that a form applies to, and the rest."""
    fit = [site for site in sites if _applies(form, site)]
    return fit, [site for site in sites if site not in fit]


def _small_enough(sites: Sequence[ReflectionSite]) -> Iterator[Sequence[ReflectionSite]]:
    """All together where the zeros of joint factors are few; else each by itself."""
    if len(sites) > 1:
        d, _ = matrix_shape(sites[0].u)
        if sum(site.rank for site in sites) <= d * JOINT_RANK_OF_FEATURES:
            yield sites
            return
    yield from ([site] for site in sites)


def _applies(form: Form, site: ReflectionSite) -> bool:
    if form == ADD:
        return True
    if not site.is_constant:
        return False
    if form == "gemm":
        return site.x.shape is not None and len(site.x.shape) == 2
    if form in ("sub", "grouped"):
        return True
    if not site.products or any(dtype_of(each.weight) != dtype_of(site.u) for each in site.products):
        return False
    if form == "packed":
        return len(site.products) == 1 and site.products[0].node.op_type == "MatMul"
    return True
