"""ONNX Runtime's own objects: sessions, values, adapter files. The only file that imports it, quantizers apart.

It is imported inside functions: whoever asks what is installed must be told that it is missing.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hra_export.errors import DeviceError, FormatError, GraphError, OutputError, UnsupportedModelError
from hra_export.graph.providers import EXECUTION_PROVIDERS, AssignedNode, Provider
from hra_export.graph.values import BFLOAT16, ONNX_BFLOAT16, Array, to_array

logger = logging.getLogger(__name__)

ERRORS_ONLY = 3  # the runtime warns of each default that may be overridden


def available_providers() -> tuple[str, ...]:
    """The execution providers that this build of ONNX Runtime was made with, best first.

    One that is listed may still find no device or library when a session is made.

    Raises:
        ImportError: onnxruntime is not installed, or one of its libraries is missing.
    """
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def assigned_nodes(session: Any) -> list[AssignedNode]:
    """Every node of a session and the provider that runs it; fused ones by the nodes they were made of."""
    return [
        AssignedNode(node.name, node.op_type, subgraph.ep_name)
        for subgraph in session.get_provider_graph_assignment_info()
        for node in subgraph.get_nodes()
    ]


def to_value(value: Any) -> Any:
    """An array, a torch tensor or an OrtValue as an OrtValue, on the same memory where the runtime can use it."""
    import onnxruntime

    if isinstance(value, onnxruntime.OrtValue):
        return value
    if hasattr(value, "detach"):
        return _of_torch(value.detach().contiguous())
    array = np.asarray(value, order="C")
    if array.dtype == BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ONNX_BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def to_device(array: Array, device: tuple[str, int]) -> Any:
    """An array as an OrtValue on a device.

    bfloat16 stays on the CPU, and the runtime moves it in each run: NumPy has no such type to copy from.
    """
    import onnxruntime

    if array.dtype == BFLOAT16 or device[0] == "cpu":
        return to_value(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), *device)


def run_options(cuda_graph: int) -> Any:
    """Options of one run.

    Args:
        cuda_graph: number of the CUDA graph that records or replays it, -1 for none. It is said in every session: the
            runtime's Python side looks for it in each bound run, and where it is missing catches an exception.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_run_config_entry("gpu_graph_id", str(cuda_graph))
    return options


def release_cuda_graph(session: Any, number: int) -> None:
    """Give back what a recorded CUDA graph holds, where the runtime can (1.31)."""
    if hasattr(session, "release_captured_graph"):
        session.release_captured_graph(number)


def make_session(
    file: Path,
    provider: Provider,
    *,
    optimize: bool,
    threads: int | None,
    device: int,
    cuda_graph: bool,
    library: Path | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` that never falls back; arguments as of `GraphSession.open`.

    Raises:
        DeviceError: the provider is not in this build, finds no library or device, or the runtime does not take the
            library of operators.
    """
    import onnxruntime

    name = EXECUTION_PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise DeviceError(
            f"execution provider `{name}` is not in this build of ONNX Runtime",
            findings=[f"it has {', '.join(onnxruntime.get_available_providers())}"],
            hint="pip install onnxruntime-gpu",
        )
    if provider != "cpu":
        with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints what it does not find
            onnxruntime.preload_dlls()
        logger.debug("loading CUDA libraries: %s", said.getvalue())
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not optimize:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        settings.intra_op_num_threads = threads
    if library is not None:
        _register(library, settings)
    try:
        options = _provider_options(provider, device, cuda_graph)
        session = onnxruntime.InferenceSession(file, settings, providers=[(name, options)], enable_fallback=0)
    except (ValueError, RuntimeError) as error:  # of a provider that finds no library or device
        raise no_provider(name, str(error)) from error
    session.disable_fallback()
    return session


def _register(library: Path, settings: Any) -> None:
    try:
        settings.register_custom_ops_library(str(library))
    except _errors() as error:
        raise DeviceError(
            f"ONNX Runtime does not take the operator library `{library}`",
            findings=[str(error)],
            hint="`hra-export build-op` builds one for this version",
        ) from error


def no_provider(name: str, finding: str) -> DeviceError:
    """The error of a provider that is in the build and cannot work."""
    return DeviceError(
        f"execution provider `{name}` cannot start",
        findings=finding.splitlines(),
        hint="`hra-export doctor` says which libraries and devices there are",
    )


@contextlib.contextmanager
def runtime_errors(file: Path) -> Iterator[None]:
    """What the runtime raises inside the block, as errors of ours.

    Raises:
        GraphError: the file or the feeds cannot be run.
        DeviceError: the provider broke down.
        UnsupportedModelError: the provider has no kernel for a node.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        yield
    except state.NotImplemented as error:
        raise UnsupportedModelError(
            f"`{file}`: the provider has no kernel for a node",
            findings=[str(error)],
            hint="bfloat16 has none on the CPU: use fp32 there",
        ) from error
    except (state.EPFail, state.DeviceReset) as error:
        raise DeviceError(f"`{file}`: the provider failed", findings=[str(error)]) from error
    except _errors() as error:
        raise GraphError(f"`{file}`: the runtime refused it", findings=[str(error)]) from error


def read_adapter_format(path: Path) -> tuple[dict[str, Array], int, int]:
    """Parameters, adapter version and model version of an `.onnx_adapter` file.

    Raises:
        FormatError: not such a file, or corrupt.
        OutputError: it cannot be read.
    """
    import onnxruntime

    try:
        path.open("rb").close()
    except OSError as error:
        raise OutputError(f"cannot read adapter file `{path}`: {error}") from error
    try:
        stored = onnxruntime.AdapterFormat.read_adapter(str(path))
        parameters = {name: to_array(value).copy() for name, value in sorted(stored.get_parameters().items())}
    except _errors() as error:
        raise FormatError(
            f"`{path}` is not an adapter file of ONNX Runtime, or corrupt", findings=[str(error)]
        ) from error
    return parameters, stored.get_adapter_version(), stored.get_model_version()


def write_adapter_format(path: Path, parameters: Mapping[str, Array], *, adapter: int, model: int) -> None:
    """Write an `.onnx_adapter` file.

    Args:
        path: of the file; it is made anew.
        parameters: name → array; written in the order of names.
        adapter: version number of the adapter, below 2³¹.
        model: version number of the model it belongs to, below 2³¹.

    Raises:
        OutputError: the file cannot be written.
    """
    import onnxruntime

    stored = onnxruntime.AdapterFormat()
    stored.set_adapter_version(adapter)
    stored.set_model_version(model)
    stored.set_parameters({name: to_value(array) for name, array in sorted(parameters.items())})
    try:
        stored.export_adapter(str(path))
    except RuntimeError as error:  # of a file that cannot be opened, or of a full disk
        raise OutputError(f"cannot write adapter file `{path}`", findings=[str(error).strip()]) from error


def _of_torch(tensor: Any) -> Any:
    import onnxruntime
    import torch
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if tensor.dtype == torch.bool:  # the runtime knows DLPack's bool only as bytes that it is told are bools
        return onnxruntime.OrtValue(state.OrtValue.from_dlpack(tensor.view(torch.uint8).__dlpack__(), True))
    if tensor.is_cuda:  # the runtime has a stream of its own, which does not wait for torch's
        torch.cuda.current_stream(tensor.device).synchronize()
    return onnxruntime.OrtValue.from_dlpack(tensor)


def _provider_options(provider: Provider, device: int, cuda_graph: bool) -> dict[str, str]:
    if provider == "cpu":
        return {}
    # TF32 would round float32 products to 11 bits, and parity in float32 would be lost.
    options = {"device_id": str(device), **({"use_tf32": "0"} if provider == "cuda" else {})}
    return {**options, "enable_cuda_graph": "1"} if cuda_graph else options


def _errors() -> tuple[type[BaseException], ...]:
    """What the runtime raises; its classes have no common ancestor of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (getattr(state, name) for name in dir(state))
    return RuntimeError, *(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))
