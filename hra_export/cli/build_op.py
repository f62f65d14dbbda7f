"""`hra-export build-op`."""

import shlex
from pathlib import Path

import click

from hra_export.cli import options
from hra_export.cli.console import Console, size_text


@click.command("build-op")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the library; an older one there is replaced.  [default: beside the package]",
)
@click.option(
    "--cuda",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="CUDA kernels too; auto where nvcc is found.",
)
@click.option(
    "--cuda-architectures",
    metavar="LIST",
    default="",
    help="As CMake names them, separated by commas: 80-real,90.  [default: 80-real,90]",
)
@click.option(
    "--ort-include-dir",
    metavar="DIR",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with onnxruntime_c_api.h, to check our declarations of it.",
)
@options.talk
def command(
    output: Path | None, cuda: str, cuda_architectures: str, ort_include_dir: Path | None, console: Console
) -> int:
    """Build the library of native kernels for ONNX Runtime.

    Graphs with the reflection as an operator run these kernels when the library is beside the package or
    HRA_EXPORT_ORT_OP names it. Needs CMake and a C++ compiler, for GPUs nvcc; what was built is compared with the
    operators' own definition before it is put into place.

    Example: hra-export build-op --cuda off
    """
    from hra_export.graph.operator_check import check_library
    from hra_export.kernels.operator_build import Options
    from hra_export.kernels.operator_library import DEFAULT_FOLDER, VARIABLE, build

    wanted = Options(
        cuda="on" if cuda == "on" else "off" if cuda == "off" else "auto",
        cuda_architectures=tuple(word.strip() for word in cuda_architectures.split(",") if word.strip()),
        ort_include_dir=ort_include_dir,
    )
    console.say("compiling, which takes a minute, and with CUDA several")
    library = build(output, wanted, check=check_library)
    lines = [f"built {library}: {size_text(library.path.stat().st_size)}"]
    if library.path.parent != DEFAULT_FOLDER.resolve():
        lines.append(f"to use it: export {VARIABLE}={shlex.quote(str(library.path))}")
    console.result("\n".join(lines), {"verb": "build-op", "library": library.to_json()})
    return 0
