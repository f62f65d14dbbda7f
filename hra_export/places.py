"""The names beside an output directory, the moves between them, and how a later run puts right what a killed one left.

For an output called `out`:

    .out.hra-export-stage       the files so far; after an exchange, for a moment, the old output
    .out.hra-export-journal     which of them are whole; valid for exactly one staging directory
    .out.hra-export-lock        held through the whole run, dropped by the system when the process dies
    .out.hra-export-old         the old output, only where two names cannot be exchanged in one step

A staging directory without a valid journal is rubbish, and so is a journal without its staging directory. `old` goes
back to the output path when nothing is there, and is rubbish otherwise.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from hra_export import filesystem
from hra_export.errors import OutputError
from hra_export.filesystem import as_output_error
from hra_export.journal import Record, read_journal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Where one output and the names beside it are."""

    output: Path
    stage: Path
    journal: Path
    lock: Path
    backup: Path

    @classmethod
    def of(cls, output: Path) -> Self:
        """Resolve what leads to the output, but not the output itself, so that a link there is seen as one."""
        try:
            final = output.resolve() if output.name in {"", ".."} else output.parent.resolve() / output.name
        except (OSError, RuntimeError) as error:
            raise OutputError(f"cannot find `{output}`: {error}") from error
        beside = [final.parent / f".{final.name}.hra-export-{role}" for role in ("stage", "journal", "lock", "old")]
        return cls(final, *beside)


def is_absent(output: Path) -> bool:
    """Whether a rename can take the path without loss: nothing is there, or an empty directory."""
    if not os.path.lexists(output):
        return True
    return filesystem.is_folder(output) and not any(output.iterdir())


def move_into_place(places: Places) -> None:
    """Give the staging directory its final name; an old output is under the stage's name afterwards, or is the backup.

    Raises:
        OSError: a rename failed; `restore_backup` puts the old output back if it was moved already.
        OutputError: it is in place, and the disk would not confirm it.
    """
    if is_absent(places.output):
        places.stage.rename(places.output)
    elif not filesystem.exchange(places.stage, places.output):
        places.output.rename(places.backup)
        places.stage.rename(places.output)
    with as_output_error(f"confirm on disk `{places.output}`, which is complete but may not survive a power cut"):
        filesystem.sync_folder(places.output.parent)


def valid_record(places: Places) -> Record | None:
    """What the journal says about the staging directory that is there; None unless both exist and belong together."""
    record = read_journal(places.journal)
    if record is None or not filesystem.is_folder(places.stage):
        return None
    status = places.stage.lstat()
    return record if (status.st_ino, status.st_uid) == (record.stage, os.geteuid()) else None


def restore_backup(places: Places) -> None:
    """Put the old output back if a run died between its two renames; drop it if the new one is in place."""
    if not filesystem.is_folder(places.backup):
        return
    if is_absent(places.output):
        logger.info("%s: putting back the old output that an interrupted run had moved", places.output)
        places.backup.rename(places.output)
        filesystem.sync_folder(places.output.parent)
    else:
        filesystem.remove(places.backup)


def recover(places: Places) -> None:
    """Put right what a killed run left, and keep only what can be resumed."""
    restore_backup(places)
    if valid_record(places) is None:
        clear(places)


def clear(places: Places) -> None:
    """Remove journal and stage. The journal goes first: without it the rest is known to be rubbish."""
    leftovers = [path for path in (places.journal, places.stage) if os.path.lexists(path)]
    for path in leftovers:
        filesystem.remove(path)
    if leftovers:
        filesystem.sync_folder(places.output.parent)


def put_right(places: Places, *, keep: bool) -> None:
    """End a run: with `keep` leave finished files for a later run, otherwise leave nothing beside the output.

    A failure to clean up is logged and no more: it must not hide why the run ended, and the next run cleans up anyway.
    """
    try:
        restore_backup(places)
        record = valid_record(places) if keep else None
        if record is None or not record.files:
            clear(places)
        else:
            logger.warning("%s: %d finished files are kept for the next run", places.stage, len(record.files))
    except OSError as error:
        logger.warning("%s: cannot clean up beside it: %s", places.output, error)


def prune(folder: Path, keep: Mapping[str, int], prefix: str = "") -> dict[str, int]:
    """Delete everything in a folder but the named regular files of the given sizes; links are not followed.

    Returns:
        The files that are there, a part of `keep`.
    """
    kept: dict[str, int] = {}
    with os.scandir(folder) as scan:
        entries = list(scan)
    for entry in entries:
        name, path = prefix + entry.name, Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            inside = prune(path, keep, name + "/")
            kept |= inside
            if not inside:
                path.rmdir()
        elif name in keep and filesystem.regular_size(path) == keep[name]:
            kept[name] = keep[name]
        else:
            path.unlink()
    return kept


def sync_folders(folder: Path) -> None:
    """Make every name below and in a folder durable."""
    for path, _, _ in os.walk(folder, topdown=False, onerror=_reraise):
        filesystem.sync_folder(Path(path))


def _reraise(error: OSError) -> NoReturn:
    raise error
