"""Kill a writer at every system call it makes, and look at what it leaves. `test_publish.py` runs this as a process.

    python publish_campaign.py fresh|overwrite|renames FOLDER

For n = 1, 2, … a forked child dies by SIGKILL at its n-th call, until one lives. After each death the output is absent,
old or complete; a second run dies somewhere else; a third one finishes with the same bytes and leaves nothing beside.
Writes are also torn: half of the bytes arrive, then the child dies. `renames` has no exchange of names, so that there
the output may be absent for a moment, with the old one beside it.
"""

import os
import sys
from pathlib import Path

from hra_export import filesystem
from hra_export.errors import OutputError
from hra_export.publish import MANIFEST_NAME, stage
from tests.killing import lives
from tests.synthetic import read_tree

NEW = {
    "model-00001-of-00002.safetensors": b"a" * 5000,
    "model-00002-of-00002.safetensors": b"b" * 3000,
    "sub/folder/config.json": b"{}",
    "tokenizer.json": b"t" * 700,
    MANIFEST_NAME: b'{"new": true}',
}
OLD = {"model-00001-of-00002.safetensors": b"o" * 5000, "old.bin": b"x", "s/old": b"y", MANIFEST_NAME: b"{}"}


def write_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """A toy merge: two shards, one of them written in two pieces, a small file, a copied one."""
    with stage(output, key="toy", size_bytes=9000, overwrite=overwrite) as work:
        for name in sorted(NEW.keys() - {MANIFEST_NAME, "tokenizer.json"}):
            if work.is_finished(name):
                continue
            content = NEW[name]
            with work.create(name, len(content)) as fd:
                os.pwrite(fd, content[len(content) // 2 :], len(content) // 2)
                os.pwrite(fd, content[: len(content) // 2], 0)
        if not work.is_finished("tokenizer.json"):
            work.copy(source, "tokenizer.json")
        work.publish(MANIFEST_NAME, NEW[MANIFEST_NAME])


def make_tree(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by name."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def run_killed(point: int, output: Path, source: Path, *, overwrite: bool) -> bool:
    """Whether a run that is to die at `point` lived to its end."""

    def work() -> None:
        try:
            write_output(output, source, overwrite=overwrite)
        except OutputError:
            if read_tree(output) != NEW:  # complete already: refused without --overwrite
                raise

    return lives(work, point=point)


def check_invariant(output: Path, old: dict[str, bytes] | None, *, has_exchange: bool) -> None:
    """The output is absent where it was absent, or old, or complete; by renames, old may be beside for a moment."""
    found = read_tree(output)
    if found is None and old is not None and not has_exchange:
        found = read_tree(output.with_name(f".{output.name}.hra-export-old"))
    assert found in (old, NEW), f"neither old nor complete: {sorted(found or {})}"


def campaign(mode: str, root: Path) -> int:
    """Run one campaign; returns how many points it had."""
    old = None if mode == "fresh" else OLD
    has_exchange = mode != "renames"
    if not has_exchange:
        filesystem.exchange = lambda first, second: False
    source = root / "source.json"
    source.write_bytes(NEW["tokenizer.json"])
    point, lived = 0, False
    while not lived:
        point += 1
        folder = root / str(point)
        output = folder / "out"
        folder.mkdir()
        if old is not None:
            make_tree(output, old)
        lived = run_killed(point, output, source, overwrite=old is not None)
        check_invariant(output, old, has_exchange=has_exchange)
        run_killed(point * 7 % 90 + 1, output, source, overwrite=old is not None)
        check_invariant(output, old, has_exchange=has_exchange)
        try:
            write_output(output, source, overwrite=old is not None)
        except OutputError:
            assert mode == "fresh", f"point {point}: refused"
        assert read_tree(output) == NEW, f"point {point}: not complete after a rerun"
        left = [path.name for path in folder.iterdir()]
        assert left == ["out"], f"point {point}: {left}"
    return point - 1


if __name__ == "__main__":
    sys.stdout.write(f"{campaign(sys.argv[1], Path(sys.argv[2]))}\n")
