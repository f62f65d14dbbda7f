"""Kill a merge at every system call it makes, and look at what it leaves. `test_interruption.py` runs this.

    python merge_campaign.py fresh|overwrite FOLDER

For n = 1, 2, … a forked child dies by SIGKILL at its n-th call, until one lives. After each death the output is absent,
the old one, or complete; the same merge started again keeps the shards that were finished, ends with the bytes of a
merge that was never interrupted, and leaves nothing beside.

torch survives a fork only in a process that has not worked with it: this one imports it, and every merge is a child's.
"""

import gc
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import huggingface_hub.repocard
import yaml

from hra_export.adapter import read_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.errors import OutputError
from hra_export.merge import merge_checkpoint
from hra_export.places import Places, valid_record
from hra_export.planning import plan_merge
from tests.killing import lives
from tests.synthetic import (
    names_beside,
    random_chains,
    random_tensor,
    read_tree,
    write_adapter_files,
    write_base,
)

SHARDS = 3
# One chain in each shard, so that taking a shard up again needs what was measured while it was written.
TARGETS = {"q_proj": 32, "gate_proj": 40, "down_proj": 48}
LOADED_BEFORE_FORKING = (huggingface_hub.repocard, yaml)  # the model card's; a fork should not pay for them each time


def prepare(folder: Path) -> None:
    """Write the base in three shards, with a tokenizer; the adapter; and an adapter for the earlier merge."""
    tensors = {f"{module}.weight": random_tensor(24, d, dtype="BF16", seed=d) for module, d in TARGETS.items()}
    norms = {f"norm.{i}.weight": random_tensor(32, dtype="BF16", seed=i) for i in range(SHARDS)}
    pairs = zip(tensors.items(), norms.items(), strict=True)  # so that each shard has a tensor to fold and one to copy
    write_base(folder / "base", dict(item for pair in pairs for item in pair), shards=SHARDS, config={})
    (folder / "base" / "tokenizer.json").write_bytes(b"t" * 5000)
    saved = {"base_model.model.norm.1.weight": random_tensor(32, seed=9)}
    write_adapter_files(folder / "adapter", {**random_chains(TARGETS), **saved}, modules_to_save=["norm.1"])
    write_adapter_files(folder / "earlier", random_chains(TARGETS, seed=200))


def merge(folder: Path, output: Path, *, adapter: str = "adapter", overwrite: bool = False) -> None:
    """Merge as the command line does; an output that is complete already may be refused."""
    plan = plan_merge(open_checkpoint(folder / "base"), [read_adapter(folder / adapter)])
    try:
        merge_checkpoint(plan, output, overwrite=overwrite, workers=2)
    except OutputError:
        if overwrite or read_tree(output) != read_tree(folder / "uninterrupted"):
            raise


def finished_shards(output: Path) -> dict[str, tuple[int, int]]:
    """The shards that the next run may take up: name → inode and time of last change."""
    places = Places.of(output)
    record = valid_record(places)
    names = [name for name in record.files if name.endswith(".safetensors")] if record is not None else []
    return {name: _identity(places.stage / name) for name in names}


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def campaign(mode: str, root: Path) -> dict[str, int]:
    """Run one campaign; returns how many points it had, and at how many of them a shard was taken up again."""
    overwrite = mode == "overwrite"
    prepare(root)
    assert lives(partial(merge, root, root / "uninterrupted"))
    new = read_tree(root / "uninterrupted")
    old = None
    if overwrite:
        assert lives(partial(merge, root, root / "old", adapter="earlier"))
        old = read_tree(root / "old")
        assert old != new
    points, resumed, lived = 0, 0, False
    while not lived:
        points += 1
        output = root / str(points) / "out"
        output.parent.mkdir()
        if overwrite:
            shutil.copytree(root / "old", output)
        run = partial(merge, root, output, overwrite=overwrite)
        lived = lives(run, point=points)
        assert read_tree(output) in (old, new), f"point {points}: neither old nor complete"
        kept = finished_shards(output)
        assert lives(run), f"point {points}: the rerun was killed"
        assert read_tree(output) == new, f"point {points}: not the bytes of an uninterrupted merge"
        assert names_beside(output) == [], f"point {points}"
        for name, identity in kept.items():
            assert _identity(output / name) == identity, f"point {points}: {name} was written again"
        resumed += bool(kept)
    return {"points": points - 1, "resumed": resumed}


if __name__ == "__main__":
    gc.freeze()  # a collection in a child would touch, and so copy, every object that the imports made
    sys.stdout.write(json.dumps(campaign(sys.argv[1], Path(sys.argv[2]))) + "\n")
