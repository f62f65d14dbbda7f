"""Where a run keeps its checkpoints, and which of them are whole.

For an output called `out`, beside it:

    .out.hra-export-train/run.json          what is being trained: settings, digests of data and base, versions
    .out.hra-export-train/checkpoint-N/     transformers' checkpoint after step N; whole once `complete.json` is in it
    .out.hra-export-train/data/             Arrow files
    .out.hra-export-train/lock              held through the run, dropped by the system when the process dies

A checkpoint's files are on disk before its `complete.json` is made, so one that a power cut tore apart is never used.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hra_export import filesystem
from hra_export.errors import MismatchError, OutputError
from hra_export.filesystem import as_output_error
from hra_export.places import Places, sync_folders

logger = logging.getLogger(__name__)

RECORD_NAME = "run.json"
MARKER_NAME = "complete.json"
CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})", re.ASCII)
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint of transformers' `Trainer`: its step and its folder."""

    step: int
    path: Path

    @property
    def is_last(self) -> bool:
        """Whether the run ended there, and the adapter is to be published."""
        try:
            return bool(json.loads((self.path / MARKER_NAME).read_bytes())["is_last"])
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run, beside its output."""

    output: Path
    path: Path

    @classmethod
    def of(cls, output: Path) -> Self:
        """The one that belongs to an output."""
        final = Places.of(output).output
        return cls(final, final.parent / f".{final.name}.hra-export-train")

    @property
    def cache(self) -> Path:
        """Where Arrow files go."""
        return self.path / "data"

    def checkpoints(self) -> list[Checkpoint]:
        """Those that are whole, by step."""
        if not filesystem.is_folder(self.path):
            return []
        found = [(CHECKPOINT.fullmatch(path.name), path) for path in self.path.iterdir()]
        whole = [
            Checkpoint(int(match[1]), path)
            for match, path in found
            if match is not None and filesystem.regular_size(path / MARKER_NAME) is not None
        ]
        return sorted(whole, key=lambda checkpoint: checkpoint.step)

    def last(self) -> Checkpoint | None:
        """The latest whole checkpoint."""
        return max(self.checkpoints(), key=lambda checkpoint: checkpoint.step, default=None)

    def at(self, step: int) -> Path:
        """Where the checkpoint after a step is."""
        return self.path / f"checkpoint-{step}"

    @contextmanager
    def held(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Make the directory and keep other runs out of it; one without a whole checkpoint is removed at the end.

        Raises:
            OutputError: another run is in it, or an interrupted one is to be neither resumed nor started over.
        """
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        with as_output_error(f"make `{self.path}`"):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            with self._alone():
                try:
                    self._refuse_to_forget(resume=resume, overwrite=overwrite)
                    yield
                finally:
                    if not self.checkpoints():
                        shutil.rmtree(self.path, ignore_errors=True)
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()  # refuses a folder with something in it

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with ExitStack() as held:
            with as_output_error(f"lock `{self.path}`"):
                try:
                    held.enter_context(filesystem.locked(self.path / "lock"))
                except BlockingIOError as error:
                    raise OutputError(
                        f"another run is training `{self.output}`", hint="wait for it to end, or choose another output"
                    ) from error
            yield

    def _refuse_to_forget(self, *, resume: bool, overwrite: bool) -> None:
        last = self.last()
        if last is not None and not resume and not overwrite:
            raise OutputError(
                f"an interrupted run for `{self.output}` has got to step {last.step}",
                hint="`--resume` goes on from there, `--overwrite` starts over",
            )

    def begin(self, record: Mapping[str, Any]) -> None:
        """Start anew: forget what an earlier run left, and say what this one trains."""
        with as_output_error(f"write `{self.path}`"):
            for path in list(self.path.iterdir()):
                if path.name not in ("lock", "data"):
                    filesystem.remove(path)
            write_json(self.path / RECORD_NAME, {"format": FORMAT, **record})

    def check_same(self, record: Mapping[str, Any]) -> list[str]:
        """Refuse to go on with other settings, data or base.

        Returns:
            What else is different, and may change the last digits.

        Raises:
            MismatchError: each difference.
        """
        try:
            earlier = json.loads((self.path / RECORD_NAME).read_bytes())
        except (OSError, ValueError) as error:
            raise MismatchError(
                f"`{self.path / RECORD_NAME}` cannot be read: {error}", hint="`--overwrite` starts over"
            ) from error
        findings = [
            f"{part}: {text}"
            for part in ("settings", "rows", "base", "processes")
            for text in _differences(earlier.get(part), json.loads(json.dumps(record[part])))
        ]
        if findings:
            raise MismatchError(
                f"the interrupted run for `{self.output}` was another one",
                findings=findings,
                hint="repeat its settings, or start over with `--overwrite`",
            )
        return [f"{text}" for text in _differences(earlier.get("versions"), record["versions"])]

    def seal(self, step: int, *, is_last: bool) -> None:
        """Bring a checkpoint's files to the disk, then mark it whole."""
        folder = self.at(step)
        with as_output_error(f"save `{folder}`"):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    _sync_file(path)
            sync_folders(folder)
            write_json(folder / MARKER_NAME, {"step": step, "is_last": is_last})
            filesystem.sync_folder(self.path)

    def rotate(self, *, keep: int, best: int | None) -> None:
        """Remove all but the last whole checkpoints and the best; and those that are not whole."""
        whole = self.checkpoints()
        kept = {checkpoint.path for checkpoint in whole[-keep:]} | ({self.at(best)} if best else set())
        folders = [path for path in self.path.iterdir() if CHECKPOINT.fullmatch(path.name) and path not in kept]
        for path in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-"))):
            # The marker first: a half removed checkpoint must not pass for a whole one.
            (path / MARKER_NAME).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove everything: the adapter is published."""
        with as_output_error(f"remove `{self.path}`"):
            for checkpoint in self.checkpoints():
                (checkpoint.path / MARKER_NAME).unlink(missing_ok=True)
            shutil.rmtree(self.path, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a small file so that it is there whole or not at all."""
    waiting = path.with_name(f".{path.name}.part")
    with waiting.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    waiting.replace(path)
    filesystem.sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _differences(earlier: object, now: object) -> Iterator[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            if earlier.get(key) != now.get(key):
                yield f"{key} was {_short(earlier.get(key))}, is {_short(now.get(key))}"
    elif earlier != now:
        yield f"was {_short(earlier)}, is {_short(now)}"


def _short(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
