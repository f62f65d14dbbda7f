"""Write a directory so that at every instant its path is absent, the old directory, or the complete new one.

Files are staged in a directory beside the output, on the same file system; each is fsynced and then noted in a journal.
The manifest comes last, every folder is fsynced, and one rename puts the whole into place.
`places.py` names what lies beside the output meanwhile, `journal.py` what is remembered for the next run.

An interruption (Ctrl-C, SIGTERM turned into `SystemExit`, SIGKILL, a power cut) leaves stage and journal for the next
run with the same key, which keeps the finished files; an error removes them. The kernel applies the umask as files are
made, so those that an interrupted run finished keep the modes that run gave them.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from hra_export import filesystem
from hra_export.errors import OutputError
from hra_export.filesystem import as_output_error
from hra_export.journal import Journal, Record
from hra_export.places import (
    Places,
    clear,
    move_into_place,
    prune,
    put_right,
    recover,
    sync_folders,
    valid_record,
)
from hra_export.replacement import MANIFEST_NAME, Replacement, check_output, check_place

logger = logging.getLogger(__name__)

__all__ = ["MANIFEST_NAME", "Stage", "check_output", "stage"]

# Folders, the journal and block rounding are not in the caller's figure.
MARGIN_BYTES = 2**20
MARGIN_FRACTION = 0.005


class Stage:
    """The staging directory of one run, from `stage(...)`. Several threads may create files at the same time.

    Names are relative POSIX paths and may have folders in them. A file is written once. One that an interrupted run
    finished is kept when the caller asks for it with `is_finished`, and dropped when nobody does: what is published is
    exactly what this run wrote or asked for.
    """

    directory: Path

    def __init__(
        self,
        places: Places,
        journal: Journal,
        replacement: Replacement,
        earlier: Mapping[str, int],
        notes: Mapping[str, str],
    ) -> None:
        self.directory = places.stage
        self.is_published = False
        self._places = places
        self._journal = journal
        self._replacement = replacement
        self._earlier = dict(earlier)  # finished by an interrupted run, and not asked for yet
        self._notes = notes
        self._files: dict[str, int] = {}  # finished, and part of the output
        self._open: set[str] = set()
        self._lock = threading.Lock()

    def is_finished(self, name: str) -> bool:
        """Whether the file is whole and on disk, from this run or an interrupted one, so that it need not be written.

        Raises:
            ValueError: the name leaves the directory.
        """
        path = self._path(name)
        with self._lock:
            size_bytes = self._earlier.get(name)
            if size_bytes is not None and filesystem.regular_size(path) == size_bytes:
                self._files[name] = self._earlier.pop(name)
            return name in self._files

    def note(self, name: str) -> str:
        """What was noted when an interrupted run finished this file; empty when nothing was."""
        return self._notes.get(name, "")

    @contextmanager
    def create(self, name: str, size_bytes: int, *, note: Callable[[], str] = str) -> Iterator[int]:
        """Make a file of exactly `size_bytes` and give its descriptor, to be written at any offset by any thread.

        The space is taken at once. When the block ends, the file is fsynced and noted in the journal; when it raises,
        the file is removed. What `note` returns at the end is kept in the journal for a run that takes the file up.

        Raises:
            OutputError: the file system said no, in here or in the block.
            ValueError: the name leaves the directory, or was written before.
            RuntimeError: the block changed the size.
        """
        path = self._path(name)
        with as_output_error(f"write `{self._places.output / name}`"), self._reserved(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _new_file(path, size_bytes) as fd:
                yield fd
                text = note()
            self._journal.add(name, size_bytes, text)
            with self._lock:
                self._files[name] = size_bytes
        logger.debug("%s: %d bytes", name, size_bytes)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file; as `create`."""
        with self.create(name, len(data)) as fd:
            filesystem.write_all(fd, data, 0)

    def copy(self, source: Path, name: str) -> None:
        """Copy a regular file, or what a link to one leads to, byte for byte; as `create`.

        Raises:
            CheckpointError: the source is a folder, FIFO, socket or device.
            OutputError: the file system said no, or the source changed meanwhile.
        """
        with (
            filesystem.open_regular(source) as (fd, before),
            self.create(name, before.st_size) as target,
            as_output_error(f"copy `{source}` to `{name}`"),
        ):
            copied = filesystem.copy_bytes(fd, target, before.st_size)
            after = os.fstat(fd)
            if (copied, after.st_size, after.st_mtime_ns) != (before.st_size, before.st_size, before.st_mtime_ns):
                raise OutputError(f"`{source}` changed while it was copied", hint="run again when it is at rest")

    def publish(self, manifest_name: str, manifest: bytes) -> None:
        """Write the manifest last, sync every folder, and rename the whole to its final path.

        Raises:
            OutputError: the file system said no, or something else lies at the output path by now.
            ValueError: not the manifest name that `stage` was given.
            RuntimeError: a file is still being written, or this was published before.
        """
        if manifest_name != self._replacement.manifest_name:
            raise ValueError(f"manifest name: expected `{self._replacement.manifest_name}`, got `{manifest_name}`")
        if self._open:
            raise RuntimeError(f"published while files are being written: {sorted(self._open)}")
        self.write_bytes(manifest_name, manifest)
        with as_output_error(f"publish `{self._places.output}`"):
            prune(self.directory, self._files)
            sync_folders(self.directory)
            self._replacement.check(self._places.output)
            move_into_place(self._places)
        self.is_published = True
        put_right(self._places, keep=False)

    def close(self) -> None:
        """Close the journal; nothing can be written any more."""
        self._journal.close()

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name)
        is_plain = name == str(parts) and name != "." and ".." not in parts.parts and not parts.is_absolute()
        if not is_plain or "\\" in name or "\0" in name or PureWindowsPath(name).drive:
            raise ValueError(f"file name {name!r} does not stay inside the output: expected a plain relative path")
        return self.directory / name

    @contextmanager
    def _reserved(self, name: str) -> Iterator[None]:
        """Keep other threads off the name; take back and remove what an interrupted run left under it."""
        with self._lock:
            if self.is_published:
                raise RuntimeError(f"`{name}` written after the output was published")
            if name in self._files or name in self._open:
                raise ValueError(f"`{name}` is written twice")
            self._open.add(name)
        try:
            if self._earlier.pop(name, None) is not None:
                # First the journal: the new file has its full size long before it has its content.
                self._journal.take_back(name)
                self._path(name).unlink(missing_ok=True)
            yield
        finally:
            with self._lock:
                self._open.discard(name)


@contextmanager
def _new_file(path: Path, size_bytes: int) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        try:
            filesystem.allocate(fd, size_bytes)
            yield fd
            if (got := os.fstat(fd).st_size) != size_bytes:
                raise RuntimeError(f"`{path.name}`: expected {size_bytes} bytes, got {got}")
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


@contextmanager
def stage(
    output: Path,
    *,
    key: str,
    size_bytes: int,
    overwrite: bool = False,
    protected: Sequence[Path] = (),
    manifest_name: str = MANIFEST_NAME,
) -> Iterator[Stage]:
    """Stage a directory beside `output`; the block writes its files and calls `publish`.

    Missing parents are made, and taken away again when nothing came of it. What killed runs left behind is put right
    first, even where the output is then refused.

    Args:
        output: the directory to be written; see `check_output` for this and the other rules.
        key: names the work, inputs and options; a run with the same key makes the same bytes.
        size_bytes: what all files together will take, for the check of free space.
        overwrite: allow an existing directory of ours; it stays whole until the new one takes its place.
        protected: inputs that the output must stay away from.
        manifest_name: the file that `publish` writes last.

    Raises:
        OutputError: refused, another run is writing here, not enough space, or the file system said no.
        RuntimeError: the block ended without `publish`.
    """
    places = Places.of(output)
    replacement = Replacement(overwrite, manifest_name)
    with as_output_error(f"write `{output}`"):
        check_place(places.output, protected)
    with _parents_made(places.output.parent), _alone(places):
        with as_output_error(f"write `{output}`"):
            recover(places)
            replacement.check(places.output)
            work = _open_stage(places, key, size_bytes, replacement)
        with _ended(places), closing(work):
            yield work
            if not work.is_published:
                raise RuntimeError(f"the block that staged `{output}` ended without `publish`")


@contextmanager
def _ended(places: Places) -> Iterator[None]:
    """Whatever ends the block: keep the finished files after an interruption, leave nothing after an error."""
    try:
        yield
    except Exception:
        put_right(places, keep=False)
        raise
    except BaseException:
        put_right(places, keep=True)
        raise


@contextmanager
def _parents_made(parent: Path) -> Iterator[None]:
    missing: list[Path] = []
    try:
        with as_output_error(f"make the folder `{parent}`"):
            missing = [path for path in (parent, *parent.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                filesystem.sync_folder(path.parent)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()  # refuses a folder with something in it
        raise


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    with ExitStack() as held:
        with as_output_error(f"lock `{places.output}`"):
            try:
                held.enter_context(filesystem.locked(places.lock))
            except BlockingIOError as error:
                raise OutputError(
                    f"another run is writing `{places.output}`", hint="wait for it to end, or choose another output"
                ) from error
        yield


def _open_stage(places: Places, key: str, size_bytes: int, replacement: Replacement) -> Stage:
    """Go on with an interrupted run with the same key, or begin; a refusal here costs no finished file."""
    record = valid_record(places)
    if record is not None and record.key != key:
        logger.info("%s: the interrupted run had other inputs or options; starting over", places.output)
        record = None
    try:
        if record is None:
            clear(places)
            return _begin(places, key, size_bytes, replacement)
        return _resume(places, record, size_bytes, replacement)
    except BaseException:
        put_right(places, keep=True)
        raise


def _begin(places: Places, key: str, size_bytes: int, replacement: Replacement) -> Stage:
    _check_space(places.output, size_bytes)
    places.stage.mkdir()
    journal = Journal.start(places.journal, key=key, stage=places.stage.lstat().st_ino)
    return Stage(places, journal, replacement, {}, {})


def _resume(places: Places, record: Record, size_bytes: int, replacement: Replacement) -> Stage:
    finished = prune(places.stage, record.files)
    _check_space(places.output, size_bytes - sum(finished.values()))
    journal = Journal.resume(places.journal, record)
    for name in record.files.keys() - finished.keys():
        journal.take_back(name)
    logger.info("%s: keeping %d finished files of an interrupted run", places.output, len(finished))
    return Stage(places, journal, replacement, finished, record.notes)


def _check_space(output: Path, size_bytes: int) -> None:
    status = os.statvfs(output.parent)
    if status.f_blocks == 0:  # some network file systems do not say
        return
    free = status.f_bavail * status.f_frsize
    needed = max(size_bytes, 0) + MARGIN_BYTES + int(max(size_bytes, 0) * MARGIN_FRACTION)
    if needed > free:
        raise OutputError(
            f"not enough space for `{output}`: {needed / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free",
            hint="free some space, or choose an output on another disk",
        )
