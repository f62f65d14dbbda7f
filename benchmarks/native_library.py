"""The library with the operator's own kernels, for a benchmark: the one that is there, or one that is built now."""

from pathlib import Path

from hra_export.errors import HraExportError
from hra_export.kernels.operator_build import Cuda, Options
from hra_export.kernels.operator_library import OperatorLibrary, build, find, open_library


def native_library(work: Path, chosen: Path | None = None, *, cuda: Cuda = "off") -> tuple[OperatorLibrary | None, str]:
    """The library, and a sentence on it; None and the reason where there is none.

    Args:
        work: where it is built if it is nowhere else.
        chosen: a file that must be used.
        cuda: whether one that is built gets CUDA kernels.

    Raises:
        FormatError: the file that was chosen is none of ours.
    """
    if chosen is not None:
        library = open_library(chosen)
        return library, f"native variants run {library}"
    try:
        library = find() or build(work / "operator", Options(cuda=cuda))
    except HraExportError as error:  # no compiler, or a library of another version
        return None, f"native variants are left out: {error}"
    return library, f"native variants run {library}"
