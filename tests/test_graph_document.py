"""ONNX files: what is written can be read anywhere, and what cannot be trusted is not read."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hra_export.adapter import HraAdapter
from hra_export.errors import GraphError, OutputError
from hra_export.graph import document, operator, provenance
from hra_export.graph.document import CACHE_LINE, EXTERNAL_FROM_BYTES, PAGE, open_graph, save_graph, size_bytes
from hra_export.graph.sites import sites_of
from hra_export.graph.soundness import check_graph
from hra_export.publish import MANIFEST_NAME, stage

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
agraph (float[n, 32] x) => (float[n, 24] y) {
    h = MatMul (x, weight)
    b = Add (h, bias)
    y = Mul (b, scale)
}
"""
MIB = 2**20
# Python, torch and onnx; what a streamed write may hold above that is one tensor.
IDLE_BYTES = 700 * MIB


def a_model(text: str = TEXT, **tensors: np.ndarray) -> ir.Model:
    """A model of the text, with initializers."""
    weights = {
        "weight": np.arange(32 * 24, dtype=np.float32).reshape(32, 24),
        "bias": np.ones(24, np.float32),
        "scale": np.full(1, 2, np.float32),
    }
    return with_initializers(ir.serde.deserialize_model(onnx.parser.parse_model(text)), {**weights, **tensors})


def with_initializers(model: ir.Model, tensors: dict[str, np.ndarray]) -> ir.Model:
    """The model, whose values of these names have become initializers."""
    values = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, array in tensors.items():
        if name in values:
            values[name].const_value = ir.Tensor(array, name=name)
            values[name].type, values[name].shape = (
                ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                ir.Shape(array.shape),
            )
            model.graph.register_initializer(values[name])
    return model


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def test_save_graph_writes_what_open_graph_reads(tmp_path: Path) -> None:
    model = a_model()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert save_graph(model, tmp_path, "encoder") == ("encoder.onnx", "encoder.onnx.data")
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before
    check_graph(tmp_path / "encoder.onnx")
    opened = open_graph(tmp_path / "encoder.onnx")
    kinds = {name: type(value.const_value) for name, value in opened.graph.initializers.items()}
    assert (kinds["weight"] is ir.ExternalTensor, kinds["bias"] is ir.ExternalTensor) == (True, False)
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(arrays(opened)[name], array)


def test_save_graph_writes_one_file_where_no_tensor_is_large(tmp_path: Path) -> None:
    model = a_model(weight=np.ones((2, 2), np.float32))
    assert save_graph(model, tmp_path) == ("model.onnx",)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_save_graph_writes_the_same_bytes_for_the_same_model(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        model = a_model()
        provenance.declare_versions_(model)
        save_graph(model, tmp_path / folder)
    (tmp_path / "c").mkdir()
    save_graph(open_graph(tmp_path / "a" / "model.onnx"), tmp_path / "c")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("a", "b", "c")]
    assert contents[0] == contents[1]
    assert contents[0]["model.onnx.data"] == contents[2]["model.onnx.data"]


def test_save_graph_aligns_offsets_and_writes_shared_tensors_once(tmp_path: Path) -> None:
    shared = ir.Tensor(np.arange(300, dtype=np.float32), name="one")
    text = "agraph (float[n] x) => (float[n] y) {a = Add(x, one) b = Add(a, two) c = Add(b, three) y = Add(c, four)}"
    model = a_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    tensors = {"one": shared.numpy(), "two": shared.numpy(), "three": np.ones(301, np.float32)}
    with_initializers(model, {**tensors, "four": np.ones(MIB // 4, np.float32)})
    model.graph.initializers["one"].const_value = model.graph.initializers["two"].const_value = shared
    save_graph(model, tmp_path)
    opened = open_graph(tmp_path / "model.onnx")
    places = {name: value.const_value.offset for name, value in opened.graph.initializers.items()}
    assert places == {"one": 0, "two": 0, "three": 1216, "four": PAGE}  # 1216: 1200 on a line of 64
    assert 1216 % CACHE_LINE == 0
    assert (tmp_path / "model.onnx.data").stat().st_size == PAGE + MIB
    (tmp_path / "again").mkdir()
    save_graph(opened, tmp_path / "again")
    again = open_graph(tmp_path / "again" / "model.onnx")
    assert {name: value.const_value.offset for name, value in again.graph.initializers.items()} == places


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.BFLOAT16, ir.DataType.FLOAT16])
def test_save_graph_keeps_narrow_types(tmp_path: Path, dtype: ir.DataType) -> None:
    array = np.arange(EXTERNAL_FROM_BYTES * 4).astype(dtype.numpy())
    model = ir.serde.deserialize_model(
        onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> g () => (float[n] y) {y = Cast <to=1> (w)}')
    )
    with_initializers(model, {"w": array})
    save_graph(model, tmp_path)
    np.testing.assert_array_equal(arrays(open_graph(tmp_path / "model.onnx"))["w"], array)


def test_save_graph_reaches_the_weights_of_subgraphs(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[512] x) => (float[512] y) {
        y = If (c) <
            then_branch = a () => (float[512] p) {p = Add(x, inner)},
            else_branch = b () => (float[512] q) {q = Neg(x)}
        >
    }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    (branch,) = (graph for graph in model.graphs() if graph.name == "a")
    value = next(value for node in branch for value in node.inputs if value is not None and value.name == "inner")
    value.const_value = ir.Tensor(np.arange(512, dtype=np.float32), name="inner")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([512])
    branch.register_initializer(value)
    assert save_graph(model, tmp_path) == ("model.onnx", "model.onnx.data")
    opened = open_graph(tmp_path / "model.onnx")
    (branch,) = (graph for graph in opened.graphs() if graph.name == "a")
    tensor = branch.initializers["inner"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), np.arange(512))


def test_open_graph_brings_external_attributes_into_memory(tmp_path: Path) -> None:
    """onnx's own saving can put them outside; in another folder they would be lost."""
    tensor = onnx.numpy_helper.from_array(np.arange(400, dtype=np.float32), "k")
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_tensor_value_info("y", 1, [400])])
    proto = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, convert_attribute=True, size_threshold=0)
    assert len(list(tmp_path.iterdir())) == 2
    model = open_graph(tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    save_graph(model, tmp_path / "out")
    (kept,) = open_graph(tmp_path / "out" / "model.onnx").graph
    np.testing.assert_array_equal(kept.attributes["value"].value.numpy(), np.arange(400))


def test_save_graph_into_a_stage_appears_whole(tmp_path: Path) -> None:
    model, output = a_model(), tmp_path / "out"
    with stage(output, key="k", size_bytes=size_bytes(model)) as work:
        names = save_graph(model, work, "text/model")
        assert not output.exists()
        work.publish(MANIFEST_NAME, b"{}")
    assert names == ("text/model.onnx", "text/model.onnx.data")
    assert sum((output / name).stat().st_size for name in names) == size_bytes(model)
    np.testing.assert_array_equal(arrays(open_graph(output / names[0]))["weight"], arrays(model)["weight"])


def test_save_graph_replaces_no_file(tmp_path: Path) -> None:
    save_graph(a_model(), tmp_path)
    with pytest.raises(OutputError, match="exists"):
        save_graph(a_model(), tmp_path)


def test_save_graph_leaves_no_file_when_a_tensor_fails(tmp_path: Path) -> None:
    def fail() -> ir.TensorProtocol:
        raise ZeroDivisionError

    model = a_model()
    lazy = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([32, 24]), name="weight")
    model.graph.initializers["weight"].const_value = lazy
    with pytest.raises(ZeroDivisionError):
        save_graph(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_save_graph_refuses_a_graph_beyond_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge:
        def SerializeToString(self, *, deterministic: bool) -> bytes:  # noqa: N802  protobuf's name
            raise ValueError("exceeds the limit of 2GB")

    monkeypatch.setattr(ir.serde, "serialize_model", lambda model: Huge())
    with pytest.raises(GraphError, match="2 GiB"):
        save_graph(a_model(), tmp_path)
    assert list(tmp_path.iterdir()) == []


STREAMED = """
import resource, sys
from pathlib import Path
import numpy as np, onnx_ir as ir
from hra_export.graph.document import open_graph, save_graph, size_bytes

COUNT, FLOATS = {count}, 24 * 2**20
values = []
for i in range(COUNT):
    make = lambda i=i: ir.Tensor(np.full(FLOATS, i, np.float32), name=f"w{{i}}")
    tensor = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape([FLOATS]), name=f"w{{i}}")
    value = ir.Value(name=f"w{{i}}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([FLOATS]))
    value.const_value = tensor
    values.append(value)
total = ir.node("Sum", values)
total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = "y", values[0].type, values[0].shape
graph = ir.Graph([], total.outputs, nodes=[total], initializers=values, opset_imports={{"": 20}}, name="g")
folder = Path(sys.argv[1])
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_graph(ir.Model(graph, ir_version=10), folder)
opened = open_graph(folder / "model.onnx")
(folder / "again").mkdir()
save_graph(opened, folder / "again")
print(idle * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
last = opened.graph.initializers[f"w{{COUNT - 1}}"].const_value.numpy()
assert last[0] == last[-1] == COUNT - 1
"""


def streamed(folder: Path, count: int) -> int:
    """Bytes above the idle process while `count` tensors of 96 MiB are written, and once more from their file."""
    script = STREAMED.format(count=count)
    environment = {**os.environ, "PYTHONPATH": str(Path(document.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, folder], check=True, capture_output=True, text=True, env=environment
    )
    idle, peak = map(int, done.stdout.split())
    return peak - idle


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_save_graph_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """The tensor itself, and its bytes."""
    assert streamed(tmp_path, 4) < 2.5 * 96 * MIB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_save_graph_writes_more_than_2_gb_in_the_memory_of_one_tensor(tmp_path: Path) -> None:
    assert streamed(tmp_path, 24) < 2.5 * 96 * MIB
    size = sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file())
    assert size > 2.2e9
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


Breaker = Callable[[Path], object]


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def set_external(path: Path, key: str, value: str) -> None:
    def change(proto: onnx.ModelProto) -> None:
        (tensor,) = (t for t in proto.graph.initializer if t.name == "weight")
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    edit(path, change)


def add_tensor(proto: onnx.ModelProto, **fields: object) -> None:
    tensor = onnx.TensorProto(name="odd", dims=[2], data_type=1, raw_data=b"12345678")
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(tensor, name)[:]
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    proto.graph.initializer.append(tensor)


def symlink_out(path: Path) -> None:
    data = path.with_name("model.onnx.data")
    outside = path.parent.parent / "outside.data"
    data.rename(outside)
    data.symlink_to(outside)


def hard_link(path: Path) -> None:
    os.link(path.with_name("model.onnx.data"), path.parent.parent / "other.data")


def fifo(path: Path) -> None:
    path.with_name("model.onnx.data").unlink()
    os.mkfifo(path.with_name("model.onnx.data"))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def not_text(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"weight", b"w\xffight"))


def wrong_attribute(path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "Gemm"
        proto.graph.node[0].attribute.append(onnx.helper.make_attribute("alpha", "much"))

    edit(path, change)


def opset(path: Path, version: int) -> None:
    edit(path, lambda proto: setattr(proto.opset_import[0], "version", version))


def shorten_data(path: Path) -> None:
    os.truncate(path.with_name("model.onnx.data"), 3000)


BROKEN: dict[str, tuple[Breaker, str]] = {
    "missing": (Path.unlink, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "no nodes"),
    "text": (lambda path: path.write_bytes(b"<html>404</html>"), "not an ONNX file|no nodes"),
    "truncated": (lambda path: os.truncate(path, 90), "damaged"),
    "folder": (folder_instead, "not a regular file"),
    "opset too old": (lambda path: opset(path, 16), "expected 17 to 26, got 16"),
    "opset too new": (lambda path: opset(path, 27), "expected 17 to 26, got 27"),
    "no opset": (lambda path: edit(path, lambda p: p.ClearField("opset_import")), "which version"),
    "IR too new": (lambda path: edit(path, lambda p: setattr(p, "ir_version", 14)), "expected 3 to 13, got 14"),
    "data missing": (lambda path: path.with_name("model.onnx.data").unlink(), "`weight`.*is missing"),
    "data too short": (shorten_data, "ends at byte 3072 of `model.onnx.data`, which has 3000"),
    "data is a FIFO": (fifo, "not a regular file"),
    "location above": (lambda path: set_external(path, "location", "../secret"), "outside the model's folder"),
    "location absolute": (lambda path: set_external(path, "location", "/etc/passwd"), "outside the model's folder"),
    "location empty": (lambda path: set_external(path, "location", ""), "expected a location"),
    "location with NUL": (lambda path: set_external(path, "location", "a\0b"), "cannot be read"),
    "location is the folder": (lambda path: set_external(path, "location", "."), "not a regular file"),
    "link out": (symlink_out, "link to a place outside"),
    "hard link": (hard_link, "more than one hard link"),
    "offset beyond": (lambda path: set_external(path, "offset", "64"), "ends at byte 3136"),
    "offset negative": (lambda path: set_external(path, "offset", "-1"), "expected a location, an offset"),
    "length wrong": (lambda path: set_external(path, "length", "3071"), "expected 3072 bytes of external data"),
    "bytes missing": (lambda path: edit(path, lambda p: add_tensor(p, dims=[3])), "expected 12 bytes, got 8"),
    "negative size": (lambda path: edit(path, lambda p: add_tensor(p, dims=[-2])), "negative size"),
    "unknown type": (lambda path: edit(path, lambda p: add_tensor(p, data_type=99)), "unknown data type 99"),
    "input from nowhere": (lambda path: edit(path, lambda p: p.graph.node[1].input.append("gone")), "gone|inputs"),
    "nodes out of order": (lambda path: edit(path, lambda p: p.graph.node.append(p.graph.node.pop(0))), "topological"),
    "name that is no text": (not_text, "damaged"),
    "attribute of another type": (wrong_attribute, "alpha"),
    "name twice": (lambda path: edit(path, lambda p: add_tensor(p, name="bias", dims=[2])), "`bias` is there 2 times"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_open_graph_refuses(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_graph(a_model(), folder)
    open_graph(folder / "model.onnx")
    damage, message = BROKEN[name]
    damage(folder / "model.onnx")
    with pytest.raises(GraphError) as caught:
        open_graph(folder / "model.onnx")
    said = "\n".join([caught.value.message, *caught.value.findings])
    assert re.search(message, said), said


def test_open_graph_names_everything_that_is_wrong(tmp_path: Path) -> None:
    save_graph(a_model(), tmp_path)
    path = tmp_path / "model.onnx"
    opset(path, 12)
    shorten_data(path)
    edit(path, lambda proto: add_tensor(proto, dims=[-1]))
    with pytest.raises(GraphError) as caught:
        open_graph(path)
    assert len(caught.value.findings) == 3


def test_open_graph_follows_links_within_the_folder(tmp_path: Path) -> None:
    save_graph(a_model(), tmp_path)
    (tmp_path / "model.onnx.data").rename(tmp_path / "real.data")
    (tmp_path / "model.onnx.data").symlink_to("real.data")
    np.testing.assert_array_equal(arrays(open_graph(tmp_path / "model.onnx"))["weight"], arrays(a_model())["weight"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_open_graph_meets_damaged_bytes_with_its_own_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        folder.mkdir()
        save_graph(a_model(), folder)
    content = bytearray((folder / "model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = folder / "damaged.onnx"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(GraphError):
        model = open_graph(damaged)
        arrays(model)
        sites_of(model)
        size_bytes(model)


def test_clean_removes_local_paths_and_keeps_name_scopes() -> None:
    model = a_model()
    node = model.graph[0]
    node.doc_string = 'File "/home/me/model.py", line 3'
    scopes = "['', 'encoder.layer.0']"
    node.metadata_props.update(
        {"pkg.torch.onnx.stack_trace": "/home/me", "pkg.torch.onnx.fx_node": "%x", provenance.NAME_SCOPES: scopes}
    )
    model.metadata_props.update({"pkg.torch.export.ExportedProgram.graph_signature": "/home/me", "author": "me"})
    model.graph.inputs[0].metadata_props["pkg.torch.onnx.original_node_name"] = "/home/me"
    weight = model.graph.initializers["weight"]
    weight.const_value = ir.Tensor(weight.const_value.numpy(), name="weight", doc_string="/home/me")
    provenance.clean_(model)
    assert node.metadata_props == {provenance.NAME_SCOPES: scopes}
    assert model.metadata_props == {"author": "me"}
    assert b"/home/me" not in ir.serde.serialize_model(model).SerializeToString()


def test_provenance_is_in_the_file_and_the_same_each_time(tmp_path: Path) -> None:
    chains = {"b": torch.ones(4, 2), "a": torch.ones(4, 2)}
    adapter = HraAdapter(chains, rank=2, digest="d1")
    model = a_model()
    properties = provenance.provenance(mode="reflect", base_fingerprint="f", adapters=[adapter], precision="fp32")
    provenance.describe_(model, properties)
    save_graph(model, tmp_path)
    got = open_graph(tmp_path / "model.onnx").metadata_props
    assert got == properties
    assert (got["hra.format_version"], got["hra.targets"], got["hra.ranks"]) == ("1", '["a", "b"]', "[2]")
    assert (got["hra.adapters"], got["hra.precision"]) == ('["d1"]', "fp32")


@pytest.mark.parametrize(("opset_version", "expected"), [(17, 10), (22, 10), (23, 11), (26, 13)])
def test_declare_versions_imports_what_is_used_and_no_more(opset_version: int, expected: int) -> None:
    model = a_model()
    model.graph.opset_imports.update({"": opset_version, "pkg.onnxscript.torch_lib": 1})
    model.graph[1].domain = "com.microsoft"
    provenance.declare_versions_(model)
    assert (model.ir_version, dict(model.graph.opset_imports)) == (expected, {"": opset_version, "com.microsoft": 1})


def test_declare_versions_refuses_what_no_runtime_takes() -> None:
    model = a_model()
    model.graph.opset_imports[""] = 28
    with pytest.raises(GraphError, match="expected 17 to 26, got 28"):
        provenance.declare_versions_(model)


def test_check_graph_refuses_a_shape_that_cannot_be(tmp_path: Path) -> None:
    save_graph(a_model(weight=np.ones((31, 24), np.float32)), tmp_path)
    with pytest.raises(GraphError, match="not sound"):
        check_graph(tmp_path / "model.onnx")


FUSED = """
<ir_version: 10, opset_import: ["" : 22, "com.microsoft" : 1]>
agraph (float[n, 8] x) => (float[n, 24] y) {
    h = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-5> (x, gain)
    g = com.microsoft.QuickGelu (h)
    y = MatMul (g, weight)
}
"""


def fused(rows: int) -> ir.Model:
    tensors = {"gain": np.ones(8, np.float32), "weight": np.ones((rows, 256), np.float32)}
    return with_initializers(ir.serde.deserialize_model(onnx.parser.parse_model(FUSED)), tensors)


def test_check_graph_takes_the_runtimes_own_operators_as_they_are(tmp_path: Path) -> None:
    save_graph(fused(8), tmp_path)
    check_graph(tmp_path / "model.onnx")


def test_check_graph_sees_what_is_wrong_beside_the_runtimes_operators(tmp_path: Path) -> None:
    model = fused(8)
    model.graph[2].attributes["made_up"] = ir.AttrInt64("made_up", 1)
    save_graph(model, tmp_path)
    with pytest.raises(GraphError, match="made_up"):
        check_graph(tmp_path / "model.onnx")


def test_check_graph_needs_the_operators_body(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "hra" : 1]>
    agraph (float[n, 8] x, float[8, 2] u, float[2, 8] v) => (float[n, 8] y) {
        y = hra.HouseholderReflection (x, u, v)
    }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    save_graph(model, tmp_path, "bare")
    with pytest.raises(GraphError):
        check_graph(tmp_path / "bare.onnx")
    operator.declare_(model)
    save_graph(model, tmp_path, "whole")
    check_graph(tmp_path / "whole.onnx")
