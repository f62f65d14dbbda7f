"""Adapters at a strength: the algebra in float64, and the same numbers from merged weights, live layers and graphs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hra_export import attach, merge
from hra_export import export as export_module
from hra_export.adapter import HraAdapter, read_adapter, write_adapter
from hra_export.checkpoint import MANIFEST_NAME, open_checkpoint
from hra_export.composition import reflectors
from hra_export.errors import ConversionError, MismatchError, NumericalError
from hra_export.export import export_graphs, plan_export
from hra_export.graph.adapter_file import read_adapter_file
from hra_export.graph.document import open_graph
from hra_export.graph.options import GraphOptions
from hra_export.householder import dense
from hra_export.merge import merge_checkpoint
from hra_export.planning import plan_merge
from hra_export.strength import Interpolation, take_strength
from hra_export.tensorfile import read_header
from hra_export.validation.graphs import validate_graph
from tests.command_line import run
from tests.graph_scene import BUILDERS, random_adapter
from tests.judged_graphs import mutate
from tests.tiny_tokenizer import write_tokenizer

# Products of a few dozen orthogonal factors of norm 1 in float64; measured: 4e-15.
ATOL64 = 1e-13
# Two float32 runs of a two-layer model in another order of sums; the adapters move outputs by a tenth and more.
EFFECT_FP32 = 1e-4
# One rounding of a float32 weight of size 0.1 there and one back.
ATOL_WEIGHTS = 1e-7
HALF = 0.5
TOKENS = 300  # more than the tokenizer's, which knows bytes
HEADS = ("embed_out", "lm_head")
BOTH: list[Interpolation] = ["geodesic", "linear"]
Kind = Literal["plain", "near-parallel", "gram-schmidt"]


def gaussian(d: int, r: int, *, seed: int = 0) -> Tensor:
    return torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near_parallel(d: int, r: int, angle: float, *, seed: int = 0) -> Tensor:
    """Pairs that enclose an angle, as PEFT's paired start and a little training leave them."""
    first = gaussian(d, r // 2, seed=seed)
    across = gaussian(d, r // 2, seed=seed + 1)
    first, across = (x / torch.linalg.vector_norm(x, dim=0) for x in (first, across))
    return torch.stack([first, first + angle * across], dim=2).reshape(d, r)


def explicit(vectors: Tensor) -> Tensor:
    product = torch.eye(vectors.shape[0], dtype=torch.float64)
    for u in vectors.double().T:
        product = product @ (torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    return product


def adapter_of(*chains: Tensor, **more: Any) -> HraAdapter:
    return HraAdapter({f"m{i}": u for i, u in enumerate(chains)}, chains[0].shape[1], **more)


def powered(adapters: Sequence[HraAdapter], t: float, module: str = "m0") -> Tensor:
    """R^t as a matrix, from whatever `take_strength` gives."""
    taken = take_strength(adapters, t, "geodesic")
    r = dense(reflectors(taken.adapters)[module])
    return torch.lerp(torch.eye(len(r), dtype=r.dtype), r, taken.linear)


def close(got: Tensor, expected: Tensor, atol: float = ATOL64) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


# The algebra


@pytest.mark.parametrize("t", [0.5, 0.3, -0.7, 1.7])
@pytest.mark.parametrize("kind", ["plain", "near-parallel", "gram-schmidt", "two adapters", "as many as features"])
def test_powers_are_rotations_and_add_up(kind: str, t: float) -> None:
    adapters = {
        "plain": [adapter_of(gaussian(16, 6))],
        "near-parallel": [adapter_of(near_parallel(16, 6, 0.005))],
        "gram-schmidt": [adapter_of(gaussian(16, 4), orthogonalize=True)],
        "two adapters": [adapter_of(gaussian(16, 3)), adapter_of(gaussian(16, 5, seed=1))],
        "as many as features": [adapter_of(gaussian(6, 4)), adapter_of(gaussian(6, 4, seed=1))],
    }[kind]
    whole = dense(reflectors(adapters)["m0"])
    part = powered(adapters, t)
    close(part @ part.T, torch.eye(len(part), dtype=part.dtype))
    close(part @ powered(adapters, 1 - t), whole)
    close(powered(adapters, t - 0.1) @ powered(adapters, 0.1), part)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_an_nth_part_n_times_is_the_explicit_chain(n: int) -> None:
    chains = [gaussian(20, 4), gaussian(20, 2, seed=1)]
    part = powered([adapter_of(u) for u in chains], 1 / n)
    close(torch.linalg.matrix_power(part, n), explicit(torch.cat(chains, dim=1)))


def test_a_part_of_two_adapters_is_that_of_their_product_in_order() -> None:
    first, second = adapter_of(gaussian(20, 4)), adapter_of(gaussian(20, 4, seed=1))
    half = powered([first, second], 0.5)
    assert float((half - powered([second, first], 0.5)).abs().max()) > 0.01
    assert float((half - powered([first], 0.5) @ powered([second], 0.5)).abs().max()) > 0.01


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
def test_half_of_near_parallel_pairs_turns_by_half_the_angle(angle: float) -> None:
    """The change keeps its digits, and is half as large: nothing cancels."""
    adapter = adapter_of(near_parallel(64, 8, angle))
    identity = torch.eye(64, dtype=torch.float64)
    half, whole = powered([adapter], 0.5), explicit(adapter.chains["m0"])
    assert float((half @ half - whole).norm() / (whole - identity).norm()) < 1e-14 / angle
    assert float((half - identity).norm() / (whole - identity).norm()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", ["even", "odd", "gram-schmidt"])
def test_minus_one_is_the_inverse_of_any_chain_and_keeps_its_vectors(kind: str) -> None:
    adapters = {
        "even": [adapter_of(gaussian(12, 4)), adapter_of(gaussian(12, 2, seed=1))],
        "odd": [adapter_of(gaussian(12, 3))],
        "gram-schmidt": [adapter_of(gaussian(12, 4), orthogonalize=True), adapter_of(gaussian(12, 2, seed=1))],
    }[kind]
    close(powered(adapters, -1), dense(reflectors(adapters)["m0"]).T)
    (taken,) = take_strength(adapters, -1, "geodesic").adapters
    assert torch.equal(taken.chains["m0"][:, 0], adapters[-1].chains["m0"][:, -1])


def test_the_inverse_of_more_reflections_than_features_is_one_of_as_many() -> None:
    adapters = [adapter_of(gaussian(6, 4)), adapter_of(gaussian(6, 3, seed=1))]
    close(powered(adapters, -1), dense(reflectors(adapters)["m0"]).T)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_at_0_and_1_the_adapters_are_left_alone(t: float) -> None:
    adapters = (adapter_of(gaussian(12, 3)), adapter_of(gaussian(12, 4), orthogonalize=True))
    taken = take_strength(adapters, t, "geodesic")
    assert taken.linear == t
    assert all(got is given for got, given in zip(taken.adapters, adapters, strict=True))


def test_linear_is_a_factor_of_any_adapters() -> None:
    adapters = (adapter_of(gaussian(12, 3)), adapter_of(gaussian(12, 4), orthogonalize=True))
    taken = take_strength(adapters, 0.3, "linear")
    assert taken.linear == 0.3
    assert all(got is given for got, given in zip(taken.adapters, adapters, strict=True))


def test_idle_targets_stay_targets_that_do_nothing() -> None:
    idle = gaussian(12, 2).repeat_interleave(2, dim=1)
    (taken,) = take_strength([adapter_of(gaussian(12, 4, seed=1), idle)], 0.5, "geodesic").adapters
    close(explicit(taken.chains["m1"]), torch.eye(12, dtype=torch.float64))


def test_odd_targets_have_no_part_and_are_all_named() -> None:
    adapters = [adapter_of(gaussian(12, 3), gaussian(8, 3)), adapter_of(gaussian(12, 3, seed=1))]
    with pytest.raises(ConversionError, match="determinant of 1 targets is -1") as caught:
        take_strength(adapters, 0.5, "geodesic")
    assert caught.value.findings == ("m1: an odd number of reflections, 3",)
    assert "--interpolation linear" in str(caught.value.hint)


def test_mirrors_that_are_paired_by_choice_are_said_so() -> None:
    (note,) = take_strength([adapter_of(gaussian(12, 4), orthogonalize=True)], 0.5, "geodesic").notes
    assert "1 of 1 targets mirror directions (`m0`)" in note
    assert not take_strength([adapter_of(gaussian(12, 4))], 0.5, "geodesic").notes


def test_parameters_stay_whole_and_that_is_said() -> None:
    taken = take_strength([adapter_of(gaussian(12, 4), parameters={"m0.bias": torch.ones(3)})], 0.5, "geodesic")
    assert torch.equal(taken.adapters[0].parameters["m0.bias"], torch.ones(3))
    assert taken.notes == ("biases and saved modules are the adapters' own at any strength",)


@pytest.mark.parametrize("t", [1e9, -1e308])
def test_powers_without_digits_are_refused_and_parts_of_the_change_are_not(t: float) -> None:
    adapter = adapter_of(gaussian(12, 4))
    with pytest.raises(NumericalError, match="digits"):
        take_strength([adapter], t, "geodesic")
    assert take_strength([adapter], t, "linear").linear == t


def test_what_cannot_be_taken_is_refused_with_all_findings() -> None:
    one, other = adapter_of(gaussian(12, 4), task="CAUSAL_LM"), adapter_of(gaussian(10, 4), task="SEQ_CLS")
    with pytest.raises(MismatchError) as caught:
        take_strength([one, other], 0.5, "geodesic")
    assert len(caught.value.findings) == 2
    broken = adapter_of(torch.zeros(12, 4), torch.zeros(8, 4))
    with pytest.raises(NumericalError) as failed:
        take_strength([broken], 0.5, "geodesic")
    assert len(failed.value.findings) == 2
    for t in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            take_strength([one], t, "geodesic")
    with pytest.raises(ValueError, match="interpolation"):
        take_strength([one], 0.5, "cubic")  # type: ignore[arg-type]  # what a caller without types may pass


def test_an_adapter_at_a_strength_says_what_it_was_made_of() -> None:
    adapters = [adapter_of(gaussian(12, 4), digest="a" * 64), adapter_of(gaussian(12, 2, seed=1), digest="b" * 64)]
    (half,) = take_strength(adapters, 0.5, "geodesic").adapters
    (third,) = take_strength(adapters, 1 / 3, "geodesic").adapters
    assert [entry["digest"] for entry in half.entries()] == ["a" * 64, "b" * 64]
    assert [entry["strength"] for entry in half.entries()] == [0.5, 0.5]
    assert len({half.digest, third.digest, "a" * 64, "b" * 64}) == 4


# Merged weights, live layers, graphs


def scene(name: str, folder: Path, *, orthogonalize: bool = False, rank: int = 4) -> Path:
    """A folder with `base`, `adapter` and `second`: chains on every layer of a tiny model."""
    model: Any = BUILDERS[name]()
    if name == "llama":
        model.resize_token_embeddings(TOKENS, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3 / parameter.std())  # large enough that attention attends
    model.save_pretrained(folder / "base")
    widths = {path: len(vectors) for path, vectors in random_adapter(model).chains.items()}
    for seed, adapter in ((1, "adapter"), (5, "second")):
        chains = {
            path: near_parallel(d, rank, 0.3, seed=seed + i).float() for i, (path, d) in enumerate(widths.items())
        }
        if orthogonalize:
            chains = {path: gaussian(len(u), rank, seed=seed).float() for path, u in chains.items()}
        write_adapter(HraAdapter(chains, rank, orthogonalize=orthogonalize), folder / adapter)
    return folder


def adapters_in(folder: Path, *names: str) -> list[HraAdapter]:
    return [read_adapter(folder / name) for name in names or ("adapter",)]


def merged(folder: Path, output: str, *names: str, base: str = "base", **options: Any) -> dict[str, Tensor]:
    plan = plan_merge(open_checkpoint(folder / base), adapters_in(folder, *names), **options)
    merge_checkpoint(plan, folder / output)
    return tensors_in(folder / output)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    file = read_header(next(folder.glob("*.safetensors")))
    return {name: file.map(name).clone() for name in file.tensors}


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "unet"])
def test_a_merge_of_the_inverse_undoes_a_merge(name: str, orthogonalize: bool, tmp_path: Path) -> None:
    """Linear, Conv1D and Conv2d; two adapters, so that the order of the inverse matters."""
    folder = scene(name, tmp_path, orthogonalize=orthogonalize)
    there = merged(folder, "there", "adapter", "second")
    back = merged(folder, "back", "adapter", "second", base="there", strength=-1.0)
    base = tensors_in(folder / "base")
    moved = [key for key, value in base.items() if not torch.equal(there[key], value)]
    assert len(moved) >= len(adapters_in(folder)[0].chains) - 1  # GPT-2's head is tied: it gets a tensor of its own
    for key in moved:
        assert float((there[key] - base[key]).abs().max()) > 1e-3
        close(back[key], base[key], 10 * ATOL_WEIGHTS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "unet"])
def test_a_merge_at_half_strength_merged_again_is_the_merge(name: str, tmp_path: Path) -> None:
    folder = scene(name, tmp_path)
    whole = merged(folder, "whole")
    half = merged(folder, "half", strength=HALF)
    twice = merged(folder, "twice", base="half", strength=HALF)
    for key, value in whole.items():
        close(twice[key], value, 10 * ATOL_WEIGHTS)
    assert any(float((half[key] - value).abs().max()) > 1e-3 for key, value in whole.items())


def test_merges_and_exports_at_different_strengths_are_different_work(tmp_path: Path) -> None:
    """What an interrupted merge left is taken up by the same merge alone."""
    folder = scene("llama", tmp_path)
    choices: list[tuple[float, Interpolation]] = [
        (1.0, "geodesic"),
        (0.5, "geodesic"),
        (0.5, "linear"),
        (0.0, "linear"),
    ]
    base = open_checkpoint(folder / "base")
    plans = [plan_merge(base, adapters_in(folder), strength=t, interpolation=how) for t, how in choices]
    assert len({merge._key(plan, "base") for plan in plans}) == len(choices)
    options = [GraphOptions(strength=t, interpolation=how) for t, how in choices]
    exports = [plan_export(folder / "base", adapters_in(folder), each) for each in options]
    assert len({export_module._key(plan) for plan in exports}) == len(choices)


def test_one_weight_under_two_names_is_folded_whole_and_has_no_common_strength(tmp_path: Path) -> None:
    """transformers renamed GPT-NeoX's head: chains under the old and the new name would each be halved alone."""
    folder = scene("gpt-neox", tmp_path)
    names = [adapter_of(gaussian(32, 4)), adapter_of(gaussian(32, 2, seed=1))]
    names = [HraAdapter({name: each.chains["m0"]}, each.rank) for name, each in zip(HEADS, names, strict=True)]
    base = open_checkpoint(folder / "base")
    merge_checkpoint(plan_merge(base, names), tmp_path / "both")
    head = tensors_in(folder / "base")["embed_out.weight"].double()
    exact = head @ explicit(names[0].chains[HEADS[0]]) @ explicit(names[1].chains[HEADS[1]])
    close(tensors_in(tmp_path / "both")["embed_out.weight"].double(), exact, ATOL_WEIGHTS)
    with pytest.raises(MismatchError) as doubled:
        plan_merge(base, [HraAdapter({name: gaussian(32, 2) for name in HEADS}, 2)])
    assert "lm_head: its weight is that of embed_out too" in doubled.value.findings[0]
    with pytest.raises(ConversionError, match="several names") as caught:
        plan_merge(base, names, strength=HALF)
    assert ", ".join(HEADS) in caught.value.findings[0]


def tokens() -> Tensor:
    return torch.randint(4, 90, (2, 7), generator=torch.Generator().manual_seed(3))


def live_logits(folder: Path, *names: str, **options: Any) -> Tensor:
    """PyTorch, with live layers of these adapters."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    attach(model, *adapters_in(folder, *names), **options)
    return logits(model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens()).logits
    return result


def plain_logits(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(directory).eval())


def graph_logits(directory: Path, **more: Any) -> Tensor:
    """Stock ONNX Runtime."""
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    ids = tokens().numpy()
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids), **more}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        elif value.name == "position_ids":
            feeds[value.name] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    return torch.from_numpy(session.run(["logits"], feeds)[0])


def export(base: Path, adapters: Sequence[HraAdapter], output: Path, **options: Any) -> Path:
    export_graphs(plan_export(base, adapters, GraphOptions(**options)), output)
    return output


def effect_error(candidate: Tensor, reference: Tensor, base: Tensor) -> float:
    assert float((reference - base).norm() / base.norm()) > 0.01
    return float((candidate - reference).norm() / (reference - base).norm())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene whose folder also has `graph`, the base as a graph: what `onnx --strength 0` makes."""
    folder = scene("llama", tmp_path_factory.mktemp("llama"))
    write_tokenizer(folder / "base")
    made = run("onnx", folder / "adapter", "--base", folder / "base", "-o", folder / "graph", "--strength", "0")
    assert made.code == 0, made.stderr
    assert "at strength 0 the adapters do nothing" in made.stderr
    return folder


@pytest.fixture(scope="module")
def half(llama: Path) -> Path:
    """What `onnx --strength 0.5` makes of a scene and judges itself."""
    arguments = (llama / "adapter", "--base", llama / "base", "-o", llama / "half", "--mode", "reflect")
    made = run("onnx", *arguments, "--strength", "0.5")
    assert made.code == 0, made.stderr
    assert "parity holds" in made.stdout
    return llama / "half"


@pytest.mark.parametrize("interpolation", BOTH)
def test_live_layers_are_the_merged_weights(llama: Path, interpolation: Interpolation, tmp_path: Path) -> None:
    names = ("adapter", "second")
    options: dict[str, Any] = {"strength": HALF, "interpolation": interpolation}
    base, live = plain_logits(llama / "base"), live_logits(llama, *names, **options)
    plan = plan_merge(open_checkpoint(llama / "base"), adapters_in(llama, *names), **options)
    merge_checkpoint(plan, tmp_path / "merged")
    assert effect_error(plain_logits(tmp_path / "merged"), live, base) < EFFECT_FP32
    assert effect_error(live_logits(llama, *names), live, base) > 0.1


@pytest.mark.parametrize(
    ("interpolation", "options"),
    [
        pytest.param("geodesic", {}, id="merged, geodesic"),
        pytest.param("linear", {}, id="merged, linear", marks=pytest.mark.slow),
        pytest.param("geodesic", {"mode": "reflect"}, id="reflect, geodesic"),
        pytest.param(
            "linear", {"mode": "reflect", "plain_ops": True}, id="plain operators, linear", marks=pytest.mark.slow
        ),
        pytest.param("geodesic", {"mode": "reflect", "runtime": "genai"}, id="GenAI, geodesic"),
        pytest.param("linear", {"runtime": "genai"}, id="GenAI merged, linear", marks=pytest.mark.slow),
    ],
)
def test_graphs_are_the_live_layers(llama: Path, interpolation: str, options: dict[str, Any], tmp_path: Path) -> None:
    names = ("adapter", "second")
    at: dict[str, Any] = {"strength": HALF, "interpolation": interpolation}
    adapters = adapters_in(llama, *names)
    out = export(llama / "base", adapters, tmp_path / "out", **options, **at)
    live = live_logits(llama, *names, **at)
    assert effect_error(graph_logits(out), live, plain_logits(llama / "base")) < EFFECT_FP32
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert (manifest["strength"], manifest["interpolation"]) == (HALF, interpolation)
    assert [entry["digest"] for entry in manifest["adapters"]] == [adapter.digest for adapter in adapters]
    stated = open_graph(out / "model.onnx").metadata_props
    assert (stated["hra.strength"], stated["hra.interpolation"]) == ("0.5", interpolation)


@pytest.mark.parametrize("interpolation", BOTH)
@pytest.mark.parametrize("plain_ops", [False, True], ids=["operator", "plain operators"])
def test_a_graph_that_takes_the_adapters_in_does_so_at_that_strength(
    llama: Path, plain_ops: bool, interpolation: Interpolation, tmp_path: Path
) -> None:
    at: dict[str, Any] = {"strength": HALF, "interpolation": interpolation}
    out = export(llama / "graph", adapters_in(llama), tmp_path / "out", mode="reflect", plain_ops=plain_ops, **at)
    live = live_logits(llama, "adapter", **at)
    assert effect_error(graph_logits(out), live, plain_logits(llama / "base")) < EFFECT_FP32


@pytest.mark.parametrize("interpolation", BOTH)
def test_swappable_adapters_are_each_at_that_strength(
    llama: Path, interpolation: Interpolation, tmp_path: Path
) -> None:
    """Each adapter for itself, as the graph's default and in the files."""
    names = ("adapter", "second")
    at: dict[str, Any] = {"strength": HALF, "interpolation": interpolation}
    adapters, base = adapters_in(llama, *names), plain_logits(llama / "base")
    first, second = (live_logits(llama, name, **at) for name in names)
    wishes: dict[str, Any] = {"mode": "reflect", "default": "adapter", **at}
    out = export(llama / "graph", adapters, tmp_path / "out", swap="adapter", **wishes)
    assert effect_error(graph_logits(out), first, base) < EFFECT_FP32
    file = read_adapter_file(out / "adapters" / "second.onnx_adapter")
    assert effect_error(graph_logits(out, **file.parameters), second, base) < EFFECT_FP32
    assert (file.description["strength"], file.description["interpolation"]) == (HALF, interpolation)
    assert [entry["digest"] for entry in file.description["adapters"]] == [adapters[1].digest]
    whole = export(llama / "graph", adapters, tmp_path / "whole", swap="adapter", mode="reflect")
    assert read_adapter_file(whole / "adapters" / "second.onnx_adapter").adapter_version != file.adapter_version
    rows = graph_logits(
        export(llama / "graph", adapters, tmp_path / "rows", swap="rows", **wishes), adapter_index=np.array([2, 1])
    )
    assert effect_error(rows[0], second[0], base[0]) < EFFECT_FP32
    assert effect_error(rows[1], first[1], base[1]) < EFFECT_FP32


@pytest.mark.parametrize("interpolation", BOTH)
def test_graphs_at_strength_0_are_the_base_and_at_1_the_plain_graph(
    llama: Path, interpolation: Interpolation, tmp_path: Path
) -> None:
    """Bit for bit: nothing is added to the base, and nothing is taken from the adapters."""
    graph, adapters = llama / "graph", adapters_in(llama)
    plain = export(graph, adapters, tmp_path / "plain", mode="reflect")
    base, whole = graph_logits(graph), graph_logits(plain)
    assert float((whole - base).abs().max()) > 0.01
    for t, expected in ((0.0, base), (1.0, whole)):
        at: dict[str, Any] = {"mode": "reflect", "strength": t, "interpolation": interpolation}
        assert torch.equal(graph_logits(export(graph, adapters, tmp_path / f"{t:g}", **at)), expected)
        swappable = export(graph, adapters, tmp_path / f"swap-{t:g}", swap="adapter", default="adapter", **at)
        assert torch.equal(graph_logits(swappable), expected)


def test_a_merged_graph_at_strength_0_holds_the_weights_of_the_base(llama: Path) -> None:
    model = open_graph(llama / "graph" / "model.onnx")
    held = {value.const_value.numpy().tobytes() for value in model.graph.initializers.values() if value.const_value}
    for key, value in tensors_in(llama / "base").items():
        if key.endswith("_proj.weight"):
            assert value.numpy().tobytes() in held or value.T.contiguous().numpy().tobytes() in held


# The command line


def test_validate_takes_the_strength_from_the_manifest_and_judges_by_it(llama: Path, tmp_path: Path) -> None:
    adapter, base = llama / "adapter", llama / "base"
    half = run("merge", adapter, "--base", base, "-o", tmp_path / "half", "--strength", "0.5", "--json")
    assert half.code == 0, half.stderr
    assert (half.json["strength"], half.json["interpolation"]) == (0.5, "geodesic")
    judged = ("validate", adapter, "--base", base, "--candidate", tmp_path / "half")
    assert run(*judged).code == 0
    assert run(*judged, "--strength", "1").code == 3
    assert run(*judged, "--interpolation", "linear").code == 3
    assert run(*judged, "--strength", "nan").code == 2


def test_an_old_manifest_without_interpolation_means_linear(llama: Path, tmp_path: Path) -> None:
    adapter, base = llama / "adapter", llama / "base"
    linear = ("--strength", "0.5", "--interpolation", "linear")
    assert run("merge", adapter, "--base", base, "-o", tmp_path / "old", *linear).code == 0
    path = tmp_path / "old" / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    del manifest["interpolation"]
    path.write_text(json.dumps(manifest))
    assert run("validate", adapter, "--base", base, "--candidate", tmp_path / "old").code == 0


def test_a_graph_is_judged_at_the_strength_it_was_made_at(llama: Path, half: Path, tmp_path: Path) -> None:
    """By what stands in the file, or by the manifest of its directory."""
    judged = ("validate", llama / "adapter", "--base", llama / "base", "--candidate")
    assert run(*judged, half / "model.onnx").code == 0
    assert run(*judged, half / "model.onnx", "--strength", "0").code == 2
    wrong = mutate(half, tmp_path / "wrong", lambda model: None)
    manifest = json.loads((wrong / MANIFEST_NAME).read_text())
    (wrong / MANIFEST_NAME).write_text(json.dumps({**manifest, "strength": 0.8}))
    assert run(*judged, wrong).code == 3
    for nonsense in ({"strength": "half"}, {"interpolation": "cubic"}):
        (wrong / MANIFEST_NAME).write_text(json.dumps({**manifest, **nonsense}))
        refused = run(*judged, wrong)
        assert (refused.code, "means nothing" in refused.stderr) == (4, True)


@pytest.mark.slow
def test_swappable_graphs_are_judged_at_the_strength_of_each_file(llama: Path, tmp_path: Path) -> None:
    """An adapter file may have been made later, at a strength of its own."""
    adapters = adapters_in(llama, "adapter", "second")
    for t, name in ((1.0, "out"), (HALF, "half")):
        export(llama / "graph", adapters, tmp_path / name, mode="reflect", swap="adapter", strength=t)
    for path in (tmp_path / "half" / "adapters").glob("second*"):
        (tmp_path / "out" / "adapters" / path.name).write_bytes(path.read_bytes())
    report = validate_graph(adapters, llama / "base", tmp_path / "out", prompts=["a"])
    assert report.ok, report.findings
    assert {output.name.partition(":")[0] for output in report.outputs} == {"adapter", "second"}


@pytest.mark.parametrize("verb", ["merge", "onnx"])
def test_odd_adapters_are_refused_and_nothing_is_written(verb: str, tmp_path: Path) -> None:
    folder = scene("llama", tmp_path / "folder")
    adapter = adapters_in(folder)[0]
    odd = {path: torch.cat([u, u[:, :1] + 1], dim=1) for path, u in adapter.chains.items()}
    write_adapter(HraAdapter(odd, 5), folder / "odd")
    outcome = run(verb, folder / "odd", "--base", folder / "base", "-o", tmp_path / "out", "--strength", "0.5")
    assert outcome.code == 4
    for words in ("determinant", next(iter(odd)), "--interpolation linear"):
        assert words in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("verb", ["merge", "onnx"])
@pytest.mark.parametrize("strength", ["nan", "inf", "half"])
def test_a_strength_that_is_no_number_is_a_matter_of_usage(verb: str, strength: str, tmp_path: Path) -> None:
    outcome = run(verb, tmp_path, "--base", tmp_path, "-o", tmp_path / "out", "--strength", strength)
    assert outcome.code == 2
    assert "--strength" in outcome.stderr
