"""Live layers against explicit float64 weights W R, in small modules and in whole models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hra_export.adapter import HraAdapter
from hra_export.attachment import Attachment, attach
from hra_export.errors import MismatchError, NumericalError, UnsupportedModelError
from hra_export.householder import BlockReflector, compact_wy, dense, orthogonality_error
from hra_export.layer import Chain, ReflectedConv2d, ReflectedLayer
from hra_export.reflection import Factors, reflect
from tests.tiny_models import MODELS, build, scores

# Float64 on both sides: a few hundred terms a sum.
ATOL64 = 1e-12
# Float32: activations of size 1, some tens of terms a sum, two roundings more than the base layer has; where
# Gram-Schmidt runs in float32, to be trained through, columns 0.05 apart magnify each rounding twenty times.
ATOL32 = 2e-5
# One rounding of the activations' dtype, relative: half a unit in the last place.
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# z = x − (x U Tᵀ) Uᵀ rounds U, x U, the coefficients, the update and the difference once each; |T| ≤ 4 and cancelling
# pairs weigh the first three. Measured: 3.
ROUNDINGS = 10
# R from a T that was solved for the rounded U and then held in float32: r entries of up to 4, 2^-24 each.
ORTHOGONALITY = 1e-5
# Central differences in float64 have an error of step² ≈ 1e-12 and rounding / step ≈ 1e-10.
GRADCHECK_ATOL = 1e-7

RANK = 4


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vectors(d: int, r: int = RANK, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Half of the columns in pairs 0.05 apart, the rest anywhere."""
    u = gaussian(d, r, seed=seed)
    if r > 1:
        u[:, 1] = u[:, 0] + 0.05 * u[:, 1]
    return u.to(dtype)


def rotation(*chains: Tensor, orthogonalize: bool = False) -> Tensor:
    """R_1 R_2 … in float64."""
    product = torch.eye(chains[0].shape[0], dtype=torch.float64)
    for u in chains:
        product = product @ dense(compact_wy(u, orthogonalize=orthogonalize))
    return product


def adapter(chains: dict[str, Tensor], **options: Any) -> HraAdapter:
    return HraAdapter(chains, rank=next(iter(chains.values())).shape[1], **options)


class Net(nn.Module):
    """One layer of every kind, each used on its own."""

    layer: Any  # nn.Module's attributes are typed Tensor | Module

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, name: str = "layer") -> Tensor:
        y: Tensor = self.get_submodule(name)(x)
        return y


def conv1d_of_gpt2(inputs: int, outputs: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(outputs, inputs)
    with torch.no_grad():
        layer.weight.copy_(gaussian(inputs, outputs))
        layer.bias.copy_(gaussian(outputs))
    return layer


def layer_of(kind: str) -> tuple[Any, Tensor]:
    """A float64 layer of 12 features and 6 outputs or rows, and an input for it."""
    layers = {"linear": nn.Linear(12, 6), "convolution": nn.Conv2d(3, 6, 2), "embedding": nn.Embedding(6, 12)}
    inputs = {"linear": gaussian(5, 12), "convolution": gaussian(2, 3, 4, 4), "embedding": torch.arange(6)}
    return layers[kind].double(), inputs[kind]


def close(got: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(got.detach().double(), expected.detach().double(), rtol=0, atol=atol)


# Each kind of layer.


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("r", [1, 2, 3, 8])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, ATOL64), (torch.float32, ATOL32)])
def test_linear_is_the_layer_with_w_r(dtype: torch.dtype, atol: float, r: int, orthogonalize: bool) -> None:
    net, x = Net(layer=nn.Linear(10, 6).to(dtype)), gaussian(2, 3, 10, dtype=dtype)
    u = vectors(10, r, dtype=dtype)
    weight = net.layer.weight.double() @ rotation(u, orthogonalize=orthogonalize)
    attach(net, adapter({"layer": u}, orthogonalize=orthogonalize))
    close(net(x), functional.linear(x.double(), weight, net.layer.bias.double()), atol)
    assert net(x).dtype == dtype


def test_linear_without_bias_and_with_one_row() -> None:
    net, x, u = Net(layer=nn.Linear(10, 6, bias=False).double()), gaussian(10), vectors(10)
    expected = net.layer.weight @ rotation(u) @ x
    attach(net, adapter({"layer": u}))
    close(net(x), expected, ATOL64)


def test_conv1d_of_gpt2_is_the_layer_with_w_r() -> None:
    """Its weight is stored (in, out)."""
    net, x, u = Net(layer=conv1d_of_gpt2(10, 6).double()), gaussian(2, 3, 10), vectors(10)
    expected = x @ (net.layer.weight.T @ rotation(u)).T + net.layer.bias
    attach(net, adapter({"layer": u}))
    close(net(x), expected, ATOL64)


def test_embedding_rows_are_rotated_after_the_lookup() -> None:
    net, tokens, u = Net(layer=nn.Embedding(7, 10, padding_idx=0).double()), torch.tensor([[0, 3, 6, 3]]), vectors(10)
    expected = (net.layer.weight @ rotation(u))[tokens]
    attach(net, adapter({"layer": u}))
    close(net(tokens), expected, ATOL64)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "one-by-one": {"kernel_size": 1},
    "rectangular": {"kernel_size": (1, 3)},
    "tall": {"kernel_size": (3, 2)},
    "stride": {"kernel_size": 3, "stride": (2, 1)},
    "dilation": {"kernel_size": (3, 2), "dilation": (1, 2)},
    "padding": {"kernel_size": 3, "padding": (0, 2)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same-dilated": {"kernel_size": 3, "padding": "same", "dilation": (2, 1)},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "reflect": {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "everything": {
        "kernel_size": (2, 3),
        "padding": (1, 2),
        "padding_mode": "circular",
        "stride": (1, 2),
        "dilation": (2, 1),
    },
    "no-bias": {"kernel_size": 3, "bias": False},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_is_the_layer_with_w_r(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 5, **options).double()
    net, x, u = Net(layer=layer), gaussian(2, 3, 7, 8), vectors(layer.weight[0].numel(), 3)
    twin = nn.Conv2d(3, 5, **options).double()
    rows = layer.weight.reshape(5, -1) @ rotation(u)
    twin.load_state_dict({**layer.state_dict(), "weight": rows.reshape(layer.weight.shape)})
    attach(net, adapter({"layer": u}))
    close(net(x), twin(x), ATOL64)
    close(net(x[0]), twin(x[0]), ATOL64)  # without a batch axis
    assert isinstance(net.layer, ReflectedConv2d)


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_several_adapters_compose_in_the_order_given(kind: str, orthogonalize: bool) -> None:
    layer, x = layer_of(kind)
    chains = [vectors(12, r, seed=r) for r in (2, 5, 1)]
    rotated = layer.weight.reshape(6, 12) @ rotation(*chains, orthogonalize=orthogonalize)
    twin, _ = layer_of(kind)
    twin.load_state_dict({**layer.state_dict(), "weight": rotated.reshape(layer.weight.shape)})
    net = Net(layer=layer)
    attach(net, *(adapter({"layer": u}, orthogonalize=orthogonalize) for u in chains))
    close(net(x), twin(x), ATOL64)
    other = Net(layer=layer)
    attach(other, *(adapter({"layer": u}, orthogonalize=orthogonalize) for u in reversed(chains)))
    assert float((other(x) - twin(x)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("strength", [0.0, 0.3, -1.0, 1.5])
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_strength_is_so_much_of_the_change(kind: str, strength: float) -> None:
    layer, x = layer_of(kind)
    net, chains = Net(layer=layer), [vectors(12, r, seed=r) for r in (2, 3)]
    base = layer(x).detach()
    attachment = attach(net, *(adapter({"layer": u}) for u in chains))
    full = net(x).detach()
    attachment.detach()
    attach(net, *(adapter({"layer": u}) for u in chains), strength=strength, interpolation="linear")
    close(net(x), base + strength * (full - base), ATOL64)


def test_a_float32_chain_works_in_a_float64_layer_and_the_other_way_round() -> None:
    for wide, narrow in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        for kind in ("linear", "convolution"):
            layer, x = layer_of(kind)
            net, x, u = Net(layer=layer.to(wide)), x.to(wide), vectors(12, dtype=narrow)
            rows = layer.weight.double().reshape(6, 12) @ rotation(u)
            kernel = rows.reshape(layer.weight.shape)
            function: Any = functional.linear if kernel.ndim == 2 else functional.conv2d
            expected = function(x.double(), kernel, layer.bias.double())
            attach(net, adapter({"layer": u}))
            close(net(x), expected, ATOL64 if wide == torch.float64 else ATOL32)
            net(x).sum().backward()
            assert torch.isfinite(net.layer.chains[0].hra_u.grad).all()


# Half precision.


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_half_precision_rotation_stays_orthogonal(
    dtype: torch.dtype, r: int, orthogonalize: bool, trains: bool
) -> None:
    """T must belong to the rounded U, for one vector and for orthonormal ones too: else R is off by 2e-3 to 2e-2."""
    chain = Chain(vectors(64, r, dtype=torch.float32), orthogonalize=orthogonalize).requires_grad_(trains)
    block = chain.reflector(dtype, torch.device("cpu"))
    assert (block.u.dtype, block.t.dtype) == (dtype, torch.float32)
    assert orthogonality_error(BlockReflector(block.u.detach().double(), block.t.detach().double())) < ORTHOGONALITY


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [1, 2, 8])
def test_half_precision_activations_are_a_few_roundings_off(dtype: torch.dtype, r: int, orthogonalize: bool) -> None:
    layer = ReflectedLayer(nn.Identity(), [Chain(vectors(64, r, dtype=torch.float32), orthogonalize=orthogonalize)])
    x = gaussian(200, 64).to(dtype)
    exact = x.double() @ rotation(vectors(64, r, dtype=torch.float32), orthogonalize=orthogonalize).T
    with torch.no_grad():
        z = layer(x)
    assert z.dtype == dtype
    assert float((z.double() - exact).norm() / exact.norm()) < ROUNDINGS * HALF_ULP[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_untrained_adapter_is_exactly_nothing_in_half_precision(dtype: torch.dtype) -> None:
    """PEFT's start repeats each vector; both copies round alike, and H H = I to the rounding of T."""
    u = gaussian(64, RANK).repeat_interleave(2, dim=1).float()
    layer = ReflectedLayer(nn.Identity(), [Chain(u, orthogonalize=False)])
    x = gaussian(50, 64).to(dtype)
    with torch.no_grad():
        z = layer(x)
    assert float((z.double() - x.double()).norm() / x.double().norm()) < HALF_ULP[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_convolution_and_embedding_keep_their_dtype_and_stay_close(dtype: torch.dtype) -> None:
    u = vectors(12, dtype=torch.float32)
    conv, embedding = nn.Conv2d(3, 6, 2, bias=False).to(dtype), nn.Embedding(6, 12).to(dtype)
    images, tokens = gaussian(2, 3, 4, 4).to(dtype), torch.arange(6)
    kernel = (conv.weight.double().reshape(6, 12) @ rotation(u)).reshape(6, 3, 2, 2)
    expected = {
        "conv": functional.conv2d(images.double(), kernel).detach(),
        "embedding": (embedding.weight.double() @ rotation(u)).detach(),
    }
    net = Net(conv=conv, embedding=embedding)
    attach(net, adapter({"conv": u, "embedding": u}))
    for name, x in (("conv", images), ("embedding", tokens)):
        y = net(x, name).detach()
        assert y.dtype == dtype
        assert float((y.double() - expected[name]).norm() / expected[name].norm()) < ROUNDINGS * HALF_ULP[dtype]


# Whole models.


@torch.no_grad()
def outputs(name: str, model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    return scores(model(**MODELS[name].inputs()))


TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "down_proj", "lm_head", "embed_tokens"],
    "gpt-neox": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte"],
    "t5": ["q", "wo"],
    "bert": ["query", "dense", "word_embeddings"],
    "vit": ["projection", "q_proj", "fc2"],
    "unet": ["to_q", "to_out.0", "conv1", "conv_shortcut"],
}


def model_of(name: str) -> Any:
    if name != "gpt2":
        return build(name).double()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1)
    return GPT2LMHeadModel(config).double().eval()


def batch(name: str) -> dict[str, Tensor]:
    torch.manual_seed(2)
    found = MODELS["llama" if name == "gpt2" else name].inputs()
    return {key: value.double() if value.is_floating_point() else value for key, value in found.items()}


def targets(name: str, model: nn.Module) -> dict[str, Tensor]:
    """A chain for each module of this name's targets."""
    chains = {}
    for seed, (path, module) in enumerate(model.named_modules()):
        weight = getattr(module, "weight", None)
        if weight is not None and any(path == t or path.endswith(f".{t}") for t in TARGETS[name]):
            is_conv1d = type(module).__name__ == "Conv1D"
            chains[path] = vectors(weight.shape[0] if is_conv1d else weight[0].numel(), seed=seed)
    return chains


def fold_densely(model: Any, chains: dict[str, Tensor]) -> None:
    """W ← W R in float64, in parameters of their own."""
    for path, u in chains.items():
        module = model.get_submodule(path)
        is_conv1d = type(module).__name__ == "Conv1D"
        weight = module.weight.detach().T if is_conv1d else module.weight.detach()
        rotated = (weight.reshape(weight.shape[0], -1) @ rotation(u)).reshape(weight.shape)
        module.weight = nn.Parameter(rotated.T.contiguous() if is_conv1d else rotated)


@pytest.mark.parametrize("name", TARGETS)
def test_a_model_with_live_layers_is_the_model_with_folded_weights(name: str) -> None:
    model, folded = model_of(name), model_of(name)
    chains = targets(name, model)
    assert {path.rpartition(".")[2] for path in chains} == {target.rpartition(".")[2] for target in TARGETS[name]}
    fold_densely(folded, chains)
    with torch.no_grad():
        start = scores(model(**batch(name)))
        attachment = attach(model, adapter(chains))
        live, expected = scores(model(**batch(name))), scores(folded(**batch(name)))
        close(live, expected, 1e3 * ATOL64)
        assert float((expected - start).abs().max()) > 1e-4
        assert attachment.unused() == []
        with attachment.disabled():
            assert torch.equal(scores(model(**batch(name))), start)
        assert torch.equal(scores(model(**batch(name))), live)


@pytest.mark.parametrize("name", TARGETS)
def test_detach_leaves_no_trace(name: str) -> None:
    model = model_of(name)
    before = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    grads = {key: value.requires_grad for key, value in model.named_parameters()}
    attachment = attach(model, adapter(targets(name, model)))
    with torch.no_grad():
        model(**batch(name))
    attachment.detach()
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is value for key, (value, _) in before.items())
    assert all(torch.equal(after[key], copy) for key, (_, copy) in before.items())
    found = dict(model.named_modules(remove_duplicate=False))
    assert found.keys() == modules.keys()
    assert all(found[path] is module for path, module in modules.items())
    assert {key: value.requires_grad for key, value in model.named_parameters()} == grads


@pytest.mark.parametrize("name", TARGETS)
def test_folding_in_memory_leaves_a_plain_model_that_computes_the_same(name: str) -> None:
    model = model_of(name)
    kinds = [type(module) for module in model.modules()]
    attachment = attach(model, adapter(targets(name, model)))
    with torch.no_grad():
        live = scores(model(**batch(name)))
        attachment.fold_()
        close(scores(model(**batch(name))), live, 1e3 * ATOL64)
    assert [type(module) for module in model.modules()] == kinds


def test_folding_experts_in_memory_folds_their_regions() -> None:
    model = build("qwen3-moe")
    inputs = MODELS["qwen3-moe"].inputs()
    expert = "model.layers.0.mlp.experts.1.gate_proj"
    attachment = attach(model, adapter({expert: vectors(32, dtype=torch.float32)}))
    with torch.no_grad():
        live = scores(model(**inputs))
        attachment.fold_()
        assert scores(model(**inputs)).equal(live)  # the region was computed once for each access, and is now kept
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


def test_folding_a_tied_head_in_memory_leaves_the_embedding_as_it_is() -> None:
    model = build("llama-tied")
    before = model.model.embed_tokens.weight.clone()
    attach(model, adapter({"lm_head": vectors(32, dtype=torch.float32)})).fold_()
    assert model.model.embed_tokens.weight.equal(before)
    assert not model.lm_head.weight.equal(before)


def test_folding_into_a_dtype_that_cannot_hold_it_is_refused() -> None:
    net = Net(layer=nn.Linear(4, 4, dtype=torch.float16))
    with torch.no_grad():
        net.layer.weight.fill_(60000.0)
    # Equal entries of 6e4 become one of 1.2e5 along an axis.
    onto_axis = torch.tensor([[-1.0], [1.0], [1.0], [1.0]])
    with pytest.raises(NumericalError, match="layer"):
        attach(net, adapter({"layer": onto_axis})).fold_()


def test_stacked_experts_act_as_the_layers_they_were_and_detach_leaves_no_trace() -> None:
    """transformers stacks the experts of a file in one parameter; a chain then turns one slice of it."""
    model, folded = build("mixtral"), build("mixtral")  # float32: the grouped product of experts knows no float64
    experts = "model.layers.1.mlp.experts"
    names = [name for name, _ in model.named_parameters() if name.startswith(experts)]
    assert sorted(name.rpartition(".")[2] for name in names) == ["down_proj", "gate_up_proj"]
    chains = {
        "model.layers.1.block_sparse_moe.experts.2.w2": vectors(48, seed=1),
        "model.layers.1.block_sparse_moe.experts.0.w3": vectors(32, seed=2),
        "model.layers.1.block_sparse_moe.experts.0.w1": vectors(32, seed=3),
    }
    with torch.no_grad():
        stacked: Any = folded.get_submodule(experts)
        turned = rotation(chains["model.layers.1.block_sparse_moe.experts.2.w2"])
        stacked.down_proj[2] = stacked.down_proj[2].double() @ turned
        turned = rotation(chains["model.layers.1.block_sparse_moe.experts.0.w3"])
        stacked.gate_up_proj[0, 48:] = stacked.gate_up_proj[0, 48:].double() @ turned
        turned = rotation(chains["model.layers.1.block_sparse_moe.experts.0.w1"])
        stacked.gate_up_proj[0, :48] = stacked.gate_up_proj[0, :48].double() @ turned
    start, before = outputs("mixtral", model), {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    attachment = attach(model, adapter(chains))
    live = outputs("mixtral", model)
    close(live, outputs("mixtral", folded), ATOL32)
    assert float((live - start).abs().max()) > 20 * ATOL32
    with attachment.disabled():
        assert torch.equal(outputs("mixtral", model), start)
    attachment.detach()
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(outputs("mixtral", model), start)


def test_a_tied_head_adapted_alone_leaves_the_embedding_as_it_is() -> None:
    model, folded = model_of("llama-tied"), model_of("llama-tied")
    chains = {"lm_head": vectors(32)}
    shared = model.get_input_embeddings().weight
    assert model.lm_head.weight is shared
    before = shared.detach().clone()
    attachment = attach(model, adapter(chains))
    fold_densely(folded, chains)
    close(outputs("llama-tied", model), outputs("llama-tied", folded), 1e3 * ATOL64)
    assert torch.equal(model.get_input_embeddings().weight, before)
    attachment.detach()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_saved_head_that_is_tied_does_not_write_through_to_the_embedding() -> None:
    model = model_of("llama-tied")
    embedding = model.get_input_embeddings()
    before, head = embedding.weight.detach().clone(), gaussian(96, 32)
    chains = {"model.layers.0.self_attn.q_proj": vectors(32)}
    attachment = attach(model, adapter(chains, parameters={"lm_head.weight": head}, modules_to_save=("lm_head",)))
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(embedding.weight, before)
    attachment.detach()
    assert model.lm_head.weight is embedding.weight


# Biases and saved modules.


def classifier() -> Net:
    head = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return Net(layer=nn.Linear(10, 6), other=nn.Linear(6, 4), head=head).eval()


def test_biases_and_saved_modules_replace_the_models_own() -> None:
    net, twin, before = (classifier() for _ in range(3))
    own = {key: value.clone() for key, value in net.state_dict().items()}
    u, x = vectors(10, dtype=torch.float32), gaussian(5, 10, dtype=torch.float32)
    values = {
        "layer.bias": gaussian(6, dtype=torch.float32, seed=1),  # of a target: it lies under `base_layer` once attached
        "other.bias": gaussian(4, dtype=torch.float32, seed=2),
        "head.0.weight": gaussian(3, 4, seed=3),  # float64, cast to the model's dtype
        "head.1.running_mean": gaussian(3, dtype=torch.float32, seed=4),
        "head.1.num_batches_tracked": torch.tensor(9),
    }
    kept = {name: value.clone() for name, value in values.items()}
    attachment = attach(net, adapter({"layer": u}, parameters=values, modules_to_save=("head",), bias="all"))
    rotated = (own["layer.weight"].double() @ rotation(u)).float()
    twin.load_state_dict({**own, **values, "layer.weight": rotated})

    def run(model: nn.Module) -> Tensor:
        return model.get_submodule("head")(model.get_submodule("other")(model.get_submodule("layer")(x))).detach()

    before.load_state_dict(own)
    close(run(net), run(twin), ATOL32)
    with attachment.disabled():
        assert torch.equal(run(net), run(before))
    close(run(net), run(twin), ATOL32)
    attachment.detach()
    assert torch.equal(run(net), run(before))
    assert all(torch.equal(value, own[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(values[name], kept[name]) for name in values)


def test_the_last_adapters_saved_values_win() -> None:
    net, u = Net(layer=nn.Linear(10, 6)), vectors(10)
    first, second = (adapter({"layer": u}, parameters={"layer.bias": torch.full((6,), v)}) for v in (1.0, 2.0))
    attach(net, first, second)
    assert net.layer.bias.tolist() == [2.0] * 6


def test_a_saved_head_may_have_more_labels_than_the_base() -> None:
    net = Net(layer=nn.Linear(10, 6), head=nn.Linear(6, 2))
    values = {"head.weight": gaussian(5, 6), "head.bias": gaussian(5)}
    attach(net, adapter({"layer": vectors(10)}, parameters=values, modules_to_save=("head",)))
    x = gaussian(3, 6, dtype=torch.float32)
    close(net(x, "head"), functional.linear(x.double(), values["head.weight"], values["head.bias"]), ATOL32)


# Disabled, unused, cached.


def test_disabled_blocks_nest_and_end_with_an_exception() -> None:
    net, x = Net(layer=nn.Linear(10, 6)), gaussian(5, 10, dtype=torch.float32)
    start = net(x)
    attachment = attach(net, adapter({"layer": vectors(10)}, parameters={"layer.bias": torch.ones(6)}))
    live = net(x)
    with attachment.disabled():
        with attachment.disabled():
            assert torch.equal(net(x), start)
        assert torch.equal(net(x), start)
    assert torch.equal(net(x), live)
    with pytest.raises(KeyError), attachment.disabled():
        raise KeyError
    assert torch.equal(net(x), live)


def test_unused_names_targets_that_never_ran() -> None:
    net = Net(layer=nn.Linear(10, 6), idle=nn.Linear(10, 6), image=nn.Conv2d(3, 4, 2), words=nn.Embedding(5, 10))
    chains = {"layer": vectors(10), "idle": vectors(10), "image": vectors(12), "words": vectors(10)}
    attachment = attach(net, adapter(chains))
    assert attachment.unused() == list(chains)
    net(gaussian(5, 10, dtype=torch.float32))
    assert attachment.unused() == ["idle", "image", "words"]
    net(torch.tensor([1]), "words")
    net(gaussian(1, 3, 4, 4, dtype=torch.float32), "image")
    assert attachment.unused() == ["idle"]


def test_a_layer_whose_weight_is_read_directly_counts_as_unused() -> None:
    """Multi-head attention hands `out_proj.weight` to a fused kernel: the chain would have no effect, and says so."""
    net = nn.MultiheadAttention(12, 2, batch_first=True).eval()
    attachment = attach(net, adapter({"out_proj": vectors(12)}))
    x = gaussian(1, 3, 12, dtype=torch.float32)
    net(x, x, x)
    assert attachment.unused() == ["out_proj"]


def test_changed_vectors_are_seen_at_once_without_gradients() -> None:
    net, x = Net(layer=nn.Linear(10, 6, bias=False).double()), gaussian(5, 10)
    attachment = attach(net, adapter({"layer": vectors(10)}))
    (parameter,) = attachment.parameters()
    with torch.no_grad():
        net(x)
        parameter.copy_(vectors(10, seed=9))
        close(net(x), x @ (net.layer.weight @ rotation(vectors(10, seed=9))).T, ATOL64)
    assert torch.equal(attachment.vectors()["layer"], vectors(10, seed=9))


def test_layers_work_in_inference_mode() -> None:
    x, u = gaussian(5, 10), vectors(10)
    with torch.inference_mode():
        net = Net(layer=nn.Linear(10, 6, bias=False).double())
        expected = x @ (net.layer.weight @ rotation(u)).T
        attachment = attach(net, adapter({"layer": u}))
        close(net(x), expected, ATOL64)
        attachment.parameters()[0].copy_(vectors(10, seed=9))
        expected = x @ (net.layer.weight @ rotation(vectors(10, seed=9))).T
        close(net(x), expected, ATOL64)


def test_layers_used_in_inference_mode_can_be_trained_behind_afterwards() -> None:
    """The factors that inference computed serve the frozen chain in a backward pass, too."""
    net, x = Net(layer=nn.Linear(10, 6).double()), gaussian(5, 10)
    attachment = attach(net, adapter({"layer": vectors(10)}))
    attachment.parameters()[0].requires_grad_(False)
    with torch.inference_mode():
        net(x)
    live = x.clone().requires_grad_()
    net(live).sum().backward()
    assert live.grad is not None
    close(live.grad, (torch.ones(5, 6, dtype=torch.float64) @ (net.layer.weight @ rotation(vectors(10)))), ATOL64)


def test_frozen_chain_is_differentiable_again() -> None:
    """For a penalty on gradients, or a product with a Hessian, through the adapted model."""
    frozen = Chain(vectors(10), orthogonalize=False).requires_grad_(False)
    layer = ReflectedLayer(nn.Linear(10, 6).double(), [frozen])
    assert torch.autograd.gradgradcheck(lambda x: layer.rotate(x).pow(3).sum(), gaussian(2, 10).requires_grad_())


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_one_launch_is_the_same_rotation(orthogonalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU takes; here the operator's plain version stands in for the kernel."""
    seeds, x = range(2), gaussian(5, 10)
    chains = [Chain(vectors(10, seed=seed), orthogonalize=orthogonalize) for seed in seeds]
    layer, calls = ReflectedLayer(nn.Linear(10, 6).double(), chains), []

    def counted(x: Tensor, vectors: Tensor, factors: Factors) -> Tensor:
        calls.append(factors)
        return reflect(x, vectors, factors)

    monkeypatch.setattr("hra_export.layer._is_one_launch", lambda x: True)
    monkeypatch.setattr("hra_export.layer.reflect", counted)
    expected = x @ rotation(*(vectors(10, seed=seed) for seed in seeds), orthogonalize=orthogonalize).T
    with torch.no_grad():
        close(layer.rotate(x), expected, ATOL64)
    assert len(calls) == 2


def test_the_adapter_is_not_changed_by_training_what_is_attached() -> None:
    u = vectors(10, dtype=torch.float32)
    kept = u.clone()
    attachment = attach(Net(layer=nn.Linear(10, 6)), adapter({"layer": u}))
    with torch.no_grad():
        attachment.parameters()[0].zero_()
    assert torch.equal(u, kept)


def test_training_mode_of_the_base_layer_is_kept() -> None:
    net = Net(layer=nn.Linear(10, 6)).eval()
    attach(net, adapter({"layer": vectors(10)}))
    assert not any(module.training for module in net.modules())


def test_attributes_of_the_base_layer_show_through() -> None:
    net = Net(layer=nn.Linear(10, 6))
    weight = net.layer.weight
    attach(net, adapter({"layer": vectors(10)}))
    assert net.layer.weight is weight
    assert (net.layer.in_features, net.layer.out_features) == (10, 6)
    with pytest.raises(AttributeError):
        net.layer.no_such_attribute  # noqa: B018


# Gradients.


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_gradients_are_those_of_finite_differences(kind: str, orthogonalize: bool, r: int) -> None:
    layer, x = layer_of(kind)
    net = Net(layer=layer.requires_grad_(False))
    attach(net, adapter({"layer": gaussian(12, r)}, orthogonalize=orthogonalize))
    chain = net.layer.chains[0]

    def run(u: Tensor, inputs: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(net, {"layer.chains.0.hra_u": u}, (inputs,))
        return y

    u = chain.hra_u.detach().clone().requires_grad_()
    inputs = x.requires_grad_() if x.is_floating_point() else x
    assert torch.autograd.gradcheck(run, (u, inputs), atol=GRADCHECK_ATOL)


def test_gradients_reach_every_chain_of_several_and_are_orthogonal_to_it() -> None:
    """R does not depend on a vector's length, so no gradient points along it."""
    net = Net(layer=nn.Linear(10, 6).double().requires_grad_(False))
    attachment = attach(net, *(adapter({"layer": vectors(10, r, seed=r)}) for r in (2, 3)))
    (net(gaussian(5, 10)) ** 2).sum().backward()
    assert len(attachment.parameters()) == 2
    for parameter in attachment.parameters():
        assert parameter.grad is not None
        along = (parameter.grad * parameter.detach()).sum(dim=0).abs().max()
        assert float(parameter.grad.norm()) > 1e-3
        assert float(along) < ATOL64 * max(1.0, float(parameter.grad.norm()))


def test_paired_start_trains_both_vectors_of_a_pair_apart() -> None:
    """At PEFT's start the two gradients of a pair are opposite and not zero: an optimizer opens the pair."""
    u = gaussian(10, 1).repeat_interleave(2, dim=1)
    net = Net(layer=nn.Linear(10, 6).double().requires_grad_(False))
    attachment = attach(net, adapter({"layer": u}))
    (net(gaussian(5, 10)) ** 3).sum().backward()
    grad = attachment.parameters()[0].grad
    assert grad is not None
    assert float(grad.norm()) > 1e-3
    close(grad[:, 0], -grad[:, 1], 1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("orthogonalize", [False, True], ids=["chain", "gram-schmidt"])
def test_tiny_and_huge_vectors_are_trained_through(scale: float, orthogonalize: bool) -> None:
    u = gaussian(10, RANK)
    x, net = gaussian(5, 10, dtype=torch.float32), Net(layer=nn.Linear(10, 6, bias=False))
    attachment = attach(net, adapter({"layer": (u * scale).float()}, orthogonalize=orthogonalize))
    y = net(x)
    y.sum().backward()
    close(y, x.double() @ (net.layer.weight.double() @ rotation(u, orthogonalize=orthogonalize)).T, ATOL32)
    grad = attachment.parameters()[0].grad
    assert grad is not None
    assert 1e-3 < float((grad * scale).norm()) < 1e3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vectors_stay_float32_and_learn_under_half_precision_activations(dtype: torch.dtype) -> None:
    net = Net(layer=nn.Linear(10, 6).to(dtype).requires_grad_(False))
    attachment = attach(net, adapter({"layer": vectors(10, dtype=torch.bfloat16)}))
    (parameter,) = attachment.parameters()
    net(gaussian(5, 10).to(dtype)).float().square().sum().backward()
    assert parameter.dtype == torch.float32
    assert parameter.grad is not None
    assert float(parameter.grad.norm()) > 1e-3


# Refusals.


def refused(model: nn.Module, *adapters: HraAdapter) -> str:
    """The findings; the model must be as it was."""
    before = {path: type(module) for path, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((MismatchError, UnsupportedModelError)) as caught:
        attach(model, *adapters)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return str(caught.value)


def test_every_mismatch_is_listed() -> None:
    net = Net(layer=nn.Linear(10, 6), image=nn.Conv2d(3, 4, 2), words=nn.Embedding(5, 10), fine=nn.Linear(10, 6))
    first = adapter({"layer": vectors(9), "gone": vectors(10), "image": vectors(3), "fine": vectors(10)})
    parameters = {"no.such.bias": torch.ones(1), "fine.bias": torch.ones(7), "layer.weight": torch.ones(6, 9)}
    second = adapter({"words": vectors(5), "layer": vectors(11)}, parameters=parameters)
    text = refused(net, first, second)
    assert "does not fit this Net" in text
    for line in (
        "layer: expected U of shape (10, r), got (9, 4)",
        "layer: expected U of shape (10, r), got (11, 4)",
        "gone: the model has no module of this name",
        "image: expected U of shape (12, r), got (3, 4)",
        "words: expected U of shape (10, r), got (5, 4)",
        "no.such.bias: the model has no parameter of this name",
        "fine.bias: expected shape (6,), got (7,)",
        "layer.weight: expected shape (6, 10), got (6, 9)",
    ):
        assert f"  {line}\n" in f"{text}\n"
    assert "fine: " not in text


def test_experts_of_another_width_are_listed() -> None:
    chains = {f"model.layers.0.block_sparse_moe.experts.{i}.w1": vectors(d) for i, d in enumerate((32, 48))}
    text = refused(build("mixtral"), adapter(chains))
    assert "experts.1.w1: expected U of shape (32, r), got (48, 4)" in text
    assert "experts.0.w1" not in text


def test_conv1d_of_gpt2_is_measured_along_its_inputs() -> None:
    text = refused(Net(layer=conv1d_of_gpt2(10, 6)), adapter({"layer": vectors(6)}))
    assert "layer: expected U of shape (10, r), got (6, 4)" in text


@pytest.mark.parametrize(
    ("layer", "d"),
    [
        *((nn.Conv1d(3, 4, 2), 6), (nn.Conv3d(3, 4, 2), 24), (nn.ConvTranspose2d(3, 4, 2), 12), (nn.LayerNorm(10), 10)),
        *((nn.BatchNorm1d(10), 10), (nn.Sequential(nn.Linear(10, 6)), 10), (nn.ReLU(), 10)),
        (nn.Bilinear(10, 10, 3), 10),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_without_a_chain_are_refused_by_name(layer: nn.Module, d: int) -> None:
    text = refused(Net(layer=layer), adapter({"layer": vectors(d)}))
    assert f"`layer` is a {type(layer).__name__}, for which HRA defines no chain" in text


def test_a_grouped_convolution_is_refused() -> None:
    net = Net(layer=nn.Conv2d(4, 4, 2, groups=2))
    assert "`layer` is a grouped convolution (groups=2)" in refused(net, adapter({"layer": vectors(8)}))


def test_vectors_without_a_direction_are_refused_when_they_are_used() -> None:
    net = Net(layer=nn.Linear(10, 6))
    attachment: Attachment = attach(net, adapter({"layer": torch.zeros(10, 2)}))
    with torch.no_grad(), pytest.raises(NumericalError, match="reflection vector 0 is zero"):
        net(gaussian(5, 10, dtype=torch.float32))
    attachment.detach()
    assert type(net.layer) is nn.Linear
