"""What we ask of a POSIX file system, in the form `publish` needs it: durable, and never through a symbolic link.

Functions here raise plain `OSError`; `as_output_error` turns one into an `OutputError` that says what was being done.
Limit: on macOS `fsync` reaches the drive and not its platter, and folders are exchanged with two renames.
"""

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hra_export.errors import CheckpointError, OutputError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 2**20  # large enough for disk speed, small enough to stay in cache
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
# EPERM: older container runtimes answer it for calls they do not know.
_NO_EXCHANGE = _UNSUPPORTED | {errno.EPERM}
_NO_COPY_IN_KERNEL = _UNSUPPORTED | {errno.EPERM, errno.EXDEV, errno.EBADF}
_NO_LOCKS = _UNSUPPORTED | {errno.ENOLCK}
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h

_HINTS = {
    errno.ENOSPC: "free some space, or choose an output on another disk",
    errno.EDQUOT: "your quota on this file system is used up: free some space, or choose another file system",
    errno.EACCES: "check who owns the folder and what its permissions are",
    errno.EPERM: "check who owns the folder and what its permissions are",
    errno.EROFS: "the file system is mounted read-only: choose an output elsewhere",
    errno.EIO: "the disk reports a fault: look at `dmesg`, and write to another disk",
    errno.EMFILE: "too many files are open: raise the limit with `ulimit -n 4096`",
    errno.ENFILE: "too many files are open on this machine: close some programs",
    errno.ENAMETOOLONG: "choose a shorter output name",
    errno.EXDEV: "this file system cannot rename the folder: move the old output away, or choose another path",
    errno.EBUSY: "the folder is in use, perhaps as a mount point: choose a path inside or beside it",
}


@contextmanager
def as_output_error(action: str) -> Iterator[None]:
    """Turn an `OSError` in the block into an `OutputError` with the system's reason and what to do about it.

    Args:
        action: what the block does, with the file it does it to, to be read after "cannot".

    Raises:
        OutputError: the block raised `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot {action}: {reason}", hint=_HINTS.get(error.errno or 0)) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` through the block; the system drops it when the process dies.

    The lock file is removed at the end. One that a killed process left behind holds nothing.

    Raises:
        BlockingIOError: another process, or another thread of this one, holds the lock.
        OSError: the lock file cannot be made.
    """
    fd = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(fd)


def _acquire(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if _lock(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, path: Path) -> bool:
    """Lock an open file; False when the holder before us removed it meanwhile, for then the lock guards no name."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks: let no other run write there", path.parent)
        return True
    try:
        return _identity_of(path.lstat()) == _identity_of(os.fstat(fd))
    except FileNotFoundError:
        return False


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of what `path` leads to, or None when there is nothing to be found."""
    try:
        return _identity_of(path.stat())
    except OSError:
        return None


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def is_folder(path: Path) -> bool:
    """Whether `path` is a directory itself, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def regular_size(path: Path) -> int | None:
    """Size in bytes when `path` is a regular file itself, not a link to one; else None."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file for reading, through links (a Hub cache is made of them).

    Yields:
        The descriptor, and the file's status when it was opened.

    Raises:
        CheckpointError: a folder, FIFO, socket or device. It is not opened: that alone could block or do harm.
        OutputError: it cannot be opened.
    """
    with as_output_error(f"read `{path}`"):
        _refuse_irregular(path, path.stat())
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        with as_output_error(f"read `{path}`"):
            status = os.fstat(fd)
        _refuse_irregular(path, status)
        yield fd, status
    finally:
        os.close(fd)


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"`{path}` is not a regular file", hint="remove it, or put a plain file in its place")


def allocate(fd: int, size_bytes: int) -> None:
    """Give the file its whole size on disk, so that a full disk shows before the work and not after it."""
    if size_bytes == 0:
        return
    if sys.platform == "linux":
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return
    os.ftruncate(fd, size_bytes)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, however many calls it takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def begin_writeback(fd: int, offset: int, size_bytes: int) -> None:
    """Ask the kernel to write a range to the disk while the work goes on, so that the fsync at the end finds little.

    Source: Linux `mm/fadvise.c`: DONTNEED starts writing the range's dirty pages, and drops those that are clean.
    """
    if sys.platform == "linux" and size_bytes:  # zero would mean the whole file
        with suppress(OSError):
            os.posix_fadvise(fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)


def copy_bytes(source: int, target: int, size_bytes: int) -> int:
    """Copy the first `size_bytes` of one file over those of another, in the kernel where it can.

    Returns:
        How many bytes were copied: fewer when the source ends early.
    """
    done = _copy_in_kernel(source, target, size_bytes)
    while done < size_bytes:
        chunk = os.pread(source, min(CHUNK_BYTES, size_bytes - done), done)
        if not chunk:
            break
        write_all(target, chunk, done)
        done += len(chunk)
    return done


def _copy_in_kernel(source: int, target: int, size_bytes: int) -> int:
    done = 0
    if sys.platform == "linux":
        while done < size_bytes:
            try:
                copied = os.copy_file_range(source, target, size_bytes - done, done, done)
            except OSError as error:
                if error.errno not in _NO_COPY_IN_KERNEL:
                    raise
                break
            if copied == 0:
                break
            done += copied
    return done


def sync_folder(path: Path) -> None:
    """Make the names in a directory durable; file systems that cannot sync one are left alone."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole directory; a link is deleted, never what it leads to."""
    if is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step.

    Returns:
        False when this system or file system cannot, and nothing was changed.

    Raises:
        OSError: it can, and it failed.

    Source: renameat2(2), RENAME_EXCHANGE.
    """
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))
