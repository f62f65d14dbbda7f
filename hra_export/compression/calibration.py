"""What goes into the targets of an adapter when its model reads a text: second moments on the span of each chain.

The model runs in float32 with the adapter at work, since that is what its layers will see. A target's inputs x (n, d)
are never kept: only Bᵀxᵀx B (k, k), for a basis B of its chain.

A `.jsonl` file holds rows as for training: `prompt` and `completion`, `messages`, or `text`. Any other file is text.

Limits: at most `MAX_TOKENS` tokens are read, from the beginning. Convolutions and stacked experts are not watched.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hra_export.adapter import HraAdapter
from hra_export.architecture import class_names
from hra_export.attachment import Attachment, attach
from hra_export.checkpoint import Checkpoint
from hra_export.composition import reflectors
from hra_export.errors import FormatError, OutputError, UnsupportedModelError
from hra_export.layer import ReflectedConv2d, ReflectedEmbedding, ReflectedLayer
from hra_export.loading import load_model
from hra_export.rotation import decompose

MAX_TOKENS = 8192
WINDOW = 512  # tokens of one forward pass
POSITIONS_KEPT_FREE = 2  # RoBERTa's and OPT's positions begin at 2
MAX_FINDINGS = 20


@dataclass(frozen=True)
class Calibration:
    """Inputs of an adapter's targets.

    Attributes:
        roots: module → N (k, d) float64 with NᵀN = P E[xxᵀ] P, P the projection on the span of the chain; for an
            embedding, x are the rows that were looked up.
        looked_up: the embeddings among them.
        unseen: targets that no input was seen of.
        tokens: that the model read.
        digest: SHA-256 of the file.
    """

    roots: Mapping[str, Tensor]
    looked_up: frozenset[str]
    unseen: tuple[str, ...]
    tokens: int
    digest: str


@dataclass(frozen=True)
class _Text:
    """What is read at once: the two halves go to encoder and decoder of a model that has both."""

    first: list[int]
    second: list[int]


def calibrate(base: Checkpoint, adapter: HraAdapter, path: Path, *, device: torch.device | str = "cpu") -> Calibration:
    """Let the adapted model read a file.

    Args:
        base: with a tokenizer, unless the adapter's directory has one.
        adapter: put to work in it; targets whose chain is the identity are not watched.
        path: `.jsonl` rows, or text.
        device: where the model runs.

    Raises:
        FormatError: rows that hold nothing to read, or no text at all; all rows.
        OutputError: the file cannot be read.
        UnsupportedModelError: a model without a tokenizer, or of a class that transformers does not know.
        CheckpointError: the base cannot be loaded.
        MismatchError: the adapter does not fit it.
        NumericalError: chains that cannot be computed; all of them.
    """
    data = _read(path)
    tokenizer = _tokenizer(base, adapter)
    texts = _texts(path, data, tokenizer, _window(base))
    rotations = {module: decompose(reflector) for module, reflector in reflectors([adapter]).items()}
    bases = {module: rotation.basis for module, rotation in rotations.items() if rotation.rank}
    config = {**base.config, "architectures": class_names(base.config, adapter.task, adapter.model_class)[:1]}
    model, _ = load_model(base, config)
    attachment = attach(model, adapter)
    model.to(device)
    moments = _watch(attachment, bases, texts)
    roots = {module: _root(total / count) @ bases[module].T for module, (total, count) in moments.items()}
    looked_up = [module for module in roots if isinstance(_layer(attachment, module), ReflectedEmbedding)]
    return Calibration(
        roots=roots,
        looked_up=frozenset(looked_up),
        unseen=tuple(module for module in bases if module not in roots),
        tokens=sum(len(text.first) + len(text.second) for text in texts),
        digest=hashlib.sha256(data).hexdigest(),
    )


@torch.inference_mode()
def _watch(
    attachment: Attachment, bases: Mapping[str, Tensor], texts: Sequence[_Text]
) -> dict[str, tuple[Tensor, int]]:
    """Module → ΣBᵀxᵀxB and the number of x, over all texts."""
    moments: dict[str, tuple[Tensor, int]] = {}
    model: Any = attachment.model
    device = next(model.parameters()).device
    with ExitStack() as watched:
        for module, basis in bases.items():
            layer = _layer(attachment, module)
            if isinstance(layer, ReflectedLayer) and not isinstance(layer, ReflectedConv2d):
                handle = layer.register_forward_pre_hook(_hook(module, basis, moments), with_kwargs=True)
                watched.callback(handle.remove)
        for text in texts:
            if getattr(model.config, "is_encoder_decoder", False):
                pair = (text.first or text.second, text.second or text.first)
                halves = [torch.tensor([half], device=device) for half in pair]
                model(input_ids=halves[0], decoder_input_ids=halves[1])
            else:
                model(input_ids=torch.tensor([text.first + text.second], device=device))
    return moments


def _layer(attachment: Attachment, module: str) -> nn.Module | None:
    return attachment.layers.get(attachment.renamed.get(module, module))


def _hook(module: str, basis: Tensor, moments: dict[str, tuple[Tensor, int]]) -> Any:
    ready: dict[torch.device, Tensor] = {}

    def see(layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs: Tensor = positional[0] if positional else next(iter(named.values()))
        if isinstance(layer, ReflectedEmbedding):
            inputs = layer.base_layer(inputs)
        narrow = ready.setdefault(inputs.device, basis.to(inputs.device, inputs.dtype))
        inside = (inputs.reshape(-1, inputs.shape[-1]) @ narrow).to("cpu", torch.float64)  # (n, k)
        total, count = moments.get(module, (inside.new_zeros(()), 0))
        moments[module] = total + inside.T @ inside, count + len(inside)

    return see


def _root(moment: Tensor) -> Tensor:
    """N (k, k) with NᵀN = C; a direction that was never seen has none."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OutputError(f"cannot read calibration `{path}`: {error.strerror}") from error


def _tokenizer(base: Checkpoint, adapter: HraAdapter) -> Any:
    from transformers import AutoTokenizer

    reasons = []
    for folder in (adapter.path, base.root):
        if folder is not None and (any(folder.glob("token*")) or any(folder.glob("*vocab*"))):
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                reasons.append(f"{folder}: {error}")
    raise UnsupportedModelError(
        f"base `{base.root}` has no tokenizer: calibration reads text",
        findings=reasons,
        hint="leave `--calibration` out: the weights alone then say what counts",
    )


def _window(base: Checkpoint) -> int:
    positions = base.config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= POSITIONS_KEPT_FREE:
        return WINDOW
    return min(WINDOW, positions - POSITIONS_KEPT_FREE)


def _texts(path: Path, data: bytes, tokenizer: Any, window: int) -> list[_Text]:
    """Token ids in pieces that the model can read at once, no more than `MAX_TOKENS` in all."""
    texts, count = [], 0
    for first, second in _halves(path, data, tokenizer):
        ids = list(tokenizer(first, verbose=False)["input_ids"]) if first else []
        more = list(tokenizer(second, add_special_tokens=False, verbose=False)["input_ids"]) if second else []
        for text in _pieces(ids, more, window):
            texts.append(text)
            count += len(text.first) + len(text.second)
            if count >= MAX_TOKENS:
                return texts
    if not texts:
        raise FormatError(f"calibration `{path}` holds no text")
    return texts


def _pieces(first: list[int], second: list[int], window: int) -> Iterator[_Text]:
    if second:
        yield _Text(first[:window], second[: max(0, window - len(first))] or second[:1])
        return
    yield from (_Text(first[start : start + window], []) for start in range(0, len(first), window))


def _halves(path: Path, data: bytes, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Texts of a file: what is said first, and the answer to it where a row has one."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"calibration `{path}` is not UTF-8 text") from error
    if path.suffix.lower() != ".jsonl":
        yield text, ""
        return
    found, findings = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found.append(_row(json.loads(line), tokenizer))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            findings.append(f"row {number}: {error}")
    if findings:
        shown = findings[:MAX_FINDINGS] + [f"and {len(findings) - MAX_FINDINGS} more"] * (len(findings) > MAX_FINDINGS)
        raise FormatError(
            f"calibration `{path}`: {len(findings)} rows are unusable",
            findings=shown,
            hint="a row is an object with `prompt` and `completion`, `messages`, or `text`",
        )
    yield from found


def _row(row: Any, tokenizer: Any) -> tuple[str, str]:
    """One row as text; ValueError or TypeError says why it is none."""
    if not isinstance(row, dict):
        raise TypeError(f"expected an object, got {type(row).__name__}")
    prompt, completion, messages = row.get("prompt"), row.get("completion"), row.get("messages")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [*prompt, *completion]
    if isinstance(messages, list):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("`messages`, but the tokenizer has no chat template")
        return "", str(tokenizer.apply_chat_template(messages, tokenize=False))  # has its special tokens already
    if isinstance(row.get("text"), str):
        return row["text"], ""
    raise ValueError(f"expected `prompt` and `completion`, `messages` or `text`, got {sorted(map(str, row))}")
