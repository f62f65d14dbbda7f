"""Base checkpoints: a transformers or diffusers directory of safetensors, read lazily.

Knows nothing of HRA. Opening a checkpoint reads headers only and checks everything they claim; shard names never
leave the directory. What is not weights (configuration, tokenizer, processor, code) is listed as companions, to be
copied byte for byte.

Limits: pickled weights (`pytorch_model.bin`) are refused, not read.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from hra_export.errors import CheckpointError, FormatError, OutputError
from hra_export.tensorfile import TensorFile, TensorInfo, read_header, strict_json

MANIFEST_NAME = "hra_export_manifest.json"
MODULES_NAME = "modules.json"  # sentence-transformers' list of layers
# Stems under which transformers and diffusers keep their weights.
WEIGHT_STEMS = ("model", "diffusion_pytorch_model")
# A pipeline's denoiser, the component that adapters are trained on.
PIPELINE_COMPONENTS = ("unet", "transformer")
# Weights in any format: an unmerged copy must not travel into a merged directory.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5"),
    *(".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot"),
)
MAX_JSON_BYTES = 100_000_000
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A checked base checkpoint.

    Attributes:
        root: the directory that was named: a model, or a whole diffusers pipeline.
        component: the sub-folder of `root` that holds the weights; empty for a model directory.
        files: the shards, in order.
        index_name: name of the shard index, None for a single file.
        config: `config.json` of the component, parsed; empty when there is none.
    """

    root: Path
    component: str
    files: tuple[TensorFile, ...]
    index_name: str | None
    config: Mapping[str, object]

    @property
    def directory(self) -> Path:
        """Where the weights lie."""
        return self.root / self.component

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in the order of files and bytes."""
        return {name: info for file in self.files for name, info in file.tensors.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size_bytes for info in self.tensors.values())

    def companions(self) -> list[PurePosixPath]:
        """Files to carry along byte for byte, relative to `root`, sorted.

        Weights of the component are left out in every format, since only one of them is merged; so are hidden files,
        adapters, and what the merged directory gets anew: the model card, an earlier manifest. Layers that
        sentence-transformers puts behind the model keep theirs.
        """
        found = []
        for path in sorted(_walk(self.root)):
            relative = PurePosixPath(path.relative_to(self.root).as_posix())
            if not self._is_left_out(relative):
                found.append(relative)
        return found

    def left_out(self) -> list[PurePosixPath]:
        """Weights that lie in the directory and are not part of this checkpoint, such as an ONNX export of the base."""
        own = {PurePosixPath(self.component, file.path.name) for file in self.files}
        relatives = [PurePosixPath(path.relative_to(self.root).as_posix()) for path in sorted(_walk(self.root))]
        return [path for path in relatives if path not in own and self._is_weights(path)]

    def fingerprint(self) -> str:
        """A digest that tells this checkpoint from every other of the same shape, without reading it whole.

        SHA-256 over the configuration, every shard's header, and the first and last 4 KiB of every tensor.
        """
        digest = hashlib.sha256()
        path = self.directory / "config.json"
        digest.update(path.read_bytes() if path.is_file() else b"")
        for file in self.files:
            digest.update(f"{file.path.name}\0{file.header_digest}\0".encode())
            with file.open() as descriptor:
                for info in file.tensors.values():
                    size = min(SAMPLE_BYTES, info.size_bytes)
                    digest.update(os.pread(descriptor, size, info.start))
                    digest.update(os.pread(descriptor, size, info.start + info.size_bytes - size))
        return digest.hexdigest()

    def _is_left_out(self, relative: PurePosixPath) -> bool:
        hidden = any(part.startswith(".") for part in relative.parts)
        index = self.index_name is not None and relative == PurePosixPath(self.component, self.index_name)
        indexed = relative.with_suffix("").with_suffix("")
        stale_index = relative.name.endswith(".index.json") and self._is_weights(indexed)
        anew = str(relative) in ("README.md", MANIFEST_NAME)
        # transformers would load an adapter on top, above the base that its configuration names.
        adapter = relative.name == "adapter_config.json"
        return hidden or index or stale_index or anew or adapter or self._is_weights(relative)

    def _is_weights(self, relative: PurePosixPath) -> bool:
        inside = not self.component or relative.parts[0] == self.component
        return inside and relative.suffix in WEIGHT_SUFFIXES and relative.parts[0] not in self._further_layers

    @cached_property
    def _further_layers(self) -> frozenset[str]:
        """Folders in which sentence-transformers keeps layers behind the model, `2_Dense` say, with their weights."""
        path = self.root / MODULES_NAME
        try:
            modules = strict_json(path, path.read_bytes()) if path.is_file() else None
        except FormatError:  # copied as it is, for its own readers to refuse
            return frozenset()
        entries = modules if isinstance(modules, list) else []
        return frozenset(str(entry.get("path")) for entry in entries if isinstance(entry, dict))


def open_checkpoint(root: Path) -> Checkpoint:
    """Open a model directory, or the denoiser of a diffusers pipeline directory.

    Raises:
        CheckpointError: no weights in safetensors, a damaged or hostile header or index, shards missing; all findings.
        OutputError: the file system does not let us read them.
    """
    if not root.is_dir():
        raise CheckpointError(
            f"base `{root}` is not a directory",
            hint="pass a transformers or diffusers directory, a Hub id or a .gguf file",
        )
    component = _component(root)
    directory = root / component
    try:
        config = _read_config(directory / "config.json")
        files, index_name = _open_files(directory)
    except FormatError as error:
        raise CheckpointError(error.message, findings=error.findings, hint=error.hint) from error
    except OSError as error:
        raise OutputError(f"cannot read base `{root}`: {error}") from error
    return Checkpoint(root, component, files, index_name, config)


def _component(root: Path) -> str:
    if not (root / "model_index.json").is_file():
        return ""
    present = [name for name in PIPELINE_COMPONENTS if (root / name).is_dir()]
    if len(present) != 1:
        raise CheckpointError(
            f"pipeline `{root}` has {' and '.join(present) or 'neither unet nor transformer'}",
            hint="pass the component's own folder as base",
        )
    return present[0]


def _open_files(directory: Path) -> tuple[tuple[TensorFile, ...], str | None]:
    for stem in WEIGHT_STEMS:
        single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
        if single.exists():  # transformers, too, prefers the single file
            return (read_header(single),), None
        if index.exists():
            return _open_shards(directory, index), index.name
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    hint = "load it once where you trust it, and save it with `save_pretrained`, which writes safetensors"
    if pickles:
        raise CheckpointError(f"base `{directory}` holds only pickled weights: {', '.join(pickles)}", hint=hint)
    raise CheckpointError(f"base `{directory}` has no model.safetensors, nor an index of shards")


def _open_shards(directory: Path, index_path: Path) -> tuple[TensorFile, ...]:
    weight_map = _read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{index_path}` has no weight_map")
    shard_names = sorted({str(name) for name in weight_map.values()})
    findings = [finding for name in shard_names if (finding := _shard_problem(directory, name)) is not None]
    if findings:
        raise CheckpointError(f"`{index_path}` names shards that cannot be used", findings=findings)
    files = tuple(read_header(directory / name) for name in shard_names)
    _cross_check(index_path, weight_map, files)
    return files


def _shard_problem(directory: Path, name: str) -> str | None:
    # The same on every platform: a drive or a backslash is as foreign to a shard name as a slash.
    if not name.endswith(".safetensors") or any(character in name for character in "/\\:\0"):
        return f"{name!r}: expected the name of a .safetensors file in the same directory"
    if not (directory / name).is_file():
        return f"{name}: missing"
    return None


def _cross_check(index_path: Path, weight_map: Mapping[str, object], files: tuple[TensorFile, ...]) -> None:
    findings = []
    seen: dict[str, str] = {}
    for file in files:
        for name in file.tensors:
            if name in seen:
                findings.append(f"{name}: in {seen[name]} and again in {file.path.name}")
            elif weight_map.get(name) != file.path.name:
                findings.append(f"{name}: lies in {file.path.name}, the index says {weight_map.get(name)!r}")
            seen[name] = file.path.name
    findings.extend(f"{name}: in the index, and in no shard" for name in weight_map if name not in seen)
    if findings:
        raise CheckpointError(f"`{index_path}` and its shards disagree", findings=findings)


def _read_config(path: Path) -> dict[str, object]:
    config = _read_json_object(path) if path.is_file() else {}
    kind = config.get("model_type")
    if not isinstance(kind, str | None):
        raise FormatError(f"`{path}`: `model_type`: expected a string, got {kind!r}")
    return config


def _read_json_object(path: Path) -> dict[str, object]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(f"`{path}` has {path.stat().st_size} bytes, too many for its kind")
    parsed = strict_json(path, path.read_bytes())
    if not isinstance(parsed, dict):
        raise FormatError(f"`{path}`: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _walk(root: Path) -> Iterator[Path]:
    """Regular files under root, through links to files (as the Hub's cache has them) but not to directories."""
    for folder, subfolders, filenames in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in filenames:
            path = Path(folder, name)
            if path.is_file():
                yield path
