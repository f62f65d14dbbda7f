"""The model builder of ONNX Runtime GenAI, in a process of its own: it prints, sets globals, and may crash.

What it takes is read from its source, so there is no list to keep here.
"""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from hra_export.errors import CheckpointError, DeviceError, GraphError, OutputError, UnsupportedModelError
from hra_export.filesystem import as_output_error
from hra_export.graph.options import GraphOptions

PACKAGE = "onnxruntime_genai"
BUILDER = f"{PACKAGE}.models.builder"
INSTALL = "pip install 'hra-export[genai]'"
GRAPH_NAME = "model.onnx"
CONFIG_NAME = "genai_config.json"

ARCHITECTURE = re.compile(r'config\.architectures\[0\] == "(\w+)"')
# Classes that the builder takes and computes wrongly, and how.
WRONG = {"OlmoForCausalLM": "its graph normalizes without subtracting the mean"}
LAST_LINES = 5  # of what a failed builder said
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def builder_file() -> Path:
    """The builder's source.

    Raises:
        DeviceError: ONNX Runtime GenAI is not installed.
    """
    spec = find_spec(PACKAGE)
    locations = [] if spec is None else list(spec.submodule_search_locations or [])
    for location in locations:
        if (file := Path(location, "models", "builder.py")).is_file():
            return file
    raise DeviceError("a directory for ONNX Runtime GenAI needs onnxruntime-genai", hint=INSTALL)


def known_architectures() -> frozenset[str]:
    """The classes of transformers that the installed builder has a right graph for.

    Raises:
        DeviceError: ONNX Runtime GenAI is not installed.
    """
    return frozenset(ARCHITECTURE.findall(builder_file().read_text(encoding="utf-8"))) - WRONG.keys()


def check_architecture(directory: Path) -> None:
    """Make sure that the builder has a right graph for the class of a model directory.

    Raises:
        CheckpointError: the directory has no configuration that names a class.
        DeviceError: ONNX Runtime GenAI is not installed.
        UnsupportedModelError: the builder has no graph for it.
    """
    file, known = directory / "config.json", known_architectures()
    try:
        with as_output_error(f"read `{file}`"):
            config = json.loads(file.read_bytes())
        (architecture, *_) = config["architectures"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"`{file}` does not name the model's class under `architectures`") from error
    if known and architecture not in known:
        reason = f": {WRONG[architecture]}" if architecture in WRONG else ""
        raise UnsupportedModelError(
            f"ONNX Runtime GenAI's builder has no right graph for {architecture}{reason}",
            findings=[f"it takes {', '.join(sorted(known))}"],
            hint="--runtime ort",
        )


def run_builder(directory: Path, scratch: Path, options: GraphOptions, *, fuse_attention: bool) -> Path:
    """Build the graph of a model directory.

    Args:
        directory: of transformers, with weights in safetensors; nothing is fetched and no code of it is run.
        scratch: an existing folder that the builder may fill.
        options: precision and provider.
        fuse_attention: one product for q, k and v.

    Returns:
        The folder with model.onnx, its data, genai_config.json and the tokenizer.

    Raises:
        CheckpointError: the directory does not name a class.
        DeviceError: ONNX Runtime GenAI is not installed, or the provider cannot run this precision.
        GraphError: the builder failed, and why.
        OutputError: the disk is full.
        UnsupportedModelError: the builder has no graph for this class.
    """
    check_architecture(directory)
    precision, provider, extra = _wishes(options)
    # A cache of the window's size breaks off the run when the prompt is longer; one of full size does not.
    extra |= {"fuse_qkv": str(fuse_attention).lower(), "windowed_kv_cache": "false"}
    output = scratch / "built"
    # -P: nothing in the working folder is imported.
    command = [sys.executable, "-P", "-m", BUILDER, "-i", str(directory.absolute()), "-o", str(output.absolute())]
    command += ["-p", precision, "-e", provider, "-c", str((scratch / "cache").absolute())]
    command += ["--extra_options", *(f"{name}={value}" for name, value in extra.items())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with as_output_error(f"start {BUILDER}"):
        done = subprocess.run(  # noqa: S603  our own Python and a module of it
            command, cwd=scratch, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
    if done.returncode:
        raise _failure(directory, done)
    if missing := [name for name in (GRAPH_NAME, CONFIG_NAME) if not (output / name).is_file()]:
        raise GraphError(f"ONNX Runtime GenAI's builder wrote no {' and no '.join(missing)} for `{directory}`")
    return output


def _wishes(options: GraphOptions) -> tuple[str, str, dict[str, str]]:
    """Precision, provider and further options in the builder's words.

    It makes a graph in the type of the activations; weights of few bits are the quantizer's, the same for all graphs.
    """
    if options.provider == "tensorrt":
        raise UnsupportedModelError("a directory for ONNX Runtime GenAI is for cpu or cuda, not for tensorrt")
    precision = PRECISIONS[options.activations]
    if options.provider == "cuda" or precision == "fp32":
        return precision, options.provider, {}
    if precision == "bf16":
        raise DeviceError("the CPU provider has no kernels for bfloat16", hint="--precision fp16, or --provider cuda")
    # The builder's half-precision graph for the CPU fails on the second token. The one for CUDA runs there, but for
    # the norms of queries and keys inside its attention.
    return precision, "cuda", {"fuse_qk_norm_gqa": "false"}


def _failure(
    directory: Path, done: "subprocess.CompletedProcess[str]"
) -> GraphError | OutputError | UnsupportedModelError:
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    label = f"ONNX Runtime GenAI's builder cannot build `{directory}`"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return GraphError(f"{label}: it was ended by {name}", hint="SIGKILL often means that memory ran out")
    if "No space left on device" in done.stderr:
        return OutputError(f"{label}: no space left on device")
    last = said[-1] if said else f"it ended with code {done.returncode} and said nothing"
    if last.startswith("NotImplementedError"):
        return UnsupportedModelError(f"{label}: {last.partition(': ')[2] or last}", hint="--runtime ort")
    return GraphError(label, findings=[*said[-LAST_LINES:-1], last], hint="--runtime ort takes more models")
