"""Publish a trained adapter: from the files of a checkpoint, checked, whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w
import torch

from hra_export import __version__, publish
from hra_export.adapter import HraAdapter, read_adapter
from hra_export.errors import AdapterError, NumericalError
from hra_export.peft_directory import CONFIG_NAME, WEIGHTS_NAME
from hra_export.publish import MANIFEST_NAME
from hra_export.training.card import adapter_card
from hra_export.training.checkpoints import RECORD_NAME, RunDirectory
from hra_export.training.records import history_csv, history_rows, loss_png
from hra_export.training.settings import Settings

SETTINGS_NAME, HISTORY_NAME, PICTURE_NAME = "train_config.toml", "history.csv", "loss.png"
TRACKER_FOLDER = "runs"  # where TensorBoard writes, unless it is told where
STATE_NAME = "trainer_state.json"
PACKAGES = ("torch", "transformers", "peft", "trl")
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        digest: SHA-256 of the adapter's configuration and weights, as read back.
        chains: how many there are.
        step: after which it was taken.
        steps: taken in all.
        figures: held-out figures of that step; empty without held-out rows.
        final_loss: the last training loss that was logged.
    """

    digest: str
    chains: int
    step: int
    steps: int
    figures: Mapping[str, float]
    final_loss: float | None


def versions() -> dict[str, str]:
    """Of the packages that decide the last digits."""
    return {name: metadata.version(name) for name in PACKAGES}


def publish_adapter(
    directory: RunDirectory, settings: Settings, record: Mapping[str, Any], tokenizer: Any, *, targets: tuple[str, ...]
) -> Published:
    """Publish the best checkpoint of a finished run at its output: the adapter, its tokenizer, and the run's records.

    Args:
        directory: of the run; its last checkpoint holds the history.
        settings: resolved.
        record: what `run.json` says.
        tokenizer: to be saved beside the adapter.
        targets: module paths that must carry a chain.

    Raises:
        AdapterError: a tensor is empty, or targets are missing.
        NumericalError: a tensor is not finite.
        OutputError: the file system said no.
    """
    last = directory.last()
    assert last is not None  # a run is finished when its last checkpoint is whole
    state = json.loads((last.path / STATE_NAME).read_bytes())
    step = state["best_global_step"] or last.step
    chosen = directory.at(step)
    rows = history_rows(state["log_history"])
    figures = {
        key: value
        for row in rows
        for key, value in row.items()
        if row["step"] == step and key.startswith("eval_") and key != "eval_entropy"
    }
    facts = {**record["facts"], "base": record["base"], "steps": last.step, "step": step}
    texts = {
        SETTINGS_NAME: settings_toml(settings),
        HISTORY_NAME: history_csv(rows),
        CONFIG_NAME: _stable_config(chosen / CONFIG_NAME),
        "README.md": adapter_card(settings, facts, figures),
    }
    files = {name: text.encode() for name, text in texts.items()}
    files[PICTURE_NAME] = loss_png(rows, title=settings.output.name, best_step=step if figures else None)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files |= {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    run = hashlib.sha256((directory.path / RECORD_NAME).read_bytes()).hexdigest()
    size_bytes = sum(map(len, files.values())) + (chosen / WEIGHTS_NAME).stat().st_size
    with publish.stage(
        directory.output, key=f"{run} {step}", size_bytes=size_bytes, overwrite=settings.overwrite
    ) as stage:
        if not stage.is_finished(WEIGHTS_NAME):
            stage.copy(chosen / WEIGHTS_NAME, WEIGHTS_NAME)
        for name, data in sorted(files.items()):
            if not stage.is_finished(name):
                stage.write_bytes(name, data)
        for path in sorted((directory.path / TRACKER_FOLDER).rglob("*")):
            if path.is_file():
                stage.copy(path, path.relative_to(directory.path).as_posix())
        adapter = read_adapter(stage.directory)
        _check(adapter, targets)
        stage.publish(MANIFEST_NAME, _manifest(settings, record, facts, figures, adapter, run))
    final_loss = next((row["loss"] for row in reversed(rows) if "loss" in row), None)
    return Published(adapter.digest, len(adapter.chains), step, last.step, figures, final_loss)


def settings_toml(settings: Settings) -> str:
    """What `--config` reads back."""
    return tomli_w.dumps(settings.to_mapping())


def is_published(directory: RunDirectory) -> bool:
    """Whether the output already holds what this run made: it was killed after publishing, before cleaning up."""
    try:
        manifest = json.loads((directory.output / MANIFEST_NAME).read_bytes())
        run = hashlib.sha256((directory.path / RECORD_NAME).read_bytes()).hexdigest()
        return bool(manifest.get("run") == run)
    except (OSError, ValueError, AttributeError):
        return False


def _check(adapter: HraAdapter, targets: tuple[str, ...]) -> None:
    """Refuse an adapter with holes; `read_adapter` has looked at the chains it found."""
    missing = [f"{target}: no chain" for target in targets if target not in adapter.chains]
    empty = [f"{name}: empty" for name, value in adapter.parameters.items() if value.numel() == 0]
    if missing or empty:
        raise AdapterError("the trained adapter is not whole", findings=[*missing, *empty])
    if wild := [name for name, value in adapter.parameters.items() if not torch.isfinite(value).all()]:
        raise NumericalError("the trained adapter is not finite", findings=wild)


def _stable_config(path: Path) -> str:
    """PEFT's configuration with its sets in order: PEFT writes them as they come, another way each time."""
    config = json.loads(path.read_bytes())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    if config.get("modules_to_save"):
        config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _manifest(
    settings: Settings,
    record: Mapping[str, Any],
    facts: Mapping[str, Any],
    figures: Mapping[str, float],
    adapter: HraAdapter,
    run: str,
) -> bytes:
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "hra-export", "version": __version__, **record["versions"]},
        "kind": "adapter",
        "base": record["base"],
        "rows": record["rows"],
        "adapter": {
            "digest": adapter.digest,
            "rank": adapter.rank,
            "apply_GS": adapter.orthogonalize,
            "targets": len(adapter.chains),
            "parameters": len(adapter.parameters),
        },
        "training": {
            "task": settings.task,
            "step": facts["step"],
            "steps": facts["steps"],
            "trainable_parameters": facts["trainable_parameters"],
            "processes": record["processes"],
            "figures": figures,
        },
        "run": run,
    }
    return (json.dumps(manifest, indent=2, ensure_ascii=True) + "\n").encode()
