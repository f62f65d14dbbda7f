"""From an input for both sides to the feeds of a candidate's graphs, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hra_export.errors import GraphError
from hra_export.graph.signature import GraphInput, Signature
from hra_export.graph.swap_sites import ADAPTER_INDEX
from hra_export.validation.candidates import GraphCandidate
from hra_export.validation.graph_probes import GraphProbe
from hra_export.validation.job import Array, Greedy, Run, Step

CACHE_IN, CACHE_OUT = ("past_key_values", "past"), "present"
# Outputs that are the state of a decoder and not its answer.
STATE = ("present", "past")
PER_TOKEN = ("input_ids", "decoder_input_ids", "position_ids", "token_type_ids")
HIDDEN_FROM_ENCODER = ("encoder_hidden_states", "encoder_outputs")


def answers_of(signature: Signature) -> tuple[str, ...]:
    """The outputs that are compared."""
    return tuple(name for name in signature.outputs if not name.startswith(STATE))


def cache_flow(signature: Signature) -> dict[str, str]:
    """Cache input → the output that holds it after the step."""
    flow = {}
    for name in signature.outputs:
        if name.startswith(CACHE_OUT):
            rest = name.removeprefix(CACHE_OUT)
            source = next((each + rest for each in CACHE_IN if each + rest in signature.inputs), None)
            if source is not None:
                flow[source] = name
    return flow


def encoder_flow(candidate: GraphCandidate) -> dict[str, str]:
    """Input of the decoder → the encoder's output that it takes; empty for a model of one graph."""
    if "encoder" not in candidate.graphs:
        return {}
    outputs, flow = candidate.graphs["encoder"].signature.outputs, {}
    for name in candidate.main.signature.inputs:
        source = name.replace(CACHE_IN[0], CACHE_OUT, 1)
        if name in HIDDEN_FROM_ENCODER:
            flow[name] = "encoder/last_hidden_state"
        elif source in outputs:
            flow[name] = f"encoder/{source}"
    return flow


def runs_of(candidate: GraphCandidate, probe: GraphProbe, *, further: Sequence[str] = ()) -> list[Run]:
    """A probe as runs of the candidate: all at once, and in pieces through the cache.

    Args:
        candidate: whose graphs are fed.
        probe: the input.
        further: outputs of the main graph that are wanted beside its answers.

    Raises:
        GraphError: an input that nothing is known for.
    """
    signature = candidate.main.signature
    keep = (*answers_of(signature), *further)
    first: list[Step] = []
    given: Mapping[str, Tensor] = probe.inputs
    if "encoder" in candidate.graphs:
        encoder = candidate.graphs["encoder"].signature
        first = [Step("encoder", _feeds(encoder, probe.inputs), keep=answers_of(encoder))]
        given = _decoder_inputs(probe.inputs)
    pieces_of = _Pieces(signature, candidate.main_role, given, encoder_flow(candidate), keep)
    runs = [Run(probe.name, [*first, *pieces_of.steps([pieces_of.length])])]
    for pieces in probe.pieces if cache_flow(signature) else ():
        name = f"{probe.name}, in pieces of {', '.join(map(str, pieces))}"
        runs.append(Run(name, [*first, *pieces_of.steps(pieces)]))
    return runs


def greedy_run(candidate: GraphCandidate, name: str, ids: Sequence[int], count: int) -> Run:
    """Greedy decoding after a prompt."""
    signature = candidate.main.signature
    names = signature.inputs
    feeds = _feeds(signature, whole_row(ids))
    plan = Greedy(
        graph="model",
        count=count,
        tokens="input_ids",
        cache=cache_flow(signature),
        mask="attention_mask" if "attention_mask" in names else None,
        positions="position_ids" if "position_ids" in names else None,
    )
    return Run(name, [Step("model", feeds)], greedy=plan)


def scored_run(candidate: GraphCandidate, name: str, ids: Sequence[int]) -> Run:
    """The log-likelihood of a piece of text."""
    return Run(name, [Step("model", _feeds(candidate.main.signature, whole_row(ids)), keep=["logits"])], scored=True)


def whole_row(ids: Sequence[int]) -> dict[str, Tensor]:
    """One unpadded row of tokens as inputs."""
    tokens = torch.tensor([list(ids)])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(tokens.shape[1])[None],
    }


@dataclass(frozen=True)
class _Pieces:
    """An input that is fed to a decoder piece by piece, or to any graph as one.

    Attributes:
        given: by the graph's names.
        flow: what comes from an encoder, into every piece.
    """

    signature: Signature
    graph: str
    given: Mapping[str, Tensor]
    flow: Mapping[str, str]
    keep: Sequence[str]

    @property
    def length(self) -> int:
        """How many tokens there are; 1 for an input without tokens."""
        ids = self.given.get("decoder_input_ids", self.given.get("input_ids"))
        return 1 if ids is None else ids.shape[1]

    def steps(self, pieces: Sequence[int]) -> list[Step]:
        """One step a piece; each takes the cache of the one before."""
        if len(pieces) == 1:
            return [Step(self.graph, _feeds(self.signature, self.given, skip=self.flow), self.flow, self.keep)]
        cache = {source: f"{self.graph}/{output}" for source, output in cache_flow(self.signature).items()}
        steps, start = [], 0
        for piece in pieces:
            flow = {**self.flow, **(cache if start else {})}
            feeds = _feeds(self.signature, self._part(start, start + piece), skip=flow)
            steps.append(Step(self.graph, feeds, flow, self.keep))
            start += piece
        return steps

    def _part(self, start: int, end: int) -> dict[str, Tensor]:
        """The tokens from start to end; a mask of past and present tokens reaches back to the first."""
        part = dict(self.given)
        for name in PER_TOKEN:
            if name in part:
                part[name] = part[name][:, start:end]
        if self.flow:
            return part  # its masks are of the encoder's tokens
        return part | {name: part[name][:, :end] for name in ("attention_mask",) if name in part}


def _decoder_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder calls the same things."""
    ids = inputs["decoder_input_ids"]
    named = {"input_ids": ids, "decoder_input_ids": ids}
    if "attention_mask" in inputs:
        named |= {"encoder_attention_mask": inputs["attention_mask"], "attention_mask": inputs["attention_mask"]}
    return named


def _feeds(
    signature: Signature, inputs: Mapping[str, Tensor], *, skip: Mapping[str, str] | None = None
) -> dict[str, Array]:
    """Arrays for every input of a graph: from the probe, or what stands for nothing."""
    batch = next(iter(inputs.values())).shape[0]
    feeds, unknown = {}, []
    for name, wanted in signature.inputs.items():
        if name in (skip or {}) or name == ADAPTER_INDEX:  # the session knows the rows' adapters
            continue
        if name in inputs:
            feeds[name] = _as(wanted, inputs[name])
            continue
        made = _neutral(wanted, batch, inputs)
        if made is None:
            unknown.append(f"`{name}`: {wanted.dtype} {wanted.axes}")
        else:
            feeds[name] = made
    if unknown:
        raise GraphError("the graph has inputs that nothing is known for", findings=unknown)
    return feeds


def _as(wanted: GraphInput, tensor: Tensor) -> Array:
    """In the graph's dtype; a scalar in the graph's number of axes."""
    array = tensor.numpy()
    if array.ndim == 0 and wanted.axes:
        array = array.reshape((1,) * len(wanted.axes))
    return array.astype(_dtype(wanted))


def _neutral(wanted: GraphInput, batch: int, inputs: Mapping[str, Tensor]) -> Array | None:
    """An input that stands for nothing: an empty cache, segment 0, no earlier step."""
    dtype = _dtype(wanted)
    if wanted.name.startswith(CACHE_IN) and len(wanted.axes) == 4:
        heads, width = wanted.axes[1], wanted.axes[3]
        return None if heads is None or width is None else np.zeros((batch, heads, 0, width), dtype=dtype)
    if wanted.name == "use_cache_branch":
        return np.zeros(1, dtype=dtype)
    if wanted.name == "token_type_ids" and "input_ids" in inputs:
        return np.zeros(tuple(inputs["input_ids"].shape), dtype=dtype)
    return None


def _dtype(wanted: GraphInput) -> np.dtype[np.generic]:
    """float32 for bfloat16, which the child casts: files of arrays do not hold it."""
    return np.dtype("float32" if wanted.dtype == "bfloat16" else wanted.dtype)
