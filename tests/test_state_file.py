"""State dicts of other people's code: what is read, from where, and what a pickle may not hold."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hra_export.errors import ConversionError, FormatError, HraExportError, OutputError
from hra_export.official.state_file import read_state

TENSORS = {"m.hra_u": torch.arange(6.0).reshape(3, 2)}


class Callback:
    """Something that a checkpoint of Lightning holds beside its tensors."""


class Trap:
    """Leaves a file behind when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_read_state_refuses_a_pickle_unless_it_is_allowed(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "w.pt")
    with pytest.raises(ConversionError, match="is a pickle") as caught:
        read_state(tmp_path / "w.pt")
    assert "--allow-pickle" in str(caught.value.hint)
    assert torch.equal(read_state(tmp_path / "w.pt", allow_pickle=True).tensors["m.hra_u"], TENSORS["m.hra_u"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip file", "older format"])
@pytest.mark.parametrize("allow", [True, False])
def test_read_state_never_runs_code(zipped: bool, allow: bool, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save(
        {"state_dict": TENSORS, "callbacks": Trap(sprung)}, tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ConversionError):
        read_state(tmp_path / "w.ckpt", allow_pickle=allow)
    assert not sprung.exists()
    torch.load(tmp_path / "w.ckpt", weights_only=False)
    assert sprung.exists()  # the trap is one


def test_read_state_says_how_to_save_a_checkpoint_with_callbacks_again(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "callbacks": Callback()}, tmp_path / "last.ckpt")
    with pytest.raises(ConversionError, match="holds more than tensors") as caught:
        read_state(tmp_path / "last.ckpt", allow_pickle=True)
    assert "Callback" in caught.value.message
    assert "['state_dict']" in str(caught.value.hint)


def test_read_state_takes_the_tensors_of_a_lightning_checkpoint(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": TENSORS}, tmp_path / "last.ckpt")
    state = read_state(tmp_path / "last.ckpt", allow_pickle=True)
    assert state.tensors.keys() == TENSORS.keys()
    assert state.saved_with == {"epoch": 3}


def test_read_state_reads_the_older_format_of_torch(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state(tmp_path / "w.bin", allow_pickle=True).tensors["m.hra_u"], TENSORS["m.hra_u"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_read_state_drops_the_prefix_of_a_wrapper_for_several_devices(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    save: Callable[..., None] = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save({f"module.{name}": value for name, value in TENSORS.items()}, path)
    assert read_state(path, allow_pickle=True).tensors.keys() == TENSORS.keys()


def test_read_state_reads_configurations_beside_the_file_and_metadata_inside(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "w.safetensors", {"cfg": json.dumps({"r": 2}), "word": "text"})
    (tmp_path / "model_config.json").write_text('{"hra": {"r": 2}}')
    state = read_state(tmp_path / "w.safetensors")
    assert state.saved_with == {"cfg": {"r": 2}, "word": "text"}
    assert state.configs == {"model_config.json": {"hra": {"r": 2}}}


def test_read_state_prefers_the_known_name_in_a_directory(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    torch.save({}, tmp_path / "optimizer.bin")
    assert read_state(tmp_path).path.name == "adapter_model.safetensors"


def test_read_state_asks_which_of_several_files(tmp_path: Path) -> None:
    for step in (100, 200):
        torch.save(TENSORS, tmp_path / f"pytorch.model-{step:06}.bin")
    with pytest.raises(ConversionError, match="holds 2 weight files") as caught:
        read_state(tmp_path, allow_pickle=True)
    assert caught.value.findings == ("pytorch.model-000100.bin", "pytorch.model-000200.bin")


def save_list(path: Path) -> None:
    torch.save([1, 2], path)


def save_values(path: Path) -> None:
    torch.save({"m.hra_u": [1.0], 7: torch.ones(2)}, path)


def save_sparse(path: Path) -> None:
    torch.save({"m.hra_u": torch.eye(3).to_sparse()}, path)


def save_noise(path: Path) -> None:
    path.write_bytes(os.urandom(64))


def save_pickle_of_a_string(path: Path) -> None:
    path.write_bytes(pickle.dumps("text"))


def cut_short(path: Path) -> None:
    torch.save({"m": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])


DAMAGED = [save_list, save_values, save_sparse, save_noise, save_pickle_of_a_string, cut_short]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch, as it rebuilds a sparse tensor
@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage.__name__)
def test_read_state_refuses_what_is_no_state_dict(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(tmp_path / "w.pt")
    with pytest.raises((ConversionError, FormatError)) as caught:
        read_state(tmp_path / "w.pt", allow_pickle=True)
    assert caught.value.exit_code == 4


def test_read_state_names_every_entry_that_is_no_tensor(tmp_path: Path) -> None:
    save_values(tmp_path / "w.pt")
    with pytest.raises(FormatError, match="2 entries are no tensors"):
        read_state(tmp_path / "w.pt", allow_pickle=True)


def missing(folder: Path) -> Path:
    return folder / "missing.pt"


def empty_directory(folder: Path) -> Path:
    return folder


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "w.pt")
    return folder / "w.pt"


@pytest.mark.parametrize("place", [missing, empty_directory, fifo], ids=lambda place: place.__name__)
def test_read_state_refuses_a_place_without_weights(place: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(HraExportError) as caught:
        read_state(place(tmp_path), allow_pickle=True)
    assert caught.value.exit_code == 4


def test_read_state_tells_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TENSORS, tmp_path / "w.pt")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(OutputError, match="cannot read"):
        read_state(tmp_path / "w.pt", allow_pickle=True)
