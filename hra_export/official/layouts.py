"""How the chains of HRA lie in files of other code: the authors' four code bases, PEFT's drafts, lora-lite.

Names and shapes only. A layout is recognized from the names of the tensors; where several fit, all are told.

Source: DaShenZi721/HRA at 8e0c637, and at bd81557 and 64a6c4d for the older names; wassname/lora-lite at 88f107a, and
before 67a6daf for the reversed order; huggingface/peft pull request 1864 for the draft.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_export.errors import AdapterError, ConversionError
from hra_export.names import PEFT_PREFIX


@dataclass(frozen=True)
class ForeignLayout:
    """One way to store chains.

    Attributes:
        what: in words, for messages.
        pattern: of a tensor that is a chain or a vector of one; `module` is what carries it, `index` its place.
        is_output_side: W' = Pᵀ W, the vectors have a row for each output feature; otherwise W' = W P.
        is_soft: divided by √(‖u‖² + ε) instead of ‖u‖.
        is_in_rows: (r, d) instead of (d, r).
        is_reversed: the last vector comes first in the product.
        has_gram_schmidt: whether that code could orthogonalize the columns first.
    """

    name: str
    what: str
    pattern: re.Pattern[str]
    is_output_side: bool = False
    is_soft: bool = False
    is_in_rows: bool = False
    is_reversed: bool = False
    has_gram_schmidt: bool = False


_ANY_PREFIX = rf"(?:{re.escape(PEFT_PREFIX)})?"
_VECTORS = re.compile(rf"{_ANY_PREFIX}(?P<module>.+)\.(?:hra_u|householder_U)(?:\.default)?")
_ROWS = re.compile(r"(?P<module>.+)\.lora_U")
# `attn1.processor.to_out_hra` stands for `attn1.to_out.0`.
_PROCESSOR = re.compile(r"(?P<attention>.+)\.processor\.to_(?P<part>q|k|v|out)_(?:hra|householder)")
# What those processors store beside their vectors.
PROCESSOR_BUFFERS = re.compile(rf"{_PROCESSOR.pattern}\.(?:cross_attention_dim|hidden_size)")

LAYOUTS: dict[str, ForeignLayout] = {
    layout.name: layout
    for layout in (
        ForeignLayout("nlu", "the authors' DeBERTa code", _VECTORS, has_gram_schmidt=True),
        ForeignLayout("subject", "the authors' DreamBooth code", _VECTORS, has_gram_schmidt=True),
        ForeignLayout("control", "the authors' controllable generation", _VECTORS, has_gram_schmidt=True),
        ForeignLayout(
            "llama",
            "the authors' LLaMA code, softened reflections after the layer",
            re.compile(rf"{_ANY_PREFIX}(?P<module>.+)\.(?:oft_r|hra_r)(?:\.default)?"),
            is_output_side=True,
            is_soft=True,
            has_gram_schmidt=True,
        ),
        ForeignLayout(
            "v-list",
            "the authors' first code, a list of softened vectors",
            re.compile(r"(?P<module>.+)\.v_list\.(?P<index>\d+)"),
            is_soft=True,
        ),
        ForeignLayout("peft", "PEFT, chains before the layer", _VECTORS, has_gram_schmidt=True),
        ForeignLayout(
            "peft-draft",
            "PEFT's first draft, chains after the layer",
            _VECTORS,
            is_output_side=True,
            has_gram_schmidt=True,
        ),
        ForeignLayout("lora-lite", "lora-lite, vectors in rows", _ROWS, is_in_rows=True),
        ForeignLayout(
            "lora-lite-reversed",
            "lora-lite before 27 April 2026, vectors in rows, the last one first in the product",
            _ROWS,
            is_in_rows=True,
            is_reversed=True,
        ),
    )
}


def recognize(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The layouts that tensors can be of, by their names; several when names do not tell.

    Raises:
        ConversionError: no chains among them, of several kinds, or of a kind that is no HRA.
    """
    leaves = {leaf: owners for leaf in _LEAVES if (owners := _owners(tensors, leaf))}
    if not leaves:
        raise ConversionError(
            "no chain of HRA among the tensors",
            hint=f"expected names that end in {', '.join(f'`.{leaf}`' for leaf in _LEAVES)}",
        )
    if len(leaves) > 1:
        raise ConversionError(
            "chains of several layouts in one file",
            findings=[f".{leaf}: {len(owners)} tensors" for leaf, owners in leaves.items()],
            hint="`--layout` chooses one; the other tensors are then refused",
        )
    ((leaf, owners),) = leaves.items()
    return _LEAVES[leaf](tensors, owners)


def chain_vectors(layout: ForeignLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The chains in PEFT's shape and order: module path → (n, r), columns in the order of the product, as stored.

    Raises:
        AdapterError: shapes that no chain has, vectors missing from a list; all findings.
    """
    vectors: dict[str, dict[int, Tensor]] = {}
    for name, value in tensors.items():
        match = layout.pattern.fullmatch(name)
        if match is not None:
            index = int(match["index"]) if "index" in layout.pattern.groupindex else 0
            vectors.setdefault(module_path(match["module"]), {})[index] = value
    findings = [line for module, parts in vectors.items() for line in _misshapen(layout, module, parts)]
    if not vectors:
        findings = [f"no tensor of the layout `{layout.name}`, {layout.what}"]
    if findings:
        raise AdapterError(f"{len(findings)} chains cannot be read as `{layout.name}`", findings=findings)
    return {module: _columns(layout, [parts[i] for i in sorted(parts)]) for module, parts in vectors.items()}


def module_path(owner: str) -> str:
    """The module that a chain acts on: diffusers' attention layer in place of the processor that holds the chain."""
    match = _PROCESSOR.fullmatch(owner)
    if match is None:
        return owner
    return f"{match['attention']}.to_{match['part']}" + (".0" if match["part"] == "out" else "")


def _columns(layout: ForeignLayout, parts: list[Tensor]) -> Tensor:
    stacked = torch.cat([part.reshape(-1, 1) for part in parts], dim=1) if layout.name == "v-list" else parts[0]
    columns = stacked.T if layout.is_in_rows else stacked
    return (columns.flip(1) if layout.is_reversed else columns).contiguous()


def _misshapen(layout: ForeignLayout, module: str, parts: Mapping[int, Tensor]) -> Iterator[str]:
    if "index" in layout.pattern.groupindex:
        if sorted(parts) != list(range(len(parts))):
            yield f"{module}: vectors 0 to {max(parts)} expected, got {sorted(parts)}"
        shapes = sorted({tuple(part.shape) for part in parts.values()})
        if len(shapes) != 1 or shapes[0][1:] not in ((), (1,)) or len(parts) > shapes[0][0]:
            yield f"{module}: expected at most d vectors of one shape (d, 1), got {len(parts)} of {shapes}"
    else:
        shape = tuple(parts[0].shape)
        sides = shape[::-1] if layout.is_in_rows else shape
        if len(shape) != 2 or not 1 <= sides[1] <= sides[0]:
            yield f"{module}: expected {'(r, d)' if layout.is_in_rows else '(d, r)'} with r <= d, got {shape}"
    if wrong := {part.dtype for part in parts.values() if not part.is_floating_point()}:
        yield f"{module}: expected floats, got {wrong.pop()}"


def _owners(tensors: Mapping[str, Tensor], leaf: str) -> list[str]:
    """The names in front of a leaf, an adapter's name and a number behind it left out."""
    found = re.compile(rf"(.+)\.{re.escape(leaf)}(?:\.\d+|\.default)?")
    return [match[1] for name in tensors if (match := found.fullmatch(name))]


def _of_vectors(tensors: Mapping[str, Tensor], owners: list[str]) -> tuple[str, ...]:
    if all(_PROCESSOR.fullmatch(owner) for owner in owners):
        return ("subject",)
    if all(f"{owner}.fixed_linear.weight" in tensors for owner in owners):
        return ("control",)
    if all(owner.startswith(PEFT_PREFIX) for owner in owners):
        return ("peft", "peft-draft")
    return ("nlu",) if all(f"{owner}.weight" in tensors for owner in owners) else ("nlu", "peft-draft")


def _of_older_vectors(_tensors: Mapping[str, Tensor], _names: list[str]) -> tuple[str, ...]:
    return ("nlu",)


def _of_oft(tensors: Mapping[str, Tensor], _names: list[str]) -> tuple[str, ...]:
    if any(value.ndim != 2 for name, value in tensors.items() if LAYOUTS["llama"].pattern.fullmatch(name)):
        raise ConversionError(
            "this is OFT, not HRA: blocks of a rotation instead of reflection vectors",
            hint="PEFT's own `merge_and_unload` merges it",
        )
    return ("llama",)


def _of_lists(tensors: Mapping[str, Tensor], owners: list[str]) -> tuple[str, ...]:
    if any(f"{owner}.fixed_linear.weight" in tensors for owner in owners):
        raise ConversionError(
            "the code that wrote this (`generation/control/householder.py`) multiplied by 1 - 2 v vᵀ, and by the last "
            "vector alone: that is no reflection, and nothing has been trained that could be converted"
        )
    return ("v-list",)


def _of_rows(tensors: Mapping[str, Tensor], owners: list[str]) -> tuple[str, ...]:
    if any(f"{owner}.lora_gate" in tensors for owner in owners):
        raise ConversionError(
            "these layers have a gate: x + g (R x - x) is a mix of a rotation with the identity, which HRA has not"
        )
    return ("lora-lite", "lora-lite-reversed")


_LEAVES = {
    "hra_u": _of_vectors,
    "householder_U": _of_older_vectors,
    "oft_r": _of_oft,
    "hra_r": _of_oft,
    "v_list": _of_lists,
    "lora_U": _of_rows,
}
