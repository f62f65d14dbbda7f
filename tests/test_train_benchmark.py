"""The training benchmarks at toy size on the CPU: that they compare what they say they compare."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import harness, train, train_gpu
from benchmarks.llamas import SIZES, Size, build_base, sharing_copy
from benchmarks.train import Figures, Worker, bars, cases, choose, measure, table
from benchmarks.trainee import METHODS, Case, Method, Trainee, adapt, oft_block_size, trainable
from hra_export.errors import DeviceError
from tests.tiny_models import build

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")

LAYER = Case("layer", rank=8, tokens=16, width=128)
MATRIX_BYTES = 4 * LAYER.width**2
TOY = Size(64, 96, layers=3, heads=4, key_heads=2, head_width=16, tied=True, vocabulary=96)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    model: Any = build("llama")
    model.save_pretrained(tmp_path / "llama")
    return Case("toy", rank=4, tokens=8, batch=2, directory=str(tmp_path / "llama"), targets=PROJECTIONS)


def names_of(chosen: list[Case]) -> list[str]:
    return [case.name for case in chosen]


def test_choose_takes_whole_names_and_how_they_begin() -> None:
    every = cases(Path("smollm2"))
    assert names_of(choose(every, ["layer-1024"])) == ["layer-1024-r8", "layer-1024-r32"]
    assert names_of(choose(every, ["smollm2-r8-plain"])) == ["smollm2-r8-plain"]
    assert choose(every, None) == every
    assert not choose(every, ["layer-10"])


@pytest.mark.parametrize("rank", [2, 8, 32])
@pytest.mark.parametrize("features", [{576, 1536}, {1024}, {3072, 8192}, {4096, 14336}])
def test_oft_comes_within_one_part_in_rank_of_the_parameters_of_hra(features: set[int], rank: int) -> None:
    """Powers of two and their triples divide these sizes, and OFT has d (b − 1) / 2 parameters a layer."""
    size = oft_block_size(features, rank)
    assert all(d % size == 0 for d in features)
    assert abs((size - 1) / 2 - rank) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_the_adapter_and_nothing_else(method: Method) -> None:
    trainee = Trainee(LAYER, method)
    adapters = trainable(trainee._model)
    frozen = [parameter for parameter in trainee._model.parameters() if not parameter.requires_grad]
    assert sum(parameter.numel() for parameter in adapters) == trainee.parameters
    assert [parameter.shape for parameter in frozen] == [(LAYER.width, LAYER.width)]
    before = [parameter.detach().clone() for parameter in [*adapters, *frozen]]
    trainee.step()
    trainee.step()  # LoRA's A stands still while its B is zero
    same = [torch.equal(old, new) for old, new in zip(before, [*adapters, *frozen], strict=True)]
    assert same == [False] * len(adapters) + [True] * len(frozen)


def test_lora_has_the_rank_of_hra_and_a_scale_of_one() -> None:
    model = adapt(nn.Sequential(nn.Linear(12, 20)), "lora", 4, ["0"])
    assert [tuple(parameter.shape) for parameter in trainable(model)] == [(4, 12), (20, 4)]
    layer: Any = model.get_submodule("base_model.model.0")
    assert layer.scaling == {"default": 1.0}
    assert [type(module) for module in layer.lora_dropout.values()] == [nn.Identity]


@on_linux
def test_memory_counts_what_is_held_between_steps_exactly() -> None:
    """LoRA and AdamW: the parameters, two moments of each, and a float32 step count for each of two matrices."""
    trainee = Trainee(LAYER, "lora")
    trainee.step()
    assert trainee.memory()["held_bytes"] == 3 * 4 * trainee.parameters + 2 * 4


@on_linux
def test_memory_counts_the_dense_matrices_of_peft_hra() -> None:
    """It keeps one for each reflection until the backward pass."""
    trainee = Trainee(LAYER, "peft-hra")
    trainee.step()
    assert trainee.memory()["transient_bytes"] > LAYER.rank * MATRIX_BYTES


@on_linux
def test_memory_of_ours_has_no_room_for_a_dense_matrix() -> None:
    trainee = Trainee(LAYER, "ours")
    trainee.step()
    assert 0 < trainee.memory()["transient_bytes"] < MATRIX_BYTES


@on_linux
def test_memory_of_a_checkpointed_model_is_smaller(llama: Case) -> None:
    """With enough tokens for activations to matter."""
    peaks = []
    for checkpointing in (False, True):
        trainee = Trainee(replace(llama, tokens=64, checkpointing=checkpointing), "lora")
        trainee.step()
        peaks.append(trainee.memory()["transient_bytes"])
    assert peaks[1] < 0.9 * peaks[0]


@contextmanager
def worker_of(case: Case, method: Method) -> Iterator[Worker]:
    worker = Worker(case, method)
    try:
        yield worker
    finally:
        worker.close()


@on_linux
def test_measure_interleaves_processes(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "THREADS", 1)
    figures = measure(replace(llama, checkpointing=True), ["ours", "lora"], rounds=2)
    assert list(figures) == ["ours", "lora"]
    for each in figures.values():
        assert each.failure is None
        assert len(each.seconds) == 2
        assert min(each.seconds) > 0
        assert each.peak_bytes >= each.loaded_bytes > 100 * 2**20  # torch is in there
        assert each.transient_bytes > 0


@on_linux
def test_worker_without_a_model_says_why() -> None:
    lost = Case("lost", rank=4, tokens=8, directory="no/such/model")
    expected = r"lost, ours ended with 1:[\s\S]*no/such/model"
    with worker_of(lost, "ours") as worker, pytest.raises(RuntimeError, match=expected):
        worker.answer()


@on_linux
def test_worker_without_memory_fails_alone() -> None:
    """35 dense matrices of 4 MiB do not fit into 80 MiB."""
    with worker_of(Case("layer", rank=32, tokens=8, width=1024), "peft-hra") as worker:
        worker.answer()
        pid = worker._process.pid
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        limit = int(status["VmData"].split()[0]) * 1024 + 80 * 2**20
        resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
        with pytest.raises(MemoryError, match="out of memory"):
            worker.ask("turn")


class Scripted(Worker):
    """Answers with prepared times."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)
        self.asked: list[str] = []

    def ask(self, command: str) -> dict[str, Any]:
        self.asked.append(command)
        if command == "memory":
            return {"peak_bytes": 30, "held_bytes": 10, "transient_bytes": 20}
        return {"seconds": self.seconds.pop(0)}


def test_a_slow_first_turn_of_peft_hra_is_its_figure() -> None:
    figures, worker = Figures(parameters=1, loaded_bytes=1), Scripted(train.SLOW_SECONDS)
    assert train._take_turn(worker, figures, counts=False, may_end=True)
    assert figures.seconds == [train.SLOW_SECONDS]
    assert figures.tensor_bytes == 30
    assert worker.asked == ["turn", "memory"]


@pytest.mark.parametrize(("seconds", "may_end"), [(train.SLOW_SECONDS / 2, True), (train.SLOW_SECONDS, False)])
def test_another_first_turn_only_warms_up(seconds: float, may_end: bool) -> None:
    figures = Figures(parameters=1, loaded_bytes=1)
    worker = Scripted(seconds, 0.1)
    assert not train._take_turn(worker, figures, counts=False, may_end=may_end)
    assert not train._take_turn(worker, figures, counts=True, may_end=may_end)
    assert figures.seconds == [0.1]


def figures_of(**seconds: float) -> dict[Method, Figures]:
    """Figures that differ in their time, and in a tensor more than LoRA's for everybody else."""
    keys: Mapping[str, Method] = {"ours": "ours", "lora": "lora", "peft": "peft-hra"}
    return {
        keys[name]: Figures(8, 100, seconds=[value], peak_bytes=300, held_bytes=100 if name == "lora" else 104)
        for name, value in seconds.items()
    }


@pytest.mark.parametrize(
    ("width", "ours", "peft", "met"),
    [
        (4096, 1.1, 11.0, {"time": True, "memory": True, "speed": True}),
        (4096, 1.2, 11.0, {"time": False, "memory": True, "speed": False}),
        (1024, 1.0, 1.0, {"time": True, "memory": True, "speed": True}),
        (0, 1.0, 0.9, {"time": True, "memory": True, "speed": False}),
    ],
)
def test_bars_are_those_that_are_promised(width: int, ours: float, peft: float, met: dict[str, bool]) -> None:
    case = replace(LAYER, width=width)
    figures = figures_of(ours=ours, lora=1.0, peft=peft)
    assert bars(case, figures) == met
    heavier = figures | {"ours": replace(figures["ours"], held_bytes=106)}
    assert bars(case, heavier) == met | {"memory": False}


def test_table_names_missed_bars_and_failures() -> None:
    figures = figures_of(ours=1.2, lora=1.0, peft=1.0)
    figures["peft-hra"] = Figures(8, 100, failure="out of memory")
    rows = {row[1]: dict(zip(train.HEADER, row, strict=True)) for row in table(LAYER, figures)}
    assert rows["ours"]["bars"] == "missed: time"
    assert rows["ours"]["PEFT HRA ÷"] == ""
    assert rows["lora"]["bars"] == ""
    assert rows["peft-hra"]["s a step"] == "out of memory"


@pytest.mark.parametrize(("name", "parameters"), [("1B", 1_235_814_400), ("3B", 3_212_749_824), ("8B", 8_030_261_248)])
def test_llamas_have_the_published_numbers_of_parameters(name: str, parameters: int) -> None:
    """As the model cards of Llama 3.2 1B, 3.2 3B and 3.1 8B count them, a tied head once."""
    model = build_base(SIZES[name], torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def base() -> nn.Module:
    return build_base(TOY, torch.device("cpu"))


def toy_ids() -> torch.Tensor:
    return torch.randint(TOY.vocabulary, (2, 8))


def test_a_sharing_copy_has_the_same_weights_and_its_own_modules(base: nn.Module) -> None:
    twin: Any = sharing_copy(base)
    assert all(one is other for one, other in zip(base.parameters(), twin.parameters(), strict=True))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    adapt(twin, "ours", 4, PROJECTIONS)
    assert not any("hra" in name for name, _ in base.named_parameters())


def test_gpu_measure_compares_all_on_one_base(base: nn.Module) -> None:
    before = [parameter.clone() for parameter in base.parameters()]
    figures = train_gpu.measure(base, train_gpu.Case("1B", "all"), toy_ids(), rounds=2)
    assert list(figures) == list(METHODS)
    assert [each.failure for each in figures.values()] == [None] * len(METHODS)
    assert {len(each.seconds) for each in figures.values()} == {2}
    assert figures["ours"].parameters == figures["peft-hra"].parameters
    assert all(torch.equal(old, new) for old, new in zip(before, base.parameters(), strict=True))


# Dynamo looks at it on purpose.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_gpu_measure_compiles_blocks_without_breaks(base: nn.Module) -> None:
    """One graph for the first of three blocks, whose input wants no gradient, and one for the others."""
    try:
        figures = train_gpu.measure(base, train_gpu.Case("1B", "all", backend="eager"), toy_ids(), rounds=1)
    finally:
        torch.compiler.reset()
    assert list(figures) == ["ours", "lora", "oft"]
    assert [each.failure for each in figures.values()] == [None] * 3
    assert [(each.graphs, each.graph_breaks) for each in figures.values()] == [(2, 0)] * 3


def test_gpu_measure_goes_on_when_a_contender_runs_out_of_memory(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapt_unless_lora(model: nn.Module, method: Method, *rest: Any) -> Any:
        if method == "lora":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return adapt(model, method, *rest)

    monkeypatch.setattr(train_gpu, "adapt", adapt_unless_lora)
    case = train_gpu.Case("1B", "qv", checkpointing=True)
    figures = train_gpu.measure(base, case, toy_ids(), rounds=1)
    assert figures["lora"].failure == "OutOfMemoryError: CUDA out of memory."
    assert figures["ours"].seconds
    rows = {row[1]: dict(zip(train_gpu.HEADER, row, strict=True)) for row in train_gpu.table(case, figures)}
    assert rows["lora"]["s a step"] == figures["lora"].failure
    assert rows["ours"]["÷ LoRA"] == ""


@pytest.fixture
def toy_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every size is the toy, and results are written here."""
    monkeypatch.setattr(train_gpu, "SIZES", dict.fromkeys(SIZES, TOY))
    monkeypatch.setattr(train_gpu, "TOKENS", 8)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path / "train_gpu.json"


def test_gpu_cases_are_reported_with_those_left_out(toy_results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands at 0, 1, 2 s when the first, second and third case could begin."""
    clock = SimpleNamespace(monotonic=iter([0.0, 0.0, 1.0, 2.0]).__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr(train_gpu, "time", clock)
    monkeypatch.setattr(train_gpu, "measure", lambda *_: {"ours": train_gpu.Figures(1, seconds=[1.0])})
    chosen = [train_gpu.Case(size, "qv") for size in ("1B", "3B", "8B")]
    assert train_gpu.run_cases(chosen, torch.device("cpu"), rounds=1, budget=1.5) == 0
    results = json.loads(toy_results.read_text())
    assert list(results["cases"]) == ["1B-qv-eager", "3B-qv-eager"]
    assert results["left_out"] == ["8B-qv-eager"]


def test_gpu_cases_that_are_done_are_reported_when_another_breaks(
    toy_results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([{"ours": train_gpu.Figures(1, seconds=[1.0])}])
    monkeypatch.setattr(train_gpu, "measure", lambda *_: next(answers))
    chosen = [train_gpu.Case("1B", "qv"), train_gpu.Case("1B", "all")]
    with pytest.raises(StopIteration):
        train_gpu.run_cases(chosen, torch.device("cpu"), rounds=1, budget=60)
    assert list(json.loads(toy_results.read_text())["cases"]) == ["1B-qv-eager"]


def test_gpu_cases_in_which_ours_fails_fail(toy_results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method, code in (("ours", 1), ("peft-hra", 0)):
        failed = {method: train_gpu.Figures(1, failure="out of memory")}
        monkeypatch.setattr(train_gpu, "measure", lambda *_, failed=failed: failed)
        chosen = [train_gpu.Case("1B", "qv")]
        assert train_gpu.run_cases(chosen, torch.device("cpu"), rounds=1, budget=60) == code
    assert toy_results.exists()


def test_gpu_benchmark_without_a_gpu_ends_with_the_code_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_gpu"])
    with pytest.raises(SystemExit) as raised:
        train_gpu.main()
    assert raised.value.code == DeviceError.exit_code
    assert "torch sees none" in capsys.readouterr().err
