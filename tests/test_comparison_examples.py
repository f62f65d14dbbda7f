"""The comparisons of `examples/`: what they read, how they split and choose, and one tiny run of every method."""

import hashlib
import importlib
import io
import json
import math
import os
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hra_export.errors import FormatError
from tests.tiny_models import build

EXAMPLES = Path(__file__).parent.parent / "examples"
MODULES = ("comparison", "demo", "methods", "sentiment", "compare_orders")
HEAD = ("pooler", "classifier")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, found the way Python finds them for `python examples/sentiment.py`."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def sentiment(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["sentiment"]


@pytest.fixture
def comparison(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["comparison"]


@pytest.fixture
def methods(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["methods"]


@pytest.fixture
def orders(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["compare_orders"]


# ---------------------------------------------------------------- the archive and its rows


def archive(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    """A .tar.gz in memory."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as files:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(content)
            files.addfile(info, io.BytesIO(content))
    return target.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is no regular file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def lines(*rows: tuple[object, ...]) -> bytes:
    """Rows in the format of the file."""
    return "".join("\t".join(map(str, row)) + "\r\n" for row in rows).encode()


ROWS = lines((1, 2.5, "A warm, funny film."), (2, -0.6, "Effective but too tepid"), (3, 0, "A film."), (4, 4, "Café!"))


def test_sentences_come_out_of_the_archive_in_the_archive(
    sentiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = archive(("hutto_ICWSM_2014/_README_.txt", b"read me"), (sentiment.DATA_FILE, ROWS))
    sdist = archive(("vaderSentiment-3.3.2/setup.py", b""), (sentiment.DATA_ARCHIVE, inner))
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(sdist)
    monkeypatch.setattr(sentiment, "DATA_SHA256", hashlib.sha256(sdist).hexdigest())
    monkeypatch.setattr(sentiment, "DATA_ROWS", 4)
    found = [(s.text, s.is_positive) for s in sentiment.fetch_sentences(tmp_path)]
    assert found == [("A warm, funny film.", True), ("Effective but too tepid", False), ("Café!", True)]


def test_a_kept_archive_of_another_digest_is_refused(sentiment: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(archive((sentiment.DATA_ARCHIVE, b"")))
    with pytest.raises(FormatError, match="another digest"):
        sentiment.fetch_sentences(tmp_path)


def test_reading_a_member_writes_nothing_whatever_the_names(
    sentiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    hostile = archive(
        ("../outside.txt", b"x"),
        (str(tmp_path / "absolute.txt"), b"x"),
        (special("link", tarfile.SYMTYPE, str(tmp_path)), b""),
        ("link/through.txt", b"x"),
        ("wanted", b"content"),
    )
    assert sentiment.member(hostile, "wanted") == b"content"
    assert [path.name for path in tmp_path.rglob("*")] == ["inside"]


@pytest.mark.parametrize(
    "members",
    [
        [],
        [("other", b"x")],
        [("./wanted", b"x")],
        [("wanted", b"x"), ("wanted", b"y")],
        [("wanted", b"x" * 101)],
        [(special("wanted", tarfile.SYMTYPE, "/etc/passwd"), b"")],
        [("other", b"x"), (special("wanted", tarfile.LNKTYPE, "other"), b"")],
        [(special("wanted", tarfile.DIRTYPE), b"")],
        [(special("wanted", tarfile.FIFOTYPE), b"")],
    ],
    ids=["empty", "missing", "another spelling", "twice", "too large", "symlink", "hard link", "folder", "pipe"],
)
def test_a_member_must_be_one_small_file(
    sentiment: ModuleType, monkeypatch: pytest.MonkeyPatch, members: list[Any]
) -> None:
    monkeypatch.setattr(sentiment, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(FormatError, match="wanted"):
        sentiment.member(archive(*members), "wanted")


@pytest.mark.parametrize("keep", [0, 1, 60, 30_000])
def test_a_broken_archive_is_refused(sentiment: ModuleType, keep: int) -> None:
    whole = archive(("first", os.urandom(20_000)), ("wanted", os.urandom(20_000)))
    with pytest.raises(FormatError):
        sentiment.member(whole[:keep], "wanted")


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (lines((1, 1, "a"), (3, 1, "b")), ":2:"),
        (lines((1, 1, "a"), (2, "b")), ":2:"),
        (lines((1, 1, "a", "b")), ":1:"),
        (lines((1, 4.1, "a")), ":1:"),
        (lines((1, "nan", "a")), ":1:"),
        (lines((1, "good", "a")), ":1:"),
        (lines((1, 1, " ")), ":1:"),
        (lines((1, 1, "a"), (2, 1, "b")).replace(b"\r", b""), ":1:"),
        (lines((1, 1, "a"), (2, 1, "b")) + b"\r\n", ":3:"),
        ("1\t1\tCafé\r\n2\t1\tb\r\n".encode("cp1252"), "not UTF-8"),
        (lines((1, 1, "a")), "expected 2 rows, got 1"),
        (b"", ":1:"),
    ],
)
def test_rows_of_another_format_are_refused_by_number(sentiment: ModuleType, content: bytes, finding: str) -> None:
    with pytest.raises(FormatError, match=finding):
        sentiment.read_ratings(content, 2)


def test_last_line_may_lack_its_end(sentiment: ModuleType) -> None:
    assert sentiment.read_ratings(b"1\t-1.5\ta\r\n2\t2\tb", 2) == [(-1.5, "a"), (2.0, "b")]


@pytest.mark.parametrize("lost", [None, "model.safetensors"])
def test_the_model_appears_whole_or_not_at_all(
    sentiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str | None
) -> None:
    def fetch(_: str, __: str, path: Path, *___: str) -> None:
        with zipfile.ZipFile(path, "w") as wheel:
            for name in {*sentiment.MODEL_FILES, "../escaped"} - {lost}:
                wheel.writestr(f"{sentiment.MODEL_FOLDER}/{name}", name)

    monkeypatch.setattr(sentiment, "fetch", fetch)
    if lost is None:
        directory = sentiment.fetch_model(tmp_path)
        assert {path.name: path.read_text() for path in directory.iterdir()} == {n: n for n in sentiment.MODEL_FILES}
        assert sentiment.fetch_model(tmp_path) == directory
    else:
        with pytest.raises(FormatError, match=lost):
            sentiment.fetch_model(tmp_path)
        assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the split


@pytest.fixture
def sentences(sentiment: ModuleType) -> list[Any]:
    return [sentiment.Sentence(f"This is sentence {i} of many.", i % 2 == 0) for i in range(2000)]


def test_split_uses_every_sentence_once_in_the_stated_shares(sentiment: ModuleType, sentences: list[Any]) -> None:
    parts = sentiment.split(sentences)
    assert sorted(s.text for part in vars(parts).values() for s in part) == sorted(s.text for s in sentences)
    for part, share in ((parts.train, 0.74), (parts.dev, 0.06), (parts.test, 0.20)):
        # five standard deviations of a binomial count
        assert abs(len(part) - 2000 * share) < 5 * math.sqrt(2000 * share * (1 - share))


def test_split_does_not_depend_on_the_other_sentences(sentiment: ModuleType, sentences: list[Any]) -> None:
    whole, half = sentiment.split(sentences), sentiment.split(sentences[1000::-1])
    for name, part in vars(half).items():
        assert set(part) <= set(getattr(whole, name))


def test_split_keeps_the_same_words_together(sentiment: ModuleType, sentences: list[Any]) -> None:
    twins = [sentiment.Sentence(f"...{s.text.upper().replace(' ', ',  ')}'", not s.is_positive) for s in sentences]
    first, second = sentiment.split(sentences), sentiment.split(twins)
    for name, part in vars(first).items():
        assert [sentences.index(s) for s in part] == [twins.index(s) for s in getattr(second, name)]


def test_orders_are_chosen_by_rows_that_do_not_train(orders: ModuleType) -> None:
    train, dev, test = ({row["prompt"] for row in part} for part in orders.read_parts())
    assert (len(train), len(dev), len(test)) == (608, 32, 64)
    assert not train & dev
    assert not test & (train | dev)


# ---------------------------------------------------------------- what trains


def llama_shapes(hidden: int, middle: int, keys: int, layers: int) -> dict[str, tuple[int, int]]:
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, middle),
        "mlp.up_proj": (hidden, middle),
        "mlp.down_proj": (middle, hidden),
    }
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def spent(shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> int:
    """Parameters of LoRA: A is (r, in), B is (out, r)."""
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


@pytest.mark.parametrize("sizes", [(576, 1536, 192, 30), (64, 256, 64, 2)], ids=["SmolLM2", "square"])
def test_lora_ranks_spend_what_hra_spends(methods: ModuleType, sizes: tuple[int, int, int, int]) -> None:
    shapes = llama_shapes(*sizes)
    hra = sum(8 * features for features, _ in shapes.values())
    ranks = methods.lora_ranks(shapes, hra)
    assert spent(shapes, ranks) == hra
    assert max(ranks.values()) - min(ranks.values()) <= 1
    for name in shapes:  # every layer is treated alike
        assert ranks[name] == ranks[name.replace(name.split(".")[1], "0", 1)]


def test_lora_ranks_leave_targets_out_when_one_rank_each_is_too_much(methods: ModuleType) -> None:
    shapes = {"a.0": (10, 10), "a.1": (10, 10), "b.0": (100, 100)}
    assert methods.lora_ranks(shapes, 40) == {"a.0": 1, "a.1": 1}


def test_lora_ranks_refuse_what_is_not_equal(methods: ModuleType) -> None:
    with pytest.raises(ValueError, match="the closest give 200"):
        methods.lora_ranks({"a": (100, 100)}, 250)


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # wide initial weights, so that frozen layers tell tokens apart
    return BertForSequenceClassification(BertConfig(vocab_size=15, initializer_range=0.1, num_labels=2, **sizes))


def adapted(scripts: dict[str, ModuleType], method: str) -> Any:
    """A tiny encoder, made ready as `sentiment.py` makes MiniLM."""
    model, methods = tiny_bert(), scripts["methods"]
    return methods.adapt(model, method, methods.linear_names(model, scripts["sentiment"].TARGETS), HEAD)


def test_methods_train_the_same_head_and_as_many_parameters(scripts: dict[str, ModuleType]) -> None:
    count = scripts["methods"].count_trainable
    counts = {method: count(adapted(scripts, method), HEAD) for method in ("hra", "lora", "full", "head")}
    vectors = 2 * 8 * (5 * 32 + 64)  # layers · rank · in_features
    head = 32 * 32 + 32 + 2 * 32 + 2
    whole = sum(parameter.numel() for parameter in tiny_bert().parameters())
    assert counts == {"hra": (vectors, head), "lora": (vectors, head), "full": (whole - head, head), "head": (0, head)}


def test_only_weights_that_decay_may_decay(scripts: dict[str, ModuleType], comparison: ModuleType) -> None:
    """Reflection vectors, biases and norms have no decay, the head its own rate, and nothing is left out."""
    run = tiny_run(comparison, "hra")
    model = adapted(scripts, "hra")
    groups = scripts["methods"].parameter_groups(model, run, HEAD)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found
        elif "hra_u" in name:
            assert found[id(parameter)] == (run.learning_rate, 0.0)
        else:
            assert found[id(parameter)][0] == run.head_rate
            assert (found[id(parameter)][1] == 0.0) == name.endswith("bias")


# ---------------------------------------------------------------- tiny runs


def tiny_run(comparison: ModuleType, method: str, learning_rate: float = 1e-2) -> Any:
    return comparison.Run(method, learning_rate, 0, steps=50, rows_per_step=8, head_rate=1e-2, bf16=False)


def made_up_rows(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths; positive ones have other tokens than negative ones."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(*words, (5 + i % 4,), generator=generator).tolist(), "labels": i % 2}
        for i, words in zip(range(count), cycle([(1, 8), (8, 15)]))
    ]


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@pytest.mark.parametrize("method", ["hra", "lora", "full", "head"])
def test_a_method_learns_and_leaves_frozen_weights_alone(
    scripts: dict[str, ModuleType], comparison: ModuleType, method: str
) -> None:
    model = adapted(scripts, method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer, watch = scripts["methods"].fit(
        model,
        tiny_run(comparison, method),
        rows=(made_up_rows(160), made_up_rows(32)),
        collate=pad,
        head=HEAD,
        compute_metrics=scripts["sentiment"].scores,
    )
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert [step for step, _ in watch.evaluations] == [13, 26, 39, 50]
    losses = [found["eval_loss"] for _, found in watch.evaluations]
    assert losses[-1] < losses[0]
    assert watch.evaluations[-1][1]["eval_accuracy"] > 0.9
    assert watch.seconds > 0


@pytest.mark.parametrize("method", ["hra", "full"])
def test_answer_trainer_loses_what_the_model_itself_loses(
    scripts: dict[str, ModuleType], comparison: ModuleType, orders: ModuleType, method: str
) -> None:
    """transformers' own loss over the same labels: padding and prompts count for nothing."""
    torch.manual_seed(0)
    model = build("llama")
    methods = scripts["methods"]
    model = methods.adapt(model, method, methods.linear_names(model, orders.TARGETS))
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]},
        {"input_ids": [10, 11, 12, 13], "labels": [-100, 11, 12, 13]},
    ]
    trainer, _ = methods.fit(
        model,
        replace(tiny_run(comparison, method), steps=2, rows_per_step=2),
        rows=(rows, rows),
        collate=orders.padder(0),
        trainer_type=orders.AnswerTrainer,
        evaluations=1,
    )
    batch = orders.padder(0)(rows)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).loss
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


# ---------------------------------------------------------------- choosing, keeping, telling


def result(comparison: ModuleType, run: Any, score: float = 0.8) -> Any:
    return comparison.Result(run, 1200, 34, 61.5, 2 * 10**9, ((5, 0.5), (10, score)), 0.4, {"accuracy": score})


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (3e-3, [1e-3, 3e-3, 1e-2]),
        (1.1e-2, [1e-3, 3e-3, 1e-2, 3e-2]),
        (2.5e-2, [1e-3, 3e-3, 1e-2, 3e-2, 9e-2]),
        (1.0, [1e-3, 3e-3, 1e-2, 3e-2, 9e-2]),
        (3e-4, [1.11e-4, 3.33e-4, 1e-3, 3e-3, 1e-2]),
    ],
)
def test_search_goes_beyond_the_grid_while_the_best_lies_at_its_end(
    comparison: ModuleType, best: float, tried: list[float]
) -> None:
    losses = comparison.search((1e-3, 3e-3, 1e-2), lambda rate: abs(math.log(rate / best)))
    assert list(losses) == tried


def test_search_never_takes_a_rate_that_diverged(comparison: ModuleType) -> None:
    losses = comparison.search((1.0, 2.0, 4.0), lambda rate: math.nan if rate > 1 else 5.0)
    assert min(losses, key=lambda rate: losses[rate]) < 2


def test_compare_runs_every_seed_at_the_rate_with_the_least_development_loss(comparison: ModuleType) -> None:
    asked = []

    def execute(run: Any) -> Any:
        asked.append((run.method, run.learning_rate, run.seed))
        return replace(result(comparison, run), dev_loss=abs(run.learning_rate - 2))

    outcomes = comparison.compare({"hra": (1, 2, 4), "head": (7,)}, tiny_run(comparison, ""), 3, execute)
    assert asked[3:] == [*(("hra", 2, seed) for seed in range(3)), *(("head", 7, seed) for seed in range(3))]
    assert [r.run.seed for r in outcomes["hra"].results] == [0, 1, 2]
    assert outcomes["hra"].searched == {1: 1, 2: 0, 4: 2}


def test_one_seed_searches_nothing(comparison: ModuleType) -> None:
    outcomes = comparison.compare({"hra": (1, 2, 4)}, tiny_run(comparison, ""), 1, lambda run: result(comparison, run))
    assert [r.run.learning_rate for r in outcomes["hra"].results] == [2]
    assert outcomes["hra"].searched == {}


def test_a_kept_result_is_not_run_again(comparison: ModuleType, tmp_path: Path) -> None:
    expected = result(comparison, tiny_run(comparison, "hra"))
    comparison.keep(expected, tmp_path)
    assert comparison.kept(tmp_path / "no_such_script.py", tmp_path, [], expected.run) == expected
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [expected.run.file]


def test_a_run_that_fails_ends_the_comparison_with_its_exit_code(comparison: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(4)")
    with pytest.raises(SystemExit) as ended:
        comparison.kept(script, tmp_path, [], tiny_run(comparison, "hra"))
    assert ended.value.code == 4
    assert not (tmp_path / "runs").exists()


def test_different_runs_are_kept_apart(comparison: ModuleType) -> None:
    run = tiny_run(comparison, "hra")
    changes: dict[str, Any] = {
        "method": "lora",
        "learning_rate": 2e-2,
        "seed": 1,
        "steps": 51,
        "rows_per_step": 9,
        "head_rate": 2e-2,
        "bf16": True,
    }
    assert changes.keys() == vars(run).keys()
    files = {replace(run, **{name: value}).file for name, value in changes.items()}
    assert len(files | {run.file}) == len(changes) + 1


@pytest.fixture
def outcomes(comparison: ModuleType) -> dict[str, Any]:
    """Three methods, three seeds."""
    return {
        method: comparison.Outcome(
            {0.003: 0.5, 0.01: math.inf},
            tuple(result(comparison, replace(tiny_run(comparison, method), seed=s), 0.8 + s / 100) for s in range(3)),
        )
        for method in ("hra", "lora", "full")
    }


def test_table_gives_mean_and_deviation(comparison: ModuleType, outcomes: dict[str, Any]) -> None:
    text = comparison.table(outcomes, [comparison.Score("accuracy", "test accuracy")]).splitlines()
    assert text[0].split("  ")[0] == "method"
    assert [line[:16].strip() for line in text[2:]] == ["HRA", "LoRA", "full fine-tuning"]
    for part in ("1,200", "34", "0.01", "81.0 ± 1.0%", "62 s", "2.00 GB"):
        assert part in text[2]
    assert len({len(line) for line in text}) == 1


def test_one_seed_has_no_deviation(comparison: ModuleType) -> None:
    assert comparison.Score("accuracy", "").text([0.8]) == "80.0%"


def test_results_are_strict_json_with_every_run(
    comparison: ModuleType, outcomes: dict[str, Any], tmp_path: Path
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    comparison.write_results(outcomes, tmp_path / "new" / "results.json", rows=7)
    data = json.loads((tmp_path / "new" / "results.json").read_text(), parse_constant=refuse)
    assert data["rows"] == 7
    assert [each["run"]["seed"] for each in data["methods"]["lora"]["results"]] == [0, 1, 2]
    assert data["methods"]["lora"]["searched"][1] == {"learning_rate": 0.01, "dev_loss": None}


@pytest.mark.parametrize("is_share", [True, False])
def test_picture_is_a_small_png(
    comparison: ModuleType, outcomes: dict[str, Any], tmp_path: Path, is_share: bool
) -> None:
    path = tmp_path / "new" / "picture.png"
    curve = comparison.Score("accuracy", "development score", is_share=is_share)
    test = comparison.Score("accuracy", "test accuracy")
    comparison.draw(outcomes, path, curve=curve, test=test, title="A title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000
