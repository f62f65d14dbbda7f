"""How ONNX Runtime GenAI comes to a library of operators that lies anywhere on the machine.

Its configuration can name one (`custom_ops_library`), as a path only inside the model's directory or the working
directory. A bare name it looks for in these two, and else leaves to the system's loader, which knows what the process
has loaded by its own name. So the library is loaded here, by its path, and named there when the model is loaded: an
exported directory holds no path of one machine.

Source: `Model::CreateSessionOptionsFromConfig` of ONNX Runtime GenAI 0.18.
"""

import ctypes
from pathlib import Path

from hra_export.errors import DeviceError, GraphError

# What a build calls it inside, whatever its file is called.
OWN_NAMES = ("libhra_export_ort_op.so", "libhra_export_ort_op.dylib", "hra_export_ort_op.dll")


def name_for_loader(library: Path, directory: Path) -> str:
    """Load a library and find the bare name that leads the runtime to this very file.

    Args:
        library: of operators.
        directory: of the model.

    Raises:
        DeviceError: it cannot be loaded, or the system's loader does not know it by name.
        GraphError: the runtime would take another file of this name.
    """
    try:
        held = ctypes.CDLL(str(library))
    except OSError as error:
        raise DeviceError(f"`{library}` cannot be loaded", findings=[str(error)]) from error
    name = next((name for name in (library.name, *OWN_NAMES) if _handle(name) == held._handle), None)
    if name is None:
        names = dict.fromkeys((library.name, OWN_NAMES[0]))
        raise DeviceError(
            f"`{library}`: ONNX Runtime GenAI cannot be led to it",
            findings=[
                f"its own name (DT_SONAME) is not {' or '.join(names)}, or another library of that name is loaded"
            ],
            hint="start a new process with this library alone; `hra-export build-op` builds one that is named so",
        )
    others = [folder / name for folder in (directory, Path.cwd()) if (folder / name).exists()]
    if foreign := [other for other in others if not other.samefile(library)]:
        raise GraphError(
            f"`{library}` is not the library that ONNX Runtime GenAI would load",
            findings=[f"it would take `{other}`" for other in foreign],
            hint="move that file, or run without the operator",
        )
    return name


def _handle(name: str) -> int | None:
    """The system's handle of a library by its bare name; None where the name is not known."""
    try:
        return ctypes.CDLL(name)._handle
    except OSError:
        return None
