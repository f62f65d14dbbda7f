"""The GPU benchmarks without a GPU: rooflines by hand, numbers at toy size, what is judged, what is left out."""

import ctypes
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ceilings, gpu, gpu_turns, harness, onnx_gpu, reflect_contenders, reflect_gpu, roofline, train_gpu
from benchmarks.cuda_operator import task_of
from benchmarks.gpu_turns import Seconds
from benchmarks.roofline import H100, Machine, Shape, Work
from hra_export import kernels

TOY_MACHINE = Machine("toy", 100.0, {"float16": 1000.0, "float32": 10.0}, launch_seconds=3.0, replay_seconds=1.0)
SHAPE = Shape(rows=3, features=5, outputs=7, rank=2, dtype="float16")


@pytest.mark.parametrize(
    ("work", "moved", "operations", "launches"),
    [
        # x 15, z 15, U 10, M 6 halves; S 4 floats
        (roofline.reflect(SHAPE), 2 * 46 + 16, 120 + 24, 1),
        (roofline.reflect(SHAPE, rows_cached=True), 2 * 16 + 16, 120 + 24, 1),
        # x twice, z, U twice, (n, r) written and read twice
        (roofline.reflect_in_three_calls(SHAPE), 2 * (45 + 20 + 24) + 16, 144, 3),
        # two of the eight adapters' U and S for two rows, and their numbers
        (roofline.reflect_rows(Shape(2, 5, 7, 2), 8), 2 * (20 + 20) + 2 * 16 + 16, 80 + 16, 1),
        (roofline.factor(SHAPE, 4), 4 * (40 + 20 + 16), 4 * (40 + 8 / 3), 1),
        # x, and U, V, Y of two
        (roofline.operator(SHAPE, 2), 2 * (15 + 2 * 35), 240, 1),
        # U and an (r, r) matrix of two
        (roofline.operator(SHAPE, 2, rows_cached=True, constant=True), 2 * 2 * (10 + 4), 240, 1),
        (roofline.operator_rows(Shape(2, 5, 7, 2), 1, 2), 2 * (10 + 20 + 40) + 16, 160, 1),
        (roofline.product(SHAPE), 2 * (15 + 35 + 21), 210, 1),
        (roofline.quantized_product(Shape(1, 64, 32, 2)), 2 * 96 + 1024 + 128, 4096, 1),
        # x, A, (n, r) written and read, B, y read and written
        (roofline.lora(SHAPE), 2 * (15 + 10 + 12 + 14 + 42), 12 * 12, 2),
        (roofline.fused_lora(SHAPE), 2 * 24, 144, 0),
        # g, ∂x, U, K and S; g, x, M, K and a float32 (d, r); that again, ∂U, the vectors, U, M and K
        (roofline.reflect_backward(SHAPE), 2 * 46 + 16 + 2 * 42 + 40 + 120 + 2 * 22, 144 + 120 + 40 + 24, 3),
    ],
)
def test_works_are_those_counted_by_hand(work: Work, moved: float, operations: float, launches: int) -> None:
    assert (work.bytes, work.launches) == (moved, launches)
    assert work.operations == pytest.approx(operations)


def test_floor_is_the_slower_of_memory_and_arithmetic_and_launches_come_on_top() -> None:
    moved, computed = Work(500, 1000, 2), Work(500, 1e5)
    assert TOY_MACHINE.floor(moved, "float16") == 5.0
    assert TOY_MACHINE.floor(computed, "float16") == 100.0
    assert TOY_MACHINE.with_launches(moved, "float16", recorded=True) == 7.0
    assert TOY_MACHINE.with_launches(moved, "float16", recorded=False) == 11.0
    assert TOY_MACHINE.balance("float32") == 0.1
    assert moved + computed == Work(1000, 101000, 3)


def test_reading_and_writing_x_alone_is_more_than_two_percent_of_a_product() -> None:
    """4 n d bytes against 2 n d o operations: 2 · peak / (o · bandwidth), whatever n and r are."""
    for width in (2048, 4096, 8192, 14336):
        share = roofline.on_top(H100, Work(4 * 4096 * width, 0), Shape(4096, width, width, 8))
        assert share == pytest.approx(2 * 989e12 / (width * 3.35e12))
        assert share > 0.04


def test_ceilings_of_a_cpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_ARRAY_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "CPU_SIDE", 64)
    found = ceilings.measured(torch.device("cpu"))
    assert found.bandwidth > 1e8
    assert found.peaks["float16"] == found.peaks["float32"] > 1e8
    assert found.source == "measured"


def test_reflect_contenders_agree_with_float64_and_a_wrong_one_is_named() -> None:
    shape = Shape(512, 33, 20, 5, "float32")
    data = reflect_contenders.Data(shape, torch.device("cpu"), 2, 1)
    calls = reflect_contenders.contenders(data, shape, None)
    assert list(calls) == ["three calls", "reflect", "product", "reflect + product", "product + LoRA", "backward"]
    assert not reflect_contenders.wrong(shape, data, calls)
    reversed_chain = {"reflect": lambda i: reflect_contenders.three_calls(data.x[i], data.u[i], data.half_s[i].T)}
    (finding,) = reflect_contenders.wrong(shape, data, reversed_chain)
    assert finding.startswith("d=33 n=512 r=5 float32, reflect: off by ")


def test_v_of_the_operator_is_that_of_the_reflection() -> None:
    shape = Shape(3, 33, 20, 5, "float32")
    data = reflect_contenders.Data(shape, torch.device("cpu"), 1, 1)
    x, expected = data.x[0], reflect_contenders.three_calls(data.x[0], data.u[0], data.half_s[0])
    torch.testing.assert_close(x + (x @ data.thin_u[0]) @ data.v[0], expected)


def test_task_has_the_layout_of_its_c_header() -> None:
    x, u, v = torch.zeros(3, 5), torch.zeros(5, 2), torch.zeros(2, 5)
    task, (y,) = task_of(x, [(u, v)])
    words = (ctypes.c_int64 * (ctypes.sizeof(task) // 8)).from_buffer(task)
    assert [words[0] & 0xFFFFFFFF, *words[1:6], words[7]] == [0, x.data_ptr(), 3, 5, 0, 3, 1]
    member = (ctypes.c_int64 * 5).from_address(words[6])
    assert list(member) == [u.data_ptr(), v.data_ptr(), y.data_ptr(), 2, 1]


def taken(**seconds: float) -> dict[str, dict[str, Seconds]]:
    """The same in both modes."""
    return {
        name.replace("_", " "): dict.fromkeys(("eager", "graph"), Seconds((each,))) for name, each in seconds.items()
    }


def test_bars_are_judged_beside_what_the_floors_allow() -> None:
    few, many = Shape(1, 4096, 4096, 8), Shape(4096, 4096, 4096, 8)
    floor = H100.floor(roofline.reflect(few), "float16")
    both = {"reflect + product": dict.fromkeys(("eager", "graph"), Seconds((1.03,)))}
    done = {few: taken(reflect=floor + H100.replay_seconds), many: {**taken(reflect=1.0, product=1.0), **both}}
    rows = {row[0]: row[2:] for row in reflect_gpu.judged(done, H100)}
    assert rows["n ≤ 64: of the memory floor"][2] == "FAILS"
    assert rows["n ≤ 64: of the floor with one launch"] == ["100.0%", "100.0%", "holds"]
    assert rows["n ≥ 1024: on top of the product"] == ["3.0%", "3.0%", "FAILS"]
    assert rows["n ≥ 1024: what reading and writing x costs"][0] == "14.4%"


def test_table_of_a_shape_divides_by_the_floor_and_by_the_others() -> None:
    shape = Shape(1, 4096, 4096, 8)
    rows = reflect_gpu.table(shape, taken(three_calls=8e-6, reflect=2e-6), H100)
    named = [dict(zip(reflect_gpu.HEADER, row, strict=True)) for row in rows]
    assert [row["÷ three calls"] for row in named] == ["1.000", "0.250"]
    assert (named[1]["of floor"], named[1]["with launch"], named[1]["÷ product"]) == ("1%", "66%", "")


def test_gpu_parts_fit_into_nine_minutes() -> None:
    limits = sum(part.limit + gpu.GRACE_SECONDS for part in gpu.PARTS)
    assert gpu.BUILD_SECONDS + limits < 9 * 60
    assert all(part.budget < part.limit for part in gpu.PARTS)
    known = {"onnx_gpu": {case.name for case in onnx_gpu.CASES}, "train_gpu": {case.name for case in train_gpu.CASES}}
    for part in gpu.PARTS:
        if "--only" in part.arguments:
            assert known[part.name] >= {*part.arguments[part.arguments.index("--only") + 1 :]}


def part(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> gpu.Part:
    """A part that runs some code."""
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "toy.py").write_text(code)
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.chdir(folder)
    return gpu.Part("toy", **{"budget": 1, "limit": 20, "packages": ("torch",), **fields})


@pytest.mark.parametrize(("code", "state"), [("0", "done"), ("raise SystemExit(3)", "failed with 3")])
def test_gpu_part_tells_how_it_ended(code: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.json").write_text("{}")
    toy = part(code, tmp_path, monkeypatch)
    assert gpu.run_part(toy, {}, checks=False) == state
    assert gpu.results("toy") == {}
    assert not (tmp_path / "toy.json").exists()  # of an earlier run


@pytest.mark.parametrize("ignored", [False, True], ids=["foreground", "background"])
def test_gpu_part_that_takes_too_long_is_interrupted(
    ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import time\ntry:\n    time.sleep(60)\nfinally:\n    open('toy.json', 'w').write('{\"table\": []}')"
    toy = part(code, tmp_path, monkeypatch, limit=3)
    old = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        assert gpu.run_part(toy, {}, checks=False).startswith("failed with")
    finally:
        signal.signal(signal.SIGINT, old)
    assert gpu.results("toy") == {"table": []}


def test_gpu_part_without_its_packages_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = part("0", tmp_path, monkeypatch, packages=("torch", "no_such_package"))
    assert gpu.run_part(toy, {}, checks=True) == "left out: no no_such_package"


def test_gpu_summary_has_the_figures_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    figures = ["100", "10", "1.2", "1.1"]
    rows = [
        ["8B-int4", batch, name, *figures] for batch in ("1", "2", "64") for name in ("native", "native, CUDA graph")
    ]
    (tmp_path / "onnx_gpu.json").write_text(json.dumps({"table": [onnx_gpu.HEADER, *rows]}))
    found = gpu.summary("onnx_gpu", "done", checks=False)
    assert [row[1:5] for row in found[1:]] == [
        [f"8B-int4, batch {batch}", "native, CUDA graph", "10 tokens/s", "1.1 of merged's time"]
        for batch in ("1", "64")
    ]
    assert gpu.summary("train_gpu", "left out: no peft", checks=False) == [
        ["train_gpu", "", "", "left out: no peft", "", ""]
    ]


def test_plain_trainee_does_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda x, rank: True)
    with train_gpu.without_kernels():
        assert not kernels.take(torch.zeros(1), 1)
    assert kernels.take(torch.zeros(1), 1)


def test_plain_trainee_takes_part_beside_the_other_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = train_gpu.Case("1B", "all")
    assert train_gpu.PLAIN not in case.methods
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert case.methods[:3] == ["ours", "ours-plain", "lora"]


@pytest.mark.slow
def test_gpu_script_checks_everything_at_toy_size() -> None:
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--check"],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert [line.split() for line in run.stdout.splitlines()[2:]] == [[each.name, "done"] for each in gpu.PARTS]


def test_reflect_contenders_of_few_rows_agree_with_float64() -> None:
    shape = Shape(1, 33, 20, 5, "float32")
    data = reflect_contenders.Data(shape, torch.device("cpu"), 2, 1)
    calls = reflect_contenders.contenders(data, shape, None)
    assert {"rows", "factor"} <= calls.keys() <= reflect_contenders.works(shape).keys()
    assert not reflect_contenders.wrong(shape, data, calls)


def test_reflect_run_reports_what_is_done_and_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a clock in place of a GPU's, a wrong kernel in the second shape, and no time for the third."""
    shapes = [Shape(rows, 33, 20, 5, "float32") for rows in (1, 1024, 7)]
    clock = SimpleNamespace(monotonic=iter([0.0, 0.0, 1.0, 9.0]).__next__)
    honest = reflect_contenders.contenders

    def contenders(data: Any, shape: Shape, cuda_operator: None) -> dict[str, Any]:
        wrong = {"reflect": lambda i: torch.full((1024, 33), 2.0)} if shape.rows > 1 else {}
        return {**honest(data, shape, cuda_operator), **wrong}

    monkeypatch.setattr(reflect_gpu, "shapes", lambda: shapes)
    monkeypatch.setattr(reflect_gpu, "time", clock)
    monkeypatch.setattr(reflect_gpu, "measured", lambda device: H100)
    monkeypatch.setattr(reflect_gpu, "native_library", lambda work, cuda: (None, "no compiler"))
    monkeypatch.setattr(reflect_gpu, "copies", lambda size: 2)
    monkeypatch.setattr(reflect_gpu, "contenders", contenders)
    monkeypatch.setattr(gpu_turns, "_walk", lambda calls, mode: gpu_turns.Walk(calls, len(calls)))
    monkeypatch.setattr(gpu_turns, "event_seconds", lambda calls: [call() for call in calls] and 1.0)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert reflect_gpu.run(1, 5.0, torch.device("cpu")) == 1
    results = json.loads((tmp_path / "reflect_gpu.json").read_text())
    assert results["left_out"] == ["d=33 n=7 r=5 float32"]
    (failure,) = results["failures"]
    assert failure.startswith("d=33 n=1024 r=5 float32, reflect: off by ")
    assert "reflect" not in results["seconds"]["d=33 n=1024 r=5 float32"]
    assert results["seconds"]["d=33 n=1 r=5 float32"]["reflect"] == {"eager": [0.5], "graph": [0.5]}
    assert "n ≤ 64: of the floor with one launch" in capsys.readouterr().out


def test_a_contender_that_fails_leaves_the_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(i: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(gpu_turns, "_walk", lambda calls, mode: gpu_turns.Walk(calls, len(calls)))
    monkeypatch.setattr(gpu_turns, "event_seconds", lambda calls: [call() for call in calls] and 1.0)
    taken, failures = gpu_turns.take_turns({"right": lambda i: i, "broken": broken}, 4, 3)
    assert taken == {"right": dict.fromkeys(gpu_turns.MODES, Seconds((0.25,) * 3))}
    assert failures == ["broken: RuntimeError: operation not permitted when stream is capturing"]


def test_gpu_run_reports_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = part("import sys; sys.exit(3)", tmp_path, monkeypatch)
    monkeypatch.setattr(gpu, "native_library", lambda work, cuda: (None, "no compiler"))
    assert gpu.run([toy], checks=False) == 1
    body = json.loads((tmp_path / "gpu.json").read_text())
    assert body["states"] == {"toy": "failed with 3"}
    assert body["operator"] == "no compiler"


@pytest.mark.gpu
def test_reflect_benchmark_runs_on_a_gpu() -> None:
    findings = [reflect_gpu.measure(shape, 1, None, torch.device("cuda"))[1] for shape in reflect_gpu.TOY]
    assert findings == [[]] * len(reflect_gpu.TOY)
