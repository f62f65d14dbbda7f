"""The effect of an adapter in a graph against its effect in PyTorch, over batches, lengths, paddings and steps.

Both sides get the same inputs in the same steps: a decoder is fed piece by piece through its cache.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from hra_export.graph import operator
from hra_export.graph.families import GraphSpec
from tests.graph_scene import Scene
from tests.tiny_models import VOCABULARY

Feeds = dict[str, Tensor]
Outputs = dict[str, Tensor]
# Label, reference, base, candidate.
Compared = Iterator[tuple[str, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison.

    Attributes:
        batch: rows; in an image-text model one image more than texts.
        lengths: tokens of each step: the prefill, then what is decoded.
        padding: on which side rows are shorter, by one token more each.
    """

    batch: int
    lengths: tuple[int, ...] = (7,)
    padding: str = "none"


def candidate(scene: Scene, folder: Path, *, optimized: bool) -> "Candidate":
    """The graphs of a scene as ONNX Runtime sessions; the graphs get the operator's body."""
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
    sessions = {}
    for name, graph in scene.graphs.items():
        path = folder / f"{name}.onnx"
        if not path.exists():
            operator.declare_(graph)
            ir.save(graph, path)
        sessions[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Candidate(sessions)


@dataclass(frozen=True)
class Candidate:
    """Sessions by file stem."""

    sessions: Mapping[str, Any]

    def run(self, name: str, feeds: Feeds) -> Outputs:
        """All outputs of one graph."""
        session = self.sessions[name]
        arrays = session.run(None, {key: value.numpy() for key, value in feeds.items()})
        return dict(zip((output.name for output in session.get_outputs()), map(torch.from_numpy, arrays), strict=True))


def effect_error(scene: Scene, candidate: Candidate, case: Case) -> dict[str, float]:
    """‖(cand − base) − (ref − base)‖ / ‖ref − base‖ for each answer of a case, over all its steps."""
    steps = {"decoder": _decoder_steps, "encoder-decoder": _seq2seq_steps}.get(scene.family, _single_step)
    random = torch.Generator().manual_seed(case.batch)
    errors: dict[str, float] = {}
    with torch.no_grad():
        for label, reference, base, answer in steps(scene, candidate, case, random):
            effect = (reference - base).double().norm()
            assert effect > 0.01 * reference.double().norm()  # an adapter without effect would prove nothing
            errors[label] = float((answer - reference).double().norm() / effect)
    return errors


def _single_step(scene: Scene, candidate: Candidate, case: Case, random: torch.Generator) -> Compared:
    (spec,) = scene.specs
    feeds = _feeds(spec, case, random)
    answers = candidate.run(spec.name, feeds)
    reference, base = scene.live(**feeds), scene.base(**feeds)
    for name in spec.outputs:
        key = "sample" if name == "out_sample" else name
        rows = feeds.get("attention_mask") if answers[name].ndim == 3 else None
        yield name, _kept(reference[key], rows), _kept(base[key], rows), _kept(answers[name], rows)


def _decoder_steps(scene: Scene, candidate: Candidate, case: Case, random: torch.Generator) -> Compared:
    mask = padding_mask(case.batch, case.lengths[0], case.padding)
    past = _empty_past(scene.specs[0], case.batch)
    caches: list[Any] = [None, None]
    for step, length in enumerate(case.lengths):
        if step:
            mask = torch.cat([mask, torch.ones(case.batch, length, dtype=torch.int64)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        ids = torch.randint(4, VOCABULARY, (case.batch, length), generator=random)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        answers = candidate.run("model", {**feeds, **past})
        past = _next_past(answers, past)
        results = []
        for index, model in enumerate((scene.live, scene.base)):
            result = model(**feeds, past_key_values=caches[index], use_cache=True)
            caches[index] = result.past_key_values
            results.append(result.logits)
        here = mask[:, -length:]
        yield f"step {step}", _kept(results[0], here), _kept(results[1], here), _kept(answers["logits"], here)


def _seq2seq_steps(scene: Scene, candidate: Candidate, case: Case, random: torch.Generator) -> Compared:
    encoder, decoder = scene.specs
    feeds = _feeds(encoder, case, random)
    mask = feeds["attention_mask"]
    encoded = candidate.run("encoder_model", feeds)
    truth = [model.get_encoder()(**feeds) for model in (scene.live, scene.base)]
    hidden = [_kept(result.last_hidden_state, mask) for result in truth]
    yield "encoder", hidden[0], hidden[1], _kept(encoded["last_hidden_state"], mask)
    past = {**_empty_past(decoder, case.batch), **_next_past(encoded, {})}
    caches: list[Any] = [None, None]
    for step, length in enumerate((3, 1, 2)):
        ids = torch.randint(4, VOCABULARY, (case.batch, length), generator=random)
        answers = candidate.run("decoder_model", {"decoder_input_ids": ids, "encoder_attention_mask": mask, **past})
        past = _next_past(answers, past)
        results = []
        for index, model in enumerate((scene.live, scene.base)):
            result = model(
                encoder_outputs=truth[index],
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=caches[index],
                use_cache=True,
            )
            caches[index] = result.past_key_values
            results.append(result.logits)
        yield f"step {step}", results[0], results[1], answers["logits"]


def padding_mask(batch: int, length: int, padding: str) -> Tensor:
    """Ones, and in row k the first or last k mod length tokens masked."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        absent = row % length
        if padding == "left":
            mask[row, :absent] = 0
        elif padding == "right":
            mask[row, length - absent :] = 0
    return mask


def _feeds(spec: GraphSpec, case: Case, random: torch.Generator) -> Feeds:
    """Random inputs of a case's sizes for a graph that is run once."""
    height, width = (19, 12) if case.batch % 2 else (16, 16)
    sizes = {
        "batch": case.batch,
        "text_batch": case.batch,
        "image_batch": case.batch + 1,
        "sequence": case.lengths[0],
        "encoder_sequence": case.lengths[0],
        "height": height,
        "width": width,
    }
    feeds = {}
    for port in spec.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in port.axes]
        if port.name == "attention_mask":
            feeds[port.name] = padding_mask(case.batch, case.lengths[0], case.padding)
        elif port.dtype == torch.int64:
            feeds[port.name] = torch.randint(0, port.bound, shape, generator=random)
        else:
            feeds[port.name] = torch.randn(shape, generator=random)
    if "input_ids" in feeds:
        ids = feeds["input_ids"].clamp(min=6)  # beyond special tokens
        ids = ids.masked_fill(feeds["attention_mask"] == 0, 1)  # RoBERTa's padding, by which it counts positions
        feeds["input_ids"] = ids
    return feeds


def _kept(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of tokens that are no padding."""
    return tensor if mask is None else tensor[mask.bool()]


def _empty_past(spec: GraphSpec, batch: int) -> Feeds:
    sizes = {"batch": batch, "past_sequence": 0, "encoder_sequence": 0}
    return {
        port.name: torch.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in port.axes])
        for port in spec.inputs
        if port.name.startswith("past_key_values.")
    }


def _next_past(answers: Outputs, past: Feeds) -> Feeds:
    present = {
        name.replace("present", "past_key_values", 1): value
        for name, value in answers.items()
        if name.startswith("present.")
    }
    return {**past, **present}
