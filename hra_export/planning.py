"""Adapters × base → a merge plan. Headers only; everything that can be wrong is found here, before the first byte.

Every adapter tensor is used exactly once, or planning fails with all the reasons at once.
"""

from collections.abc import Sequence
from dataclasses import replace

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.composition import reflectors
from hra_export.errors import ConversionError, UnsupportedModelError
from hra_export.placement import Draft
from hra_export.plan import STORED_DTYPES, Action, DtypeChoice, MergePlan, OutputTensor, Shard
from hra_export.strength import Interpolation, take_strength
from hra_export.tensorfile import FLOAT_DTYPES


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[HraAdapter],
    *,
    strength: float = 1.0,
    interpolation: Interpolation = "geodesic",
    dtype: DtypeChoice = "keep",
    max_shard_bytes: int | None = None,
) -> MergePlan:
    """Decide what every output tensor is made of.

    Args:
        base: as opened by `open_checkpoint`.
        adapters: composed in the order given, W R_1 R_2 ….
        strength: t of R^t, or of W + t (W R − W); 0 is the base, 1 the adapters.
        interpolation: which of the two.
        dtype: of the floating-point tensors written; `keep` takes each tensor's own.
        max_shard_bytes: split the output anew; None keeps the base's shards.

    Raises:
        MismatchError: an adapter tensor has no place in the base, or the wrong shape; all of them.
        ConversionError: R^t of a chain with determinant −1, or of one weight under several names.
        NumericalError: a chain cannot be computed.
        UnsupportedModelError: quantized base, grouped convolution, a layout that mixes input features.
    """
    if not adapters:
        raise ValueError("a merge needs at least one adapter")
    _refuse_quantized(base)
    draft = _placed(base, adapters)
    reflectors(adapters)  # so that a breakdown shows before the first byte is written
    taken = take_strength(adapters, strength, interpolation)
    if taken.adapters[0] is not adapters[0]:
        _refuse_several_names(draft)
        draft = _placed(base, taken.adapters)
    tensors = [_with_dtype(tensor, dtype) for tensor in draft.output_tensors(taken.linear)]
    shards = _shards(base, tensors, max_shard_bytes)
    changes = dict(draft.config_changes)
    if dtype != "keep":
        changes["dtype" if "torch_dtype" not in base.config else "torch_dtype"] = dtype
    notes = (*draft.notes, *taken.notes)
    return MergePlan(base, taken.adapters, shards, strength, dtype, changes, notes, interpolation)


def _placed(base: Checkpoint, adapters: Sequence[HraAdapter]) -> Draft:
    draft = Draft(base, tuple(adapters))
    for index, adapter in enumerate(adapters):
        for module in adapter.chains:
            draft.place_chain(index, module)
        for name in adapter.parameters:
            draft.place_parameter(index, name)
    draft.raise_findings()
    return draft


def _refuse_quantized(base: Checkpoint) -> None:
    quantization = base.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"base `{base.root}` is quantized ({method}): folding into it would round every weight again",
            hint="merge into the unquantized base, and quantize the result",
        )


def _refuse_several_names(draft: Draft) -> None:
    """R^t is that of a weight's whole product, which is not made of chains whose targets are called differently."""
    findings = []
    for name, regions in draft.folds.items():
        for sites in regions.values():
            modules = list(dict.fromkeys(site.module for site in sites))
            if len(modules) > 1:
                findings.append(f"{name}: {', '.join(modules)}")
    if findings:
        raise ConversionError(
            f"{len(findings)} weights carry chains under several names, which have no common strength",
            findings=findings,
            hint="`--interpolation linear` takes a part of ΔW instead, which is no rotation",
        )


def _with_dtype(tensor: OutputTensor, dtype: DtypeChoice) -> OutputTensor:
    if dtype == "keep" or tensor.dtype not in FLOAT_DTYPES or tensor.dtype == STORED_DTYPES[dtype]:
        return tensor
    action: Action = "cast" if tensor.action == "copy" else tensor.action
    return replace(tensor, dtype=STORED_DTYPES[dtype], action=action)


def _shards(base: Checkpoint, tensors: Sequence[OutputTensor], max_bytes: int | None) -> tuple[Shard, ...]:
    """The base's own shards, or new ones of at most `max_bytes` filled in order; what is added goes into the last."""
    metadata = dict(base.files[0].metadata) or {"format": "pt"}
    if max_bytes is None:
        owner = {name: i for i, file in enumerate(base.files) for name in file.tensors}
        groups: list[list[OutputTensor]] = [[] for _ in base.files]
        for tensor in tensors:
            groups[owner.get(tensor.name, len(groups) - 1)].append(tensor)
        return tuple(
            Shard(file.path.name, tuple(group), metadata) for file, group in zip(base.files, groups, strict=True)
        )
    groups = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.size_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.size_bytes
    stem = base.files[0].path.name.removesuffix(".safetensors").split("-0")[0]
    total = len(groups)
    shard_names = (
        [f"{stem}.safetensors"]
        if total == 1
        else [f"{stem}-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    )
    return tuple(Shard(name, tuple(group), metadata) for name, group in zip(shard_names, groups, strict=True))
