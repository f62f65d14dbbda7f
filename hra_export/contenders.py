"""Who takes part when speed is measured: graphs in sessions, adapters swapped into them, PyTorch with live layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hra_export.adapter import HraAdapter
from hra_export.attachment import attach
from hra_export.checkpoint import MANIFEST_NAME, open_checkpoint
from hra_export.errors import GraphError
from hra_export.graph.document import open_graph
from hra_export.graph.grouped_operator import is_operator
from hra_export.graph.native import Operator
from hra_export.graph.providers import Provider
from hra_export.graph.session import GraphSession
from hra_export.graph.values import Array
from hra_export.loading import load_model
from hra_export.tensorfile import strict_json
from hra_export.workload import DEFAULT_PIXELS, Load, feeds_of, loads_of

GENAI_CONFIG = "genai_config.json"
STEMS = ("model", "encoder_model", "decoder_model")


@dataclass(frozen=True)
class Contender:
    """Something that runs one load.

    Attributes:
        name: as in the table.
        run: does it once, and returns when it is done.
        operator: what runs a graph's reflections, `native` kernels or `inlined` bodies; None where there are none.
    """

    name: str
    run: Callable[[], object]
    operator: Literal["native", "inlined"] | None = None


@dataclass(frozen=True)
class OpenDirectory:
    """The sessions of one output of `hra-export onnx`.

    Attributes:
        path: of the directory, or of a single graph.
        sessions: stem of a file → its session.
        manifest: what the export said; empty for others.
        widths: sizes of dynamic axes that no load knows.
        pixels: height and width, where a graph leaves them open.
        adapter: name of the one that is loaded, if any.
        reflections: how many nodes of all graphs are operators of ours.
    """

    path: Path
    sessions: Mapping[str, GraphSession]
    manifest: Mapping[str, Any]
    widths: Mapping[str, int]
    pixels: int
    adapter: str | None
    reflections: int

    @classmethod
    def open(
        cls, path: Path, *, provider: Provider, threads: int | None, operator: Operator = "auto"
    ) -> "OpenDirectory":
        """Open every graph, and load the first adapter into those that take one; `operator` as of `GraphSession`.

        Raises:
            GraphError: no graph is there, or one that cannot be used.
            FormatError: the library of operators cannot be used.
            DeviceError: the provider or the library's kernels for it are missing, or another one would run some nodes.
        """
        files = [path] if path.is_file() else [file for stem in STEMS if (file := path / f"{stem}.onnx").is_file()]
        if not files:
            raise GraphError(f"`{path}`: expected {', '.join(f'{stem}.onnx' for stem in STEMS)}, found none of them")
        sessions = {
            file.stem: GraphSession.open(file, provider=provider, threads=threads, operator=operator) for file in files
        }
        reflections = sum(is_operator(node) for file in files for node in open_graph(file).graph)
        stored = sorted((path / "adapters").glob("*.onnx_adapter"))[:1]
        for session in sessions.values():
            for file in stored if session.contract is not None else ():
                session.load_adapter(file.stem, file)
        config, genai = _parsed(path / "config.json"), _parsed(path / GENAI_CONFIG)
        head = genai.get("model", {}).get("decoder", {}).get("head_size")
        widths = {"kv_cache_dim": int(head)} if head else {}
        pixels = config.get("sample_size", DEFAULT_PIXELS)
        adapter = stored[0].stem if stored else None
        manifest = _parsed(path / MANIFEST_NAME)
        pixels = pixels if isinstance(pixels, int) else DEFAULT_PIXELS
        return cls(path, sessions, manifest, widths, pixels, adapter, reflections)

    @property
    def operator(self) -> Literal["native", "inlined"] | None:
        """What runs the reflections: a library's kernels, or the operators' bodies; None where there are none."""
        if not self.reflections:
            return None
        return "native" if any(session.native is not None for session in self.sessions.values()) else "inlined"

    @property
    def notes(self) -> Iterator[str]:
        """What the manifest says of the graphs, and what runs their reflections."""
        said = [str(self.manifest[key]) for key in ("mode", "precision") if self.manifest.get(key)]
        if self.operator is not None:
            choice = next(iter(self.sessions.values())).operator
            by = choice.reason if choice.library is None else f"`{choice.library.path}` {choice.library.version}"
            said.append(f"reflections {self.operator}, {by}")
        if said:
            yield f"`{self.path}`: {', '.join(said)}"

    def loads(self, batch: int, tokens: int) -> list[Load]:
        """What can be run, with so many rows and tokens."""
        inputs = {stem: session.inputs for stem, session in self.sessions.items()}
        return loads_of(inputs, batch=batch, tokens=tokens, pixels=self.pixels)

    def feeds(self, load: Load) -> dict[str, Array]:
        """What the load's graph is fed."""
        return feeds_of(self.sessions[load.graph].inputs, load, widths=self.widths)

    def contenders(self, load: Load, *, told_apart: bool = False) -> Iterator[Contender]:
        """The graph as it is; with an adapter swapped in, too, where it can be.

        Args:
            load: what it does.
            told_apart: the names say what runs the reflections.
        """
        session, feeds, operator = self.sessions[load.graph], self.feeds(load), self.operator
        suffix = f", {operator}" if told_apart and operator is not None else ""
        yield Contender(f"{self.path}{suffix}", session.bind(feeds).run, operator)
        if session.contract is not None and self.adapter is not None:
            run = session.bind(feeds, adapter=self.adapter).run
            yield Contender(f"{self.path} + {self.adapter}{suffix}", run, operator)


@dataclass(frozen=True)
class LiveModel:
    """PyTorch with live layers."""

    model: nn.Module
    device: torch.device

    @classmethod
    def load(cls, base: Path, adapters: Sequence[HraAdapter], *, provider: Provider) -> "LiveModel":
        """Load a base in float32 and attach adapters, on the device that the provider uses.

        Raises:
            CheckpointError, MismatchError, UnsupportedModelError: as `load_model` and `attach`.
        """
        checkpoint = open_checkpoint(base)
        model, _ = load_model(checkpoint, checkpoint.config)
        attach(model, *adapters)
        device = torch.device("cpu" if provider == "cpu" else "cuda")
        return cls(model.to(device), device)

    def runner(self, load: Load, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """Runs the model once on what a graph is fed."""
        tensors = {name: _like_the_model(array).to(self.device) for name, array in feeds.items()}
        past = {name: tensor for name, tensor in tensors.items() if name.startswith("past")}
        inputs = {name: tensor for name, tensor in tensors.items() if name not in past}
        model: Any = self.model.get_encoder() if load.name == "encode" else self.model  # type: ignore[operator]  # transformers has no types
        cache = _cache(past) if past else None

        @torch.inference_mode()
        def run() -> None:
            if cache is None:
                model(**inputs)
            else:
                model(**inputs, past_key_values=cache, use_cache=True)
                cache.crop(-load.tokens)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return run


def _like_the_model(array: Array) -> torch.Tensor:
    """Floats in float32, whatever the graph takes."""
    return torch.from_numpy(array if array.dtype.kind == "i" else array.astype(np.float32))


def _cache(past: Mapping[str, torch.Tensor]) -> Any:
    """transformers' cache of `past_key_values.N.key` and `.value`."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(past) // 2):
        key, value = (past[f"past_key_values.{layer}.{part}"] for part in ("key", "value"))
        cache.update(key, value, layer)
    return cache


def _parsed(path: Path) -> dict[str, Any]:
    parsed = strict_json(path, path.read_bytes()) if path.is_file() else {}
    return parsed if isinstance(parsed, dict) else {}
