"""The inputs that graphs are judged on: several batches and lengths, padding on either side, caches in pieces.

Tokens are seeded and random, which reaches every layer; real prompts come beside them where there is a tokenizer.

Limits: lengths end at the model's positions. GroupQueryAttention knows lengths and no masks, so it is padded on the
right only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hra_export.errors import UnsupportedModelError
from hra_export.graph.signature import Signature

SEED = 20240517
# Batch and length: one token alone, and sizes that no axis of a model shares by accident.
SHAPES = ((1, 1), (2, 2), (3, 7), (1, 33))
PADDED_SHAPES = ((3, 7), (2, 33))
DECODER_TOKENS = 5
# Lengths that a sequence is fed in, one after another, through the cache.
PIECES: dict[int, tuple[tuple[int, ...], ...]] = {7: ((6, 1), (4, 1, 1, 1)), 33: ((20, 13),)}
DECODER_PIECES = ((DECODER_TOKENS - 1, 1),)
FIRST_ID = 4  # below are the special tokens of most vocabularies
IMAGE_BATCHES = (1, 2)
TIME_STEPS = (1, 500)

Side = Literal["left", "right"]


@dataclass(frozen=True)
class GraphProbe:
    """One input for both sides.

    Attributes:
        name: in the report.
        inputs: by the names that PyTorch and graphs share.
        mask: (b, t) of positions that count; None when all do.
        pieces: lengths in which a cached decoder is fed, beside all at once.
    """

    name: str
    inputs: Mapping[str, Tensor]
    mask: Tensor | None = None
    pieces: tuple[tuple[int, ...], ...] = field(default=())


def graph_probes(
    model: nn.Module, config: Mapping[str, Any], signatures: Sequence[Signature], prompts: Sequence[Sequence[int]] = ()
) -> list[GraphProbe]:
    """The probes for a model that its graphs can take.

    Args:
        model: the reference.
        config: of the candidate; a diffusers one has `_class_name`.
        signatures: of all graphs of the candidate.
        prompts: real token ids, each of its own length.

    Raises:
        UnsupportedModelError: no input is known for this kind of model.
    """
    generator = torch.Generator().manual_seed(SEED)
    names = {name for signature in signatures for name in signature.inputs}
    settings: Any = model.config
    if "_class_name" in config:
        found = _denoiser_probes(settings, generator)
    elif names >= {"input_ids", "pixel_values"}:
        found = _pair_probes(settings, generator)
    elif "pixel_values" in names:
        found = _image_probes(settings, generator)
    elif names & {"input_ids", "decoder_input_ids"}:
        found = _Tokens(settings, names, signatures, generator).probes(prompts)
    else:
        raise UnsupportedModelError(
            f"no parity input is known for {type(model).__name__}: its graph takes {sorted(names)}"
        )
    return [probe for probe in found if _fits(probe, signatures)]


class _Tokens:
    """Probes made of token ids."""

    def __init__(self, settings: Any, names: set[str], signatures: Sequence[Signature], generator: torch.Generator):
        text = settings.get_text_config()
        self.generator = generator
        self.vocabulary = int(text.vocab_size)
        pad = getattr(settings, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and 0 <= pad < self.vocabulary else 0
        self.longest = int(getattr(text, "max_position_embeddings", 0) or 1 << 30)
        self.is_sequence_to_sequence = bool(settings.is_encoder_decoder)
        self.names = names
        by_length = any("GroupQueryAttention" in signature.operators for signature in signatures)
        self.sides: tuple[Side, ...] = ("right",) if by_length else ("left", "right")
        self.has_cache = any(name.startswith("past") for name in names)

    def probes(self, prompts: Sequence[Sequence[int]]) -> Iterator[GraphProbe]:
        for batch, count in SHAPES:
            if count <= self.longest:
                yield self._probe(f"{batch} × {count} token{'s' * (count > 1)}", self._rows([count] * batch))
        if "attention_mask" not in self.names:
            return
        for (batch, count), side in ((shape, side) for shape in PADDED_SHAPES for side in self.sides):
            if count <= self.longest:
                lengths = [max(1, count - 3 * row) for row in range(batch)]
                yield self._probe(f"{batch} × {count} tokens, padded {side}", self._rows(lengths), side)
        if prompts:
            rows = [torch.tensor(prompt[: self.longest]) for prompt in prompts]
            name = f"{len(rows)} prompts, padded {self.sides[0]}" if len(rows) > 1 else "1 prompt"
            yield self._probe(name, rows, self.sides[0])

    def _rows(self, lengths: Sequence[int]) -> list[Tensor]:
        lowest = min(FIRST_ID, self.vocabulary // 2)
        rows = [torch.randint(lowest, self.vocabulary, (length,), generator=self.generator) for length in lengths]
        other = self.vocabulary - 1 if self.pad != self.vocabulary - 1 else lowest
        return [row.masked_fill(row == self.pad, other) for row in rows]

    def _probe(self, name: str, rows: Sequence[Tensor], side: Side = "right") -> GraphProbe:
        ids, mask = padded(rows, self.pad, side)
        inputs = {"input_ids": ids}
        if "attention_mask" in self.names or "encoder_attention_mask" in self.names:
            inputs["attention_mask"] = mask.long()
        if "position_ids" in self.names:
            inputs["position_ids"] = positions(mask)
        if self.is_sequence_to_sequence:
            shape = (len(rows), DECODER_TOKENS)
            inputs["decoder_input_ids"] = torch.randint(FIRST_ID, self.vocabulary, shape, generator=self.generator)
            return GraphProbe(name, inputs, mask, DECODER_PIECES if self.has_cache else ())
        is_cut = self.has_cache and (side == "left" or bool(mask.all()))
        return GraphProbe(name, inputs, mask, PIECES.get(ids.shape[1], ()) if is_cut else ())


def padded(rows: Sequence[Tensor], pad: int, side: Side) -> tuple[Tensor, Tensor]:
    """Rows of ids as one (b, t) tensor, and which of its positions they fill."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = row, True
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Position ids (b, t) that count unpadded tokens, as generation makes them."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _image_probes(settings: Any, generator: torch.Generator) -> Iterator[GraphProbe]:
    for count in IMAGE_BATCHES:
        yield GraphProbe(f"{count} image{'s' * (count > 1)}", {"pixel_values": _pixels(settings, count, generator)})


def _pair_probes(settings: Any, generator: torch.Generator) -> Iterator[GraphProbe]:
    """Images and captions, as many of one as of the other or not."""
    text = settings.get_text_config()
    end = getattr(text, "eos_token_id", None)  # CLIP pools at it
    for images, captions, count in ((1, 2, 7), (2, 3, 2)):
        ids = torch.randint(FIRST_ID, text.vocab_size, (captions, count), generator=generator)
        if isinstance(end, int) and 0 <= end < text.vocab_size:
            ids = ids.masked_fill(ids == end, FIRST_ID)
            ids[:, -1] = end
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = _pixels(settings, images, generator)
        yield GraphProbe(f"{images} × images, {captions} × {count} tokens", {**inputs, "pixel_values": pixels})


def _pixels(settings: Any, count: int, generator: torch.Generator) -> Tensor:
    vision = getattr(settings, "vision_config", settings)
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return torch.randn(count, getattr(vision, "num_channels", 3), size, size, generator=generator)


def _denoiser_probes(settings: Any, generator: torch.Generator) -> Iterator[GraphProbe]:
    """The size that was trained, and another that is not square."""
    width = getattr(settings, "cross_attention_dim", None)
    size = settings.sample_size if isinstance(settings.sample_size, int) else settings.sample_size[0]
    step = 2 ** (len(settings.block_out_channels) - 1)  # each block but the last halves the sample
    smaller = max(step, size // 2 // step * step)
    for (batch, height, wide), time in zip(((1, size, size), (2, size, smaller)), TIME_STEPS, strict=True):
        sample = torch.randn(batch, settings.in_channels, height, wide, generator=generator)
        inputs = {"sample": sample, "timestep": torch.tensor(time)}
        if width is not None:
            inputs["encoder_hidden_states"] = torch.randn(batch, 7, width, generator=generator)
        yield GraphProbe(f"{batch} × {height}×{wide}, time step {time}", inputs)


def _fits(probe: GraphProbe, signatures: Sequence[Signature]) -> bool:
    """Whether the fixed axes of the graphs' inputs are the probe's."""
    for signature in signatures:
        for name, tensor in probe.inputs.items():
            found = signature.inputs.get(name)
            if found is None or len(found.axes) != tensor.ndim:
                continue
            if any(axis not in (None, size) for axis, size in zip(found.axes, tensor.shape, strict=True)):
                return False
    return True
