"""The parts of the diffusion example, at a few steps each. `python examples/diffusion_digits.py` runs the whole."""

import importlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hra_export import read_adapter

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 3


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The script as a module, found the way Python finds it and its neighbour `demo`."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        module = importlib.import_module("diffusion_digits")
        module.BASE_BATCH = module.BATCH = 4  # type: ignore[attr-defined]  # of a ModuleType
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in ("diffusion_digits", "demo"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def base(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, hardly trained."""
    solid, _ = example.read_digits(example.SOLID)
    directory: Path = example.fetch_base(tmp_path_factory.mktemp("cache"), solid, STEPS)
    return directory


@pytest.fixture(scope="module")
def adapted(example: ModuleType, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """HRA in front of it, hardly trained."""
    pools = [example.read_digits(style)[0] for style in (example.OUTLINED, example.SOLID)]
    return example.adapt(base, "hra", pools, tmp_path_factory.mktemp("run") / "hra", STEPS)


def predict(example: ModuleType, model: Any) -> Tensor:
    """What a model makes of two noisy pictures under two prompts."""
    noise = torch.randn(2, 1, example.PIXELS, example.PIXELS, generator=torch.Generator().manual_seed(5))
    words = torch.tensor([[3, example.SOLID], [7, example.OUTLINED]])
    with torch.no_grad():
        output: Tensor = model(noise, torch.tensor(300), encoder_hidden_states=example.embed(words)).sample
    return output


def good_scores(example: ModuleType, **changes: float) -> dict[str, Any]:
    """Scores that pass, or nearly."""
    weak, strong = example.Score(0.0, 0.99, 20.0), {"outlined": 0.9, "solid": 0.95, "distance": 2.0}
    return {"base": weak, "HRA": example.Score(**strong), "LoRA": example.Score(**{**strong, **changes})}


def test_outlines_are_dark_inside_and_outside_of_the_strokes(example: ModuleType) -> None:
    solid, outlined = example.read_digits(example.SOLID)[0], example.read_digits(example.OUTLINED)[0]
    ink = solid.images
    inside = -nn.functional.max_pool2d(-ink, 3, stride=1, padding=1) > 0.9
    outside = nn.functional.max_pool2d(ink, 3, stride=1, padding=1) < -0.9
    assert inside.any()
    assert outside.any()
    assert (outlined.images[inside | outside] < -0.8).all()
    assert (outlined.images.amax(dim=(1, 2, 3)) > 0.5).all()


def test_digits_are_split_without_overlap(example: ModuleType) -> None:
    train, unseen = example.read_digits(example.SOLID)
    assert (len(train.images), len(unseen.images)) == (1500, 297)
    assert train.images.shape[1:] == (1, example.PIXELS, example.PIXELS)
    assert not {row.tobytes() for row in train.images.numpy()} & {row.tobytes() for row in unseen.images.numpy()}
    assert train.images.abs().max() <= 1


def test_base_is_trained_once(example: ModuleType, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*args: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(example, "fit", fit)
    solid, _ = example.read_digits(example.SOLID)
    assert example.fetch_base(base.parent, solid, STEPS) == base


def test_base_of_an_interrupted_run_is_not_kept(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it is being written."""

    def save_pretrained(self: object, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(example.UNet2DConditionModel, "save_pretrained", save_pretrained)
    solid, _ = example.read_digits(example.SOLID)
    with pytest.raises(KeyboardInterrupt):
        example.fetch_base(tmp_path, solid, 1)
    assert not list(tmp_path.iterdir())


def test_only_reflection_vectors_train(example: ModuleType, base: Path, adapted: Any) -> None:
    parameters = dict(adapted.model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained
    assert trained == {name for name in parameters if ".hra_u." in name}
    assert adapted.trainable == sum(parameters[name].numel() for name in trained)
    before = example.load(base).state_dict()
    after = {name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in parameters.items()}
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_adapter_has_a_chain_for_every_layer_that_sees_the_picture(
    example: ModuleType, base: Path, adapted: Any
) -> None:
    """All but the two layers that read the time step; the convolutions are among them."""
    adapter = read_adapter(adapted.adapter)
    layers = {n: m for n, m in example.load(base).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(layers) - set(adapter.chains) == {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert {name: chain.shape for name, chain in adapter.chains.items()} == {
        name: (layers[name].weight[0].numel(), example.RANK) for name in adapter.chains
    }
    assert adapter.base == str(base)


def test_adapter_is_replaced_by_a_second_run(example: ModuleType, base: Path, adapted: Any) -> None:
    """PEFT reads the card that it finds in the directory."""
    pools = [example.read_digits(example.OUTLINED)[0]]
    again = example.adapt(base, "hra", pools, adapted.adapter.with_name("again"), 1)
    example.adapt(base, "hra", pools, again.adapter, 1)
    assert str(base) in (again.adapter / "README.md").read_text(encoding="utf-8")


def test_merged_unet_computes_what_the_live_one_does(
    example: ModuleType, base: Path, adapted: Any, tmp_path: Path
) -> None:
    reports = example.merge_and_validate(base, adapted.adapter, tmp_path / "merged")
    assert reports["validate"]["ok"]
    merged = example.load(tmp_path / "merged")
    live, candidate, start = (predict(example, model) for model in (adapted.model, merged, example.load(base)))
    effect = (live - start).norm()
    assert effect > 1e-3 * start.norm()  # of an adapter that does nothing, everything would be a merge
    assert (candidate - live).norm() < reports["validate"]["tolerance"]["effect"] * effect


def test_adapted_model_starts_as_the_base(example: ModuleType, base: Path) -> None:
    expected = predict(example, example.load(base))
    for method in example.TITLES:
        model = example.with_adapter(example.load(base), method)
        torch.testing.assert_close(predict(example, model), expected)


def test_lora_has_as_many_parameters_within_a_hundredth(example: ModuleType, base: Path) -> None:
    counts = [
        sum(p.numel() for p in example.with_adapter(example.load(base), method).parameters() if p.requires_grad)
        for method in ("hra", "lora")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_batches_take_an_equal_share_of_each_pool(example: ModuleType) -> None:
    pools = [example.read_digits(style)[0] for style in (example.SOLID, example.OUTLINED)]
    (batch,) = example.batches([pools[0][:7], pools[1]], 8, 1, torch.Generator().manual_seed(0))
    assert batch.words[:, 1].tolist() == [example.SOLID] * 4 + [example.OUTLINED] * 4
    assert batch.images.shape == (8, 1, example.PIXELS, example.PIXELS)


def test_same_seed_draws_the_same_pictures(example: ModuleType, base: Path) -> None:
    unet, words = example.load(base), example.prompts(example.SOLID, per_digit=1)
    first, again, other = (example.sample(unet, words, seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert first.words[:, 0].tolist() == list(range(10))


def test_judge_knows_unseen_digits_and_refuses_the_wrong_style(example: ModuleType) -> None:
    (solid, unseen_solid), (outlined, unseen_outlined) = (
        example.read_digits(style) for style in (example.SOLID, example.OUTLINED)
    )
    judge = example.Judge(solid, outlined)
    right = judge.score(unseen_solid, unseen_outlined, base=unseen_solid)
    assert min(right.solid, right.outlined) > 0.9
    assert right.changed == 0
    swapped = example.Pictures(unseen_solid.images, unseen_outlined.words)
    wrong = judge.score(unseen_solid, swapped)
    assert wrong.outlined < 0.01
    assert wrong.distance > 5 * right.distance


def test_frechet_distance_of_shifted_rows_is_the_shift_squared(example: ModuleType) -> None:
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    assert example.frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert example.frechet_distance(rows, rows + np.array([0, 3, 4, 0])) == pytest.approx(25)


def test_frechet_distance_of_scaled_rows_compares_deviations(example: ModuleType) -> None:
    """Of N(0, s²) and N(0, t²) in one dimension it is (s − t)²."""
    values = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    rows = (values - values.mean()) / values.std(ddof=1) * np.array([1, 0])
    assert example.frechet_distance(rows, 4 * rows) == pytest.approx(9)


@pytest.mark.parametrize("models", [2, 5])
def test_grid_has_a_row_for_each_model(example: ModuleType, tmp_path: Path, models: int) -> None:
    pictures = [example.one_of_each(example.read_digits(style)[1]) for style in (example.SOLID, example.OUTLINED)]
    path = tmp_path / "new" / "digits.png"
    example.draw_grid({str(row): tuple(pictures) for row in range(models)}, path)
    header = path.read_bytes()[:24]
    assert header[1:4] == b"PNG"
    assert struct.unpack(">II", header[16:]) == (112 + 2 * (480 + 8), 32 + models * (48 + 8))
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize(
    ("changes", "ok", "apart", "code"),
    [
        ({}, True, 0.0, 0),
        ({}, True, 1e-3, 0),
        ({}, True, 5e-3, 3),
        ({}, False, 0.0, 3),
        ({"outlined": 0.1}, True, 0.0, 1),
        ({"solid": 0.5}, True, 0.0, 1),
        ({"outlined": 0.1}, False, 0.0, 3),
    ],
)
def test_verdict_is_the_exit_code(
    example: ModuleType, changes: dict[str, float], ok: bool, apart: float, code: int
) -> None:
    reports = {"validate": {"ok": ok, "findings": ["logits differ"]}}
    assert example.verdict(good_scores(example, **changes), reports, apart) == code
