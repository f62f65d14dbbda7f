"""The operator library: found, refused, built, and run by ONNX Runtime as its operators' bodies say.

Numbers of the kernels alone are test_cpu_kernel.py's.
"""

import _ctypes
import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from hra_export.cli.build_op import command
from hra_export.errors import DeviceError, FormatError, GraphError, NumericalError, OutputError
from hra_export.graph import operator_check
from hra_export.graph.operator_check import (
    DTYPES,
    allowed_roundings,
    check_library,
    exact_outputs,
    one_node_model,
    random_feeds,
)
from hra_export.graph.session import GraphSession
from hra_export.graph.values import Array
from hra_export.kernels import operator_build, operator_library
from hra_export.kernels.operator_build import Options
from hra_export.kernels.operator_library import FILE_NAME, VARIABLE, OperatorLibrary, build, find, open_library
from tests.native_operator import built_library

ENDINGS = ["", "Rows", *(f"{rows}Group{k}" for rows in ("", "Rows") for k in range(2, 9))]
NAMES = [f"HouseholderReflection{ending}" for ending in ENDINGS]
FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
UNIT = {**DTYPES, BFLOAT16: 2.0**-8}
# Below it, numbers of a format lie evenly: half the distance is an error of its own.
SMALLEST = {FLOAT32: 2.0**-149, FLOAT16: 2.0**-24, BFLOAT16: 2.0**-133}
CASES_BY_DEFAULT, CASES = 100, 1000


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither named nor beside the package."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(operator_library, "DEFAULT_FOLDER", tmp_path / "beside")


def saved(tmp_path: Path, name: str, dtype: np.dtype[Any] = FLOAT32) -> Path:
    path = tmp_path / f"{name}-{dtype}.onnx"
    if not path.exists():
        ir.save(one_node_model(name, dtype), path)
    return path


def with_constants(model: ir.Model, constants: dict[str, Array]) -> ir.Model:
    """The model, with some of its inputs given in the file."""
    for value in [each for each in model.graph.inputs if each.name in constants]:
        array = constants[str(value.name)]
        value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    return model


def excess(got: Array, wanted: Array, size: Array, roundings: float) -> float:
    """The largest error, in what rounding allows; infinite where a number is missing."""
    dtype = got.dtype
    allowed = roundings * (UNIT[dtype] * size + SMALLEST[dtype])
    off = np.abs(got.astype(np.float64) - wanted.astype(np.float64)) / allowed
    return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0.0))


def as_if(library: OperatorLibrary, **changes: object) -> str:
    """What a library says of itself, changed."""
    return json.dumps({**library.to_json(), "operators": 1, **changes})


# --- finding one ---


@pytest.mark.usefixtures("no_library")
def test_find_gives_none_where_there_is_none() -> None:
    assert find() is None
    assert find({VARIABLE: ""}) is None


def test_find_takes_the_named_library_before_the_one_beside_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_library: Path
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(native_library, beside)
    monkeypatch.setattr(operator_library, "DEFAULT_FOLDER", beside)
    found = find({})
    assert found is not None
    assert found.path == beside / FILE_NAME
    named = find({VARIABLE: str(native_library)})
    assert named is not None
    assert named.path == native_library.resolve()
    monkeypatch.setenv(VARIABLE, str(native_library))
    assert find() == named


def test_library_says_what_it_is(native_library: Path) -> None:
    library = open_library(native_library)
    assert library.providers == ("cpu",)
    assert library.cuda_architectures == ()
    assert library.instructions in ("avx512", "avx2", "baseline")
    assert str(library) == f"{library.path}, version {library.version}, cpu, {library.instructions}"


def test_find_refuses_a_name_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"{VARIABLE}=.*no such operator library"):
        find({VARIABLE: str(tmp_path / "none.so")})


def test_find_says_which_file_of_a_folder_it_would_take(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"it is a folder; the library would be `{tmp_path / FILE_NAME}`"):
        find({VARIABLE: str(tmp_path)})


def test_open_refuses_what_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(b"\x7fELF, and nothing more")
    with pytest.raises(FormatError, match="cannot be loaded"):
        open_library(path)


@pytest.mark.skipif(sys.platform != "linux", reason="names a library of Linux")
def test_open_refuses_a_library_of_others() -> None:
    import onnxruntime

    (path,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime_providers_shared.so")
    with pytest.raises(FormatError, match="is not the operator library of hra-export"):
        open_library(path)


@pytest.mark.parametrize(("changes", "words"), [({"operators": 2}, "expected 1, got 2"), ({"version": None}, None)])
def test_open_refuses_another_version_of_the_operators_and_no_other_release(
    monkeypatch: pytest.MonkeyPatch, native_library: Path, changes: dict[str, object], words: str | None
) -> None:
    text = as_if(open_library(native_library), **changes)
    monkeypatch.setattr(operator_library, "_info", lambda loaded: text)
    if words is None:
        assert open_library(native_library).version == "None"
        return
    with pytest.raises(FormatError, match=words) as caught:
        open_library(native_library)
    assert caught.value.hint is not None
    assert "build-op" in caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", '{"operators": "x"}', '{"operators": 1}'])
def test_open_refuses_a_library_that_does_not_say_what_it_is(
    monkeypatch: pytest.MonkeyPatch, native_library: Path, text: str
) -> None:
    monkeypatch.setattr(operator_library, "_info", lambda loaded: text)
    with pytest.raises(FormatError, match="does not say what it is"):
        open_library(native_library)


def test_library_refuses_a_runtime_that_is_too_old(native_library: Path) -> None:
    """One that knows API 1 alone, made of three functions; its slots past CreateStatus must not be touched."""
    said = []

    def create_status(code: int, message: bytes) -> int:
        said.append((code, message.decode()))
        return 1234

    def get_api(number: int) -> int | None:
        return ctypes.addressof(table) if number == 1 else None

    pointer = ctypes.c_void_p
    status_function = ctypes.CFUNCTYPE(pointer, ctypes.c_int, ctypes.c_char_p)(create_status)
    api_function = ctypes.CFUNCTYPE(pointer, ctypes.c_uint32)(get_api)
    version = ctypes.create_string_buffer(b"1.9.0")
    version_function = ctypes.CFUNCTYPE(pointer)(lambda: ctypes.addressof(version))
    table = (pointer * 1)(ctypes.cast(status_function, pointer).value)
    base = (pointer * 2)(*(ctypes.cast(each, pointer).value for each in (api_function, version_function)))
    register = ctypes.CDLL(str(native_library)).RegisterCustomOps
    register.argtypes, register.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    assert register(None, base) == 1234
    assert said == [(9, "the operators of hra-export need ONNX Runtime 1.24 or later, this is 1.9.0")]


# --- sessions ---


@pytest.mark.usefixtures("no_library")
def test_session_runs_the_bodies_without_a_word_when_there_is_no_library(tmp_path: Path) -> None:
    session = GraphSession.open(saved(tmp_path, NAMES[0]))
    assert session.native is None
    assert {node.op_type for node in session.nodes} == {"MatMul", "Add"}


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_session_runs_every_operator_in_every_type_natively(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_library: Path, name: str, dtype: np.dtype[Any]
) -> None:
    """The kernels' own numbers against float64: they round once, so even bfloat16 is exact to its last bit but one."""
    monkeypatch.setenv(VARIABLE, str(native_library))
    session = GraphSession.open(saved(tmp_path, name, dtype), threads=1)
    assert session.native is not None
    assert session.native.path == native_library.resolve()
    assert [node.op_type for node in session.nodes] == [name]
    feeds = random_feeds(name, dtype, np.random.default_rng(7))
    got = session.run(feeds)
    for result, (wanted, size) in zip(got.values(), exact_outputs(feeds), strict=True):
        assert result.dtype == dtype
        assert excess(result, wanted, size, allowed_roundings(dtype, feeds)) <= 1


def test_session_gives_the_same_bits_in_any_thread(tmp_path: Path, native_library: Path) -> None:
    """Several runs of one session at a time share nothing that they write."""
    name = "HouseholderReflectionRowsGroup3"
    session = GraphSession.open(saved(tmp_path, name), operator=native_library, threads=2)
    feeds = [random_feeds(name, FLOAT32, np.random.default_rng(seed)) for seed in range(4)]
    alone = [session.run(each) for each in feeds]
    failures: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(50):
            again = session.run(feeds[i])
            if any(not np.array_equal(again[label], alone[i][label]) for label in again):
                failures.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("name", "fed_label"),
    [
        ("HouseholderReflection", ""),
        ("HouseholderReflectionGroup3", ""),
        ("HouseholderReflectionGroup3", "V_2"),
        ("HouseholderReflectionRowsGroup3", "V_2"),
    ],
)
def test_constant_factors_are_those_of_their_session_while_others_come_and_go(
    tmp_path: Path, native_library: Path, name: str, fed_label: str
) -> None:
    """A node whose U and V are all in the file packs them into memory that sessions share; one may be fed as well."""
    fed = GraphSession.open(saved(tmp_path, name), operator=native_library)
    sessions, expected, given = [], [], []
    for seed in range(3):
        feeds = random_feeds(name, FLOAT32, np.random.default_rng(seed))
        constant = [label for label in feeds if label[0] in "UV" and label != fed_label]
        path = tmp_path / f"constant{seed}.onnx"
        ir.save(with_constants(one_node_model(name, FLOAT32), {label: feeds[label] for label in constant}), path)
        sessions.append(GraphSession.open(path, operator=native_library))
        expected.append(fed.run(feeds))
        given.append({label: value for label, value in feeds.items() if label not in constant})
    while sessions:  # the memory's maker goes first
        for session, feeds, wanted in zip(sessions, given, expected, strict=True):
            got = session.run(feeds)
            assert all(np.array_equal(got[label], value) for label, value in wanted.items())
        del sessions[0], given[0], expected[0], session


@pytest.mark.parametrize("name", ["HouseholderReflection", "HouseholderReflectionGroup3"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_constant_chains_are_right_and_read_without_v(
    tmp_path: Path, native_library: Path, name: str, rows: int
) -> None:
    """V of a chain is M Uᵀ: few rows are multiplied by U, M and Uᵀ, which rounds otherwise than U and V."""
    d = 200
    rng = np.random.default_rng(rows)
    feeds = random_feeds(name, FLOAT32, rng, shape=(1, rows, d), ranks=(8, 3, 32))
    for label in [each for each in feeds if each[0] == "U"]:
        u = feeds[label].astype(np.float64)
        triangle = -2 * np.eye(u.shape[1]) + np.triu(rng.standard_normal((u.shape[1], u.shape[1])), 1)
        feeds[label.replace("U", "V")] = (triangle @ u.T).astype(np.float32)
    model = with_constants(
        one_node_model(name, FLOAT32), {label: value for label, value in feeds.items() if label != "X"}
    )
    path = tmp_path / "chain.onnx"
    ir.save(model, path)
    got = GraphSession.open(path, operator=native_library).run({"X": feeds["X"]})
    fed = GraphSession.open(saved(tmp_path, name), operator=native_library).run(feeds)
    x = feeds["X"].astype(np.float64)
    for (label, result), (wanted, _) in zip(got.items(), exact_outputs(feeds), strict=True):
        u, v = (feeds[label.replace("Y", letter)].astype(np.float64) for letter in "UV")
        largest = np.abs(x) + np.abs(x) @ np.abs(u) @ np.abs(v).max(axis=1, keepdims=True)
        # d + 2 r + 8 roundings of terms that are at most 8 times V's largest, and M Uᵀ within 2⁻²⁰ of V: the limits of
        # cpu_coefficients.h.
        allowed = ((d + 2 * u.shape[1] + 8) * 8 * UNIT[FLOAT32] + 2**-20) * largest
        assert np.all(np.abs(result - wanted) <= allowed)
        assert np.array_equal(result, fed[label]) == (rows > 12)


@pytest.mark.skipif(sys.platform != "linux", reason="where the mapped files are listed")
def test_library_stays_when_a_runtime_closes_it(tmp_path: Path, native_library: Path) -> None:
    """Its operators are made once: loaded anew for every session, they would be made anew and the old ones lost."""
    copy = Path(shutil.copy(native_library, tmp_path))
    _ctypes.dlclose(ctypes.CDLL(str(copy))._handle)
    assert str(copy) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("name", "label", "shape", "words"),
    [
        (NAMES[0], "U", (4, 2), r"HouseholderReflection: input U: expected shape \(5, r\), got \(4, 2\)"),
        (NAMES[0], "V", (3, 5), r"input V: expected shape \(2, 5\), got \(3, 5\)"),
        ("HouseholderReflectionGroup2", "V_2", (2, 4), r"input V_2: expected shape \(2, 5\), got \(2, 4\)"),
        ("HouseholderReflectionRows", "A", (4,), r"input A: expected shape \(2,\), got \(4,\)"),
        ("HouseholderReflectionRows", "U", (3, 6, 2), r"input U: expected shape \(a, 5, r\), got \(3, 6, 2\)"),
        ("HouseholderReflectionRows", "V", (2, 2, 5), r"input V: expected shape \(3, 2, 5\), got \(2, 2, 5\)"),
    ],
)
def test_kernel_refuses_shapes_that_do_not_fit(
    tmp_path: Path, native_library: Path, name: str, label: str, shape: tuple[int, ...], words: str
) -> None:
    model = one_node_model(name, FLOAT32)
    for value in model.graph.inputs:  # sizes that the session does not compare
        value.shape = ir.Shape([f"{value.name}{i}" for i in range(len(value.shape or ()))])
    path = tmp_path / "free.onnx"
    ir.save(model, path)
    session = GraphSession.open(path, operator=native_library)
    feeds = random_feeds(name, FLOAT32, np.random.default_rng(0), shape=(2, 3, 5), ranks=[2], adapters=3)
    session.run(feeds)
    feeds[label] = np.zeros(shape, feeds[label].dtype)
    with pytest.raises(GraphError, match=words):
        session.run(feeds)


@pytest.mark.parametrize("number", [-1, 4, 2**62])
def test_kernel_refuses_an_index_that_names_no_adapter(tmp_path: Path, native_library: Path, number: int) -> None:
    name = "HouseholderReflectionRowsGroup2"
    session = GraphSession.open(saved(tmp_path, name), operator=native_library)
    feeds = random_feeds(name, FLOAT32, np.random.default_rng(0), adapters=4)
    feeds["A"][-1] = number
    with pytest.raises(GraphError, match=name):
        session.run(feeds)


def test_session_refuses_a_provider_that_the_named_library_has_no_kernels_for(
    tmp_path: Path, native_library: Path
) -> None:
    with pytest.raises(DeviceError, match="cannot run on cuda") as caught:
        GraphSession.open(saved(tmp_path, NAMES[0]), provider="cuda", operator=native_library)
    assert caught.value.hint == "`hra-export build-op --cuda on` builds one"
    with pytest.raises(DeviceError, match="cannot run on tensorrt") as caught:
        GraphSession.open(saved(tmp_path, NAMES[0]), provider="tensorrt", operator=native_library)
    assert "build-op" not in str(caught.value.hint)  # no build has any


SIZES: dict[str, list[int | str | None] | None] = {
    "names": ["b", 7, "d"],
    "no name": [None, 7, 33],
    "no shape": None,  # arrives as that of a scalar
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_runtime_infers_the_shapes_of_native_outputs(
    tmp_path: Path, native_library: Path, sizes: list[int | str | None] | None
) -> None:
    """What it knows of X it knows of Y, and no more: a wrong size would fail in the next node."""
    model = one_node_model(NAMES[0], FLOAT32)
    (node,) = model.graph
    x, (y,) = model.graph.inputs[0], node.outputs
    if sizes is None:
        shape = ir.Value(name="S", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
        model.graph.inputs.append(shape)
        reshaped = ir.node("Reshape", [x, shape], name="reshape")
        model.graph.insert_before(node, reshaped)
        node.replace_input_with(0, reshaped.outputs[0])
    else:
        x.shape = ir.Shape(sizes)
    after = ir.node("Add", [y, y], name="after")
    model.graph.append(after)
    (z,) = after.outputs
    z.name, z.type, y.shape = "Z", x.type, None
    model.graph.outputs[:] = [z]
    path = tmp_path / "inferred.onnx"
    ir.save(model, path)
    session = GraphSession.open(path, operator=native_library)
    feeds = random_feeds(NAMES[0], FLOAT32, np.random.default_rng(0), shape=(2, 7, 33))
    ((wanted, size),) = exact_outputs(feeds)
    given = {**feeds, "S": np.array([2, 7, 33])} if sizes is None else feeds
    assert excess(session.run(given)["Z"], 2 * wanted, 2 * size, allowed_roundings(FLOAT32, feeds)) <= 1
    assert len(session.outputs[0].shape) == (3 if sizes is not None and None not in sizes else 0)


# --- a thousand graphs ---


def random_case(rng: np.random.Generator) -> tuple[str, np.dtype[Any], dict[str, Array]]:
    """An operator, a type and inputs; sizes of zero and one are frequent."""
    name, dtype = str(rng.choice(NAMES)), [FLOAT32, FLOAT16, BFLOAT16][rng.integers(3)]
    batch, tokens = int(rng.choice([0, 1, 1, 2, 3, 9])), int(rng.choice([0, 1, 1, 2, 7, 33, 70]))
    width = int(rng.choice([1, 2, 7, 16, 31, 64, 65, 96, 130, 257]))
    ranks = [int(rank) for rank in rng.choice([0, 1, 2, 3, 8, 8, 16, 17, 32, 40], size=8)]
    adapters = int(rng.integers(1, 5))
    return name, dtype, random_feeds(name, dtype, rng, shape=(batch, tokens, width), ranks=ranks, adapters=adapters)


class Sessions:
    """One of each operator, type and way to run it."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._folder, self._library = folder, library
        self._made: dict[tuple[str, str, bool], GraphSession] = {}

    def run(self, name: str, feeds: dict[str, Array], *, native: bool) -> list[Array]:
        key = (name, str(feeds["X"].dtype), native)
        if key not in self._made:
            path = saved(self._folder, name, feeds["X"].dtype)
            self._made[key] = GraphSession.open(path, operator=self._library if native else None, threads=1 + native)
        return list(self._made[key].run(feeds).values())


def disagreements(tmp_path: Path, library: Path, seeds: range) -> Iterator[str]:
    """Random cases of which the native kernels and the inlined bodies (bfloat16: float64) differ."""
    sessions = Sessions(tmp_path, library)
    for seed in seeds:
        name, dtype, feeds = random_case(np.random.default_rng(seed))
        got, exact = sessions.run(name, feeds, native=True), exact_outputs(feeds)
        wanted = [each for each, _ in exact] if dtype == BFLOAT16 else sessions.run(name, feeds, native=False)
        for result, other, (_, size) in zip(got, wanted, exact, strict=True):
            off = excess(result, other, size, allowed_roundings(dtype, feeds))
            if result.shape != feeds["X"].shape or not off <= 1:
                shapes = {label: value.shape for label, value in feeds.items()}
                yield f"{seed}: {name}, {dtype}, {shapes}: off by {off:.3g}"


def test_native_kernels_and_inlined_bodies_agree_on_random_graphs(tmp_path: Path, native_library: Path) -> None:
    assert not list(disagreements(tmp_path, native_library, range(CASES_BY_DEFAULT)))


@pytest.mark.slow
def test_native_kernels_and_inlined_bodies_agree_on_a_thousand_random_graphs(
    tmp_path: Path, native_library: Path
) -> None:
    assert not list(disagreements(tmp_path, native_library, range(CASES)))


# --- building one ---


def invoke(*arguments: str) -> Result:
    """Run the command; what it raises comes through, as in `main`."""
    return CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, native_library: Path) -> list[Options]:
    """The compiler is not run again: it would make this library. Gives what was asked of it."""
    asked: list[Options] = []

    def compile_library(work: Path, options: Options, name: str) -> Path:
        asked.append(options)
        return Path(shutil.copy(native_library, work / name))

    monkeypatch.setattr(operator_library, "compile_library", compile_library)
    return asked


def test_build_op_checks_and_puts_into_place(tmp_path: Path, compiled: list[Options]) -> None:
    output = tmp_path / "new" / "folder"
    run = invoke("--output", str(output), "--cuda", "off", "--cuda-architectures", "90, 100", "--json")
    parsed = json.loads(run.stdout)
    assert parsed["library"]["path"] == str(output / FILE_NAME)
    assert parsed["library"]["providers"] == ["cpu"]
    assert compiled == [Options(cuda="off", cuda_architectures=("90", "100"))]
    assert [path.name for path in output.iterdir()] == [FILE_NAME]
    assert open_library(output / FILE_NAME).path == output / FILE_NAME


def test_build_op_says_how_to_use_a_library_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: list[Options]
) -> None:
    assert f"export {VARIABLE}={tmp_path / FILE_NAME}" in invoke("--output", str(tmp_path), "-q").stdout
    spaced = tmp_path / "a folder"
    assert f"export {VARIABLE}='{spaced / FILE_NAME}'" in invoke("--output", str(spaced), "-q").stdout
    monkeypatch.setattr(operator_library, "DEFAULT_FOLDER", tmp_path)
    assert VARIABLE not in invoke("-q").stdout
    assert len(compiled) == 3


@pytest.mark.usefixtures("compiled")
def test_build_keeps_the_old_library_when_the_new_one_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / FILE_NAME).write_text("the old one")
    monkeypatch.setattr(operator_check, "allowed_roundings", lambda dtype, feeds: 1e-3)
    with pytest.raises(NumericalError, match="does not compute what the operators' bodies do"):
        build(tmp_path, check=check_library)
    assert (tmp_path / FILE_NAME).read_text() == "the old one"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the owner may write everywhere")
def test_build_refuses_a_folder_it_may_not_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write the operator library"):
        build(tmp_path)


def test_build_refuses_a_place_below_a_file_before_it_compiles(tmp_path: Path, compiled: list[Options]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write the operator library") as caught:
        build(tmp_path / "file" / "folder")
    assert caught.value.hint is not None
    assert "--output" in caught.value.hint
    assert not compiled


def test_build_refuses_a_full_temporary_folder_before_it_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: list[Options]
) -> None:
    monkeypatch.setattr(operator_library, "NEEDED_BYTES", 2**62)
    with pytest.raises(OutputError, match="cannot compile in the temporary folder") as caught:
        build(tmp_path)
    assert "MB are free" in caught.value.findings[0]
    assert not compiled


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_interrupted_build_leaves_no_compiler_running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CMake starts Ninja, which starts compilers: a signal to this process alone must end them all."""
    started = tmp_path / "started"

    def interrupt(process: "subprocess.Popen[str]") -> None:
        while not (started.is_file() and started.read_text().endswith("\n")):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        operator_build._run(["sh", "-c", f"sleep 60 & echo $! > '{started}'; wait"], "failed")
    state = Path("/proc", started.read_text().strip(), "stat")
    until = time.monotonic() + 10
    while state.exists() and ") Z" not in state.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    assert not state.exists() or ") Z" in state.read_text()


def test_build_without_cmake_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    with pytest.raises(DeviceError, match="needs CMake") as caught:
        build(tmp_path)
    assert caught.value.hint == operator_build.INSTALL


def test_build_without_a_compiler_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_library: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(DeviceError, match=r"needs a C\+\+ compiler") as caught:
        build(tmp_path / "out", Options(cuda="off"))
    assert caught.value.exit_code == 7
    assert not list((tmp_path / "out").iterdir())


def test_build_shows_what_the_compiler_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_library: Path
) -> None:
    sources = tmp_path / "ort"
    sources.mkdir()
    (sources / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES CXX)\nadd_library(p SHARED broken.cc)\n"
    )
    (sources / "broken.cc").write_text("int broken = nonsense;\n")
    monkeypatch.setattr(operator_build, "SOURCES", sources)
    with pytest.raises(DeviceError, match="does not compile") as caught:
        build(tmp_path / "out", Options(cuda="off"))
    assert any("nonsense" in line for line in caught.value.findings)


def test_build_op_is_a_verb() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "hra_export", "build-op", "--cuda", "perhaps"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "--cuda" in run.stderr


# --- sanitizers ---

UNDER_SANITIZERS = """
import sys
from pathlib import Path
from tests.test_operator_library import disagreements
found = list(disagreements(Path(sys.argv[1]), Path(sys.argv[2]), range(int(sys.argv[3]))))
print("\\n".join(found) or "agreed")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="how a sanitizer is loaded first differs")
def test_random_graphs_pass_the_sanitizers(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own that loads them first."""
    library = built_library(Options(cuda="off", sanitize=True))
    compiler = os.environ.get("CXX", "c++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    settings = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
    run = subprocess.run(
        [sys.executable, "-c", UNDER_SANITIZERS, str(tmp_path), str(library), "200"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **settings},
    )
    assert (run.returncode, run.stdout.strip().splitlines()[-1:]) == (0, ["agreed"]), run.stderr[-4000:]
