"""Inputs that `hra-export onnx` must refuse: exit code, what the message names, and nothing written.

Most damages are done to a graph that is the base, for that takes no tracing; a few to a checkpoint.
"""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hra_export import filesystem
from hra_export.graph.document import save_graph
from tests import graph_text
from tests.command_line import run
from tests.refusals import Case, Refusals
from tests.synthetic import (
    RANK,
    linear_modules,
    llama_config,
    random_chains,
    stored,
    toy_tensors,
    write_adapter_files,
    write_base,
)

D = 8
Q_PROJ = "layers.0.q_proj"
V_PROJ = "layers.0.v_proj"
PREFIX = "base_model.model."
BODY = """
g (float[b, t, 8] x) => (float[b, t, 8] y) {
    q = MatMul(x, q_weight)
    v = MatMul(x, v_weight)
    y = Add(q, v)
}
"""


@dataclass(frozen=True)
class Scene:
    """A folder with the graph `base/model.onnx`, a good `adapter`, and the `output` still to be made."""

    folder: Path

    @property
    def graph(self) -> Path:
        return self.folder / "base" / "model.onnx"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def put_adapter(self, chains: dict[str, Any], *, rank: int = 2, **config: Any) -> None:
        shutil.rmtree(self.adapter, ignore_errors=True)
        tensors = {f"{PREFIX}{path}.hra_u": stored(u) for path, u in chains.items()}
        write_adapter_files(self.adapter, tensors, rank=rank, **config)

    def put_graph(self, model: ir.Model) -> None:
        shutil.rmtree(self.graph.parent, ignore_errors=True)
        self.graph.parent.mkdir()
        save_graph(model, self.graph.parent)

    def rewrite(self, model: onnx.ModelProto) -> None:
        self.graph.write_bytes(model.SerializeToString())

    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.graph, load_external_data=False)

    def snapshot(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


def toy_graph() -> ir.Model:
    """Two products that share an input, and a table that nobody reads and that lies outside the file."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(D, D)).astype(np.float32) for name in ("q_weight", "v_weight")}
    model = graph_text.graph(BODY, weights)
    for name, module in (("q_weight", Q_PROJ), ("v_weight", V_PROJ)):
        model.graph.initializers[name].name = f"{module}.weight"
    large = ir.tensor(random.normal(size=(64, 64)).astype(np.float32), name="table")
    table = ir.Value(name="table", type=ir.TensorType(large.dtype), shape=ir.Shape((64, 64)), const_value=large)
    model.graph.register_initializer(table)
    return model


def vectors(d: int = D, r: int = 2, *, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(d, r))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    made = Scene(tmp_path)
    made.put_graph(toy_graph())
    made.put_adapter({Q_PROJ: vectors(), V_PROJ: vectors(seed=2)})
    return made


refused: Refusals[Scene] = Refusals()


@refused(4, "model.onnx", "not an ONNX file")
def a_graph_that_is_none(scene: Scene) -> None:
    scene.graph.write_bytes(b"PK\x03\x04 this is a zip file")


@refused(4, "model.onnx")
def a_graph_that_is_cut_short(scene: Scene) -> None:
    scene.graph.write_bytes(scene.graph.read_bytes()[:100])


@refused(4, "no nodes")
def an_empty_graph(scene: Scene) -> None:
    scene.graph.write_bytes(b"")


@refused(4, "opset", "got 12")
def an_opset_that_is_too_old(scene: Scene) -> None:
    model = scene.proto()
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = 12
    scene.rewrite(model)


@refused(4, "IR version", "got 99")
def an_ir_version_from_the_future(scene: Scene) -> None:
    model = scene.proto()
    model.ir_version = 99
    scene.rewrite(model)


@refused(4, "table", "../secret")
def external_data_outside_the_directory(scene: Scene) -> None:
    (scene.folder / "secret").write_bytes(bytes(64 * 64 * 4))
    relocate(scene, "../secret")


@refused(4, "table", "/etc/hostname")
def external_data_by_an_absolute_path(scene: Scene) -> None:
    relocate(scene, "/etc/hostname")


@refused(4, "table")
def external_data_through_a_link_that_leads_outside(scene: Scene) -> None:
    (scene.folder / "secret").write_bytes(bytes(64 * 64 * 4))
    (scene.graph.parent / "link").symlink_to(scene.folder / "secret")
    relocate(scene, "link")


@refused(4, "model.onnx.data")
def external_data_that_is_missing(scene: Scene) -> None:
    (scene.graph.parent / "model.onnx.data").unlink()


@refused(4, "table")
def external_data_that_is_cut_short(scene: Scene) -> None:
    data = scene.graph.parent / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])


def relocate(scene: Scene, location: str) -> None:
    """Let the weights that lie outside of the file lie elsewhere."""
    model = scene.proto()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            if entry.key == "offset":
                entry.value = "0"
    scene.rewrite(model)


@refused(4, "layers.0.k_proj", "layers.7.q_proj")
def targets_that_the_graph_has_not(scene: Scene) -> None:
    scene.put_adapter({Q_PROJ: vectors(), "layers.0.k_proj": vectors(), "layers.7.q_proj": vectors()})


@refused(4, Q_PROJ, "12")
def a_chain_of_another_width(scene: Scene) -> None:
    scene.put_adapter({Q_PROJ: vectors(12)})


@refused(4, Q_PROJ)
def a_target_that_two_weights_are_called_like(scene: Scene) -> None:
    model = toy_graph()
    model.graph.initializers[f"{V_PROJ}.weight"].name = f"other.{Q_PROJ}.weight"
    model.graph.initializers[f"{Q_PROJ}.weight"].name = f"model.{Q_PROJ}.weight"
    scene.put_graph(model)
    scene.put_adapter({Q_PROJ: vectors()})


@refused(4, Q_PROJ, "reflect")
def a_graph_that_has_reflections_already(scene: Scene) -> list[str | Path]:
    first = scene.folder / "first"
    assert run("onnx", scene.adapter, "--base", scene.graph, "-o", first, "--mode", "reflect").code == 0
    return ["--base", first / "model.onnx"]


@refused(8, "merge")
def folding_into_a_graph(scene: Scene) -> list[str | Path]:
    return ["--mode", "merged"]


@refused(4, "2 graphs")
def a_directory_with_several_graphs(scene: Scene) -> list[str | Path]:
    shutil.copy(scene.graph, scene.graph.with_name("other.onnx"))
    return ["--base", scene.graph.parent]


@refused(4, "nowhere.onnx")
def a_graph_that_does_not_exist(scene: Scene) -> list[str | Path]:
    return ["--base", scene.folder / "nowhere.onnx"]


@refused(5, Q_PROJ, "vector 1")
def a_vector_without_direction(scene: Scene) -> None:
    u = vectors()
    u[:, 1] = 0
    scene.put_adapter({Q_PROJ: u})


@refused(5, "float16")
def weights_that_half_precision_cannot_hold(scene: Scene) -> list[str | Path]:
    model = toy_graph()
    weight = model.graph.initializers[f"{Q_PROJ}.weight"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1e6, name=weight.name)
    scene.put_graph(model)
    return ["--precision", "fp16"]


@refused(6, "exists")
def an_output_that_exists(scene: Scene) -> None:
    scene.output.mkdir()
    (scene.output / "precious.txt").write_text("mine")


@refused(6, "not overwritten")
def an_output_that_is_somebody_s_even_with_overwrite(scene: Scene) -> list[str | Path]:
    scene.output.mkdir()
    (scene.output / "precious.txt").write_text("mine")
    return ["--overwrite"]


@refused(6, "base")
def an_output_inside_the_base(scene: Scene) -> list[str | Path]:
    return ["--output", scene.graph.parent]


@refused(8, "no ONNX graph is known for `mixtral`")
def an_architecture_that_no_graph_is_known_for(scene: Scene) -> list[str | Path]:
    return ["--base", checkpoint(scene, "mixtral"), "--mode", "merged"]


@refused(8, "quantized")
def a_quantized_checkpoint(scene: Scene) -> list[str | Path]:
    base = checkpoint(scene, "llama", quantization_config={"quant_method": "gptq", "bits": 4})
    return ["--base", base, "--mode", "merged"]


def checkpoint(scene: Scene, kind: str, **config: object) -> Path:
    """A llama in safetensors and an adapter for it; `kind` and `config` go into its configuration."""
    shutil.rmtree(scene.adapter)
    write_adapter_files(scene.adapter, random_chains(linear_modules()), rank=RANK)
    if kind == "mixtral":
        return mixtral(scene)
    return write_base(scene.folder / "llama", toy_tensors(), config={**llama_config(), "model_type": kind, **config})


def mixtral(scene: Scene) -> Path:
    from tests.tiny_models import build

    model = build("mixtral")
    model.save_pretrained(scene.folder / "mixtral")
    path = "model.layers.0.self_attn.q_proj"
    scene.put_adapter({path: vectors(32)})
    return scene.folder / "mixtral"


@pytest.mark.parametrize("case", refused.cases, ids=lambda case: case.damage.__name__)
def test_onnx_refuses(scene: Scene, case: Case[Scene]) -> None:
    more = case.damage(scene) or []
    before = scene.snapshot()
    named = [str(each) for each in more]
    arguments: list[str | Path] = ["onnx", scene.adapter, *more]
    if "--base" not in named:
        arguments += ["--base", scene.graph]
    if "--output" not in named:
        arguments += ["--output", scene.output]
    if "--mode" not in named:
        arguments += ["--mode", "reflect"]
    outcome = run(*arguments)
    assert outcome.code == case.code, outcome.stdout + outcome.stderr
    assert not [word for word in case.says if word not in outcome.stderr], outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert scene.snapshot() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_nothing_behind(scene: Scene, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scene.snapshot()
    write_all = filesystem.write_all

    def fail(fd: int, data: Any, offset: int) -> None:
        if len(data) > 1000:
            raise OSError(code, os.strerror(code))
        write_all(fd, data, offset)

    monkeypatch.setattr(filesystem, "write_all", fail)
    outcome = run("onnx", scene.adapter, "--base", scene.graph, "-o", scene.output, "--mode", "reflect")
    assert outcome.code == 6, outcome.stderr
    assert os.strerror(code) in outcome.stderr or "space" in outcome.stderr
    assert scene.snapshot() == before


def test_a_disk_that_is_too_small_is_seen_before_the_first_byte(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scene.snapshot()
    real = os.statvfs(scene.folder)
    small = os.statvfs_result([*real[:4], 1, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    outcome = run("onnx", scene.adapter, "--base", scene.graph, "-o", scene.output, "--mode", "reflect")
    assert outcome.code == 6
    assert "not enough space" in outcome.stderr
    assert scene.snapshot() == before


def test_an_error_is_one_json_object_too(scene: Scene) -> None:
    targets_that_the_graph_has_not(scene)
    outcome = run("onnx", scene.adapter, "--base", scene.graph, "-o", scene.output, "--mode", "reflect", "--json")
    error = json.loads(outcome.stdout)["error"]
    assert error["exit_code"] == outcome.code == 4
    assert len(error["findings"]) == 2


def test_an_earlier_output_is_replaced_with_overwrite(scene: Scene) -> None:
    command: list[str | Path] = ["onnx", scene.adapter, "--base", scene.graph, "-o", scene.output, "--mode", "reflect"]
    assert run(*command).code == 0
    first = (scene.output / "model.onnx").read_bytes()
    scene.put_adapter({Q_PROJ: vectors(seed=5)})
    assert run(*command).code == 6
    assert run(*command, "--overwrite").code == 0
    assert (scene.output / "model.onnx").read_bytes() != first
