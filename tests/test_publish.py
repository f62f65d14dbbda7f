# ruff: noqa: PT012  what is under test are `with` blocks and processes

import errno
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hra_export import filesystem, journal, publish
from hra_export.errors import CheckpointError, OutputError
from hra_export.publish import MANIFEST_NAME, Stage, check_output, stage

MANIFEST = b'{"tool": "hra-export"}'
CAMPAIGN = Path(__file__).with_name("publish_campaign.py")
FAULTS = (errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EACCES, errno.ENOSPC)
FAULTY_CALLS = (
    *("open", "pwrite", "fsync", "posix_fallocate", "copy_file_range", "rename", "unlink", "mkdir", "rmdir", "scandir"),
    *("statvfs", "fstat"),
)
SUBPROCESS_ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        path for path in (str(Path(publish.__file__).parents[1]), os.environ.get("PYTHONPATH", "")) if path
    )
}


def write_output(output: Path, files: dict[str, bytes], *, key: str = "k", overwrite: bool = False) -> list[str]:
    """Stage and publish `files`; returns the names that an interrupted run had finished."""
    kept = []
    with stage(output, key=key, size_bytes=sum(map(len, files.values())), overwrite=overwrite) as work:
        for name, content in files.items():
            if work.is_finished(name):
                kept.append(name)
            else:
                work.write_bytes(name, content)
        work.publish(MANIFEST_NAME, MANIFEST)
    return kept


def interrupt(output: Path, files: dict[str, bytes], *, key: str = "k") -> None:
    """Write `files` and be interrupted before publishing."""
    with pytest.raises(KeyboardInterrupt), stage(output, key=key, size_bytes=0) as work:
        for name, content in files.items():
            work.write_bytes(name, content)
        raise KeyboardInterrupt


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def beside(output: Path, role: str) -> Path:
    return output.parent / f".{output.name}.hra-export-{role}"


@pytest.fixture
def output(fast_folder: Path) -> Path:
    """A path in a folder of its own, so that what lies beside it can be listed."""
    folder = fast_folder / "folder"
    folder.mkdir()
    return folder / "out"


@pytest.fixture
def output_on_disk(tmp_path: Path) -> Path:
    """The same on the disk that pytest uses."""
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder / "out"


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 4 MiB: a real one where we may mount it, else the same answers from patched calls."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return

    def allocate(fd: int, _offset: int, length: int) -> None:
        if length > 4 * 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, length)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 1024, 1024, 1024, 9, 9, 9, 0, 255)))
    yield folder


# What is published


def test_stage_publishes_exactly_what_was_written(output_on_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_bytes(os.urandom(100_000))
    with stage(output_on_disk, key="k", size_bytes=100_100) as work:
        assert work.directory.parent == output_on_disk.parent
        with work.create("model.safetensors", 10) as fd:
            os.pwrite(fd, b"56789", 5)
            os.pwrite(fd, b"01234", 0)
        work.write_bytes("sub/folder/empty", b"")
        work.copy(source, "tokenizer.json")
        assert not output_on_disk.exists()
        work.publish(MANIFEST_NAME, MANIFEST)
    assert read_tree(output_on_disk) == {
        "model.safetensors": b"0123456789",
        "sub/folder/empty": b"",
        "tokenizer.json": source.read_bytes(),
        MANIFEST_NAME: MANIFEST,
    }
    assert names_in(output_on_disk.parent) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_stage_gives_files_and_folders_the_modes_of_the_umask(output: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_output(output, {"a": b"a", "sub/b": b"b"})
    finally:
        os.umask(before)
    for path in (output, *output.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_stage_makes_missing_parents_and_takes_them_away_after_an_error(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    with pytest.raises(ZeroDivisionError), stage(output, key="k", size_bytes=0):
        raise ZeroDivisionError
    assert names_in(tmp_path) == []
    write_output(output, {"a": b"a"})
    assert names_in(output) == ["a", MANIFEST_NAME]


def test_stage_takes_the_place_of_an_empty_directory(output: Path) -> None:
    output.mkdir()
    write_output(output, {"a": b"a"})
    assert names_in(output) == ["a", MANIFEST_NAME]


def test_create_lets_threads_write_several_files_at_once(output_on_disk: Path) -> None:
    size = 64 * 1024

    def write_file(work: Stage, number: int) -> None:
        with work.create(f"{number}.bin", size) as fd:
            pieces = [
                threading.Thread(target=os.pwrite, args=(fd, bytes([number]) * (size // 4), size // 4 * i))
                for i in range(4)
            ]
            for piece in pieces:
                piece.start()
            for piece in pieces:
                piece.join()

    with stage(output_on_disk, key="k", size_bytes=8 * size) as work:
        files = [threading.Thread(target=write_file, args=(work, number)) for number in range(8)]
        for file in files:
            file.start()
        for file in files:
            file.join()
        assert len((beside(output_on_disk, "journal")).read_bytes().splitlines()) == 9
        work.publish(MANIFEST_NAME, MANIFEST)
    assert read_tree(output_on_disk) == {f"{i}.bin": bytes([i]) * size for i in range(8)} | {MANIFEST_NAME: MANIFEST}


def test_create_removes_the_file_when_the_block_raises(output: Path) -> None:
    with stage(output, key="k", size_bytes=10) as work:
        with pytest.raises(ZeroDivisionError), work.create("a", 10):
            raise ZeroDivisionError
        assert names_in(work.directory) == []
        work.write_bytes("a", b"second try")
        work.publish(MANIFEST_NAME, MANIFEST)
    assert (output / "a").read_bytes() == b"second try"


def test_create_refuses_a_file_whose_size_changed(output: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="expected 3 bytes, got 9"),
        stage(output, key="k", size_bytes=3) as work,
        work.create("a", 3) as fd,
    ):
        os.pwrite(fd, b"123456789", 0)
    assert names_in(output.parent) == []


def test_create_refuses_a_name_that_was_written(output: Path) -> None:
    with pytest.raises(ValueError, match="`a` is written twice"), stage(output, key="k", size_bytes=0) as work:
        work.write_bytes("a", b"1")
        work.write_bytes("a", b"2")
    assert names_in(output.parent) == []


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../../x", "a/..", "/etc/x", "./a", "a//b", "a/", "a\\b", "C:x", "C:/x", "a\0b", "//h/s"],
)
def test_names_that_leave_the_output_are_refused(output: Path, name: str) -> None:
    with pytest.raises(ValueError, match="does not stay inside"), stage(output, key="k", size_bytes=0) as work:
        work.write_bytes(name, b"")
    assert names_in(output.parent) == []


@given(st.text(alphabet="a./\\:~\0 é", max_size=8))
def test_every_accepted_name_stays_inside(name: str) -> None:
    work = Stage.__new__(Stage)
    work.directory = Path("/stage")
    try:
        path = work._path(name)
    except ValueError:
        return
    assert os.path.normpath(path).startswith("/stage/")


# Copying


def test_copy_follows_a_link_to_a_regular_file(output: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"blob")
    (tmp_path / "link").symlink_to("blob")
    with stage(output, key="k", size_bytes=4) as work:
        work.copy(tmp_path / "link", "config.json")
        work.publish(MANIFEST_NAME, MANIFEST)
    assert (output / "config.json").read_bytes() == b"blob"
    assert not (output / "config.json").is_symlink()


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket"])
def test_copy_refuses_what_is_not_a_regular_file(output: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    listener = socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        os.mkfifo(source)
    elif kind == "folder":
        source.mkdir()
    elif kind == "device":
        source.symlink_to("/dev/zero")
    else:
        listener.bind(str(source))
    with (
        listener,
        pytest.raises(CheckpointError, match="not a regular file"),
        stage(output, key="k", size_bytes=0) as work,
    ):
        work.copy(source, "a")
    assert names_in(output.parent) == []


def test_copy_refuses_a_missing_file_as_output_error(output: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"), stage(output, key="k", size_bytes=0) as work:
        work.copy(tmp_path / "missing", "a")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_copy_works_where_the_kernel_cannot(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(*_: object) -> int:
        if code is None:
            return 0
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(filesystem, "CHUNK_BYTES", 1000)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(12_345))
    with stage(output, key="k", size_bytes=12_345) as work:
        work.copy(source, "a")
        work.publish(MANIFEST_NAME, MANIFEST)
    assert (output / "a").read_bytes() == source.read_bytes()


def test_copy_refuses_a_source_that_changes_meanwhile(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)

    def copy_and_shrink(*arguments: int) -> int:
        os.truncate(source, 10)
        return copy_bytes(*arguments)

    copy_bytes = filesystem.copy_bytes
    monkeypatch.setattr(filesystem, "copy_bytes", copy_and_shrink)
    with pytest.raises(OutputError, match="changed while it was copied"), stage(output, key="k", size_bytes=0) as work:
        work.copy(source, "a")


# Resuming


def test_stage_keeps_finished_files_of_an_interrupted_run(output: Path) -> None:
    interrupt(output, {"a": b"aaa", "sub/b": b"bbb"})
    assert not output.exists()
    before = (beside(output, "stage") / "a").stat()
    assert write_output(output, {"a": b"aaa", "sub/b": b"bbb", "c": b"ccc"}) == ["a", "sub/b"]
    after = (output / "a").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert read_tree(output) == {"a": b"aaa", "sub/b": b"bbb", "c": b"ccc", MANIFEST_NAME: MANIFEST}
    assert names_in(output.parent) == ["out"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_stage_keeps_finished_and_no_half_files_when_interrupted(output: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), stage(output, key="k", size_bytes=9) as work:
        work.write_bytes("a", b"aaa")
        with work.create("b", 3):
            raise kind
    assert names_in(beside(output, "stage")) == ["a"]
    assert names_in(output.parent) == [".out.hra-export-journal", ".out.hra-export-stage"]
    assert write_output(output, {"a": b"aaa", "b": b"bbb"}) == ["a"]


def test_stage_leaves_nothing_when_interrupted_before_a_file_is_finished(output: Path) -> None:
    interrupt(output, {})
    assert names_in(output.parent) == []


def test_stage_redoes_half_written_and_resized_files_and_drops_strangers(output: Path, tmp_path: Path) -> None:
    interrupt(output, {"a": b"aaa", "resized": b"123", "linked": b"123"})
    staged = beside(output, "stage")
    (tmp_path / "precious").write_bytes(b"123")
    (staged / "half").write_bytes(b"hal")
    (staged / "resized").write_bytes(b"1")
    (staged / "linked").unlink()
    (staged / "linked").symlink_to(tmp_path / "precious")
    (staged / "elsewhere").symlink_to(tmp_path)
    files = {"a": b"aaa", "half": b"whole", "resized": b"123", "linked": b"321"}
    assert write_output(output, files) == ["a"]
    assert read_tree(output) == files | {MANIFEST_NAME: MANIFEST}
    assert (tmp_path / "precious").read_bytes() == b"123"


def test_stage_publishes_no_finished_file_that_nobody_asks_for(output: Path) -> None:
    interrupt(output, {"model-00001-of-00002": b"old", "sub/x": b"old"})
    write_output(output, {"model": b"new"})
    assert names_in(output) == [MANIFEST_NAME, "model"]


@pytest.mark.parametrize("damage", ["size", "missing", "none"])
def test_a_file_that_is_written_again_counts_as_unfinished_when_that_is_interrupted(output: Path, damage: str) -> None:
    """It has its full size from the start, so that size alone would not tell."""
    interrupt(output, {"a": b"aaa", "b": b"bbb"})
    if damage == "size":
        (beside(output, "stage") / "b").write_bytes(b"b")
    elif damage == "missing":
        (beside(output, "stage") / "b").unlink()
    program = HOLDER.replace('work.write_bytes("a", b"aaa")', 'half = work.create("b", 3); half.__enter__()')
    with start_holder(output, program) as holder:
        holder.kill()
    assert (beside(output, "stage") / "b").read_bytes() == b"\0\0\0"
    assert write_output(output, {"a": b"aaa", "b": b"bbb"}) == ["a"]
    assert (output / "b").read_bytes() == b"bbb"


def test_stage_starts_over_when_the_key_differs(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupt(output, {"a": b"aaa"}, key="other")
    with caplog.at_level("INFO", logger="hra_export.publish"):
        assert write_output(output, {"a": b"AAA"}) == []
    assert "starting over" in caplog.text
    assert (output / "a").read_bytes() == b"AAA"


@pytest.mark.parametrize("tail", [b'{"name": "b", "size', b"\0\0\0\0", b'{"name": "b", "size_bytes": 3}'])
def test_stage_tolerates_a_torn_last_line_of_the_journal(output: Path, tail: bytes) -> None:
    interrupt(output, {"a": b"aaa"})
    (beside(output, "stage") / "b").write_bytes(b"zzz")
    with beside(output, "journal").open("ab") as file:
        file.write(tail)
    with pytest.raises(KeyboardInterrupt), stage(output, key="k", size_bytes=0) as work:
        assert work.is_finished("a")
        assert not work.is_finished("b")
        work.write_bytes("c", b"ccc")
        raise KeyboardInterrupt
    assert write_output(output, {"a": b"aaa", "b": b"bbb", "c": b"ccc"}) == ["a", "c"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage\n",
        b"[]\n",
        b'{"journal": 2, "key": "k", "stage": 1}\n',
        b'{"journal": 1, "key": "k"}\n',
        b'{"journal": 1, "key": "k", "stage": 1e999}\n',
        b'{"journal": 1, "key": "k", "stage": 0}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_stage_starts_over_when_the_journal_is_unreadable(output: Path, content: bytes) -> None:
    interrupt(output, {"a": b"aaa"})
    beside(output, "journal").write_bytes(content)
    assert write_output(output, {"a": b"AAA"}) == []
    assert names_in(output.parent) == ["out"]


def test_stage_does_not_follow_a_link_in_the_place_of_its_own(output: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"x")
    for role in ("stage", "journal"):
        beside(output, role).symlink_to(precious)
    write_output(output, {"a": b"aaa"})
    assert read_tree(precious) == {"file": b"x"}
    assert names_in(output.parent) == ["out"]


def test_journal_lines_are_whole_and_say_what_is_finished(output: Path) -> None:
    interrupt(output, {"a": b"aaa"})
    header, entry = map(json.loads, beside(output, "journal").read_text().splitlines())
    assert header == {"journal": 1, "key": "k", "stage": beside(output, "stage").stat().st_ino}
    assert entry == {"name": "a", "size_bytes": 3, "note": ""}
    record = journal.read_journal(beside(output, "journal"))
    assert record is not None
    assert record.files == {"a": 3}


def test_note_of_a_finished_file_is_there_for_the_next_run(output: Path) -> None:
    digest: list[str] = []
    with pytest.raises(KeyboardInterrupt), stage(output, key="k", size_bytes=0) as work:
        for name in ("a", "b"):
            with work.create(name, 1, note=lambda: digest[-1]):
                digest.append(f"sha256 of {name}")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), stage(output, key="k", size_bytes=0) as work:
        assert (work.note("a"), work.note("b"), work.note("c")) == ("sha256 of a", "sha256 of b", "")
        work.write_bytes("b", b"")
        raise KeyboardInterrupt
    with stage(output, key="k", size_bytes=0) as work:
        assert work.is_finished("a")
        assert (work.note("a"), work.note("b")) == ("sha256 of a", "")
        work.publish(MANIFEST_NAME, MANIFEST)


def test_create_removes_the_file_when_its_note_cannot_be_made(output: Path) -> None:
    with stage(output, key="k", size_bytes=0) as work:
        with pytest.raises(ZeroDivisionError), work.create("a", 1, note=lambda: str(1 // 0)):
            pass
        assert names_in(work.directory) == []
        work.publish(MANIFEST_NAME, MANIFEST)


# Refusals


def test_check_output_refuses_an_existing_output(output: Path) -> None:
    write_output(output, {"a": b"a"})
    with pytest.raises(OutputError, match="exists") as caught:
        check_output(output)
    assert caught.value.exit_code == 6
    assert "--overwrite" in str(caught.value.hint)
    check_output(output, overwrite=True)
    with pytest.raises(OutputError, match="exists"), stage(output, key="k", size_bytes=0):
        raise AssertionError


@pytest.mark.parametrize("kind", ["none", "folder", "link"])
def test_check_output_refuses_to_overwrite_what_is_not_ours(output: Path, tmp_path: Path, kind: str) -> None:
    output.mkdir()
    (output / "thesis.tex").write_bytes(b"x")
    if kind == "folder":
        (output / MANIFEST_NAME).mkdir()
    elif kind == "link":
        (tmp_path / "manifest").write_bytes(b"{}")
        (output / MANIFEST_NAME).symlink_to(tmp_path / "manifest")
    with pytest.raises(OutputError, match=f"holds no `{MANIFEST_NAME}`"):
        check_output(output, overwrite=True)
    with pytest.raises(OutputError), stage(output, key="k", size_bytes=0, overwrite=True):
        raise AssertionError
    assert (output / "thesis.tex").exists()


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "fifo"])
def test_check_output_refuses_what_is_not_a_directory(output: Path, tmp_path: Path, kind: str) -> None:
    if kind == "file":
        output.write_bytes(b"x")
    elif kind == "fifo":
        os.mkfifo(output)
    else:
        (tmp_path / "target").mkdir()
        output.symlink_to(tmp_path / ("target" if kind == "link" else "missing"))
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"is a symbolic link|is not a directory"):
            check_output(output, overwrite=overwrite)
    assert names_in(output.parent) == ["out"]


def test_check_output_accepts_absent_empty_and_missing_parents(output: Path) -> None:
    check_output(output)
    check_output(output / "deep" / "deeper")
    output.mkdir()
    check_output(output)
    assert names_in(output.parent) == ["out"]


def test_check_output_refuses_a_parent_that_is_a_file(output: Path) -> None:
    output.write_bytes(b"x")
    with pytest.raises(OutputError, match="is not a directory"):
        check_output(output / "sub" / "out")
    with pytest.raises(OutputError), stage(output / "sub" / "out", key="k", size_bytes=0):
        raise AssertionError


def test_check_output_refuses_the_current_directory(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.mkdir()
    monkeypatch.chdir(output)
    for path in (Path(), Path("../out"), output.parent):
        with pytest.raises(OutputError, match="current directory"):
            check_output(path, overwrite=True)


def test_check_output_refuses_a_mount_point(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == small_disk)
    with pytest.raises(OutputError, match="mount point"):
        check_output(small_disk)


@pytest.mark.parametrize("relation", ["same", "inside", "contains", "linked", "linked inside"])
def test_check_output_keeps_away_from_inputs(tmp_path: Path, relation: str) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (tmp_path / "alias").symlink_to(base)
    output = {
        "same": base,
        "inside": base / "sub" / "merged",
        "contains": tmp_path / "models",
        "linked": tmp_path / "alias",
        "linked inside": tmp_path / "alias" / "merged",
    }[relation]
    with pytest.raises(OutputError, match="is, contains or lies in the input"):
        check_output(output, overwrite=True, protected=[tmp_path / "missing", base])
    with pytest.raises(OutputError), stage(output, key="k", size_bytes=0, overwrite=True, protected=[base]):
        raise AssertionError
    assert names_in(base) == []
    check_output(base.with_name("base-merged"), protected=[base])


def test_check_output_refuses_a_folder_it_may_not_write_in(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere: the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == output.parent and mode & os.W_OK))
    with pytest.raises(OutputError, match="no permission to write in"):
        check_output(output)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_stage_refuses_a_folder_it_may_not_write_in(output: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, flags, *arguments, **options)

    real_open = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match=os.strerror(code)) as caught, stage(output, key="k", size_bytes=0):
        raise AssertionError
    assert caught.value.hint is not None


def test_stage_that_ends_without_publish_is_a_bug(output: Path) -> None:
    with pytest.raises(RuntimeError, match="without `publish`"), stage(output, key="k", size_bytes=1) as work:
        work.write_bytes("a", b"a")
    assert names_in(output.parent) == []


def test_publish_refuses_open_files_other_manifests_and_a_second_time(output: Path) -> None:
    with stage(output, key="k", size_bytes=1) as work:
        with pytest.raises(ValueError, match="manifest name"):
            work.publish("manifest.json", MANIFEST)
        with work.create("a", 1), pytest.raises(RuntimeError, match="being written"):
            work.publish(MANIFEST_NAME, MANIFEST)
        work.publish(MANIFEST_NAME, MANIFEST)
        with pytest.raises(RuntimeError, match="after the output was published"):
            work.publish(MANIFEST_NAME, MANIFEST)
    assert names_in(output) == ["a", MANIFEST_NAME]


# Full disks and faults


def test_stage_refuses_before_the_first_byte_when_the_disk_is_too_small(small_disk: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"not enough space .* 0\.009 GB needed, 0\.004 GB free") as caught,
        stage(small_disk / "out", key="k", size_bytes=8_000_000),
    ):
        raise AssertionError
    assert caught.value.exit_code == 6
    assert names_in(small_disk) == []


def test_stage_counts_finished_files_as_space_it_has(small_disk: Path) -> None:
    interrupt(small_disk / "out", {"a": bytes(2_500_000)})
    with stage(small_disk / "out", key="k", size_bytes=2_600_000) as work:
        assert work.is_finished("a")
        work.publish(MANIFEST_NAME, MANIFEST)
    assert names_in(small_disk) == ["out"]


def test_stage_keeps_finished_files_when_a_resumed_run_lacks_space(small_disk: Path) -> None:
    interrupt(small_disk / "out", {"a": b"a"})
    with pytest.raises(OutputError, match="not enough space"), stage(small_disk / "out", key="k", size_bytes=8_000_000):
        raise AssertionError
    assert write_output(small_disk / "out", {"a": b"a"}) == ["a"]


def test_create_finds_a_full_disk_before_anything_is_written(small_disk: Path) -> None:
    with (
        pytest.raises(OutputError, match="No space left") as caught,
        stage(small_disk / "out", key="k", size_bytes=0) as work,
        work.create("model.safetensors", 8_000_000),
    ):
        raise AssertionError
    assert "model.safetensors" in caught.value.message
    assert "free some space" in str(caught.value.hint)
    assert names_in(small_disk) == []


def count_calls(monkeypatch: pytest.MonkeyPatch, at: int, code: int) -> Callable[[], int]:
    """Let the `at`-th of all watched system calls fail with `code`, once; returns what tells their number."""
    count = 0

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise OSError(code, os.strerror(code))
            return call(*arguments, **options)

        return wrapper

    for name in FAULTY_CALLS:
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(filesystem, "exchange", watched(filesystem.exchange))
    return lambda: count


def run_with_fault(output: Path, source: Path, *, at: int, code: int) -> tuple[OutputError | None, int]:
    """Overwrite `output` while one system call fails; returns the error and how many calls there were."""
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch, at, code)
        try:
            with stage(output, key="k", size_bytes=100, overwrite=True) as work:
                work.write_bytes("sub/a", b"new")
                work.copy(source, "b")
                work.publish(MANIFEST_NAME, MANIFEST)
        except OutputError as error:
            return error, calls()
        return None, calls()


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("has_old", [False, True], ids=["fresh", "overwrite"])
def test_every_failing_call_is_an_output_error_that_leaves_old_or_complete(
    fast_folder: Path, code: int, has_old: bool
) -> None:
    source = fast_folder / "source"
    source.write_bytes(b"copied")
    old = {"a": b"old", MANIFEST_NAME: MANIFEST} if has_old else {}
    new = {"sub/a": b"new", "b": b"copied", MANIFEST_NAME: MANIFEST}
    at, calls = 0, 0
    while at <= calls:
        at += 1
        output = fast_folder / str(at) / "out"
        output.parent.mkdir()
        if has_old:
            write_output(output, {"a": b"old"})
        error, calls = run_with_fault(output, source, at=at, code=code)
        found = read_tree(output)
        assert found in (old, new), at
        if error is not None:
            assert os.strerror(code) in error.message, at
            assert error.hint is not None, at
            left = set(names_in(output.parent)) - {beside(output, "lock").name}  # one that nobody holds is harmless
            assert left == ({"out"} if found else set()), at
        else:
            assert found == new, at
            write_output(output, {"again": b""}, overwrite=True)
            assert names_in(output.parent) == ["out"], at
    assert at > 40


def test_stage_cleans_up_and_passes_on_an_error_of_the_caller(output: Path) -> None:
    with pytest.raises(ZeroDivisionError), stage(output, key="k", size_bytes=0) as work:
        work.write_bytes("a", b"a")
        raise ZeroDivisionError
    assert names_in(output.parent) == []


def test_stage_keeps_the_error_when_cleaning_up_fails_too(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with pytest.raises(ZeroDivisionError), stage(output, key="k", size_bytes=0):
        monkeypatch.setattr(filesystem, "remove", fail)
        raise ZeroDivisionError
    monkeypatch.undo()
    write_output(output, {"a": b"a"})
    assert names_in(output.parent) == ["out"]


# Replacing


@pytest.mark.parametrize("has_exchange", [True, False])
def test_overwrite_keeps_the_old_output_until_the_new_one_is_whole(
    output_on_disk: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool
) -> None:
    if not has_exchange:
        monkeypatch.setattr(filesystem, "exchange", lambda _first, _second: False)
    write_output(output_on_disk, {"a": b"old", "gone": b""})
    with stage(output_on_disk, key="k", size_bytes=3, overwrite=True) as work:
        work.write_bytes("a", b"new")
        assert (output_on_disk / "a").read_bytes() == b"old"
        work.publish(MANIFEST_NAME, MANIFEST)
        assert (output_on_disk / "a").read_bytes() == b"new"
    assert names_in(output_on_disk) == ["a", MANIFEST_NAME]
    assert names_in(output_on_disk.parent) == ["out"]


def test_overwrite_puts_the_old_output_back_when_the_second_rename_fails(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_output(output, {"a": b"old"})
    real_rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if str(source).endswith("-stage"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_rename(source, target)

    monkeypatch.setattr(filesystem, "exchange", lambda _first, _second: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OutputError, match="cannot publish"):
        write_output(output, {"a": b"new"}, overwrite=True)
    assert (output / "a").read_bytes() == b"old"
    assert names_in(output.parent) == ["out"]


@pytest.mark.parametrize("has_old", [False, True], ids=["fresh", "overwrite"])
def test_everything_is_on_disk_before_the_move_and_the_move_before_the_old_output_goes(
    output: Path, monkeypatch: pytest.MonkeyPatch, has_old: bool
) -> None:
    """A power cut may undo whatever was not synced, so the order of syncs is the promise."""
    events: list[int | str] = []

    def noted(call: Callable[..., Any], event: Callable[..., int | str]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            result = call(*arguments)
            events.append(event(*arguments))
            return result

        return wrapper

    if has_old:
        write_output(output, {"a": b"old"})
    monkeypatch.setattr(os, "fsync", noted(os.fsync, lambda fd: os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "rename", noted(os.rename, lambda *_: "move"))
    monkeypatch.setattr(filesystem, "exchange", noted(filesystem.exchange, lambda *_: "move"))
    monkeypatch.setattr(filesystem, "remove", noted(filesystem.remove, lambda path: f"remove {path.name}"))
    write_output(output, {"a": b"new", "sub/deep/b": b"new"}, overwrite=has_old)

    before, after = events[: events.index("move")], events[events.index("move") + 1 :]
    last = {event: number for number, event in enumerate(before)}
    for path in output.rglob("*"):
        assert last[path.parent.stat().st_ino] > last[path.stat().st_ino], path
    parent = output.parent.stat().st_ino
    assert parent in before, "the staging directory and its journal have a name before the first file"
    assert after[0] == parent
    removed = [event for event in after if isinstance(event, str)]
    assert removed == [f"remove .out.hra-export-{role}" for role in (["journal", "stage"] if has_old else ["journal"])]


def test_publish_refuses_what_appeared_at_the_output_meanwhile(output: Path) -> None:
    with pytest.raises(OutputError, match="exists"), stage(output, key="k", size_bytes=0) as work:
        output.mkdir()
        (output / "theirs").write_bytes(b"x")
        work.publish(MANIFEST_NAME, MANIFEST)
    assert read_tree(output) == {"theirs": b"x"}
    assert names_in(output.parent) == ["out"]


def test_exchange_swaps_two_folders_or_says_that_it_cannot(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
    swapped = filesystem.exchange(tmp_path / "a", tmp_path / "b")
    assert swapped or sys.platform != "linux"
    assert (tmp_path / "a" / ("b" if swapped else "a")).exists()
    if swapped:
        with pytest.raises(FileNotFoundError):
            filesystem.exchange(tmp_path / "a", tmp_path / "missing")


# Several processes


HOLDER = """
import sys, time
from pathlib import Path
from hra_export.publish import stage
with stage(Path(sys.argv[1]), key="k", size_bytes=3) as work:
    work.write_bytes("a", b"aaa")
    print("ready", flush=True)
    time.sleep(60)
"""


def start_holder(output: Path, program: str = HOLDER) -> subprocess.Popen[str]:
    """A process that holds the stage with one file finished."""
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(output)],
        env=SUBPROCESS_ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    return holder


def test_a_second_run_is_refused_and_a_killed_one_holds_nothing(output: Path) -> None:
    with start_holder(output) as holder:
        with pytest.raises(OutputError, match="another run is writing") as caught:
            write_output(output, {"a": b"aaa"})
        assert caught.value.exit_code == 6
        assert (beside(output, "stage") / "a").exists()
        holder.kill()
    assert beside(output, "lock").exists()
    assert write_output(output, {"a": b"aaa"}) == ["a"]
    assert names_in(output.parent) == ["out"]


def test_a_second_run_in_another_thread_is_refused(output: Path) -> None:
    with stage(output, key="k", size_bytes=0) as work:
        with pytest.raises(OutputError, match="another run is writing"), stage(output, key="k", size_bytes=0):
            raise AssertionError
        work.publish(MANIFEST_NAME, MANIFEST)


def test_sigterm_as_system_exit_keeps_finished_files(output: Path) -> None:
    program = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + HOLDER
    with start_holder(output, program) as holder:
        holder.terminate()
        assert holder.wait(10) == 143
    assert names_in(output.parent) == [".out.hra-export-journal", ".out.hra-export-stage"]
    assert write_output(output, {"a": b"aaa"}) == ["a"]


def test_a_lock_that_its_holder_removed_meanwhile_is_not_taken_for_held(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file can be gone between our open and our lock; a lock on a nameless file would keep nobody out."""
    real_flock = fcntl.flock
    raced: list[int] = []

    def flock(fd: int, operation: int) -> None:
        if not raced:
            raced.append(fd)
            beside(output, "lock").unlink()
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with filesystem.locked(beside(output, "lock")):
        assert raced
        assert beside(output, "lock").exists()


def test_stage_works_without_locks_and_says_so(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_output(output, {"a": b"a"})
    assert "no locks" in caplog.text
    assert names_in(output.parent) == ["out"]


@pytest.mark.parametrize("mode", ["fresh", "overwrite", "renames"])
def test_a_run_killed_at_any_call_leaves_old_or_complete_and_can_be_run_again(fast_folder: Path, mode: str) -> None:
    result = subprocess.run(
        [sys.executable, str(CAMPAIGN), mode, str(fast_folder)],
        env=SUBPROCESS_ENV,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 80


def test_file_descriptors_do_not_pile_up(output: Path) -> None:
    write_output(output, {"a": b"a"})
    before = len(names_in(Path("/dev/fd")))
    for number in range(20):
        write_output(output, {"a": b"a"}, overwrite=True)
        with pytest.raises(ZeroDivisionError), stage(output, key=str(number), size_bytes=0, overwrite=True):
            raise ZeroDivisionError
    assert len(names_in(Path("/dev/fd"))) == before
