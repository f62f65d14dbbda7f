"""What a language model says: greedy decoding of prompts on both sides, and the perplexity of a text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hra_export.parity import Decoding, OutputParity, Perplexity
from hra_export.validation.candidates import GraphCandidate
from hra_export.validation.feeding import greedy_run, scored_run
from hra_export.validation.graph_probes import FIRST_ID, SEED
from hra_export.validation.job import Generation, Run
from hra_export.validation.process import Answer
from hra_export.validation.reference import Reference
from hra_export.validation.text import NEW_TOKENS, Tokenizer

PREFIX = 6  # random tokens to decode from, where there is no tokenizer
# Two tokens change places when both logits move by less than half of what lies between them. The largest move that
# was measured is on other inputs.
GAP_PER_DIFFERENCE = 4.0


@dataclass(frozen=True)
class Spoken:
    """One prompt and what the reference goes on with.

    Attributes:
        name: of the run.
        logits: (count, vocabulary), from which each token was drawn.
    """

    name: str
    prompt: str
    ids: Sequence[int]
    tokens: Sequence[int]
    logits: Tensor


def can_decode(reference: Reference, candidate: GraphCandidate) -> bool:
    """Whether this is a decoder of text with one graph."""
    model = reference.model
    generates = hasattr(model, "generate") and bool(model.can_generate())  # type: ignore[operator]  # a method of generation
    takes = candidate.main.signature.inputs
    return generates and "model" in candidate.graphs and "input_ids" in takes and "pixel_values" not in takes


def longest_text(reference: Reference) -> int:
    """How many positions the model has; a large number for one that counts none."""
    config: Any = reference.model.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def spoken(reference: Reference, prompts: Sequence[str], tokenizer: Tokenizer | None) -> list[Spoken]:
    """The reference's continuations of prompts, or of a few random tokens."""
    if tokenizer is not None:
        asked = [(prompt, tokenizer.prompt(prompt)) for prompt in prompts]
    else:
        vocabulary = reference.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]  # a config
        drawn = torch.randint(FIRST_ID, vocabulary, (PREFIX,), generator=torch.Generator().manual_seed(SEED))
        asked = [(f"{PREFIX} random tokens", drawn.tolist())]
    room = max(1, longest_text(reference) - NEW_TOKENS)
    asked = [(prompt, ids[-room:]) for prompt, ids in asked]
    answers = [reference.greedy(ids, NEW_TOKENS) for _, ids in asked]
    return [
        Spoken(f"decoding prompt {number}", prompt, ids, tokens, logits)
        for number, ((prompt, ids), (tokens, logits)) in enumerate(zip(asked, answers, strict=True), start=1)
    ]


def decoding_runs(candidate: GraphCandidate, said: Sequence[Spoken]) -> list[Run]:
    """The same prompts as runs of the candidate."""
    return [greedy_run(candidate, each.name, each.ids, NEW_TOKENS) for each in said]


def generations(said: Sequence[Spoken]) -> list[Generation]:
    """The same prompts for the generator of ONNX Runtime GenAI."""
    return [Generation(each.name, each.ids, NEW_TOKENS) for each in said]


def decodings(
    said: Sequence[Spoken], answers: Mapping[str, Answer], tokenizer: Tokenizer | None, *, runtime: str
) -> list[Decoding]:
    """Hold the candidate's tokens against the reference's; a run that failed agreed on none."""
    return [_decoding(each, list(answers[each.name].tokens), tokenizer, runtime) for each in said]


def end_tokens(reference: Reference) -> set[int]:
    """Tokens that end a text, as the model's configurations say."""
    model: Any = reference.model
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or ())
    return found


def cut(said: Spoken, ends: set[int]) -> Spoken:
    """What was said up to a token that ends the text."""
    count = next((index + 1 for index, token in enumerate(said.tokens) if token in ends), len(said.tokens))
    return replace(said, tokens=said.tokens[:count], logits=said.logits[:count])


def with_end(answer: Answer, said: Spoken, ends: set[int]) -> Answer:
    """An answer of ONNX Runtime GenAI with the token that ended the text, which it leaves out."""
    count = len(answer.tokens)
    if answer.error is not None or count >= NEW_TOKENS or not ends:
        return answer
    own = said.tokens[count] if count < len(said.tokens) else -1
    return replace(answer, tokens=[*answer.tokens, own if own in ends else min(ends)])


def decoding_findings(found: Sequence[Decoding], outputs: Sequence[OutputParity]) -> list[str]:
    """Prompts that leave the reference at a token that rounding does not explain."""
    moved = max((output.max_abs for output in outputs if output.kl is not None), default=0.0)
    return [
        f"decoding `{each.prompt}`: token {each.agreed + 1} of {each.count} differs, where the reference's own is "
        f"ahead by {each.gap:.2g} and logits are off by {moved:.1g}"
        for each in found
        if each.agreed < each.count and not each.gap <= GAP_PER_DIFFERENCE * moved
    ]


def scored_windows(candidate: GraphCandidate, windows: Sequence[Sequence[int]]) -> list[Run]:
    """Pieces of a text as runs of the candidate."""
    return [scored_run(candidate, f"text, piece {number}", ids) for number, ids in enumerate(windows, start=1)]


def likelihoods(reference: Reference, windows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Sums of negative log-likelihoods of all pieces: of the base, and with the adapter."""
    adapted = sum(reference.negative_log_likelihood(window) for window in windows)
    with reference.without_adapter():
        return sum(reference.negative_log_likelihood(window) for window in windows), adapted


def perplexity(
    sums: tuple[float, float], windows: Sequence[Sequence[int]], runs: Sequence[Run], answers: Mapping[str, Answer]
) -> Perplexity:
    """Of the base, the reference and the candidate on the same pieces; NaN where the candidate failed."""
    tokens = sum(len(window) - 1 for window in windows)
    scored = [answers[run.name] for run in runs]
    total = math.nan if any(answer.error for answer in scored) else sum(answer.nll for answer in scored)
    return Perplexity(tokens, *(math.exp(nll / tokens) for nll in (*sums, total)))


def _decoding(said: Spoken, tokens: list[int], tokenizer: Tokenizer | None, runtime: str) -> Decoding:
    pairs = list(zip(said.tokens, tokens, strict=False))
    agreed = next((index for index, (own, other) in enumerate(pairs) if own != other), len(pairs))
    gap = 0.0
    if agreed < len(said.tokens):
        scores = said.logits[agreed]
        own = float(scores[said.tokens[agreed]])
        gap = own - float(scores[tokens[agreed]]) if agreed < len(tokens) else math.inf
    texts = [tokenizer.text(each) if tokenizer is not None else "" for each in (said.tokens, tokens)]
    return Decoding(said.prompt, len(said.tokens), agreed, gap, texts[0], texts[1], runtime)
