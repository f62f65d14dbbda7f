"""The journal of a staging directory: which of its files are whole and on disk, one JSON line each.

    {"journal": 1, "key": "<what the work is>", "stage": <inode of the staging directory>}
    {"name": "model.safetensors", "size_bytes": 1234, "note": "<what its writer wants to remember>"}
    {"name": "model.safetensors", "size_bytes": null}       taken back: it is being written again

A line counts once its newline is there, so that a line torn by a power cut is as good as none. The inode tells the
staging directory that is meant from another one under the same name: after an exchange, the old output lies there.
"""

import json
import os
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hra_export import filesystem

_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """What a journal says.

    Args:
        key: names the work; two runs with the same key make the same bytes.
        stage: inode of the staging directory.
        files: size in bytes of every finished file, by name.
        notes: what their writers noted, by name.
        length_bytes: how much of the journal is whole lines.
    """

    key: str
    stage: int
    files: dict[str, int]
    notes: dict[str, str]
    length_bytes: int


def read_journal(path: Path) -> Record | None:
    """Read a journal; None when there is none, when it is not ours, or when it cannot be understood.

    Raises:
        OSError: it is there and cannot be read.
    """
    if filesystem.regular_size(path) is None:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        header, *entries = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        if header["journal"] != _FORMAT:
            return None
        notes = {str(entry["name"]): str(entry.get("note", "")) for entry in entries}
        return Record(str(header["key"]), int(header["stage"]), _finished(entries), notes, len(whole))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _finished(entries: list[dict[str, str | int | None]]) -> dict[str, int]:
    files: dict[str, int] = {}
    for entry in entries:
        name, size_bytes = str(entry["name"]), entry["size_bytes"]
        if size_bytes is None:
            files.pop(name, None)
        else:
            files[name] = int(size_bytes)
    return files


class Journal:
    """An open journal; every line is on disk when the call that adds it returns. Threads may share it."""

    def __init__(self, fd: int, end: int) -> None:
        self._fd = fd
        self._end = end
        self._lock = threading.Lock()

    @classmethod
    def start(cls, path: Path, *, key: str, stage: int) -> Self:
        """Begin a new journal where there is none."""
        journal = cls(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), 0)
        try:
            journal._append({"journal": _FORMAT, "key": key, "stage": stage})
            filesystem.sync_folder(path.parent)
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def resume(cls, path: Path, record: Record) -> Self:
        """Go on with a journal that was read, cutting off a torn last line."""
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            os.ftruncate(fd, record.length_bytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, record.length_bytes)

    def add(self, name: str, size_bytes: int, note: str) -> None:
        """Say that a file is whole and on disk."""
        self._append({"name": name, "size_bytes": size_bytes, "note": note})

    def take_back(self, name: str) -> None:
        """Say that a file no longer is."""
        self._append({"name": name, "size_bytes": None})

    def close(self) -> None:
        """Close the file. An error here says nothing new: every line was on disk when it was added."""
        with suppress(OSError):
            os.close(self._fd)

    def _append(self, entry: dict[str, str | int | None]) -> None:
        line = json.dumps(entry).encode("ascii") + b"\n"
        with self._lock:
            filesystem.write_all(self._fd, line, self._end)
            self._end += len(line)
            os.fsync(self._fd)
