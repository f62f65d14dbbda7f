"""Write one file so that at every instant its path is absent, the old file, or the complete new one.

For outputs that are a single file by nature; directories are `publish.py`'s.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hra_export import filesystem
from hra_export.errors import OutputError
from hra_export.filesystem import as_output_error


def check_file(output: Path, *, overwrite: bool = False, protected: Sequence[Path] = ()) -> None:
    """Refuse a path that cannot become the output.

    Args:
        output: the file to be written.
        overwrite: allow a file that exists.
        protected: inputs, files or directories, that it must not replace or lie in.

    Raises:
        OutputError: a directory, a file that exists, or a place among the inputs.
    """
    with as_output_error(f"write `{output}`"):
        place = output.resolve()
        for path in protected:
            inside = path.resolve()
            if place == inside or inside in place.parents:
                raise OutputError(f"output `{output}` lies in the input `{path}`", hint="choose another output")
        if output.is_dir():
            raise OutputError(f"output `{output}` is a directory, expected a file name")
        if os.path.lexists(output) and not overwrite:
            raise OutputError(f"output `{output}` exists", hint="`--overwrite` replaces it")


@contextmanager
def staged_file(output: Path, *, overwrite: bool = False, protected: Sequence[Path] = ()) -> Iterator[Path]:
    """Give a path beside the output, to be written in the block; then it is synced and renamed.

    Missing parents are made.

    Raises:
        OutputError: refused as by `check_file`, or the file system said no, in here or in the block.
    """
    check_file(output, overwrite=overwrite, protected=protected)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    with as_output_error(f"write `{output}`"):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            check_file(output, overwrite=overwrite, protected=protected)
            partial.replace(output)
            filesystem.sync_folder(output.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
