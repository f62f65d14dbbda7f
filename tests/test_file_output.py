"""One file as output: absent, the old one, or complete."""

from pathlib import Path

import pytest

from hra_export.errors import OutputError
from hra_export.file_output import check_file, staged_file


def left_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_file_appears_when_it_is_whole_with_its_folders(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folders" / "a.gguf"
    with staged_file(output) as partial:
        partial.write_text("half")
        assert not output.exists()
        partial.write_text("whole")
    assert left_in(output.parent) == {"a.gguf": "whole"}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    output.write_text("old")

    def fail() -> None:
        with staged_file(output, overwrite=True) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert left_in(tmp_path) == {"a.gguf": "old"}


def test_a_file_that_exists_is_replaced_only_on_request(tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    output.write_text("old")
    with pytest.raises(OutputError, match="exists") as caught:
        check_file(output)
    assert caught.value.exit_code == 6
    with staged_file(output, overwrite=True) as partial:
        partial.write_text("new")
    assert left_in(tmp_path) == {"a.gguf": "new"}


def test_directories_and_inputs_are_never_replaced(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = tmp_path / "base.gguf"
    base.write_text("base")
    for output, reason in ((adapter, "directory"), (adapter / "a.gguf", "input"), (base, "input")):
        with pytest.raises(OutputError, match=reason):
            check_file(output, overwrite=True, protected=[*([adapter] if output != adapter else []), base])
    assert left_in(tmp_path) == {"base.gguf": "base"}


def test_a_file_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"

    def write() -> None:
        with staged_file(output) as partial:
            partial.write_text("mine")
            output.write_text("theirs")

    with pytest.raises(OutputError, match="exists"):
        write()
    assert left_in(tmp_path) == {"a.gguf": "theirs"}
