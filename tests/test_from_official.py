"""Files of the authors' code and its relatives: recognized, refused where they do not say enough, and exact.

Each layout is judged against a re-implementation of its documented maths, in float64.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from hra_export.adapter import HraAdapter, read_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.errors import AdapterError, ConversionError, MismatchError, NumericalError, OutputError
from hra_export.householder import dense
from hra_export.low_rank import DeltaSource, HraSource, locate
from hra_export.merge import merge_checkpoint
from hra_export.official.layouts import LAYOUTS, recognize
from hra_export.official.ldm_names import diffusers_names
from hra_export.official.settings import Settings
from hra_export.official.soft_chain import SoftSource
from hra_export.planning import plan_merge
from hra_export.registry import load_converter
from tests import official_layouts as code
from tests import tiny_models
from tests.official_scenes import (
    EPSILON,
    RANK,
    Scene,
    adapter_directory,
    control,
    draft,
    first_code,
    llama,
    lora_lite,
    nlu,
    subject,
)

from_official = load_converter("from_official")

# Both sides compute in float64, over sums of fewer than a hundred terms.
RTOL = 1e-12
# Logits of two layers of float64, through files in float64.
LOGITS_ATOL = 1e-9
OFF = Settings(orthogonalize=False)

EXACT: dict[str, tuple[Callable[[Path], Scene], dict[str, Any], str]] = {
    "nlu": (nlu, {"settings": OFF}, "nlu"),
    "nlu, Gram-Schmidt": (partial(nlu, gram_schmidt=True), {"settings": Settings(orthogonalize=True)}, "nlu"),
    "nlu, older name": (partial(nlu, layer=code.OlderNluLinear), {"settings": OFF}, "nlu"),
    "subject": (subject, {"settings": OFF}, "subject"),
    "control": (control, {"settings": OFF}, "control"),
    "llama": (llama, {}, "llama"),
    "llama, older name": (partial(llama, leaf="hra_r"), {}, "llama"),
    "llama, Gram-Schmidt": (partial(llama, gram_schmidt=True), {"settings": Settings(orthogonalize=True)}, "llama"),
    "PEFT's first draft": (draft, {}, "peft-draft"),
    "first code": (first_code, {"settings": Settings(epsilon=EPSILON)}, "v-list"),
    "lora-lite": (lora_lite, {}, "lora-lite"),
    "lora-lite, reversed": (
        partial(lora_lite, reversed_order=True),
        {"layout": "lora-lite-reversed"},
        "lora-lite-reversed",
    ),
}


def delta_source(adapter: HraAdapter | SoftSource) -> DeltaSource:
    return adapter if isinstance(adapter, SoftSource) else HraSource([adapter])


@pytest.mark.parametrize(("build", "options", "layout"), EXACT.values(), ids=EXACT)
def test_read_gives_the_weights_of_the_documented_maths(
    build: Callable[[Path], Scene], options: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    made = build(tmp_path)
    official = made.read(**options)
    assert official.layout == layout
    assert layout in official.notes[0]
    source = delta_source(official.adapter)
    weights = locate(source, made.base)
    assert set(weights) == set(made.layers)
    for module, weight in weights.items():
        b, a = source.factors(weight)
        expected = made.layers[module].folded().detach()
        error = (weight.matrix() + b @ a - expected).norm() / (expected - weight.matrix()).norm()
        assert error < RTOL, module
        assert source.rank(module) == min(b.shape[1], RANK)


HARD = ("nlu", "nlu, Gram-Schmidt", "nlu, older name", "subject", "control", "lora-lite", "lora-lite, reversed")


@pytest.mark.parametrize("name", EXACT)
def test_read_gives_an_adapter_only_where_the_maths_is_that_of_hra(name: str, tmp_path: Path) -> None:
    build, options, _ = EXACT[name]
    assert isinstance(build(tmp_path).read(**options).adapter, HraAdapter if name in HARD else SoftSource)


@pytest.mark.parametrize("name", HARD)
def test_convert_writes_a_directory_that_reads_back_the_same(name: str, tmp_path: Path) -> None:
    build, options, layout = EXACT[name]
    made = build(tmp_path)
    report = from_official.convert(made.source, tmp_path / "output", base=made.base, allow_pickle=True, **options)
    adapter, read = read_adapter(tmp_path / "output"), made.read(**options).adapter
    assert adapter.orthogonalize == read.orthogonalize
    assert adapter.parameters.keys() == read.parameters.keys()
    assert {module: u.shape for module, u in adapter.chains.items()} == {
        module: u.shape for module, u in read.chains.items()
    }
    assert all(torch.equal(adapter.chains[module], u.float()) for module, u in read.chains.items())
    manifest = json.loads((tmp_path / "output" / "hra_export_manifest.json").read_text())
    assert manifest["layout"] == layout
    assert {target.module for target in report.targets} == set(made.layers)
    for target in report.targets:
        exact, written = (dense(each.reflector(target.module)) for each in (read, adapter))
        assert target.delta_norm == pytest.approx(float((exact - torch.eye(len(exact))).norm()), rel=1e-9)
        assert target.error * target.delta_norm == pytest.approx(float((written - exact).norm()), rel=1e-3, abs=1e-12)


def hra_tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}


RECOGNIZED: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "whole model": (hra_tensors(a__b__hra_u=(8, 2), a__b__weight=(4, 8)), ("nlu",)),
    "older name": (hra_tensors(a__householder_U=(8, 2), a__weight=(4, 8)), ("nlu",)),
    "processors": (hra_tensors(a__attn1__processor__to_q_hra__hra_u=(8, 2)), ("subject",)),
    "frozen layer below": (hra_tensors(a__hra_u=(8, 2), a__fixed_linear__weight=(4, 8)), ("control",)),
    "after the layer": (hra_tensors(base_model__model__a__oft_r=(8, 2)), ("llama",)),
    "after the layer, older name": (hra_tensors(base_model__model__a__hra_r=(8, 2)), ("llama",)),
    "list": (hra_tensors(a__v_list__0=(8, 1), a__v_list__1=(8, 1)), ("v-list",)),
    "rows": (hra_tensors(a__lora_U=(2, 8)), ("lora-lite", "lora-lite-reversed")),
    "PEFT": (hra_tensors(base_model__model__a__hra_u=(8, 2)), ("peft", "peft-draft")),
    "chains alone": (hra_tensors(a__hra_u=(8, 2)), ("nlu", "peft-draft")),
}


@pytest.mark.parametrize(("tensors", "expected"), RECOGNIZED.values(), ids=RECOGNIZED)
def test_recognize_names_every_layout_that_fits(tensors: dict[str, Tensor], expected: tuple[str, ...]) -> None:
    assert recognize(tensors) == expected
    assert set(expected) <= LAYOUTS.keys()


NOT_RECOGNIZED: dict[str, tuple[dict[str, Tensor], str]] = {
    "no chains": (hra_tensors(a__weight=(4, 8)), "no chain of HRA"),
    "several": (hra_tensors(a__hra_u=(8, 2), b__lora_U=(2, 8)), "several layouts"),
    "blocks of OFT": (hra_tensors(base_model__model__a__oft_r=(2, 4, 4)), "this is OFT, not HRA"),
    "no reflections": (hra_tensors(a__v_list__0=(8, 1), a__fixed_linear__weight=(4, 8)), "is no reflection"),
    "gate": (hra_tensors(a__lora_U=(2, 8), a__lora_gate=(1,)), "have a gate"),
}


@pytest.mark.parametrize(("tensors", "says"), NOT_RECOGNIZED.values(), ids=NOT_RECOGNIZED)
def test_recognize_refuses_what_is_no_hra(tensors: dict[str, Tensor], says: str) -> None:
    with pytest.raises(ConversionError, match=says):
        recognize(tensors)


def saved(folder: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    safetensors.torch.save_file(tensors, folder / "weights.safetensors", metadata or None)
    return folder / "weights.safetensors"


def choices(error: ConversionError) -> set[str]:
    """The layouts that a refusal offers."""
    return {line.split("`")[1] for line in error.findings}


def test_read_refuses_an_ambiguous_layout_with_its_choices(tmp_path: Path) -> None:
    source = adapter_directory(tmp_path / "a", hra_tensors(base_model__model__m__hra_u=(8, RANK)), peft_type="HRA")
    with pytest.raises(ConversionError, match="can be of 2 layouts") as caught:
        from_official.read(source)
    assert choices(caught.value) == {"peft", "peft-draft"}
    assert "--layout" in str(caught.value.hint)
    assert "base" in str(caught.value.hint)


def test_read_refuses_square_layers_whose_side_not_even_the_base_tells(tmp_path: Path) -> None:
    made = draft(tmp_path)
    square = {key: value for key, value in read_file(made.source).items() if "q_proj" in key}
    source = adapter_directory(tmp_path / "square", square, peft_type="HRA", apply_GS=False)
    with pytest.raises(ConversionError, match="can be of 2 layouts"):
        from_official.read(source, base=made.base)
    sides = {name: from_official.read(source, base=made.base, layout=name).adapter for name in ("peft", "peft-draft")}
    assert isinstance(sides["peft"], HraAdapter)
    assert isinstance(sides["peft-draft"], SoftSource)


def read_file(directory: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(directory / "adapter_model.safetensors")


def test_read_tells_released_files_of_peft_by_their_version(tmp_path: Path) -> None:
    tensors = {"base_model.model.m.hra_u": torch.randn(8, RANK)}
    source = adapter_directory(tmp_path / "a", tensors, peft_type="HRA", apply_GS=False, peft_version="0.18.0")
    official = from_official.read(source)
    assert official.layout == "peft"
    assert torch.equal(official.adapter.chains["m"], tensors["base_model.model.m.hra_u"])


def test_read_keeps_the_class_that_was_adapted(tmp_path: Path) -> None:
    tensors = {"base_model.model.m.hra_u": torch.randn(8, RANK)}
    mapping = {"base_model_class": "BertModel", "parent_library": "transformers.models.bert.modeling_bert"}
    fields = {"peft_type": "HRA", "apply_GS": False, "peft_version": "0.18.0", "auto_mapping": mapping}
    adapter = from_official.read(adapter_directory(tmp_path / "a", tensors, **fields)).adapter
    assert (adapter.model_class, adapter.model_library) == tuple(mapping.values())


def test_read_tells_released_files_of_peft_by_the_shapes_of_the_base(tmp_path: Path) -> None:
    made = draft(tmp_path)
    before = {f"base_model.model.{path}.hra_u": torch.randn(32, RANK) for path in made.layers}  # every layer has d = 32
    source = adapter_directory(tmp_path / "released", before, peft_type="HRA", apply_GS=False)
    assert from_official.read(source, base=made.base).layout == "peft"


def test_read_refuses_the_two_orders_of_lora_lite(tmp_path: Path) -> None:
    made = lora_lite(tmp_path, reversed_order=True)
    with pytest.raises(ConversionError, match="can be of 2 layouts") as caught:
        made.read()
    assert choices(caught.value) == {"lora-lite", "lora-lite-reversed"}


def test_read_refuses_another_variant_of_lora_lite(tmp_path: Path) -> None:
    source = saved(tmp_path, {"m.lora_U": torch.ones(8, 2)}, cfg=json.dumps({"variant": "antipasto"}))
    with pytest.raises(ConversionError, match="its variant is 'antipasto'"):
        from_official.read(source)


def test_read_refuses_an_unknown_layout() -> None:
    with pytest.raises(ValueError, match="expected one of nlu, subject"):
        from_official.read(Path(__file__).parent / "missing.safetensors", layout="theirs")


def test_read_asks_for_gram_schmidt_where_it_matters(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="whether Gram-Schmidt was on") as caught:
        nlu(tmp_path).read()
    assert "--no-gram-schmidt" in str(caught.value.hint)


def test_read_needs_no_word_on_gram_schmidt_for_orthogonal_vectors(tmp_path: Path) -> None:
    vectors = torch.linalg.qr(torch.randn(8, 4)).Q.contiguous()
    official = from_official.read(saved(tmp_path, {"m.hra_u": vectors, "m.weight": torch.ones(4, 8)}))
    assert official.adapter.orthogonalize is False


CONFIGURED = {
    "on": ({"inject_adapter": "hra", "hra": {"r": RANK, "apply_GS": True}}, True),
    "off": ({"inject_adapter": "hra", "hra": {"r": RANK, "apply_GS": False}}, False),
    "older, on": ({"householder": {"add_orth": "gramschmidt"}}, True),
    "older, off": ({"householder": {"add_orth": "none"}}, False),
}


@pytest.mark.parametrize(("config", "expected"), CONFIGURED.values(), ids=CONFIGURED)
def test_read_takes_gram_schmidt_from_the_configuration_beside(
    config: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    made = nlu(tmp_path)
    made.source.with_name("model_config.json").write_text(json.dumps(config))
    assert made.read().adapter.orthogonalize is expected
    with pytest.raises(ConversionError, match="its configuration says"):
        made.read(settings=Settings(orthogonalize=not expected))


def test_read_asks_for_epsilon_where_nothing_says_it(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="does not say by which ε"):
        first_code(tmp_path).read()


def test_read_refuses_an_epsilon_that_contradicts_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"eps = 0\.0001, not 0\.01"):
        llama(tmp_path).read(settings=Settings(epsilon=0.01))


@pytest.mark.parametrize("written", [-1e-4, "1e-4", True])
def test_read_refuses_an_epsilon_of_the_configuration_that_means_nothing(written: object, tmp_path: Path) -> None:
    made = llama(tmp_path)
    source = adapter_directory(tmp_path / "other", read_file(made.source), eps=written)
    with pytest.raises(ConversionError, match="expected a number"):
        from_official.read(source)


def test_read_refuses_an_epsilon_of_the_caller_that_means_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        first_code(tmp_path).read(settings=Settings(epsilon=-1.0))


def test_read_refuses_another_rank_than_the_configuration_has(tmp_path: Path) -> None:
    """That code takes the first r vectors and leaves the others out."""
    made = llama(tmp_path)
    source = adapter_directory(tmp_path / "other", read_file(made.source), eps=EPSILON, r=2)
    with pytest.raises(AdapterError, match=r"says r = 2, its chains have \[4\] vectors"):
        from_official.read(source)


@pytest.mark.parametrize(("field", "value"), [("bias", "some"), ("bias", ["none"]), ("modules_to_save", "head")])
def test_read_refuses_fields_of_the_configuration_that_mean_nothing(field: str, value: object, tmp_path: Path) -> None:
    made = llama(tmp_path)
    source = adapter_directory(tmp_path / "other", read_file(made.source), eps=EPSILON, **{field: value})
    with pytest.raises(AdapterError) as caught:
        from_official.read(source)
    assert [line.partition(":")[0] for line in caught.value.findings] == [field]


def test_read_takes_hard_vectors_of_the_first_code_for_an_adapter(tmp_path: Path) -> None:
    """‖v‖² is about 3e8 there, so that ε changes less than float32 holds."""
    made = first_code(tmp_path, scale=3e3)
    adapter = made.read(settings=Settings(epsilon=EPSILON)).adapter
    assert isinstance(adapter, HraAdapter)
    weight = locate(HraSource([adapter]), made.base)[module := next(iter(made.layers))]
    b, a = HraSource([adapter]).factors(weight)
    assert torch.allclose(weight.matrix() + b @ a, made.layers[module].folded(), rtol=0, atol=1e-10)


def test_read_carries_what_the_base_lacks(tmp_path: Path) -> None:
    made = nlu(tmp_path)
    official = made.read(settings=OFF)
    assert set(official.adapter.modules_to_save) == {"pooler", "classifier"}
    assert official.adapter.task == "SEQ_CLS"
    state = made.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in official.adapter.parameters.items())
    assert any("are those of the base" in note for note in official.notes)


def test_read_carries_the_head_without_a_base(tmp_path: Path) -> None:
    official = nlu(tmp_path).read(settings=OFF, base=None)
    assert set(official.adapter.modules_to_save) == {"pooler", "classifier"}
    assert any("no base given" in note for note in official.notes)


def test_nlu_merged_computes_what_their_model_computes(tmp_path: Path) -> None:
    made = nlu(tmp_path)
    plan = plan_merge(made.base, [made.read(settings=OFF).adapter])
    merge_checkpoint(plan, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", torch_dtype=torch.float64).eval()
    inputs = tiny_models.token_inputs()
    with torch.no_grad():
        expected, got = made.model(**inputs).logits, merged(**inputs).logits
    assert torch.allclose(got, expected, rtol=0, atol=LOGITS_ATOL)


def test_read_says_that_the_weights_of_another_base_differ(tmp_path: Path) -> None:
    made = nlu(tmp_path)
    path = made.base.files[0].path
    tensors = safetensors.torch.load_file(path)
    tensors["deberta.encoder.layer.1.output.dense.weight"][0] += 1
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    notes = made.read(settings=OFF, base=open_checkpoint(made.base.root)).notes
    (note,) = [note for note in notes if "differ from base" in note]
    assert note.startswith("1 of ")
    assert "`deberta.encoder.layer.1.output.dense.weight`" in note


def test_read_finds_weights_that_were_saved_in_half_precision_equal(tmp_path: Path) -> None:
    made = nlu(tmp_path)
    torch.save({name: value.half() for name, value in made.model.state_dict().items()}, made.source)
    assert any("weights in the file are those of the base" in note for note in made.read(settings=OFF).notes)


def test_read_names_the_hint_encoder_of_the_controllable_generation(tmp_path: Path) -> None:
    notes = " ".join(control(tmp_path).read(settings=OFF).notes)
    assert "hint encoder" in notes
    assert "control_model.input_hint_block.0.weight" in notes
    assert "`first_stage_model`, `betas`" in notes


def test_read_tells_the_blocks_of_a_unet_without_a_base(tmp_path: Path) -> None:
    made = control(tmp_path)
    assert set(made.read(settings=OFF, base=None).adapter.chains) == set(made.layers)


def test_ldm_names_are_those_of_stable_diffusion_block_by_block() -> None:
    """Every layer that code adapts has its place, in a layer of the same width; a base of SD 1.5 by its structure."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    layers = dict(code.stable_diffusion_layers())
    assert len(layers) == 16 * 9
    found = diffusers_names({f"{module}.weight" for module in layers}, layers_per_block=2)
    shapes = {name: tuple(value.shape) for name, value in unet.named_parameters()}
    assert {module: shapes[found[f"{module}.weight"]][1] for module in layers} == layers
    assert len(set(found.values())) == len(layers)
    attention = {
        n for n in shapes if n.endswith((*(f"{leaf}.weight" for leaf in code.ATTENTION_LEAVES), "0.proj.weight"))
    }
    assert set(found.values()) == attention


def test_ldm_names_keep_their_order() -> None:
    """Blocks are numbered upwards on both sides: the first layer with attention going down, the last one going up."""
    name = "model.diffusion_model.{}.1.transformer_blocks.0.attn1.to_q.weight".format
    found = diffusers_names(
        {name("input_blocks.1"), name("input_blocks.5"), name("output_blocks.11")}, layers_per_block=2
    )
    tail = "transformer_blocks.0.attn1.to_q.weight"
    assert found == {
        name("input_blocks.1"): f"down_blocks.0.attentions.0.{tail}",
        name("input_blocks.5"): f"down_blocks.1.attentions.1.{tail}",
        name("output_blocks.11"): f"up_blocks.3.attentions.2.{tail}",
    }


def test_ldm_names_ask_for_a_base_where_no_block_ends() -> None:
    with pytest.raises(ConversionError, match="cannot be told"):
        diffusers_names({"model.diffusion_model.input_blocks.1.1.proj_in.weight"})


def test_read_refuses_chains_that_the_base_has_no_place_for(tmp_path: Path) -> None:
    made = llama(tmp_path)
    tensors = {key.replace("v_proj", "w_proj"): value for key, value in read_file(made.source).items()}
    source = adapter_directory(tmp_path / "renamed", tensors, eps=EPSILON)
    with pytest.raises(MismatchError, match="lacks 2 targets"):
        from_official.read(source, base=made.base)


def test_read_refuses_chains_of_the_other_side_with_all_layers(tmp_path: Path) -> None:
    made = llama(tmp_path)
    before = {f"base_model.model.{path}.oft_r": torch.randn(32, RANK) for path in made.layers}
    source = adapter_directory(tmp_path / "before", before, eps=EPSILON)
    with pytest.raises(MismatchError) as caught:
        from_official.read(source, base=made.base)
    assert len(caught.value.findings) == 2  # the v_proj of each layer is not square
    assert "on the output side" in caught.value.findings[0]


STRAY = {
    "llama": (partial(llama), {"base_model.model.model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 2)}),
    "draft": (partial(draft), {"unrelated": torch.ones(2)}),
}


@pytest.mark.parametrize(("build", "stray"), STRAY.values(), ids=STRAY)
def test_read_refuses_tensors_that_the_layout_does_not_have(
    build: Callable[[Path], Scene], stray: dict[str, Tensor], tmp_path: Path
) -> None:
    made = build(tmp_path)
    source = adapter_directory(tmp_path / "stray", {**read_file(made.source), **stray}, eps=EPSILON, apply_GS=False)
    with pytest.raises(AdapterError, match="not tensors of the layout") as caught:
        from_official.read(source, base=made.base)
    assert next(iter(stray)) in caught.value.findings[0]


def test_read_refuses_a_whole_unet_of_another_base(tmp_path: Path) -> None:
    made = subject(tmp_path)
    torch.save({**torch.load(made.source), "conv_out2.weight": torch.ones(2, 2)}, made.source)
    with pytest.raises(AdapterError, match="not tensors of the layout") as caught:
        made.read(settings=OFF)
    assert caught.value.findings == ("conv_out2.weight: neither a chain nor a weight of the base",)


MALFORMED: dict[str, tuple[dict[str, Tensor], str]] = {
    "three axes": ({"m.lora_U": torch.ones(2, 4, 8)}, "expected (r, d)"),
    "rank above d": ({"m.lora_U": torch.ones(9, 8)}, "r <= d"),
    "integers": ({"m.lora_U": torch.ones(2, 8, dtype=torch.int64)}, "expected floats"),
    "missing vector": ({"m.v_list.0": torch.ones(8, 1), "m.v_list.2": torch.ones(8, 1)}, "vectors 0 to 2 expected"),
    "vectors of two shapes": ({"m.v_list.0": torch.ones(8, 1), "m.v_list.1": torch.ones(9, 1)}, "of one shape"),
}


@pytest.mark.parametrize(("tensors", "says"), MALFORMED.values(), ids=MALFORMED)
def test_read_refuses_malformed_chains(tensors: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    layout = "v-list" if any("v_list" in name for name in tensors) else "lora-lite"
    with pytest.raises(AdapterError) as caught:
        from_official.read(saved(tmp_path, tensors), layout=layout, settings=Settings(epsilon=EPSILON))
    assert says in caught.value.findings[0]


def test_read_names_every_vector_without_a_direction(tmp_path: Path) -> None:
    tensors = {f"m{i}.lora_U": torch.zeros(2, 8) for i in range(3)}
    with pytest.raises(NumericalError, match="3 chains cannot be computed") as caught:
        from_official.read(saved(tmp_path, tensors), layout="lora-lite")
    assert "m2" in caught.value.findings[2]


def test_convert_refuses_what_no_hra_file_holds_and_writes_nothing(tmp_path: Path) -> None:
    made = llama(tmp_path)
    with pytest.raises(ConversionError, match="cannot be written as HRA") as caught:
        from_official.convert(made.source, tmp_path / "output", base=made.base)
    assert "--to lora" in str(caught.value.hint)
    assert any("softened" in line for line in caught.value.findings)
    assert not (tmp_path / "output").exists()


def test_convert_refuses_an_output_that_exists_before_it_reads(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine").touch()
    with pytest.raises(OutputError, match="exists"):
        from_official.convert(tmp_path / "missing.safetensors", tmp_path / "output")


def test_convert_refuses_chains_of_several_ranks(tmp_path: Path) -> None:
    tensors = {"a.lora_U": torch.randn(2, 8), "b.lora_U": torch.randn(4, 8)}
    with pytest.raises(AdapterError, match=r"have one rank, these have \[2, 4\]"):
        from_official.convert(saved(tmp_path, tensors), tmp_path / "output", layout="lora-lite")


def test_lists_of_modules_and_buffers_of_processors_are_told_apart(tmp_path: Path) -> None:
    """`to_out` of a processor is the linear layer of a list; sizes that are stored beside are no weights."""
    official = subject(tmp_path).read(settings=OFF)
    assert any(module.endswith("to_out.0") for module in official.adapter.chains)
    assert not official.adapter.parameters
    assert len(official.notes) == 1
