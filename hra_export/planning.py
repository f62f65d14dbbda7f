"""Adapters × base → a merge plan. Headers only; everything that can be wrong is found here, before the first byte.

Every adapter tensor is used exactly once, or planning fails with all the reasons at once.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.errors import NumericalError, UnsupportedModelError
from hra_export.placement import Draft
from hra_export.plan import STORED_DTYPES, Action, DtypeChoice, MergePlan, OutputTensor, Shard
from hra_export.tensorfile import FLOAT_DTYPES


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[HraAdapter],
    *,
    strength: float = 1.0,
    dtype: DtypeChoice = "keep",
    max_shard_bytes: int | None = None,
) -> MergePlan:
    """Decide what every output tensor is made of.

    Args:
        base: as opened by `open_checkpoint`.
        adapters: composed in the order given, W R_1 R_2 ….
        strength: s in W + s (W R − W).
        dtype: of the floating-point tensors written; `keep` takes each tensor's own.
        max_shard_bytes: split the output anew; None keeps the base's shards.

    Raises:
        MismatchError: an adapter tensor has no place in the base, or the wrong shape; all of them.
        NumericalError: a chain cannot be computed.
        UnsupportedModelError: quantized base, grouped convolution, a layout that mixes input features.
    """
    if not adapters:
        raise ValueError("a merge needs at least one adapter")
    if not math.isfinite(strength):
        raise ValueError(f"strength: expected a finite number, got {strength}")
    _refuse_quantized(base)
    draft = Draft(base, tuple(adapters))
    for index, adapter in enumerate(adapters):
        for module in adapter.chains:
            draft.place_chain(index, module)
        for name in adapter.parameters:
            draft.place_parameter(index, name)
    draft.raise_findings()
    _check_chains(adapters)
    tensors = [_with_dtype(tensor, dtype) for tensor in draft.output_tensors(strength)]
    shards = _shards(base, tensors, max_shard_bytes)
    changes = dict(draft.config_changes)
    if dtype != "keep":
        changes["dtype" if "torch_dtype" not in base.config else "torch_dtype"] = dtype
    return MergePlan(base, tuple(adapters), shards, strength, dtype, changes, tuple(draft.notes))


def _refuse_quantized(base: Checkpoint) -> None:
    quantization = base.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"base `{base.root}` is quantized ({method}): folding into it would round every weight again",
            hint="merge into the unquantized base, and quantize the result",
        )


def _check_chains(adapters: Sequence[HraAdapter]) -> None:
    """Compute every chain once, so that a breakdown shows before the first byte is written."""
    findings, hint = [], None
    for adapter in adapters:
        for module in adapter.chains:
            try:
                adapter.reflector(module)
            except NumericalError as error:
                findings.append(error.message)
                hint = error.hint
    if findings:
        raise NumericalError(f"{len(findings)} chains cannot be computed", findings=findings, hint=hint)


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
