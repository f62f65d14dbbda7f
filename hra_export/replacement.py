"""What an output path may be, and what may be replaced there."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hra_export import filesystem
from hra_export.errors import OutputError
from hra_export.filesystem import as_output_error
from hra_export.places import Places, is_absent

MANIFEST_NAME = "hra_export_manifest.json"


@dataclass(frozen=True)
class Replacement:
    """What may be replaced at the output path."""

    overwrite: bool
    manifest_name: str

    def check(self, output: Path) -> None:
        """Refuse what is there, unless it is nothing or ours and to be overwritten."""
        if is_absent(output):
            return
        if not self.overwrite:
            raise OutputError(f"output `{output}` exists", hint="`--overwrite` replaces it, or choose another output")
        if not filesystem.is_folder(output) or filesystem.regular_size(output / self.manifest_name) is None:
            raise OutputError(
                f"output `{output}` is not overwritten: it was not written by hra-export, for it holds no "
                f"`{self.manifest_name}`",
                hint="move it away, or choose another output",
            )


def check_output(
    output: Path, *, overwrite: bool = False, protected: Sequence[Path] = (), manifest_name: str = MANIFEST_NAME
) -> None:
    """Refuse an output that `stage` would refuse, before any work and without touching the disk.

    Args:
        output: the directory to be written. An empty one is as good as none; missing parents are made by `stage`.
        overwrite: allow an existing directory, if it holds a manifest of ours. It is replaced as a whole.
        protected: inputs. The output must not be, contain or lie in one of them; links and mounts are seen through.
        manifest_name: what makes an existing directory ours.

    Raises:
        OutputError: with the reason; exit code 6.
    """
    places = Places.of(output)
    with as_output_error(f"look at `{output}`"):
        check_place(places.output, protected)
        Replacement(overwrite, manifest_name).check(places.output)
        nearest = next(path for path in places.output.parents if path.exists())
        if not nearest.is_dir():
            raise OutputError(f"cannot write `{output}`: `{nearest}` is not a directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write `{output}`: no permission to write in `{nearest}`")


def check_place(output: Path, protected: Sequence[Path]) -> None:
    """Refuse a path that no option makes right: near an input, a link, a file, a mount point, the current directory."""
    for path in protected:
        resolved = path.resolve()
        if _lies_in(output, resolved) or _lies_in(resolved, output):
            raise OutputError(
                f"output `{output}` is, contains or lies in the input `{path}`",
                hint="choose an output outside of the inputs",
            )
    if output.is_symlink():
        raise OutputError(f"output `{output}` is a symbolic link", hint="give the directory itself, or remove the link")
    if output.exists() and not output.is_dir():
        raise OutputError(f"output `{output}` is not a directory", hint="choose another name")
    if output.is_mount():
        raise OutputError(
            f"output `{output}` is a mount point", hint=f"choose a path inside it, such as `{output}/merged`"
        )
    with suppress(FileNotFoundError):
        if _lies_in(Path.cwd(), output):
            raise OutputError(
                f"output `{output}` is or contains the current directory, which would be pulled away",
                hint="choose a path inside it, or change to another directory",
            )


def _lies_in(inner: Path, outer: Path) -> bool:
    target = filesystem.identity(outer)
    return target is not None and any(filesystem.identity(path) == target for path in (inner, *inner.parents))
