"""What a candidate is: a merged directory, or ONNX graphs from here, from ONNX Runtime GenAI or from elsewhere."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hra_export.checkpoint import MANIFEST_NAME
from hra_export.errors import FormatError, GraphError
from hra_export.graph.document import open_graph
from hra_export.graph.grouped_operator import is_operator
from hra_export.graph.provenance import stated_strength
from hra_export.graph.signature import Signature, read_signature
from hra_export.strength import INTERPOLATIONS, Interpolation
from hra_export.tensorfile import strict_json

GENAI_CONFIG = "genai_config.json"
ADAPTER_SUFFIX = ".onnx_adapter"
Strength = tuple[float, Interpolation]
CACHE_IN = "past_key_values."
# File names of others → what the graph is; the first that is there wins.
KNOWN_NAMES = {
    "model": ("model.onnx", "decoder_model_merged.onnx"),
    "encoder": ("encoder_model.onnx", "encoder.onnx"),
    "decoder": ("decoder_model_merged.onnx", "decoder_model.onnx", "decoder.onnx"),
}


@dataclass(frozen=True)
class GraphFile:
    """One graph of a candidate: its outside, and how many of its nodes are operators of ours."""

    path: Path
    signature: Signature
    reflections: int = 0


@dataclass(frozen=True)
class GraphCandidate:
    """ONNX graphs to judge.

    Attributes:
        root: the directory that holds them.
        graphs: `model`, or `encoder` and `decoder` → graph.
        manifest: what `hra-export onnx` said about them, of a single file its strength; empty when they came from
            elsewhere.
        genai: the parsed `genai_config.json`; None without one.
    """

    root: Path
    graphs: Mapping[str, GraphFile]
    manifest: Mapping[str, Any]
    genai: Mapping[str, Any] | None

    @property
    def main(self) -> GraphFile:
        """The graph whose outputs are the model's."""
        return self.graphs[self.main_role]

    @property
    def main_role(self) -> str:
        """What the main graph is."""
        return "decoder" if "decoder" in self.graphs else next(iter(self.graphs))

    @property
    def precision(self) -> str:
        """As promised, or as the main graph shows it; of kept bits, what is rounded beside them."""
        promised = self.manifest.get("precision")
        if promised == "keep":
            promised = self.manifest.get("rounding")
        return str(promised or self.main.signature.precision)

    @property
    def adapter_files(self) -> dict[str, dict[str, Path]]:
        """The adapters that can be swapped in: name → role of a graph → its file.

        The file for `encoder_model.onnx` is `NAME.encoder_model.onnx_adapter`, for `model.onnx` `NAME.onnx_adapter`.
        """
        found: dict[str, dict[str, Path]] = {}
        endings = {f".{graph.path.stem}": role for role, graph in self.graphs.items()}
        for file in sorted((self.root / "adapters").glob(f"*{ADAPTER_SUFFIX}")):
            name = file.name.removesuffix(ADAPTER_SUFFIX)
            ending = next((ending for ending in endings if name.endswith(ending)), "")
            found.setdefault(name.removesuffix(ending), {})[endings.get(ending, self.main_role)] = file
        return found


def is_graph_candidate(path: Path) -> bool:
    """Whether a path leads to ONNX graphs, and not to weights."""
    if path.is_file():
        return path.suffix == ".onnx"
    return (path / GENAI_CONFIG).is_file() or any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx"))


def open_candidate(path: Path) -> GraphCandidate:
    """Find the graphs of a candidate and read what they take and give.

    Raises:
        GraphError: no graph, graphs whose part in the model cannot be told, or a graph that cannot be used.
    """
    root = path if path.is_dir() else path.parent
    manifest = _parsed(root / MANIFEST_NAME) if path.is_dir() else stated_strength(open_graph(path))
    genai = _parsed(root / GENAI_CONFIG) if path.is_dir() and (root / GENAI_CONFIG).is_file() else None
    files = {"model": path} if path.is_file() else _files(root, manifest, genai)
    width = None if genai is None else genai["model"]["decoder"].get("head_size")
    graphs = {role: _read_graph(file, width) for role, file in files.items()}
    return GraphCandidate(root, graphs, manifest, genai)


def promised_strength(said: Mapping[str, Any]) -> Strength:
    """The strength of adapters, and its interpolation, as whatever was made with them says.

    Args:
        said: a manifest, or what lies beside an adapter file. Older ones name no interpolation, and mean linear.

    Raises:
        FormatError: it says something that means nothing.
    """
    value = said.get("strength", 1.0)
    named = said.get("interpolation", "linear" if "strength" in said else "geodesic")
    interpolation = next((word for word in INTERPOLATIONS if word == named), None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if interpolation is None or not is_number or not math.isfinite(value):
        raise FormatError(f"a manifest names a strength that means nothing: {value!r}, {named!r}")
    return float(value), interpolation


def _files(root: Path, manifest: Mapping[str, Any], genai: Mapping[str, Any] | None) -> dict[str, Path]:
    if genai is not None:
        return {"model": _inside(root, str(genai["model"]["decoder"]["filename"]))}
    if manifest.get("graphs"):
        names = [str(graph["file"]) for graph in manifest["graphs"]]
        return {_role(name): _inside(root, name) for name in names}
    folder = root if any(root.glob("*.onnx")) else root / "onnx"
    there = {path.name: path for path in sorted(folder.glob("*.onnx"))}
    known = {
        role: there[next(name for name in names if name in there)]
        for role, names in KNOWN_NAMES.items()
        if any(name in there for name in names)
    }
    if "encoder" in known and "decoder" in known:
        return {"encoder": known["encoder"], "decoder": known["decoder"]}
    if "model" in known:
        return {"model": known["model"]}
    if len(there) == 1:
        return {"model": next(iter(there.values()))}
    raise GraphError(
        f"`{root}` has no graph that can be judged",
        findings=[f"{name}: its part in the model cannot be told from its name" for name in there],
        hint="pass the .onnx file itself with `--candidate`",
    )


def _read_graph(file: Path, width: object) -> GraphFile:
    model = open_graph(file)
    return GraphFile(file, _sized(read_signature(model), width), sum(map(is_operator, model.graph)))


def _sized(signature: Signature, width: object) -> Signature:
    """With the last axis of an empty cache, which GenAI's builder leaves open for caches that are compressed."""
    inputs = dict(signature.inputs)
    for name, value in inputs.items():
        if name.startswith(CACHE_IN) and len(value.axes) == 4 and value.axes[3] is None and isinstance(width, int):
            inputs[name] = replace(value, axes=(*value.axes[:3], width))
    return replace(signature, inputs=inputs)


def _role(name: str) -> str:
    stem = Path(name).stem
    return next((role for role in ("encoder", "decoder") if stem.startswith(f"{role}_model")), "model")


def _inside(root: Path, name: str) -> Path:
    """A file that a manifest names; it may not lead out of its directory."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise GraphError(f"`{root}` names a graph outside of it: `{name}`")
    return root / name


def _parsed(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    parsed = strict_json(path, path.read_bytes())
    return parsed if isinstance(parsed, dict) else {}
