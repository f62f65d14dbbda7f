"""One trial: a candidate with one adapter against its reference, from the inputs to what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hra_export import parity
from hra_export.graph.codes import keep_activations_
from hra_export.graph.variants import silence_
from hra_export.parity import Decoding, OperatorRun, OutputParity, Perplexity, RoundingCost
from hra_export.tolerance import GRAPH_TOLERANCES, UNROUNDED, unrounded
from hra_export.validation import decoding
from hra_export.validation.candidates import GraphCandidate
from hra_export.validation.cases import Case, is_swappable, names_rows
from hra_export.validation.comparison import compared, outputs_by_name
from hra_export.validation.feeding import runs_of
from hra_export.validation.graph_probes import GraphProbe, graph_probes
from hra_export.validation.job import Job, Run
from hra_export.validation.layers import compare_layers
from hra_export.validation.process import Answer, Ending, run_job
from hra_export.validation.question import Question
from hra_export.validation.reference import Reference
from hra_export.validation.rounding import (
    QUANTIZED,
    Rounding,
    moved_base,
    round_reference_,
    rounding_cost,
)
from hra_export.validation.stand_ins import runnable, variants_of
from hra_export.validation.text import PROMPTS, Tokenizer

Say = Callable[[str], None]
Sides = dict[str, dict[str, Tensor]]


@dataclass
class Trial:
    """A candidate, its reference, and what came of it."""

    question: Question
    candidate: GraphCandidate
    case: Case
    reference: Reference
    config: Mapping[str, Any]
    tokenizer: Tokenizer | None
    outputs: list[OutputParity] = field(default_factory=list)
    exact: list[OutputParity] = field(default_factory=list)
    layers: list[OutputParity] = field(default_factory=list)
    rounding: Rounding | None = None
    cost: RoundingCost | None = None
    decodings: list[Decoding] = field(default_factory=list)
    perplexity: Perplexity | None = None
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    operators: list[OperatorRun] = field(default_factory=list)

    def run(self, tell: Say) -> None:
        """Do it all, and keep what was measured."""
        with runnable(self.candidate, self.question.provider, self.notes) as graphs:
            self._run(graphs, tell)

    def _run(self, graphs: Mapping[str, Path], tell: Say) -> None:
        probes = self._probes()
        adapted, base = self._sides(probes)
        unused = self.reference.attachment.unused()
        self.findings += [f"{path}: this target never ran, its chain has no effect" for path in unused]
        windows, scored_runs = self._windows()
        sums = decoding.likelihoods(self.reference, windows) if windows else (0.0, 0.0)
        if self.candidate.precision in QUANTIZED:
            adapted, base = self._round(probes, adapted, base, tell)
        runs = {probe.name: runs_of(self.candidate, probe) for probe in probes}
        self._mixed(probes, runs, adapted, base)
        said, spoken_runs = self._spoken()
        tell(f"candidate: {sum(map(len, runs.values()))} inputs on `{self.question.provider}`")
        ending = self._answers(graphs, [*(run for each in runs.values() for run in each), *spoken_runs, *scored_runs])
        if ending is None:
            return
        self._take_operators(ending, "ONNX Runtime")
        alike = [run for each in runs.values() for run in each if not run.rows]
        start = self._start(graphs, alike, tell)
        for probe in probes:
            for run in runs[probe.name]:
                self.outputs += self._taken(probe, run, ending.answers[run.name], start.get(run.name), adapted, base)
        if self.rounding is not None and not self.rounding.is_dynamic:
            self._take_exact(graphs, probes, runs, adapted, base, tell)
        self._take_decodings(ending, said, "ONNX Runtime")
        if scored_runs:
            self.perplexity = decoding.perplexity(sums, windows, scored_runs, ending.answers)
        if self.candidate.genai is not None:
            self._take_generations(said, tell)
        if self.question.per_layer:
            tell("candidate: layer by layer")
            self._take_layers(probes)

    def _sides(self, probes: Sequence[GraphProbe]) -> tuple[Sides, Sides]:
        """What the reference gives with the adapter, and without."""
        adapted = {probe.name: self.reference.run(probe.inputs) for probe in probes}
        with self.reference.without_adapter():
            return adapted, {probe.name: self.reference.run(probe.inputs) for probe in probes}

    def _round(self, probes: Sequence[GraphProbe], exact: Sides, base: Sides, tell: Say) -> tuple[Sides, Sides]:
        """Check the candidate's matrices, put them into the reference, and run it again."""
        tell(f"reference: the candidate's own weights{self.case.suffix}")
        found = round_reference_(self.reference, self.candidate, self.case.adapters)
        if isinstance(found, str):
            self.notes.append(f"{found}: judged against the float model, which shows no small fault")
            return exact, base
        self.rounding = found
        self.findings += [self.case.label(finding) for finding in found.findings]
        if found.is_live:
            rounded, plain = self._sides(probes)
            self.cost = rounding_cost(exact, rounded, base, plain)
            return rounded, plain
        rounded = {probe.name: self.reference.run(probe.inputs) for probe in probes}
        self.cost = rounding_cost(exact, rounded, base, None)
        return rounded, moved_base(rounded, exact, base)

    def _take_exact(
        self,
        graphs: Mapping[str, Path],
        probes: Sequence[GraphProbe],
        runs: Mapping[str, Sequence[Run]],
        adapted: Sides,
        base: Sides,
        tell: Say,
    ) -> None:
        """The graph with its activations not rounded, which then differs by the order of sums alone."""
        assert self.rounding is not None
        changed: list[bool] = []
        with variants_of(graphs, lambda model: changed.append(keep_activations_(model))) as exact:
            if any(changed):
                tell("candidate: with activations not rounded")
                ending = self._answers(exact, [run for each in runs.values() for run in each])
                answers = {} if ending is None else ending.answers
                for probe in probes:
                    for run in runs[probe.name] if answers else ():
                        self.exact += self._taken(probe, run, answers[run.name], None, adapted, base)
        tolerance = UNROUNDED if self.rounding.precision == "fp32" else GRAPH_TOLERANCES[self.rounding.precision]
        what = "activations not rounded, "
        if not any(changed):
            self.findings += parity.departed(self.outputs, tolerance)
        rounded = {output.name: output for output in self.outputs}
        for each in self.exact:
            seen = rounded.get(each.name, each)
            allowed = unrounded(tolerance, seen.effect_error, seen.kl)
            self.findings += [f"{what}{each.name}: {text}" for text in parity.departures(each, allowed)]

    def _mixed(self, probes: list[GraphProbe], runs: dict[str, list[Run]], adapted: Sides, base: Sides) -> None:
        """Add one probe whose rows have the adapter in turn, where rows name their adapters."""
        if not names_rows(self.candidate):
            return
        probe = max(probes, key=_batch)
        rows = [row % 2 == 0 for row in range(_batch(probe))]
        name = f"{probe.name}, the adapter in every second row"
        probes.append(replace(probe, name=name))
        runs[name] = [replace(runs[probe.name][0], name=name, rows=rows)]
        base[name] = base[probe.name]
        adapted[name] = {
            output: torch.stack([ours if on else theirs for ours, theirs, on in zip(tensor, plain, rows, strict=True)])
            for output, tensor in adapted[probe.name].items()
            if len(plain := base[probe.name][output]) == len(rows)
        }

    def _probes(self) -> list[GraphProbe]:
        signatures = [graph.signature for graph in self.candidate.graphs.values()]
        takes_tokens = getattr(self.reference.model, "main_input_name", "") == "input_ids"
        prompts: list[list[int]] = []
        if self.tokenizer is not None and takes_tokens:
            prompts = [self.tokenizer.prompt(prompt) for prompt in self.question.prompts or PROMPTS]
        return graph_probes(self.reference.model, self.config, signatures, prompts)

    def _spoken(self) -> tuple[list[decoding.Spoken], list[Run]]:
        if not decoding.can_decode(self.reference, self.candidate):
            return [], []
        said = decoding.spoken(self.reference, self.question.prompts or PROMPTS, self.tokenizer)
        return said, decoding.decoding_runs(self.candidate, said)

    def _windows(self) -> tuple[list[list[int]], list[Run]]:
        if self.question.text is None:
            return [], []
        if self.tokenizer is None or not decoding.can_decode(self.reference, self.candidate):
            self.findings.append(f"`{self.question.text}` was not scored: this is no language model with a tokenizer")
            return [], []
        windows = self.tokenizer.windows(self.question.text, decoding.longest_text(self.reference))
        return windows, decoding.scored_windows(self.candidate, windows)

    def _answers(self, graphs: Mapping[str, Path], runs: Sequence[Run], *, plain: bool = False) -> Ending | None:
        """What the runtime answers; None when it ended without, which is a finding."""
        files, operator = {} if plain else self.case.files, self.question.operator
        job = Job(graphs, self.question.provider, runs, files, operator=operator)
        ending = run_job(job, timeout=self.question.timeout)
        if ending.failure is not None:
            self.findings.append(self.case.label(ending.failure))
            return None
        return ending

    def _start(self, graphs: Mapping[str, Path], runs: Sequence[Run], tell: Say) -> Mapping[str, Answer]:
        """The candidate without its adapter, where it runs so and its base is not the reference's."""
        ending = None
        if is_swappable(self.candidate):
            if self.candidate.manifest.get("default") != "adapter":
                tell("candidate: without an adapter")
                ending = self._answers(graphs, runs, plain=True)
        elif self.candidate.precision in QUANTIZED and self.rounding is None:
            ending = self._silenced(graphs, runs, tell)
        return {} if ending is None else ending.answers

    def _silenced(self, graphs: Mapping[str, Path], runs: Sequence[Run], tell: Say) -> Ending | None:
        silenced: list[bool] = []
        with variants_of(graphs, lambda model: silenced.append(silence_(model))) as variants:
            if not any(silenced):
                self.notes.append("the adapter is part of the weights: the error of the base is not told apart")
                return None
            tell("candidate: without its adapter")
            return self._answers(variants, runs)

    def _taken(
        self,
        probe: GraphProbe,
        run: Run,
        answer: Answer,
        start: Answer | None,
        adapted: Mapping[str, Mapping[str, Tensor]],
        base: Mapping[str, Mapping[str, Tensor]],
    ) -> list[OutputParity]:
        label = self.case.label(run.name)
        if answer.error is not None:
            self.findings.append(f"{label}: the runtime failed: {answer.error}")
            return []
        has_encoder = "encoder" in self.candidate.graphs
        outputs = outputs_by_name(answer.outputs, has_encoder=has_encoder)
        own = outputs_by_name(start.outputs, has_encoder=has_encoder) if start is not None and start.outputs else None
        found = list(compared(label, probe, adapted[probe.name], base[probe.name], outputs, own))
        self.findings += [each for each in found if isinstance(each, str)]
        return [each for each in found if isinstance(each, OutputParity)]

    def _take_decodings(self, ending: Ending, said: Sequence[decoding.Spoken], runtime: str) -> None:
        for each in said:
            if error := ending.answers[each.name].error:
                self.findings.append(self.case.label(f"{each.name}: {runtime} failed: {error}"))
        found = decoding.decodings(said, ending.answers, self.tokenizer, runtime=runtime)
        self.decodings += found
        self.findings += [self.case.label(each) for each in decoding.decoding_findings(found, self.outputs)]

    def _take_generations(self, said: Sequence[decoding.Spoken], tell: Say) -> None:
        """The same prompts by the generator of ONNX Runtime GenAI, which stops where a text ends."""
        tell("candidate: decoding with ONNX Runtime GenAI")
        ends = decoding.end_tokens(self.reference)
        asked = [decoding.cut(each, ends) for each in said]
        job = Job(
            {},
            self.question.provider,
            adapters=self.case.files,
            genai=self.candidate.root,
            generations=decoding.generations(asked),
            operator=self.question.operator,
        )
        ending = run_job(job, timeout=self.question.timeout)
        if ending.failure is not None:
            self.findings.append(self.case.label(ending.failure))
            return
        self._take_operators(ending, "ONNX Runtime GenAI")
        answers = {each.name: decoding.with_end(ending.answers[each.name], each, ends) for each in asked}
        self._take_decodings(Ending(answers), asked, "ONNX Runtime GenAI")

    def _take_layers(self, probes: Sequence[GraphProbe]) -> None:
        self.layers, notes = compare_layers(
            self.reference,
            self.candidate,
            probes,
            provider=self.question.provider,
            adapters=self.case.files,
            timeout=self.question.timeout,
            operator=self.question.operator,
        )
        self.notes += notes

    def _take_operators(self, ending: Ending, runtime: str) -> None:
        """What ran the reflections of each graph that holds any."""
        for role, told in ending.operators.items():
            graph = self.candidate.graphs.get(role, self.candidate.main)
            library = told["library"] if told["nodes"] else None
            path, version = (None, None) if library is None else (library["path"], library["version"])
            if graph.reflections:
                nodes, reason = told["nodes"] or graph.reflections, told["reason"]
                if library is None and not reason:
                    reason = "the library that was registered took none"
                self.operators.append(OperatorRun(runtime, graph.path.name, nodes, path, version, reason))


def _batch(probe: GraphProbe) -> int:
    return len(next(iter(probe.inputs.values())))
