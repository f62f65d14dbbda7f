"""What our tuner does beyond PEFT's: layers PEFT's refuses, mixed batches, exact unmerging, caching that never lies."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hra_export import kernels
from hra_export.adapter import read_adapter
from hra_export.attachment import attach
from hra_export.errors import MismatchError, NumericalError, UnsupportedModelError
from hra_export.householder import compact_wy, dense
from hra_export.reflection import factor, reflect_rows
from hra_export.training import layers
from hra_export.training.layers import initial_vectors
from hra_export.training.regularizer import orthogonality_penalty
from hra_export.training.tuner import accelerate_peft, get_hra_model, load_hra_model
from tests.tiny_models import MODELS, build, scores

# Float32: activations of size 1, sums of at most 72 terms, some roundings more than the base layer has.
ATOL = 2e-5
RANK = 4


class Net(nn.Module):
    """One layer under the name `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def adapted(layer: nn.Module, *, r: int = RANK, seed: int = 0, **options: Any) -> Any:
    """The layer behind a chain away from the identity."""
    torch.manual_seed(seed)
    model = get_hra_model(Net(layer), HRAConfig(r=r, target_modules=["layer"], **{"init_weights": False, **options}))
    return model.eval()


def rotation(model: Any, adapter: str = "default") -> Tensor:
    """R in float64."""
    layer = model.base_model.model.layer
    return dense(compact_wy(layer.hra_u[adapter], orthogonalize=layer.hra_apply_GS[adapter]))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=ATOL)


def test_conv1d_is_adapted_on_its_input_side() -> None:
    layer, x = Conv1D(6, 12), torch.randn(5, 12)
    model = adapted(layer)
    close(model(x), x.double() @ (rotation(model).T @ layer.weight.double()) + layer.bias.double())


def test_gpt2_is_trained_and_merged() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    model = get_hra_model(base, HRAConfig(r=RANK, target_modules=["c_attn", "c_proj", "c_fc"], init_weights=False))
    tokens = torch.randint(96, (2, 9))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if "hra_u" in name)
    with torch.no_grad():
        live = model(input_ids=tokens).logits
        merged = model.merge_and_unload()(input_ids=tokens).logits
    close(merged, live)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "rectangular": {"kernel_size": (1, 3)},
    "tall-and-strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1)},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflected-border": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular-border": {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "circular", "bias": False},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_is_that_of_the_folded_kernel(options: dict[str, Any], channels_last: bool) -> None:
    layer, x = nn.Conv2d(4, 6, **options), torch.randn(2, 4, 8, 8)
    if channels_last:
        layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
    reference = copy.deepcopy(layer)
    model = adapted(layer)
    folded = reference.weight.double().reshape(6, -1) @ rotation(model)
    reference.weight.data = folded.reshape(reference.weight.shape).float()
    close(model(x), reference(x))
    model(x).sum().backward()
    assert model.base_model.model.layer.hra_u["default"].grad.abs().sum() > 0
    model.merge_adapter()
    close(model(x), reference(x))


def test_grouped_convolution_is_refused_and_the_model_left_alone() -> None:
    net = Net(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UnsupportedModelError, match=r"layer: a grouped convolution"):
        get_hra_model(net, HRAConfig(r=2, target_modules=["layer"]))
    assert type(net.layer) is nn.Conv2d


def test_rank_above_features_names_every_target_and_leaves_the_model_alone() -> None:
    model = build("llama")
    names = list(model.state_dict())
    with pytest.raises(MismatchError) as refused:
        get_hra_model(model, HRAConfig(r=40, target_modules=["q_proj", "down_proj"]))
    assert len(refused.value.findings) == 2  # down_proj has 48 inputs
    assert "layers.1.self_attn.q_proj: expected a rank of 1 to 32" in str(refused.value)
    assert list(model.state_dict()) == names


def test_second_adapter_that_does_not_fit_leaves_the_first() -> None:
    model = get_hra_model(build("llama"), HRAConfig(r=4, target_modules=["q_proj"]))
    names = list(model.state_dict())
    with pytest.raises(MismatchError):
        model.add_adapter("second", HRAConfig(r=40, target_modules=["q_proj", "v_proj"]))
    assert list(model.state_dict()) == names


def test_no_target_is_a_mismatch() -> None:
    with pytest.raises(MismatchError, match="no target"):
        get_hra_model(build("llama"), HRAConfig(r=4, target_modules=["query"]))


def test_gram_schmidt_with_paired_vectors_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="rounding noise"):
        get_hra_model(build("llama"), HRAConfig(r=4, target_modules=["q_proj"], apply_GS=True))


@pytest.mark.parametrize("r", [2, 8])
def test_even_rank_starts_at_the_base(r: int) -> None:
    base = build("llama")
    torch.manual_seed(1)
    inputs = MODELS["llama"].inputs()
    expected = scores(base(**inputs))
    close(scores(get_hra_model(base, HRAConfig(r=r, target_modules="all-linear"))(**inputs)), expected)


@pytest.mark.parametrize("r", [1, 3, 7])
def test_odd_rank_starts_one_reflection_from_the_base_and_says_so(r: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = get_hra_model(Net(nn.Linear(20, 6)), HRAConfig(r=r, target_modules=["layer"]))
    assert "odd" in caplog.text
    u = model.base_model.model.layer.hra_u["default"].detach().double()
    last = u[:, -1] / u[:, -1].norm()
    torch.testing.assert_close(rotation(model), torch.eye(20, dtype=torch.float64) - 2 * torch.outer(last, last))


def test_initial_vectors_have_the_lengths_of_pefts_whatever_the_rank() -> None:
    """The angle of an optimizer's step depends on them."""
    torch.manual_seed(0)
    lengths = {r: initial_vectors(3000, r, paired=True).norm(dim=0) for r in (8, 9)}
    # Uniform in ±1/√(r//2), so ‖u‖ = √(d / 3 (r//2)) within 3 %: five standard deviations at d = 3000.
    for r, found in lengths.items():
        expected = torch.full((2 * (r // 2),), (3000 / (3 * (r // 2))) ** 0.5)
        torch.testing.assert_close(found[: 2 * (r // 2)], expected, rtol=0.03, atol=0)


# --- several adapters, rows with adapters of their own


def two_adapters() -> Any:
    model = adapted(nn.Linear(20, 6))
    model.add_adapter("other", HRAConfig(r=2, target_modules=["layer"], init_weights=False))
    return model.eval()


def test_each_row_of_a_batch_may_name_its_adapter() -> None:
    model, x = two_adapters(), torch.randn(4, 3, 20)
    got = model(x, adapter_names=["other", "__base__", "default", "other"])
    weight, bias = (value.double() for value in model.base_model.model.layer.base_layer.parameters())
    turns = [rotation(model, "other"), torch.eye(20), rotation(model), rotation(model, "other")]
    expected = [row.double() @ (weight @ turn.double()).T + bias for row, turn in zip(x, turns, strict=True)]
    close(got, torch.stack(expected))


def test_rows_of_chains_of_one_rank_are_one_call_where_a_kernel_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, that is; the operator's plain version stands in for the kernel."""
    model, x = adapted(nn.Linear(20, 6)), torch.randn(5, 3, 20)
    model.add_adapter("other", HRAConfig(r=RANK, target_modules=["layer"], init_weights=False, apply_GS=True))
    names = ["other", "__base__", "default", "other", "__base__"]
    one_by_one, calls = model.eval()(x, adapter_names=names).detach(), []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return reflect_rows(*arguments)

    monkeypatch.setattr(layers, "reflect_rows", counted)
    monkeypatch.setattr(kernels, "take", lambda x, rank: rank == RANK)
    with torch.no_grad():
        close(model(x, adapter_names=names), one_by_one)
        assert len(calls) == 1
        close(model(x, adapter_names=["__base__"] * 5), model.base_model.model.layer.base_layer(x))
        model.add_adapter("smaller", HRAConfig(r=2, target_modules=["layer"], init_weights=False))
        model(x, adapter_names=["smaller", *names[1:]])
    model(x, adapter_names=names).sum().backward()  # with gradients, one after another
    assert len(calls) == 1


def test_rows_of_images_may_name_their_adapter() -> None:
    model, x = adapted(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6)
    with_adapter, base = model(x), model.base_model.model.layer.base_layer(x)
    got = model(x, adapter_names=["__base__", "default"])
    close(got, torch.stack([base[0], with_adapter[1]]))


def test_adapter_names_in_a_whole_model_with_a_saved_head() -> None:
    config = {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "init_weights": False}
    model = get_hra_model(build("bert"), HRAConfig(r=4, **config))
    model.add_adapter("other", HRAConfig(r=2, **config))
    torch.manual_seed(1)
    inputs, singles = MODELS["bert"].inputs(), []
    for name in ("other", "default"):
        model.set_adapter(name)
        singles.append(scores(model.eval()(**inputs)))
    got = scores(model(**inputs, adapter_names=["other", "default"]))
    close(got, torch.stack([singles[0][0], singles[1][1]]))


@pytest.mark.parametrize(
    ("names", "message"),
    [(["default"], "one name for each of 4 rows"), (["default"] * 3 + ["typo"], "no layer has typo")],
)
def test_wrong_adapter_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_adapters()(torch.randn(4, 20), adapter_names=names)


def test_adapter_names_are_refused_in_training_and_when_merged() -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match="training mode"):
        model.train()(torch.randn(1, 20), adapter_names=["other"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(torch.randn(1, 20), adapter_names=["other"])


def test_disabled_adapter_is_the_base() -> None:
    model, x = adapted(nn.Linear(20, 6)), torch.randn(4, 20)
    base = model.base_model.model.layer.base_layer(x)
    assert not torch.allclose(model(x), base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


# --- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [nn.Linear(20, 6), nn.Conv2d(3, 4, 3), Conv1D(6, 20)], ids=str)
def test_unmerge_restores_the_exact_bits(layer: nn.Module, dtype: torch.dtype) -> None:
    model = adapted(copy.deepcopy(layer).to(dtype))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    merged = model.state_dict()["base_model.model.layer.base_layer.weight"]
    assert not torch.equal(merged, before["base_model.model.layer.base_layer.weight"])
    assert merged.dtype == dtype
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_merging_two_adapters_one_after_the_other_rounds_once() -> None:
    model = adapted(nn.Linear(20, 6).bfloat16())
    model.add_adapter("other", HRAConfig(r=2, target_modules=["layer"], init_weights=False))
    layer = model.base_model.model.layer
    exact = layer.base_layer.weight.double() @ rotation(model) @ rotation(model, "other")
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["other"])
    assert torch.equal(layer.base_layer.weight.double(), exact.bfloat16().double())
    assert layer.merged_adapters == ["default", "other"]


def test_merge_leaves_a_tied_parameter_alone() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(6, 20), "layer": nn.Linear(20, 6, bias=False)})
    net["layer"].weight = net["embedding"].weight
    model = get_hra_model(net, HRAConfig(r=2, target_modules=["layer"], init_weights=False))
    embedding = net.get_parameter("embedding.weight")
    before = embedding.clone()
    model.base_model.merge_adapter()
    assert torch.equal(net.get_parameter("embedding.weight"), before)
    model.base_model.unmerge_adapter()
    assert net.get_parameter("layer.base_layer.weight") is embedding


def test_safe_merge_refuses_what_the_dtype_cannot_hold_and_changes_nothing() -> None:
    layer = nn.Linear(20, 6)
    layer.weight.data.fill_(60000.0)
    model = adapted(layer.half())
    before = layer.weight.clone()
    with pytest.raises(NumericalError, match="NaN or Inf"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.layer.base_layer.weight, before)
    assert not model.base_model.model.layer.merged


def test_accelerate_refuses_merged_and_foreign_models() -> None:
    stock = get_peft_model(Net(nn.Linear(20, 6)), HRAConfig(r=2, target_modules=["layer"]))
    stock.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        accelerate_peft(stock)
    with pytest.raises(ValueError, match="no HRA layer"):
        accelerate_peft(Net(nn.Linear(20, 6)))


# --- factors that are reused while they hold


def solves(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of chains of each batched solve from now on."""
    from hra_export.training import workspace

    sizes: list[int] = []
    original = factor

    def counted(vectors: Tensor, dtype: torch.dtype) -> Any:
        sizes.append(len(vectors))
        return original(vectors, dtype)

    monkeypatch.setattr(workspace, "factor", counted)
    return sizes


def micro_batch(model: Any) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(4, 96, (2, 9))
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_chains_of_one_shape_are_solved_together_and_kept_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_hra_model(build("llama"), HRAConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    sizes = solves(model, monkeypatch)
    micro_batch(model)
    assert sizes == [12, 2]  # q, k, v, o, gate, up of two layers; down
    micro_batch(model)
    assert sizes == [12, 2]
    optimizer.step()
    micro_batch(model)
    assert sizes == [12, 2] * 2


def test_vectors_that_zero3_shards_are_found_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed gathers what is looked at, in all processes at once: a layer must look at nothing but its own."""
    model = get_hra_model(build("llama"), HRAConfig(r=4, target_modules="all-linear")).train()
    for value in model.parameters():
        if value.requires_grad:
            value.ds_id = 0
    sizes = solves(model, monkeypatch)
    micro_batch(model)
    assert sizes == [1] * 14


def test_gradient_checkpointing_reuses_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_hra_model(build("llama"), HRAConfig(r=4, target_modules="all-linear")).train()
    micro_batch(model)
    plain = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    sizes = solves(model, monkeypatch)
    model.base_model.workspace.expire()
    micro_batch(model)
    assert sizes == [12, 2]
    for name, value in model.named_parameters():
        if value.grad is not None:
            assert torch.equal(value.grad, plain[name])


def test_weights_swapped_through_data_are_noticed_outside_of_training() -> None:
    """As an average of weights is swapped in for an evaluation: no version counter moves."""
    model, x = adapted(nn.Linear(20, 6)).eval(), torch.randn(4, 20)
    vectors = model.base_model.model.layer.hra_u["default"]
    first = model(x)
    counter = vectors._version
    vectors.data.copy_(torch.randn(20, RANK))
    assert vectors._version == counter
    weight = model.base_model.model.layer.base_layer.weight.double() @ rotation(model)
    assert not torch.allclose(model(x), first)
    close(model(x), x.double() @ weight.T + model.base_model.model.layer.base_layer.bias.double())


def test_optimizer_that_writes_through_data_is_noticed() -> None:
    class Raw(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for value in group["params"]:
                    value.data.add_(torch.ones_like(value), alpha=0.5)

    model, x = adapted(nn.Linear(20, 6)).train(), torch.randn(4, 20)
    first = model(x)
    Raw([value for value in model.parameters() if value.requires_grad], lr=0.1).step()
    assert not torch.allclose(model(x), first)


def test_loaded_values_are_noticed_within_a_training_step() -> None:
    model, x = adapted(nn.Linear(20, 6)).train(), torch.randn(4, 20)
    first = model(x)
    model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items() if "hra_u" in name}, strict=False
    )
    assert not torch.allclose(model(x), first)


def test_replaced_adapter_of_the_same_name_is_noticed() -> None:
    model, x = two_adapters(), torch.randn(4, 20)
    model.set_adapter("other")
    first = model(x)
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.manual_seed(9)
    model.add_adapter("other", HRAConfig(r=2, target_modules=["layer"], init_weights=False))
    model.set_adapter("other")
    assert not torch.allclose(model.eval()(x), first)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copied_model_has_factors_of_its_own(way: str) -> None:
    model, x = adapted(nn.Linear(20, 6)).train(), torch.randn(4, 20)
    first = model(x)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        twin.base_model.model.layer.hra_u["default"].add_(1)
    assert torch.equal(model(x), first)
    assert not torch.allclose(twin(x), first)


def test_model_in_inference_mode_can_be_trained_afterwards() -> None:
    model, x = adapted(nn.Linear(20, 6)), torch.randn(4, 20)
    with torch.inference_mode():
        expected = model(x)
    y = model.train()(x)
    y.sum().backward()
    close(y, expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("options", [{}, {"apply_GS": True, "init_weights": False}], ids=["chain", "gram-schmidt"])
def test_whole_model_compiles_to_one_graph_once(name: str, options: dict[str, Any]) -> None:
    """No graph breaks, and no new graph after an optimizer step."""
    model = get_hra_model(build(name), HRAConfig(r=4, target_modules=MODELS[name].targets, **options))
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    vectors = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(vectors, lr=0.1)
    for _ in range(3):
        losses = [
            each(**MODELS[name].inputs() | {"input_ids": torch.arange(18).view(2, 9)}) for each in (compiled, model)
        ]
        gradients = [torch.autograd.grad(scores_with_gradient(loss), vectors) for loss in losses]
        for value, got, expected in zip(vectors, *gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
            value.grad = expected
        optimizer.step()
    assert graphs == 1


def scores_with_gradient(result: Any) -> Tensor:
    total: Tensor = result.logits.square().sum()
    return total


def test_autocast_is_a_few_roundings_from_float32() -> None:
    model, x = adapted(nn.Linear(20, 6)), torch.randn(50, 20)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 10 * 2**-9


def test_half_precision_base_keeps_float32_vectors_and_its_own_products() -> None:
    model, x = adapted(nn.Linear(20, 6).bfloat16()), torch.randn(50, 20, dtype=torch.bfloat16)
    y = model(x)
    y.sum().backward()
    layer = model.base_model.model.layer
    assert y.dtype == torch.bfloat16
    assert layer.hra_u["default"].dtype == layer.hra_u["default"].grad.dtype == torch.float32


# --- files, and the rest of this library


@pytest.mark.parametrize("options", [{}, {"apply_GS": True}], ids=["chain", "gram-schmidt"])
def test_saved_adapter_is_read_and_attached_with_the_same_outputs(tmp_path: Path, options: dict[str, Any]) -> None:
    model = get_hra_model(
        build("unet"), HRAConfig(r=4, target_modules=MODELS["unet"].targets, init_weights=False, **options)
    )
    model.save_pretrained(tmp_path)
    base = build("unet")
    attach(base, read_adapter(tmp_path))
    outputs = []
    for each in (model, base, load_hra_model(build("unet"), tmp_path)):
        torch.manual_seed(3)
        outputs.append(scores(each.eval()(**MODELS["unet"].inputs())))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-6, atol=1e-6)


# --- the regularizer


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_penalty_is_the_sum_over_chains(form: Any) -> None:
    model = get_hra_model(build("llama"), HRAConfig(r=4, target_modules="all-linear", init_weights=False))
    expected = 0.0
    for layer in model.modules():
        if hasattr(layer, "hra_u"):
            u = layer.hra_u["default"].detach().double()
            u = u / u.norm(dim=0)
            off = float(torch.linalg.matrix_norm(u.T @ u - torch.eye(4)))
            expected += off**2 if form == "squared" else off
    assert float(orthogonality_penalty(model, form=form).detach()) == pytest.approx(expected, rel=1e-5)


def test_penalty_of_the_paired_start_is_the_rank_and_does_not_open_pairs() -> None:
    model = get_hra_model(Net(nn.Linear(4000, 2)), HRAConfig(r=2, target_modules=["layer"]))
    penalty = orthogonality_penalty(model)
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(2, abs=1e-4)
    assert float(model.base_model.model.layer.hra_u["default"].grad.norm()) < 1e-5


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_penalty_pulls_towards_orthogonal_vectors(form: Any) -> None:
    model = adapted(nn.Linear(20, 6), r=4)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        orthogonality_penalty(model, form=form).backward()
        optimizer.step()
    u = model.base_model.model.layer.hra_u["default"].detach()
    u = u / u.norm(dim=0)
    assert torch.linalg.matrix_norm(u.T @ u - torch.eye(4)) < 0.05


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_penalty_of_orthogonal_vectors_has_no_gradient(form: Any) -> None:
    model = adapted(nn.Linear(4, 6), r=2)
    layer = model.base_model.model.layer
    layer.hra_u["default"].data.copy_(torch.eye(4)[:, :2])
    orthogonality_penalty(model, form=form).backward()
    assert torch.equal(layer.hra_u["default"].grad, torch.zeros(4, 2))
