"""Validate merged weights: PyTorch with live HRA layers as reference, a merged directory as candidate.

Both run in float32 on the CPU with the weights as stored, so that what differs is what was written. Each input is run
three times: base, reference (base with live layers), candidate.

Limits: inputs are seeded random tokens or pixels, which reach every layer but say nothing about quality.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hra_export import parity
from hra_export.adapter import HraAdapter
from hra_export.attachment import attach
from hra_export.checkpoint import MANIFEST_NAME, Checkpoint, open_checkpoint
from hra_export.errors import CheckpointError, UnsupportedModelError
from hra_export.loading import load_model
from hra_export.parity import OutputParity, ParityReport
from hra_export.strength import Interpolation
from hra_export.tensorfile import DTYPES, FLOAT_DTYPES, strict_json
from hra_export.tolerance import TOLERANCES
from hra_export.validation.candidates import promised_strength

logger = logging.getLogger(__name__)

TOKEN_COUNTS = (1, 2, 7, 33)
BATCH = 2
PREFIX = 6  # tokens in the cache before the step that is compared
NEW_TOKENS = 16
SEED = 20240517
# The outputs of a forward pass that are compared, and whether they are scores.
COMPARED = {"logits": True, "last_hidden_state": False, "pooler_output": False, "sample": False}

HALF_DTYPES = ("float16", "bfloat16")

Say = Callable[[str], None]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """One input, its name in the report, and whether all but its last token come from a cache."""

    name: str
    inputs: Mapping[str, Tensor]
    cached: bool = False

    @torch.inference_mode()
    def run(self, model: nn.Module) -> Outputs:
        """What a model makes of it."""
        if self.cached:
            ids = self.inputs["input_ids"]
            past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            return _collect(model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True))
        hidden = {} if "sample" in self.inputs else {"output_hidden_states": True}
        return _collect(model(**self.inputs, **hidden))


def validate_merged(
    adapters: Sequence[HraAdapter],
    base: Path,
    candidate: Path,
    *,
    dtype: str | None = None,
    strength: float | None = None,
    interpolation: Interpolation | None = None,
    say: Say | None = None,
) -> ParityReport:
    """Compare a merged directory with the base under live HRA layers.

    Args:
        adapters: in the order they were merged.
        base: the directory they were merged into; not changed.
        candidate: the directory to judge.
        dtype: the storage dtype that was promised; None takes the candidate's manifest, then the base's own.
        strength: at which the adapters were folded; None takes the candidate's manifest, then 1.
        interpolation: of that strength; None takes the candidate's manifest, then geodesic.
        say: told about each stage.

    Raises:
        CheckpointError: base or candidate cannot be read, or are not models of the same kind.
        ConversionError: adapters that have no such strength.
        MismatchError: the adapter does not fit the base.
        UnsupportedModelError: no input is known for this kind of model.
    """
    tell = say or (lambda text: None)
    original, written = open_checkpoint(base), open_checkpoint(candidate)
    manifest = _manifest(written)
    promised = dtype or _promised_dtype(original, manifest)
    findings = _dtype_findings(written, promised)
    promised_at, promised_how = promised_strength(manifest)
    folded_at, how = promised_at if strength is None else strength, interpolation or promised_how
    tell("reference: base with live HRA layers")
    model, missing = load_model(original, written.config)
    probes = list(_probes(model, written))
    attachment = attach(model, *adapters, strength=folded_at, interpolation=how)
    reference = {probe.name: probe.run(model) for probe in probes}
    tokens = _greedy(model)
    findings += [f"{path}: this target never ran, its chain has no effect" for path in attachment.unused()]
    with attachment.disabled(keep=missing):
        start = {probe.name: probe.run(model) for probe in probes}
    del model, attachment
    tell("candidate: merged weights")
    model, missing = load_model(written, written.config)
    findings += [f"{name}: the candidate lacks it, and its library would make it up" for name in sorted(missing)]
    outputs = [
        output
        for probe in probes
        for output in _compare(probe.name, reference[probe.name], probe.run(model), start[probe.name])
    ]
    loss = manifest.get("totals", {}).get("rounding_loss")
    notes = _greedy_notes(tokens, _greedy(model))
    if loss and promised in HALF_DTYPES:
        notes.append(f"rounding to {promised} cost {loss:.2%} of ΔW; `merge --dtype float32` costs nothing")
    return parity.judge(outputs, promised, rounding_loss=loss, findings=findings, notes=notes)


def _manifest(candidate: Checkpoint) -> dict[str, Any]:
    """What `merge` said about the candidate; empty when it came from elsewhere."""
    path = candidate.root / MANIFEST_NAME
    if not path.is_file():
        return {}
    parsed = strict_json(path, path.read_bytes())
    return parsed if isinstance(parsed, dict) else {}


def _promised_dtype(base: Checkpoint, manifest: Mapping[str, Any]) -> str:
    """What the manifest promises, else the base's own dtype: that of most of its bytes."""
    if manifest.get("dtype") in TOLERANCES:
        return str(manifest["dtype"])
    sizes: dict[str, int] = {}
    for info in base.tensors.values():
        if info.dtype in FLOAT_DTYPES:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
    if not sizes:
        raise CheckpointError(f"base `{base.root}` holds no floating-point tensors")
    return DTYPES[max(sizes, key=lambda name: sizes[name])][1]


def _dtype_findings(candidate: Checkpoint, promised: str) -> list[str]:
    bits = {torch_name: size for size, torch_name in DTYPES.values()}
    return [
        f"{name}: stored as {DTYPES[info.dtype][1]}, promised {promised}"
        for name, info in candidate.tensors.items()
        if info.dtype in FLOAT_DTYPES and len(info.shape) > 1 and DTYPES[info.dtype][0] < bits[promised]
    ]


def _probes(model: nn.Module, checkpoint: Checkpoint) -> Iterator[Probe]:
    """The inputs for this kind of model."""
    generator = torch.Generator().manual_seed(SEED)
    config: Any = model.config
    main_input = getattr(model, "main_input_name", "sample")
    if "_class_name" in checkpoint.config:
        yield from _denoiser_probes(config, generator)
    elif main_input == "pixel_values":
        yield from _image_probes(config, generator)
    elif main_input == "input_ids":
        yield from _token_probes(model, config, generator)
    else:
        raise UnsupportedModelError(f"no parity input is known for {type(model).__name__} (it takes `{main_input}`)")


def _token_probes(model: nn.Module, config: Any, generator: torch.Generator) -> Iterator[Probe]:
    text = config.get_text_config()
    for count in TOKEN_COUNTS:
        ids = torch.randint(text.vocab_size, (BATCH, count), generator=generator)
        decoder = {"decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {}
        yield Probe(f"{count} token{'s' * (count > 1)}", {"input_ids": ids, **decoder})
    if hasattr(model, "generate") and not config.is_encoder_decoder and model.can_generate():  # type: ignore[operator]
        ids = torch.randint(text.vocab_size, (BATCH, PREFIX + 1), generator=generator)
        yield Probe("1 token after a cached prefix", {"input_ids": ids}, cached=True)


def _image_probes(config: Any, generator: torch.Generator) -> Iterator[Probe]:
    vision = getattr(config, "vision_config", config)
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    for count in (1, BATCH):
        pixels = torch.randn(count, getattr(vision, "num_channels", 3), size, size, generator=generator)
        yield Probe(f"{count} image{'s' * (count > 1)}", {"pixel_values": pixels})


def _denoiser_probes(config: Any, generator: torch.Generator) -> Iterator[Probe]:
    width = getattr(config, "cross_attention_dim", None)
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    for step in (1, 500):
        sample = torch.randn(BATCH, config.in_channels, size, size, generator=generator)
        inputs: dict[str, Tensor] = {"sample": sample, "timestep": torch.tensor(step)}
        if width is not None:
            inputs["encoder_hidden_states"] = torch.randn(BATCH, 7, width, generator=generator)
        yield Probe(f"time step {step}", inputs)


def _collect(result: Mapping[str, Any]) -> Outputs:
    found = {name: result[name] for name in COMPARED if isinstance(result.get(name), Tensor)}
    for name in ("hidden_states", "decoder_hidden_states"):
        if result.get(name):
            found["last hidden state"] = result[name][-1]
    return found


def _compare(probe: str, reference: Outputs, candidate: Outputs, base: Outputs) -> list[OutputParity]:
    return [
        parity.compare(
            f"{probe}, {name.replace('_', ' ')}",
            *(_array(outputs[name]) for outputs in (reference, candidate, base)),
            logits=COMPARED.get(name, False) and reference[name].shape[-1] > 1,
        )
        for name in reference
    ]


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return tensor.to(torch.float32).numpy()


@torch.inference_mode()
def _greedy(model: Any) -> Tensor | None:
    """Greedy continuation of a fixed prompt; None for a model that does not generate."""
    if not hasattr(model, "generate") or not model.can_generate() or model.main_input_name != "input_ids":
        return None
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, PREFIX), generator=torch.Generator().manual_seed(SEED))
    mask = torch.ones_like(ids)
    tokens: Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    return tokens[0]


def _greedy_notes(reference: Tensor | None, candidate: Tensor | None) -> list[str]:
    if reference is None or candidate is None:
        return []
    same = int((reference == candidate).long().cumprod(0).sum()) - (len(reference) - NEW_TOKENS)
    return [f"greedy decoding: the first {max(same, 0)} of {NEW_TOKENS} tokens agree"]
