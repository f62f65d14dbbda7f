"""Validate ONNX graphs: the same inputs through PyTorch with live HRA layers and through the runtime.

The runtime works in a child process, on the provider that was asked for or not at all. A quantized candidate is also
run without its adapter, where it can be, so that the error of its base and the error of the adapter are told apart.
A swappable candidate is judged once for each of its adapter files, and without one.

Limits: the reference runs on the CPU in float32; a graph with fixed axes is judged on the inputs that fit it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hra_export import parity
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint, open_checkpoint
from hra_export.errors import GraphError
from hra_export.graph.native import Operator
from hra_export.parity import ParityReport
from hra_export.tensorfile import strict_json
from hra_export.tolerance import GRAPH_TOLERANCES, UNREAD_TOLERANCES
from hra_export.validation.candidates import GraphCandidate, open_candidate
from hra_export.validation.cases import cases_of
from hra_export.validation.question import Question
from hra_export.validation.reference import make_reference
from hra_export.validation.text import find_tokenizer
from hra_export.validation.trial import Trial

TIMEOUT = 1800.0  # seconds for one child: a graph of 8 billion weights loads and runs on a CPU

Say = Callable[[str], None]


def validate_graph(
    adapters: Sequence[HraAdapter],
    base: Path,
    candidate: Path,
    *,
    provider: str = "cpu",
    per_layer: bool = False,
    text: Path | None = None,
    prompts: Sequence[str] | None = None,
    timeout: float = TIMEOUT,
    operator: Operator = "auto",
    say: Say | None = None,
) -> ParityReport:
    """Compare ONNX graphs with the base under live HRA layers.

    Args:
        adapters: in the order they compose; for a swappable candidate, those its adapter files were made of.
        base: directory of transformers or diffusers; not changed.
        candidate: a directory that `hra-export onnx` wrote, one of ONNX Runtime GenAI or of others, or an .onnx file.
        provider: `cpu`, `cuda` or `tensorrt`; must run every compute node.
        per_layer: also compare what every layer gives, in the order they run.
        text: also score this text file: perplexity of the base, the reference and the candidate.
        prompts: to decode greedily, for a language model with a tokenizer; None for a few neutral ones.
        timeout: seconds after which the runtime counts as hung.
        operator: library with kernels for the reflections; `auto` for the one that is found, if it serves the
            provider, None for the operators' bodies.
        say: told about each stage.

    Returns:
        The verdict. A runtime that crashes, hangs or raises on an input is a finding.

    Raises:
        CheckpointError: the base cannot be read, or is no model.
        MismatchError: the adapters do not fit the base, or an adapter file not the graph.
        GraphError: the candidate cannot be read or loaded, or takes inputs that nothing is known for.
        DeviceError: the provider is missing, the runtime fell back from it, or the library that is named has no
            kernels for it.
        FormatError: the library is not ours, or of another version.
        UnsupportedModelError: no input is known for this kind of model, or the provider has no kernel for it.
    """
    tell = say or (lambda text: None)
    question = Question(provider, per_layer, text, prompts, timeout, operator)
    checkpoint, found = open_checkpoint(base), open_candidate(candidate)
    if found.precision not in GRAPH_TOLERANCES:
        raise GraphError(f"`{candidate}`: no tolerance is known for precision `{found.precision}`")
    config = _config(found, checkpoint)
    tokenizer = find_tokenizer(found.root, base)
    cases, findings, notes = cases_of(found, adapters)
    trials = []
    for case in cases:
        tell(f"reference: base with live HRA layers{case.suffix}")
        strength, interpolation = case.strength
        reference = make_reference(checkpoint, case.adapters, config, strength=strength, interpolation=interpolation)
        trial = Trial(question, found, case, reference, config, tokenizer)
        trial.run(tell)
        trials.append(trial)
    return _verdict(found, question, trials, findings, notes)


def _config(candidate: GraphCandidate, base: Checkpoint) -> Mapping[str, Any]:
    """The candidate's own configuration, which may have a head that the base has not; else the base's."""
    path = candidate.root / "config.json"
    parsed = strict_json(path, path.read_bytes()) if path.is_file() else None
    if isinstance(parsed, dict) and {"architectures", "_class_name"} & parsed.keys():
        return parsed
    return base.config


def _verdict(
    candidate: GraphCandidate,
    question: Question,
    trials: Sequence[Trial],
    findings: Sequence[str],
    notes: Sequence[str],
) -> ParityReport:
    """All trials of a candidate as one report."""
    is_read = all(trial.rounding is not None for trial in trials)
    rows = GRAPH_TOLERANCES if is_read or candidate.precision not in UNREAD_TOLERANCES else UNREAD_TOLERANCES
    is_dynamic = any(trial.rounding is not None and trial.rounding.is_dynamic for trial in trials)
    tolerance = rows["dynamic int8" if is_read and is_dynamic else candidate.precision]
    outputs = [output for trial in trials for output in trial.outputs]
    return ParityReport(
        dtype=candidate.precision,
        tolerance=tolerance,
        outputs=tuple(outputs),
        findings=(
            *findings,
            *(finding for trial in trials for finding in trial.findings),
            *parity.departed(outputs, tolerance),
        ),
        notes=tuple(dict.fromkeys([*notes, *(note for trial in trials for note in trial.notes)])),
        layers=tuple(layer for trial in trials for layer in trial.layers),
        decodings=tuple(each for trial in trials for each in trial.decodings),
        perplexity=next((trial.perplexity for trial in trials if trial.perplexity is not None), None),
        provider=question.provider,
        exact=tuple(output for trial in trials for output in trial.exact),
        operators=tuple(dict.fromkeys(run for trial in trials for run in trial.operators)),
        cost=next((trial.cost for trial in trials if trial.cost is not None), None),
    )
