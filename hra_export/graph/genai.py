"""Directories for ONNX Runtime GenAI: their graph and files, and its generator.

    build_genai    merged: the graph of weights that hold the chains; reflect: the graph of the base's, chains in front
    traced_genai   the same for a decoder that the builder does not know and we can trace
    GenaiModel     loads a directory and continues prompts

The only file that imports onnxruntime_genai.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hra_export.adapter import HraAdapter
from hra_export.errors import DeviceError, GraphError, HraExportError
from hra_export.filesystem import as_output_error
from hra_export.graph import document
from hra_export.graph.adapter_file import read_adapter_file
from hra_export.graph.genai_builder import CONFIG_NAME, GRAPH_NAME, INSTALL, run_builder
from hra_export.graph.genai_config import (
    check_config,
    check_loadable,
    for_provider,
    provider_settings,
    to_bytes,
    traced_config,
)
from hra_export.graph.genai_corrections import correct_, resolved_config
from hra_export.graph.genai_library import name_for_loader
from hra_export.graph.genai_names import builder_names, wants_separate_attention
from hra_export.graph.insertion import insert_reflections_
from hra_export.graph.making import MadeGraphs
from hra_export.graph.native import Operator, OperatorChoice, choose_operator
from hra_export.graph.operator import DOMAIN
from hra_export.graph.options import GraphOptions, Provider
from hra_export.graph.swapping import read_contract
from hra_export.graph.values import Array

DATA_NAME = f"{GRAPH_NAME}.data"
# A generator that takes the likeliest token, whatever the directory's own defaults are.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}


def build_genai(directory: Path, adapters: Sequence[HraAdapter], scratch: Path, options: GraphOptions) -> MadeGraphs:
    """The graph of a model directory as ONNX Runtime GenAI's own builder makes it, and the files beside it.

    Weights stay in the type of the activations: `quantize_` rounds them afterwards, as in all graphs.

    Args:
        directory: of transformers, with biases and saved modules already the adapters'. For `merged` its weights hold
            the chains; for `reflect` they are the base's.
        adapters: composed in the order given; only for `reflect`.
        scratch: an existing folder; the graph's weights lie in it until the graph is saved, so it must live as long.
        options: mode, precision, provider.

    Returns:
        The graph `model` with opaque reflections, `genai_config.json`, and tokenizer files that the directory lacks.

    Raises:
        CheckpointError: the directory does not name a class.
        DeviceError: onnxruntime-genai is not installed, or the provider cannot run this precision.
        GraphError: the builder failed, or its configuration does not fit its graph.
        MismatchError: a target has no place in the graph.
        NumericalError: a chain cannot be computed.
        OutputError: the disk is full.
        UnsupportedModelError: the builder has no graph for this class, or the runtime no kernel.
    """
    chains = [replace(adapter, parameters={}) for adapter in adapters if options.mode == "reflect"]
    targets = dict.fromkeys(path for adapter in chains for path in adapter.chains)
    names = builder_names(targets)
    built = run_builder(directory, scratch, options, fuse_attention=not wants_separate_attention(targets))
    model = document.open_graph(built / GRAPH_NAME)
    config = for_provider(json.loads((built / CONFIG_NAME).read_bytes()), options.provider)
    check_config(config, model.graph)
    notes = correct_(model, resolved_config(directory))
    if chains:
        notes += insert_reflections_(model, chains, rename=names, strength=options.linear).notes
    known = {GRAPH_NAME, DATA_NAME, CONFIG_NAME}
    extra = [path for path in sorted(built.iterdir()) if path.is_file() and path.name not in known]
    files = {path.name: path.read_bytes() for path in extra if not (directory / path.name).exists()}
    return MadeGraphs({"model": model}, "decoder", "text-generation", notes, {CONFIG_NAME: to_bytes(config), **files})


def traced_genai(made: MadeGraphs, directory: Path, provider: Provider) -> MadeGraphs:
    """A traced decoder as a directory for ONNX Runtime GenAI: the same graph, and a configuration for it.

    Args:
        made: one graph `model` that serves prompt and continuation.
        directory: of transformers, for `config.json` and `generation_config.json`.
        provider: where it will run.

    Raises:
        GraphError: the graph is not such a decoder, or the configuration lacks a size or the token that ends a text.
        OutputError: a configuration cannot be read.
    """
    (graph,) = (model.graph for model in made.graphs.values())
    config = traced_config(graph, _json(directory / "config.json"), _json(directory / "generation_config.json"))
    config = for_provider(config, provider)
    check_config(config, graph)
    return replace(made, files={**made.files, CONFIG_NAME: to_bytes(config)})


@dataclass(frozen=True)
class Generation:
    """What a model made of a prompt.

    Attributes:
        tokens: the new ones, without the one that ended the text.
        logits: of the prompt (t, vocabulary), float32.
    """

    tokens: tuple[int, ...]
    logits: Array


class GenaiModel:
    """A directory in ONNX Runtime GenAI. A crash of the runtime ends the process: run it in a child to be safe.

    Attributes:
        directory: what was loaded.
        operator: the library whose kernels run the reflections, or why the operators' bodies do.
        reflections: how many nodes of the graph that is about.
    """

    def __init__(self, model: Any, directory: Path, operator: OperatorChoice, reflections: int) -> None:
        self.directory = directory
        self.operator = operator
        self.reflections = reflections
        self._model = model
        self._adapters: Any = None
        self._names: set[str] = set()

    @classmethod
    def open(
        cls, directory: Path, *, provider: Provider = "cpu", operator: Operator = "auto", cuda_graph: bool = False
    ) -> "GenaiModel":
        """Load a directory on a provider, whatever its own configuration names.

        Args:
            directory: that `hra-export onnx --runtime genai` wrote, or another.
            provider: runs the graph.
            operator: library with kernels for the reflections; `auto` for the one that is found, if it serves the
                provider, None for the operators' bodies.
            cuda_graph: record the run of a single token and replay it for the next ones. Each generation records its
                own, with its adapter; only with `provider="cuda"`.

        Raises:
            DeviceError: onnxruntime-genai is not installed, the provider cannot start, or the library that is named
                has no kernels for it or cannot be loaded.
            FormatError: the library is not ours, or of another version.
            GraphError: the runtime refuses the directory.
            UnsupportedModelError: its decoding cannot be recorded.
            ValueError: a provider that records no CUDA graph.
        """
        if cuda_graph and provider != "cuda":
            raise ValueError(f"cuda_graph: only the `cuda` provider records one, got `{provider}`")
        og, known = _import(), _json(directory / CONFIG_NAME)
        check_loadable(known, str(directory), cuda_graph=cuda_graph)
        choice, reflections = choose_operator(operator, provider), _reflections(directory, known)
        if not reflections:
            choice = OperatorChoice(None, "the graph has no reflections")
        try:
            config = og.Config(str(directory))
            config.clear_providers()
            if provider != "cpu":
                config.append_provider(provider)
            for name, value in provider_settings(provider, cuda_graph=cuda_graph).items():
                config.set_provider_option(provider, name, value)
        except Exception as error:  # the runtime raises plain RuntimeError and its own
            raise GraphError(f"ONNX Runtime GenAI cannot read `{directory}`", findings=[str(error)]) from error
        if choice.library is not None:
            options = {"custom_ops_library": name_for_loader(choice.library.path, directory)}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        try:
            return cls(og.Model(config), directory, choice, reflections)
        except Exception as error:
            raise _not_loaded(error, directory, provider) from error

    def load_adapter(self, name: str, path: Path) -> None:
        """Load an `.onnx_adapter` file under a name, after what the runtime leaves out: is it whole, is it for this?

        Raises:
            FormatError: not an adapter file.
            GraphError: the graph is not swappable.
            MismatchError: the file is foreign or partial.
            ValueError: the name is taken.
        """
        if name in self._names:
            raise ValueError(f"adapter `{name}` is loaded already")
        model = document.open_graph(self.directory / GRAPH_NAME)
        contract = read_contract(model)
        if contract is None:
            raise GraphError(f"`{self.directory}` takes no adapters", hint="export it with --swappable")
        read_adapter_file(path).check(contract)
        if self._adapters is None:
            self._adapters = _import().Adapters(self._model)
        self._adapters.load(str(path), name)
        self._names.add(name)

    def generate(self, prompt: Sequence[int], *, max_new_tokens: int, adapter: str | None = None) -> Generation:
        """Continue a prompt with the likeliest tokens until one ends the text.

        Args:
            prompt: token ids, one at least.
            max_new_tokens: at most so many.
            adapter: a loaded one; None for what the graph computes by itself.

        Raises:
            GraphError: the runtime failed, or the text would be longer than the model's context.
            ValueError: the adapter is not loaded.
        """
        if adapter is not None and adapter not in self._names:
            raise ValueError(f"adapter `{adapter}` is not loaded; there are {sorted(self._names)}")
        og = _import()
        try:
            parameters = og.GeneratorParams(self._model)
            parameters.set_search_options(**GREEDY, batch_size=1, max_length=len(prompt) + max_new_tokens)
            generator = og.Generator(self._model, parameters)
            if adapter is not None:
                generator.set_active_adapter(self._adapters, adapter)
            generator.append_tokens(np.array([prompt], np.int32))
            logits = generator.get_output("logits")[0].astype(np.float32)
            while not generator.is_done():
                generator.generate_next_token()
            tokens = generator.get_sequence(0)[len(prompt) :]
        except Exception as error:  # the runtime raises plain RuntimeError and its own
            raise GraphError(f"ONNX Runtime GenAI cannot run `{self.directory}`", findings=[str(error)]) from error
        return Generation(tuple(int(token) for token in tokens), logits)


def _import() -> Any:
    """The runtime.

    Raises:
        DeviceError: it is not installed, or one of its libraries is missing.
    """
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise DeviceError("ONNX Runtime GenAI is missing", findings=[str(error)], hint=INSTALL) from error
    onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


def _not_loaded(error: Exception, directory: Path, provider: Provider) -> HraExportError:
    """What the runtime raised when it loaded a directory, as an error of ours."""
    if provider != "cpu" and "not available" in str(error):
        return DeviceError(
            f"ONNX Runtime GenAI cannot start on {provider}",
            findings=[str(error)],
            hint="`hra-export doctor` says which libraries and devices there are",
        )
    hint = "open it without `cuda_graph`" if "graph capture" in str(error) else None
    return GraphError(f"ONNX Runtime GenAI cannot load `{directory}`", findings=[str(error)], hint=hint)


def _reflections(directory: Path, config: Mapping[str, Any]) -> int:
    """How many nodes of a directory's graph are operators of ours; 0 where there is no graph."""
    file = directory / str(config.get("model", {}).get("decoder", {}).get("filename", GRAPH_NAME))
    return sum(node.domain == DOMAIN for node in document.open_graph(file).graph) if file.is_file() else 0


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with as_output_error(f"read `{path}`"):
        content = json.loads(path.read_bytes())
    return content if isinstance(content, dict) else {}
