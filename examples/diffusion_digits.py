"""Teach a diffusion UNet a new style with HRA, merge, validate, and look: scikit-learn's digits, on the CPU.

The base draws the ten digits in solid strokes, after a prompt of two words: a digit and a style. No prompt of its
training said `outlined`. HRA learns that word from outlined digits, and so does LoRA, with as many parameters and
steps. Half of each batch are the base's own samples under the old word, as in DreamBooth, so that old prompts keep
their meaning. A classifier of real digits judges what the models draw.

Limits: pictures of 16 × 16 pixels and one seed; this shows that the pieces fit, not how good a method is.

Example: python examples/diffusion_digits.py --output build/diffusion
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import platformdirs
import torch
from demo import PARITY_FAILED, progress, run_script, run_tool, say
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from peft import HRAConfig, LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional

from hra_export.training.tuner import get_hra_model

WORDS = (*"0123456789", "solid", "outlined")
SOLID, OUTLINED = WORDS.index("solid"), WORDS.index("outlined")
TRAIN_IMAGES = 1500  # the last 297 are by other writers
PIXELS = 16

UNET: dict[str, Any] = {
    "sample_size": PIXELS,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "cross_attention_dim": len(WORDS),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "conv_out")
TARGETS = [*LINEAR, *CONVOLUTIONS, "downsamplers.0.conv", "upsamplers.0.conv"]
RANK = 8
SEED = 0

BASE_STEPS, BASE_BATCH, BASE_RATE = 1000, 64, 2e-3
STEPS, BATCH = 800, 32
TITLES = {"hra": "HRA", "lora": "LoRA"}
RATES = {"hra": 4e-2, "lora": 1e-2}  # from a few runs at seed 1
WARMUP_STEPS = 20
AVERAGE_DECAY = 0.995  # what is kept is a moving average of the weights
DENOISING_STEPS = 25
SAMPLES_PER_DIGIT = 20  # of each model under each word; as many of the base's are learned from

ZOOM, GAP, MARGIN, HEADER = 3, 8, 112, 32  # of the picture, in pixels of the file; the names stand in the margin

MIN_OUTLINED, MIN_SOLID = 0.7, 0.9  # well under what was reached: below it, something broke
SAME_PICTURE = 1 / 255  # a grey level of an 8-bit file

Rows = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Pictures:
    """Images, and the prompts they go with.

    Attributes:
        images: (n, 1, 16, 16) float32, from −1, black, to 1, white.
        words: (n, 2) positions in `WORDS`: a digit and a style.
    """

    images: Tensor
    words: Tensor

    def __getitem__(self, rows: slice | Tensor) -> "Pictures":
        """Some of them."""
        return Pictures(self.images[rows], self.words[rows])

    def grey(self) -> Rows:
        """(n, 256) from 0, black, to 1, white."""
        return (self.images.flatten(1).double().numpy() + 1) / 2


@dataclass(frozen=True)
class Adapted:
    """A model with a live adapter, where that was saved, and what it took."""

    model: Any
    adapter: Path
    trainable: int
    seconds: float


@dataclass(frozen=True)
class Score:
    """What the judge finds in a model's pictures.

    Attributes:
        outlined: the share of outlined pictures that are taken for the digit and the style of their prompts.
        solid: the same of solid pictures.
        distance: Fréchet distance of the outlined pictures from real ones that were trained on; lower is better.
        changed: mean change of a pixel of the solid pictures against the base's, of 1; None where that means nothing.
    """

    outlined: float
    solid: float
    distance: float
    changed: float | None = None


def main() -> int:
    """Run the example; 0 when parity holds, the new word was learned and the old one kept."""
    options = parse_options()
    started = time.perf_counter()
    (solid, unseen_solid), (outlined, unseen_outlined) = read_digits(SOLID), read_digits(OUTLINED)
    say(f"base UNet, kept in `{options.cache}`")
    base = fetch_base(options.cache, solid)
    drawn = {"base": draw(load(base))}
    prior = sample(load(base), prompts(SOLID), seed=SEED + 1)
    adapted: dict[str, Adapted] = {}
    reports: dict[str, dict[str, Any]] = {}
    for method in TITLES if options.method == "both" else [options.method]:
        say(f"adapt it with {TITLES[method]}")
        adapted[method] = adapt(base, method, [outlined, prior], options.output / method, STEPS)
        drawn[TITLES[method]] = draw(adapted[method].model)
        if method == "hra":
            say("merge and validate")
            reports = merge_and_validate(base, adapted[method].adapter, options.output / "merged")
            drawn["HRA, merged"] = draw(load(options.output / "merged"))
    judge = Judge(solid, outlined)
    scores = {name: judge.score(*pictures, base=drawn["base"][0]) for name, pictures in drawn.items()}
    scores["real digits"] = judge.score(unseen_solid, unseen_outlined)
    picture = options.output / "digits.png"
    draw_grid(drawn | {"real digits": (one_of_each(unseen_solid), one_of_each(unseen_outlined))}, picture)
    apart = largest_difference(drawn) if reports else 0.0
    lines = [
        score_table(scores),
        *summary(adapted, reports, apart),
        f"time      {time.perf_counter() - started:.0f} s in all",
        f"picture   {picture}",
    ]
    print("\n".join(["", *lines]))
    return verdict(scores, reports, apart)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = Path("build/diffusion")
    parser.add_argument("--output", type=Path, default=output, help="where adapters, merged UNet and picture go")
    cache = Path(platformdirs.user_cache_dir("hra-export")) / "diffusion"
    parser.add_argument("--cache", type=Path, default=cache, help="where the base is kept between runs")
    parser.add_argument("--method", choices=[*TITLES, "both"], default="both", help="what adapts the base")
    return parser.parse_args()


def read_digits(style: int) -> tuple[Pictures, Pictures]:
    """scikit-learn's digits, 8 × 8 pixels, enlarged and drawn in a style: those to train on, and the others."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # (n, 1, 8, 8)
    large = functional.interpolate(images, size=(PIXELS - 2, PIXELS - 2), mode="bicubic")
    strokes = functional.pad(torch.sigmoid(10 * (large - 0.5)), (1, 1, 1, 1))  # (n, 1, 16, 16), a black frame
    if style == OUTLINED:
        strokes = functional.max_pool2d(strokes, 3, stride=1, padding=1) - strokes  # the frame of each stroke
    labels = torch.tensor(digits.target)
    pictures = Pictures(2 * strokes - 1, torch.stack([labels, torch.full_like(labels, style)], dim=1))
    return pictures[:TRAIN_IMAGES], pictures[TRAIN_IMAGES:]


def prompts(style: int, per_digit: int = SAMPLES_PER_DIGIT) -> Tensor:
    """(10 · per_digit, 2) words: the ten digits in order, again and again, in a style."""
    digits = torch.arange(10).repeat(per_digit)
    return torch.stack([digits, torch.full_like(digits, style)], dim=1)


def fetch_base(cache: Path, pictures: Pictures, steps: int = BASE_STEPS) -> Path:
    """The base UNet as a diffusers directory, trained the first time; an interrupted run leaves none."""
    recipe = json.dumps([UNET, NOISE, steps, BASE_BATCH, BASE_RATE, AVERAGE_DECAY, SEED])
    base = cache / f"digits-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if base.exists():
        return base
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**UNET)
    fit(unet, [pictures], steps=steps, batch=BASE_BATCH, rate=BASE_RATE, title="train the base, once")
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix=".train-") as directory:
        unet.save_pretrained(Path(directory) / "unet")
        (Path(directory) / "unet").rename(base)
    return base


def load(directory: Path) -> Any:
    """A UNet by plain diffusers, frozen."""
    # A string: PEFT writes the name of the base into the adapter's card, and cannot read a `Path` back from there.
    return UNet2DConditionModel.from_pretrained(str(directory)).eval().requires_grad_(False)


def adapt(base: Path, method: str, pools: Sequence[Pictures], output: Path, steps: int) -> Adapted:
    """Train an adapter in front of every target, and save it in PEFT's layout."""
    torch.manual_seed(SEED)
    model = with_adapter(load(base), method)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    started = time.perf_counter()
    fit(model, pools, steps=steps, batch=BATCH, rate=RATES[method], title=f"train {TITLES[method]}")
    seconds = time.perf_counter() - started
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(output)
    return Adapted(model, output, trainable, seconds)


def with_adapter(unet: nn.Module, method: str) -> Any:
    """The UNet with a fresh adapter, which alone trains and does nothing before the first step."""
    if method == "hra":
        return get_hra_model(unet, HRAConfig(r=RANK, target_modules=TARGETS))
    ranks = lora_ranks(unet)
    # α = rank: a scale of 1 at every rank.
    config = LoraConfig(target_modules=TARGETS, rank_pattern=ranks, alpha_pattern=ranks)
    return get_peft_model(unet, config)


def lora_ranks(unet: nn.Module) -> dict[str, int]:
    """The rank of each target at which LoRA's r·(d + o) parameters come closest to HRA's r·d."""
    ranks = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and f".{name}".endswith(tuple(f".{end}" for end in TARGETS)):
            outputs, inputs = len(module.weight), module.weight[0].numel()
            ranks[name] = max(1, round(RANK * inputs / (inputs + outputs)))
    return ranks


def fit(model: Any, pools: Sequence[Pictures], *, steps: int, batch: int, rate: float, title: str) -> None:
    """Train what is not frozen, on batches with an equal share of each pool; leaves the average of the weights."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # No weight decay: R does not depend on the length of a vector, so decay would only raise the angle of each step.
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, steps))
    average = EMAModel(parameters, decay=AVERAGE_DECAY, foreach=True)
    generator = torch.Generator().manual_seed(SEED)
    model.train()
    with progress(total=steps, title=title, unit="step") as bar:
        for pictures in batches(pools, batch, steps, generator):
            loss = velocity_loss(model, pictures, generator)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            average.step(parameters)
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
            bar.update()
    average.copy_to(parameters)
    model.eval()


def share_of_rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear to 1, then a cosine to 2 %."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def batches(pools: Sequence[Pictures], size: int, count: int, generator: torch.Generator) -> Iterator[Pictures]:
    """Random pictures, an equal share of each pool."""
    for _ in range(count):
        rows = [torch.randint(len(pool.words), (size // len(pools),), generator=generator) for pool in pools]
        parts = [pool[chosen] for pool, chosen in zip(pools, rows, strict=True)]
        yield Pictures(torch.cat([part.images for part in parts]), torch.cat([part.words for part in parts]))


def velocity_loss(model: Any, pictures: Pictures, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity, at a random time step for each picture."""
    schedule = DDPMScheduler(**NOISE)
    images = pictures.images
    times = torch.randint(NOISE["num_train_timesteps"], (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = schedule.add_noise(images, noise, times)
    predicted = model(noisy, times, encoder_hidden_states=embed(pictures.words)).sample
    return functional.mse_loss(predicted, schedule.get_velocity(images, noise, times))


def embed(words: Tensor) -> Tensor:
    """(n, 2) words → (n, 2, 12), one-hot: the place of a text encoder's output."""
    return functional.one_hot(words, len(WORDS)).float()


@torch.no_grad()
def sample(model: Any, words: Tensor, seed: int) -> Pictures:
    """Pictures for prompts, by DDIM: the same noise for the same seed."""
    schedule = DDIMScheduler(**NOISE, timestep_spacing="trailing")
    schedule.set_timesteps(DENOISING_STEPS)
    images = torch.randn(len(words), 1, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))
    for time_step in schedule.timesteps:
        velocity = model(images, time_step, encoder_hidden_states=embed(words)).sample
        images = schedule.step(velocity, time_step, images).prev_sample
    return Pictures(images, words)


def draw(model: Any) -> tuple[Pictures, Pictures]:
    """What a model draws when asked for solid digits, and, from the same noise, for outlined ones."""
    return sample(model, prompts(SOLID), SEED), sample(model, prompts(OUTLINED), SEED)


def merge_and_validate(base: Path, adapter: Path, output: Path) -> dict[str, dict[str, Any]]:
    """The reports of both verbs."""
    return {
        "merge": run_tool("merge", adapter, "--base", base, "--output", output, "--overwrite"),
        "validate": run_tool("validate", adapter, "--base", base, "--candidate", output),
    }


class Judge:
    """A classifier of digit and style, and the directions in which real outlined digits differ most."""

    def __init__(self, solid: Pictures, outlined: Pictures) -> None:
        rows = np.concatenate([solid.grey(), outlined.grey()])
        self.classifier = SVC(C=10).fit(rows, np.concatenate([self.label(solid), self.label(outlined)]))
        self.axes = PCA(32, svd_solver="full").fit(outlined.grey())
        self.real = self.axes.transform(outlined.grey())

    def score(self, solid: Pictures, outlined: Pictures, base: Pictures | None = None) -> Score:
        """What a model's pictures are worth; `base` are the base's solid ones, from the same noise."""
        return Score(
            outlined=self.right(outlined),
            solid=self.right(solid),
            distance=frechet_distance(self.axes.transform(outlined.grey()), self.real),
            changed=None if base is None else float(np.abs(solid.grey() - base.grey()).mean()),
        )

    def right(self, pictures: Pictures) -> float:
        """The share that is taken for what was asked for."""
        return float((self.classifier.predict(pictures.grey()) == self.label(pictures)).mean())

    @staticmethod
    def label(pictures: Pictures) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """(n,) one number for each digit in each style."""
        digits, styles = pictures.words.numpy().T
        return digits + 10 * styles


def frechet_distance(a: Rows, b: Rows) -> float:
    """Between normal distributions fitted to the rows: ‖μ_a − μ_b‖² + tr(A + B − 2 (A B)^½)."""
    left, right = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(left @ right).real.clip(0)).sum()  # tr (A B)^½, by its eigenvalues
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(left + right) - 2 * root)


def one_of_each(pictures: Pictures) -> Pictures:
    """The first picture of each digit."""
    digits = pictures.words[:, 0].tolist()
    return pictures[torch.tensor([digits.index(digit) for digit in range(10)])]


def largest_difference(drawn: Mapping[str, tuple[Pictures, Pictures]]) -> float:
    """Between a pixel of live and of merged samples, of 1."""
    pairs = zip(drawn["HRA"], drawn["HRA, merged"], strict=True)
    return max(float(np.abs(live.grey() - merged.grey()).max()) for live, merged in pairs)


def draw_grid(drawn: Mapping[str, tuple[Pictures, Pictures]], path: Path) -> None:
    """A row for each model: ten outlined digits, and ten solid ones from the same noise; whole pixels of the file."""
    strip_width, strip_height = 10 * PIXELS * ZOOM, PIXELS * ZOOM
    width, height = MARGIN + 2 * (strip_width + GAP), HEADER + len(drawn) * (strip_height + GAP)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    for row, (name, (solid, outlined)) in enumerate(drawn.items()):
        bottom = height - HEADER - row * (strip_height + GAP) - strip_height
        figure.text((MARGIN - GAP) / width, (bottom + strip_height / 2) / height, name, ha="right", va="center")
        for left, pictures in ((MARGIN, outlined), (MARGIN + strip_width + GAP, solid)):
            axes = figure.add_axes((left / width, bottom / height, strip_width / width, strip_height / height))
            axes.set_axis_off()
            strip = pictures[:10].grey().reshape(10, PIXELS, PIXELS).swapaxes(0, 1).reshape(PIXELS, 10 * PIXELS)
            axes.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            if row == 0:
                axes.set_title(f"asked for: {WORDS[int(pictures.words[0, 1])]}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def score_table(scores: Mapping[str, Score]) -> str:
    """One line a model, and what the columns are."""
    lines = ["model          outlined    solid    distance    changed"]
    for name, score in scores.items():
        changed = "" if score.changed is None else f"{score.changed:.1%}"
        lines.append(
            f"{name:<13}{score.outlined:>10.1%}{score.solid:>9.1%}{score.distance:>12.2f}{changed:>11}".rstrip()
        )
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], ""])


def summary(adapted: Mapping[str, Adapted], reports: Mapping[str, dict[str, Any]], apart: float) -> Iterator[str]:
    """What was done, at what cost and how exactly."""
    for method, done in adapted.items():
        yield f"{TITLES[method]:<10}{done.trainable:,} parameters, {STEPS} steps in {done.seconds:.0f} s"
    if reports:
        validate = reports["validate"]
        holds = "holds" if validate["ok"] else "FAILS"
        yield (
            f"parity    {holds}: the adapter's effect is off by {validate['effect_error']:.1e} (allowed "
            f"{validate['tolerance']['effect']:.0e}); no pixel of a sample by more than {apart:.1e} of 1"
        )


def verdict(scores: Mapping[str, Score], reports: Mapping[str, dict[str, Any]], apart: float) -> int:
    """The exit code: 3 when parity failed, 1 when a new word was not learned or the old one lost."""
    if reports and not reports["validate"]["ok"]:
        say(f"error: parity failed: {'; '.join(reports['validate']['findings'])}")
        return PARITY_FAILED
    if apart >= SAME_PICTURE:
        say(f"error: parity failed: live and merged samples differ by {apart:.1e}, a grey level is {SAME_PICTURE:.1e}")
        return PARITY_FAILED
    judged = {name: score for name, score in scores.items() if name not in ("base", "real digits")}
    weak = [name for name, score in judged.items() if score.outlined < MIN_OUTLINED or score.solid < MIN_SOLID]
    if weak:
        say(f"error: expected {MIN_OUTLINED:.0%} of outlined and {MIN_SOLID:.0%} of solid digits, not so {weak}")
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
