"""Adapters for llama.cpp, judged by llama.cpp: what they do to a model's log-probabilities is what PyTorch says."""

import builtins
import hashlib
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from hra_export import llama_cpp
from hra_export.adapter import HraAdapter
from hra_export.attachment import attach
from hra_export.checkpoint import open_checkpoint
from hra_export.converted import ConvertReport
from hra_export.errors import (
    ConversionError,
    HraExportError,
    MismatchError,
    NumericalError,
    OutputError,
    UnsupportedModelError,
)
from hra_export.low_rank import HraSource
from hra_export.registry import load_converter
from tests import tiny_models
from tests.real_models import smollm2_gguf

pytest.importorskip("xllamacpp", reason="llama.cpp is the judge")

from tests import llama_cpp_judge as judge

from_gguf, to_gguf = load_converter("from_gguf"), load_converter("to_gguf")

PROMPTS = [[5, 17, 40, 8, 91], [3], [60, 61, 62, 5, 5, 9, 33, 2, 11]]
# float32 on both sides, sums in another order; 1e-6 was seen.
EFFECT_FP32 = 2e-5
# llama.cpp looks GELU up in a table of half precision: 2⁻¹¹ for each value, and the base is as far off.
EFFECT_GELU = 2e-3
GELU = ("gemma", "gemma2", "gemma3", "gpt2", "starcoder2")
# Factors and what is multiplied with them are rounded to 11 and 8 bits, in every layer.
EFFECT_HALF = {"float16": 2**-9, "bfloat16": 2**-6}
# Products with Q8_0 round activations to 8 bits for each 32 values: ten times less than an adapter that is missing.
EFFECT_Q8 = 0.1


class Scene:
    """A tiny model for both sides: PyTorch, a directory, llama.cpp's file; and what both say before any adapter."""

    def __init__(self, folder: Path, family: str, kind: Type = Type.F32) -> None:
        self.folder = folder
        self.model = judge.build(family)
        self.model.save_pretrained(folder / "base")
        self.base = open_checkpoint(folder / "base")
        self.file = judge.write_model(self.model, family, folder / "base.gguf", kind)

    def adapter(self, *, rank: int = 4, seed: int = 1, only: str = "") -> HraAdapter:
        head = not self.model.config.tie_word_embeddings
        modules = [name for name in judge.targets(self.model, head=head) if only in name]
        return judge.random_adapter(self.model, modules, rank=rank, seed=seed)

    def convert(self, *adapters: HraAdapter, name: str = "adapter.gguf", **options: Any) -> ConvertReport:
        source = HraSource(adapters, strength=options.pop("strength", 1.0))
        report: ConvertReport = to_gguf.convert(source, self.folder / name, **{"base": self.base, **options})
        return report

    def effect_error(self, *adapters: HraAdapter, name: str | None = "adapter.gguf", strength: float = 1.0) -> float:
        """Of the file beside these adapters, live; `name` None leaves llama.cpp without one."""
        answer = judge.log_probabilities
        before = judge.pytorch_log_probabilities(self.model, PROMPTS), answer(self.file, PROMPTS, judge.VOCABULARY)
        attachment = attach(self.model, *adapters, strength=strength, interpolation="linear")
        live = judge.pytorch_log_probabilities(self.model, PROMPTS)
        attachment.detach()
        path = self.folder / name if name else None
        found = answer(self.file, PROMPTS, judge.VOCABULARY, adapter=path)
        return judge.effect_error(before, (live, found))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, "llama")


def read(path: Path) -> Any:
    return gguf.GGUFReader(path)


def tensors(path: Path) -> dict[str, bytes]:
    """Name, type, shape and bytes of every tensor."""
    return {f"{each.name} {each.tensor_type} {each.shape}": each.data.tobytes() for each in read(path).tensors}


def metadata(path: Path) -> dict[str, object]:
    fields = read(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("family", judge.FAMILIES)
def test_adapter_does_in_llama_cpp_what_it_does_in_pytorch(tmp_path: Path, family: str) -> None:
    """Every matrix of the architecture is adapted; one that llama.cpp passed by would be missed."""
    scene = Scene(tmp_path, family)
    adapter = scene.adapter()
    report = scene.convert(adapter)
    assert [target.module for target in report.targets] == list(adapter.chains)
    assert report.ranks == (4, 4)
    assert scene.effect_error(adapter) < (EFFECT_GELU if family in GELU else EFFECT_FP32)


def test_families_are_those_that_are_converted() -> None:
    known = {judge.build(family).config.model_type for family in judge.FAMILIES}
    assert known == set(to_gguf.ARCHITECTURES)


def test_judge_sees_an_adapter_that_is_not_there(scene: Scene) -> None:
    assert scene.effect_error(scene.adapter(), name=None) == pytest.approx(1, abs=EFFECT_FP32)


@pytest.mark.parametrize("only", ["q_proj", "k_proj"])
def test_judge_sees_rows_in_the_wrong_order(scene: Scene, only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = scene.adapter(only=only)
    monkeypatch.setattr(llama_cpp, "row_order", lambda processor, tensor, shape: np.arange(shape[0]))
    scene.convert(adapter)
    assert scene.effect_error(adapter) > 0.5


def test_ranks_may_differ_and_adapters_compose(scene: Scene) -> None:
    """llama.cpp multiplies by alpha / rank of each tensor: no alpha above 0 is right for two ranks."""
    first, second = scene.adapter(rank=4), scene.adapter(rank=2, seed=2, only="down_proj")
    assert scene.convert(first, second).ranks == (4, 6)
    assert metadata(scene.folder / "adapter.gguf")["adapter.lora.alpha"] == 0
    assert scene.effect_error(first, second) < EFFECT_FP32


def test_strength_scales_the_change(scene: Scene) -> None:
    adapter = scene.adapter()
    scene.convert(adapter, strength=0.4)
    assert scene.effect_error(adapter, strength=0.4) < EFFECT_FP32


@pytest.mark.parametrize("dtype", EFFECT_HALF)
def test_half_factors_lose_what_their_dtype_loses(scene: Scene, dtype: str) -> None:
    adapter = scene.adapter()
    assert scene.convert(adapter, dtype=dtype).error < EFFECT_HALF[dtype]
    assert {each.tensor_type.name for each in read(scene.folder / "adapter.gguf").tensors} == {
        {"float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    assert EFFECT_FP32 < scene.effect_error(adapter) < EFFECT_HALF[dtype]


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_1])
def test_quantized_file_is_its_own_base(tmp_path: Path, kind: Type) -> None:
    """The chain turns what llama.cpp dequantizes, which in 4 bits is far from what was quantized."""
    scene = Scene(tmp_path, "llama", kind)
    from_gguf.convert(scene.file, tmp_path / "dequantized")
    base = open_checkpoint(tmp_path / "dequantized")
    adapter = scene.adapter()
    scene.convert(adapter, base=base, file=scene.file)
    scene.model = type(scene.model).from_pretrained(base.root)
    assert scene.effect_error(adapter) < EFFECT_Q8


@pytest.mark.parametrize("family", ["llama", "llama-wide-heads", "qwen2", "starcoder2"])
def test_file_and_directory_of_one_model_give_one_adapter(tmp_path: Path, family: str) -> None:
    scene = Scene(tmp_path, family)
    from_gguf.convert(scene.file, tmp_path / "dequantized")
    adapter = scene.adapter()
    scene.convert(adapter, name="directory.gguf")
    scene.convert(adapter, name="file.gguf", base=open_checkpoint(tmp_path / "dequantized"), file=scene.file)
    assert tensors(tmp_path / "directory.gguf") == tensors(tmp_path / "file.gguf")


def test_adapter_of_the_model_without_its_head_is_the_same(scene: Scene) -> None:
    adapter = scene.adapter(only="_proj")
    bare = replace(adapter, chains={name.removeprefix("model."): u for name, u in adapter.chains.items()})
    scene.convert(adapter, name="whole.gguf")
    scene.convert(bare, name="bare.gguf")
    assert tensors(scene.folder / "whole.gguf") == tensors(scene.folder / "bare.gguf")


def test_metadata_say_what_the_file_is_and_for_which_base(scene: Scene) -> None:
    scene.convert(replace(scene.adapter(), path=Path("runs/orders")), file=scene.file)
    found = metadata(scene.folder / "adapter.gguf")
    assert list(found) == [
        "general.architecture",
        "general.type",
        "general.name",
        "general.file_type",
        "general.base_model.count",
        "general.base_model.0.name",
        "adapter.type",
        "adapter.lora.alpha",
        "hra_export.version",
        "hra_export.source.digest",
        "hra_export.base.fingerprint",
    ]
    assert (found["general.architecture"], found["general.type"], found["adapter.type"]) == ("llama", "adapter", "lora")
    assert (found["general.name"], found["general.base_model.0.name"]) == ("orders", "base.gguf")
    assert (found["adapter.lora.alpha"], found["general.file_type"]) == (4, 0)
    assert found["hra_export.base.fingerprint"] == scene.base.fingerprint()


def test_file_holds_two_tensors_for_each_target(scene: Scene) -> None:
    scene.convert(scene.adapter(only="k_proj"))
    shapes = {each.name: tuple(reversed(each.shape.tolist())) for each in read(scene.folder / "adapter.gguf").tensors}
    rows = judge.KV_HEADS * judge.HEAD
    assert shapes == {
        f"blk.{i}.attn_k.weight.lora_{side}": shape
        for i in range(judge.LAYERS)
        for side, shape in (("a", (4, judge.WIDTH)), ("b", (rows, 4)))
    }


def test_plan_reads_headers_only(scene: Scene) -> None:
    """What a dry run shows: the weights may be anything."""
    adapter = scene.adapter(only="q_proj")
    weights = scene.folder / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000] + bytes([255]) * 100_000)
    plan = to_gguf.plan(HraSource([adapter]), base=scene.base)
    assert plan.ranks == dict.fromkeys(adapter.chains, 4)
    assert plan.read_bytes == judge.LAYERS * judge.WIDTH * judge.WIDTH * 4


def test_report_says_which_weights_it_is_exact_for(scene: Scene) -> None:
    adapter = scene.adapter(only="q_proj")
    assert scene.convert(adapter, file=scene.file).notes == ()
    (note,) = scene.convert(adapter, overwrite=True).notes
    assert note.startswith(f"exact for the weights of `{scene.base.root}`")


def test_idle_targets_are_left_out(scene: Scene) -> None:
    adapter = scene.adapter(only="q_proj")
    idle = next(iter(adapter.chains))
    pairs = torch.randn(judge.WIDTH, 2).repeat_interleave(2, dim=1)
    report = scene.convert(replace(adapter, chains={**adapter.chains, idle: pairs}))
    assert [(target.module == idle, target.rank) for target in report.targets] == [(True, 0), (False, 4)]
    assert len(read(scene.folder / "adapter.gguf").tensors) == 2


def test_equal_inputs_give_equal_bytes_and_progress_counts_the_weights(scene: Scene) -> None:
    seen: list[int] = []
    for name in ("first.gguf", "second.gguf"):
        scene.convert(scene.adapter(only="q_proj"), name=name, progress=seen.append)
    digests = [hashlib.sha256((scene.folder / name).read_bytes()).hexdigest() for name in ("first.gguf", "second.gguf")]
    assert digests[0] == digests[1]
    assert seen == [judge.WIDTH * judge.WIDTH * 4] * judge.LAYERS * 2


def test_overwrite_replaces_an_adapter_and_nothing_else(scene: Scene) -> None:
    output = scene.folder / "adapter.gguf"
    scene.convert(scene.adapter())
    first = output.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        scene.convert(scene.adapter())
    scene.convert(scene.adapter(), dtype="float16", overwrite=True)
    assert output.read_bytes() != first
    for other in (b"old", scene.file.read_bytes()):
        output.write_bytes(other)
        with pytest.raises(OutputError, match="no adapter of llama"):
            scene.convert(scene.adapter(), overwrite=True)
        assert output.read_bytes() == other


Refusal = Callable[[Scene], object]


def biases(scene: Scene) -> object:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(judge.WIDTH)}
    return scene.convert(replace(scene.adapter(), parameters=bias, bias="hra_only"))


def saved_module(scene: Scene) -> object:
    head = {"lm_head.weight": torch.ones(judge.VOCABULARY, judge.WIDTH)}
    return scene.convert(replace(scene.adapter(), parameters=head, modules_to_save=("lm_head",)))


def embedding(scene: Scene) -> object:
    chains = {"model.embed_tokens": torch.randn(judge.WIDTH, 4)}
    return scene.convert(replace(scene.adapter(), chains=chains))


def unknown_module(scene: Scene) -> object:
    chains = {"model.layers.7.self_attn.q_proj": torch.randn(judge.WIDTH, 4)}
    return scene.convert(replace(scene.adapter(), chains=chains))


def wrong_width(scene: Scene) -> object:
    chains = {"model.layers.0.self_attn.q_proj": torch.randn(judge.WIDTH // 2, 4)}
    return scene.convert(replace(scene.adapter(), chains=chains))


def nothing_left(scene: Scene) -> object:
    return scene.convert(scene.adapter(), strength=0.0)


def too_large(scene: Scene) -> object:
    with torch.no_grad():
        scene.model.lm_head.weight.mul_(1e12)
    scene.model.save_pretrained(scene.folder / "large")
    return scene.convert(scene.adapter(), base=open_checkpoint(scene.folder / "large"), dtype="float16")


def other_architecture(scene: Scene) -> object:
    tiny_models.build("gpt-neox").save_pretrained(scene.folder / "neox")
    return scene.convert(scene.adapter(), base=open_checkpoint(scene.folder / "neox"))


def experts(scene: Scene) -> object:
    tiny_models.build("mixtral").save_pretrained(scene.folder / "experts")
    return scene.convert(scene.adapter(), base=open_checkpoint(scene.folder / "experts"))


def file_of_another_architecture(scene: Scene) -> object:
    (scene.folder / "other").mkdir()
    return scene.convert(scene.adapter(), file=Scene(scene.folder / "other", "qwen2").file)


def file_without_the_targets(scene: Scene) -> object:
    (scene.folder / "other").mkdir()
    return scene.convert(scene.adapter(), file=Scene(scene.folder / "other", "llama-tied").file)


def inside_the_base(scene: Scene) -> object:
    return scene.convert(scene.adapter(), name="base/adapter.gguf")


REFUSALS: list[tuple[Refusal, type[HraExportError], str]] = [
    (biases, ConversionError, "q_proj.bias: trained beside the chains"),
    (saved_module, ConversionError, "lm_head.weight: trained beside the chains"),
    (embedding, UnsupportedModelError, "model.embed_tokens: embedding"),
    (unknown_module, MismatchError, "model.layers.7.self_attn.q_proj"),
    (wrong_width, MismatchError, "model.layers.0.self_attn.q_proj: expected U of shape (64, r)"),
    (nothing_left, ConversionError, "changes nothing"),
    (too_large, NumericalError, "lm_head: ‖ΔW‖ is"),
    (other_architecture, UnsupportedModelError, "a `gpt_neox` model"),
    (experts, UnsupportedModelError, "a `mixtral` model"),
    (file_of_another_architecture, MismatchError, "holds a `qwen2` model"),
    (file_without_the_targets, MismatchError, "lm_head: no tensor of the llama model"),
    (inside_the_base, OutputError, "lies in the input"),
]


@pytest.mark.parametrize(("attempt", "kind", "says"), REFUSALS, ids=[attempt.__name__ for attempt, *_ in REFUSALS])
def test_refusals_name_what_is_wrong_and_write_nothing(
    scene: Scene, attempt: Refusal, kind: type[HraExportError], says: str
) -> None:
    with pytest.raises(kind) as caught:
        attempt(scene)
    assert says in str(caught.value)
    assert not list(scene.folder.rglob("*adapter*"))


def test_base_whose_name_is_no_unicode_is_named_as_well_as_can_be(scene: Scene) -> None:
    scene.base = open_checkpoint((scene.folder / "base").rename(scene.folder / os.fsdecode(b"ba\xffse")))
    scene.convert(scene.adapter())
    assert metadata(scene.folder / "adapter.gguf")["general.base_model.0.name"] == "ba?se"


@pytest.mark.parametrize("missing", [1, 6000])
def test_disk_that_is_full_before_the_end_is_an_error(scene: Scene, missing: int) -> None:
    adapter = scene.adapter()
    scene.convert(adapter)
    size = (scene.folder / "adapter.gguf").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cut\.gguf"):
            scene.convert(adapter, name="cut.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(scene.folder.glob("*cut*"))


def test_tied_head_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "llama-tied")
    adapter = judge.random_adapter(scene.model, ["lm_head"])
    with pytest.raises(ConversionError) as caught:
        scene.convert(adapter)
    assert caught.value.findings == ("lm_head: llama.cpp multiplies with `token_embd.weight` in its place",)


def test_missing_package_is_named(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_gguf(name: str, *rest: Any, **named: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(UnsupportedModelError) as caught:
        scene.convert(scene.adapter())
    assert caught.value.hint == "pip install 'hra-export[gguf]'"


TEXTS = ("Order: Please send three kitchen scales to Kofi Moreau in Seoul by Sunday.", "The capital of France is")
# Products with 4-bit weights round activations to 8 bits: the base alone is off by 0.075 of this effect.
EFFECT_Q4 = 0.2
# Nats by which PyTorch likes a token of its own better. The same noise; 0.03 was seen.
REGRET_Q4 = 0.3
# float32 through 30 layers; 3e-5 was seen.
EFFECT_DEEP = 2e-4


def paired_adapter(model: Any) -> HraAdapter:
    """Vectors in pairs, as training leaves them: the model still writes English."""
    generator = torch.Generator().manual_seed(3)
    chains = {}
    for name in judge.targets(model):
        first = torch.randn(model.get_submodule(name).weight.shape[1], 4, generator=generator)
        second = first + 0.6 * torch.randn(first.shape, generator=generator)
        chains[name] = torch.stack([first, second], dim=2).flatten(1)
    return HraAdapter(chains=chains, rank=8)


def regret(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """How much less likely than the model's own choice a token of an answer is, at most, in nats."""
    with torch.no_grad():
        scores = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float((scores.amax(-1) - scores.gather(1, torch.tensor(answer)[:, None])[:, 0]).max())


@pytest.mark.real
@pytest.mark.timeout(600)
def test_smollm2_answers_as_in_pytorch(tmp_path: Path) -> None:
    """The file with its 4 bits, which llama.cpp multiplies in 8; and the same values in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from_gguf.convert(smollm2_gguf(), tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base.root).eval()
    prompts = [AutoTokenizer.from_pretrained(base.root)(text).input_ids for text in TEXTS]
    adapter, path = paired_adapter(model), tmp_path / "adapter.gguf"
    to_gguf.convert(HraSource([adapter]), path, base=base, file=smollm2_gguf())
    before = judge.pytorch_log_probabilities(model, prompts)
    exact = judge.write_model(model, "llama-tied", tmp_path / "float32.gguf")
    attach(model, adapter)
    after = judge.pytorch_log_probabilities(model, prompts)
    for file, allowed, allowed_regret in ((smollm2_gguf(), EFFECT_Q4, REGRET_Q4), (exact, EFFECT_DEEP, 0.0)):
        start, found = (
            judge.log_probabilities(file, prompts, model.config.vocab_size, adapter=each) for each in (None, path)
        )
        assert judge.effect_error((before, start), (after, found)) < allowed
        answer = judge.greedy_tokens(file, prompts[0], 16, adapter=path)
        assert len(answer) == 16
        assert regret(model, prompts[0], answer) <= allowed_regret
