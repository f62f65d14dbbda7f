"""Inspection against explicit dense float64 computation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from hra_export.adapter import HraAdapter, write_adapter
from hra_export.checkpoint import open_checkpoint
from hra_export.cli.inspect import command
from hra_export.effect import BLOCK_ELEMENTS, Effect, _Rows
from hra_export.errors import MismatchError, NumericalError
from hra_export.householder import compact_wy, unit_columns
from hra_export.inspection import inspect_adapter, pair_angles, rotation_angles

GENERATOR_SEED = 5
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def vectors(d: int, r: int, *, spread: float = 1.0, seed: int = GENERATOR_SEED) -> Tensor:
    """Pairs of columns that differ by `spread` times a random vector, as trained from PEFT's paired start."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(d, (r + 1) // 2, generator=generator).repeat_interleave(2, dim=1)[:, :r]
    return columns + spread * torch.randn(d, r, generator=generator)


def dense_chain(u: Tensor) -> Tensor:
    """H_1 H_2 … H_r, one after the other."""
    product = torch.eye(u.shape[0], dtype=torch.float64)
    for column in u.double().T:
        unit = column / column.norm()
        product = product @ (torch.eye(u.shape[0], dtype=torch.float64) - 2 * torch.outer(unit, unit))
    return product


def dense_gram_schmidt(u: Tensor) -> Tensor:
    q = torch.linalg.qr(u.double()).Q
    reflected: Tensor = torch.eye(u.shape[0], dtype=torch.float64) - 2 * q @ q.T
    return reflected


def saved(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def llama(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=48, tie_word_embeddings=False, **options)
    model = LlamaForCausalLM(config).to(dtype)
    return model, saved(model, directory)


def expected_effect(weight: Tensor, rotation: Tensor) -> dict[str, float]:
    """‖ΔW‖, ‖W‖ and every loss for a weight (o, d), by the definition."""
    exact = weight.double() @ rotation
    delta = float((exact - weight.double()).norm())
    losses = {
        name: float((exact.to(getattr(torch, name)).double() - exact).norm()) / delta
        for name in ("bfloat16", "float16", "float32")
    }
    return {"delta": delta, "weight": float(weight.double().norm()), **losses}


def check_effect(effect: Effect | None, expected: dict[str, float]) -> None:
    assert effect is not None
    got = {"delta": effect.delta_norm, "weight": effect.weight_norm}
    got.update({name: effect.loss(name) or 0.0 for name in ("bfloat16", "float16", "float32")})
    # The two float64 sums differ in their last bits, which moves a few values across a rounding boundary of float32.
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 1e-4, 0.5, math.pi / 2 - 1e-9, math.pi / 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_pair_angles_are_exact_at_both_ends(angle: float, sign: int) -> None:
    """Reflections do not see the sign of a vector, so the angle between lines is what counts."""
    u = torch.zeros(6, 2, dtype=torch.float64)
    u[0] = torch.tensor([1.0, sign * math.cos(angle)], dtype=torch.float64)
    u[1, 1] = sign * math.sin(angle)
    assert pair_angles(u) == pytest.approx([math.degrees(angle)], rel=1e-9)


def test_pair_angles_leave_the_last_column_of_an_odd_chain_alone() -> None:
    units = unit_columns(vectors(16, 5))
    assert len(pair_angles(units)) == 2
    assert pair_angles(units[:, :1]) == ()


@pytest.mark.parametrize("angle", [1e-10, 1e-6, 0.3, math.pi / 2])
def test_rotation_angles_are_twice_the_angle_of_a_pair(angle: float) -> None:
    u = torch.zeros(6, 2, dtype=torch.float64)
    u[0], u[1, 1] = torch.tensor([1.0, math.cos(angle)], dtype=torch.float64), math.sin(angle)
    assert rotation_angles(compact_wy(u)) == pytest.approx([math.degrees(2 * angle)] * 2, rel=1e-5)


@pytest.mark.parametrize("r", [1, 2, 5, 8])
@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_rotation_angles_are_those_of_the_dense_matrix(r: int, spread: float) -> None:
    u = vectors(24, r, spread=spread)
    dense = torch.linalg.eigvals(dense_chain(u)).angle().abs().sort(descending=True).values[:r]
    assert rotation_angles(compact_wy(u)) == pytest.approx(torch.rad2deg(dense).tolist(), rel=1e-6, abs=1e-6)


def test_rotation_angles_of_repeated_vectors_are_zero() -> None:
    assert rotation_angles(compact_wy(vectors(24, 8, spread=0.0))) == pytest.approx([0.0] * 8, abs=1e-12)


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_inspect_adapter_describes_each_chain(orthogonalize: bool) -> None:
    u = vectors(32, 4)
    adapter = HraAdapter({"a.q_proj": u, "a.net.0": u + 1}, rank=4, orthogonalize=orthogonalize)
    report = inspect_adapter(adapter)
    target = report.targets[0]
    units = u.double() / u.double().norm(dim=0)
    cosines = (units[:, 0::2] * units[:, 1::2]).sum(dim=0).abs()
    assert (target.module, target.features, target.rank) == ("a.q_proj", 32, 4)
    assert target.pair_angles == pytest.approx(torch.rad2deg(torch.acos(cosines)).tolist())
    assert target.column_penalty == pytest.approx(float((units.T @ units - torch.eye(4)).norm()))
    assert target.orthogonality_error < 1e-14
    if orthogonalize:
        assert target.rotation_angles == pytest.approx([180.0] * 4)
        assert target.smallest_pivot == pytest.approx(float(torch.linalg.qr(units).R.diagonal().abs().min()))
    else:
        assert target.smallest_pivot is None
    assert [kind.kind for kind in report.kinds] == ["q_proj", "net"]
    assert report.chain_size == 2 * 32 * 4


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inspect_adapter_measures_the_effect_in_a_base(tmp_path: Path, dtype: torch.dtype, orthogonalize: bool) -> None:
    model, base = llama(tmp_path / "base", dtype)
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"]
    chains = {name: vectors(model.get_submodule(name).in_features, 4, spread=0.05) for name in modules}
    report = inspect_adapter(HraAdapter(chains, rank=4, orthogonalize=orthogonalize), open_checkpoint(base))
    rotate = dense_gram_schmidt if orthogonalize else dense_chain
    expected = {name: expected_effect(model.get_submodule(name).weight.data, rotate(u)) for name, u in chains.items()}
    for target in report.targets:
        check_effect(target.effect, expected[target.module])
    assert report.effect is not None
    assert report.effect.delta_norm == pytest.approx(math.sqrt(sum(each["delta"] ** 2 for each in expected.values())))


def test_inspect_adapter_measures_weights_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2 stores (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    u = vectors(32, 2, spread=0.1)
    adapter = HraAdapter({"transformer.h.0.attn.c_attn": u}, rank=2)
    report = inspect_adapter(adapter, open_checkpoint(saved(model, tmp_path / "base")))
    check_effect(
        report.targets[0].effect, expected_effect(model.transformer.h[0].attn.c_attn.weight.data.T, dense_chain(u))
    )


def test_inspect_adapter_measures_parts_of_a_fused_tensor(tmp_path: Path) -> None:
    """Two experts of a stacked (experts, 2·out, in) tensor; only their own rows count."""
    from safetensors.torch import save_file
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=3)
    config.architectures = ["MixtralForCausalLM"]
    model = MixtralForCausalLM(config)
    nn.init.normal_(model.model.layers[0].mlp.experts.gate_up_proj)
    config.save_pretrained(tmp_path)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    experts = model.model.layers[0].mlp.experts.gate_up_proj.data  # (3, 96, 32)
    chains = {f"model.layers.0.mlp.experts.{i}.{name}": vectors(32, 4) for i, name in ((0, "w3"), (2, "w1"))}
    report = inspect_adapter(HraAdapter(chains, rank=4), open_checkpoint(tmp_path))
    for target, weight in zip(report.targets, (experts[0, 48:], experts[2, :48]), strict=True):
        check_effect(target.effect, expected_effect(weight, dense_chain(chains[target.module])))


def test_inspect_adapter_measures_an_embedding_the_adapter_replaces(tmp_path: Path) -> None:
    """PEFT saves a targeted embedding's own weight: the chain acts on that, not on the base's."""
    _, base = llama(tmp_path / "base")
    u, weight = vectors(32, 2, spread=0.1), torch.randn(40, 32)
    adapter = HraAdapter({"lm_head": u}, rank=2, parameters={"lm_head.weight": weight})
    report = inspect_adapter(adapter, open_checkpoint(base))
    check_effect(report.targets[0].effect, expected_effect(weight, dense_chain(u)))


def test_inspect_adapter_reads_in_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = llama(tmp_path / "base")
    adapter = HraAdapter({"model.layers.0.mlp.down_proj": vectors(48, 2)}, rank=2)
    whole = inspect_adapter(adapter, open_checkpoint(base)).effect
    monkeypatch.setattr("hra_export.effect.BLOCK_ELEMENTS", 5 * 48)
    runs = []
    read = _Rows._read

    def recording(self: _Rows, run: slice, columns: int) -> Tensor:
        runs.append(run)
        return read(self, run, columns)

    monkeypatch.setattr(_Rows, "_read", recording)
    parts = inspect_adapter(adapter, open_checkpoint(base)).effect
    assert whole is not None
    assert parts is not None
    assert len(runs) == math.ceil(32 / 5)
    assert parts.delta_norm == pytest.approx(whole.delta_norm)
    assert parts.loss("bfloat16") == pytest.approx(whole.loss("bfloat16"))
    assert BLOCK_ELEMENTS > 48 * 32


def test_inspect_adapter_agrees_with_what_a_merge_reports(tmp_path: Path) -> None:
    from hra_export.merge import merge_checkpoint
    from hra_export.planning import plan_merge

    _, base = llama(tmp_path / "base", torch.bfloat16)
    chains = {f"model.layers.0.self_attn.{name}": vectors(32, 4, spread=0.05) for name in ("q_proj", "v_proj")}
    adapter, checkpoint = HraAdapter(chains, rank=4), open_checkpoint(base)
    merged = merge_checkpoint(plan_merge(checkpoint, [adapter]), tmp_path / "merged")
    effect = inspect_adapter(adapter, checkpoint).effect
    assert effect is not None
    assert effect.delta_norm == pytest.approx(merged.delta_norm, rel=1e-4)
    assert effect.loss("bfloat16") == pytest.approx(merged.loss, rel=1e-3)


def test_warnings_say_that_chains_do_nothing() -> None:
    idle, trained = vectors(32, 4, spread=0.0), vectors(32, 4)
    warnings = inspect_adapter(HraAdapter({"a": idle, "b": trained}, rank=4)).warnings()
    assert warnings == ["1 of 2 chains are the identity: untrained (first: `a`)"]
    (warning,) = inspect_adapter(HraAdapter({"a": idle}, rank=4)).warnings()
    assert warning.startswith("every chain is the identity")


def test_warnings_say_that_an_odd_rank_mirrors() -> None:
    report = inspect_adapter(HraAdapter({"a": vectors(32, 3)}, rank=3))
    assert any("det R = -1" in warning for warning in report.warnings())
    assert report.targets[0].to_json()["determinant"] == -1


def test_warnings_say_that_gram_schmidt_is_near_its_breakdown() -> None:
    report = inspect_adapter(HraAdapter({"a": vectors(32, 2, spread=3e-3)}, rank=2, orthogonalize=True))
    (warning,) = report.warnings()
    assert "near its breakdown in 1 of 1 chains (worst: `a`" in warning


def test_warnings_say_what_half_precision_loses(tmp_path: Path) -> None:
    _, base = llama(tmp_path / "base", torch.bfloat16)
    adapter = HraAdapter({"lm_head": vectors(32, 2, spread=3e-3)}, rank=2)
    report = inspect_adapter(adapter, open_checkpoint(base))
    assert report.effect is not None
    loss = report.effect.loss("bfloat16")
    assert loss is not None
    assert loss > 0.2
    assert any(f"bfloat16 loses {loss:.1%} of ΔW" in warning for warning in report.warnings())


def test_warnings_say_that_float16_overflows(tmp_path: Path) -> None:
    model, _ = llama(tmp_path / "first")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    base = saved(model, tmp_path / "base")
    report = inspect_adapter(HraAdapter({"lm_head": vectors(32, 2)}, rank=2), open_checkpoint(base))
    assert report.effect is not None
    assert report.effect.loss("float16") == math.inf
    assert report.effect.to_json()["loss"]["float16"] is None  # type: ignore[index]
    assert "merged weights overflow in float16" in report.warnings()


def test_inspect_adapter_names_every_chain_that_cannot_be_computed() -> None:
    idle = vectors(32, 2, spread=0.0)
    with pytest.raises(NumericalError) as caught:
        inspect_adapter(HraAdapter({"a": idle, "b": idle}, rank=2, orthogonalize=True))
    assert [finding.split("`")[3] for finding in caught.value.findings] == ["a", "b"]


def test_inspect_adapter_refuses_a_base_that_does_not_fit_or_is_not_finite(tmp_path: Path) -> None:
    model, base = llama(tmp_path / "base")
    with pytest.raises(MismatchError, match="does not fit"):
        inspect_adapter(HraAdapter({"lm_head": vectors(16, 2)}, rank=2), open_checkpoint(base))
    nn.init.constant_(model.lm_head.weight, math.nan)
    broken = open_checkpoint(saved(model, tmp_path / "broken"))
    with pytest.raises(NumericalError, match="NaN or Inf in target `lm_head`"):
        inspect_adapter(HraAdapter({"lm_head": vectors(32, 2)}, rank=2), broken)


def test_command_prints_tables_and_json(tmp_path: Path) -> None:
    _, base = llama(tmp_path / "base", torch.bfloat16)
    chains = {f"model.layers.0.self_attn.{name}": vectors(32, 4, spread=3e-3) for name in ("q_proj", "v_proj")}
    write_adapter(HraAdapter(chains, rank=4), tmp_path / "adapter")
    arguments = [str(tmp_path / "adapter"), "--base", str(base)]
    shown = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    assert [line.split()[0] for line in shown.stdout.splitlines() if "self_attn" in line] == list(chains)
    assert "adapter_model.safetensors" in shown.stdout
    assert "warning: storing the merged weights as bfloat16" in shown.stderr
    parsed = json.loads(CliRunner().invoke(command, [*arguments, "--json", "-q"]).stdout)
    assert parsed["schema_version"] == 1
    assert parsed["totals"]["targets"] == 2
    assert [target["module"] for target in parsed["targets"]] == list(chains)
    assert 0 < parsed["targets"][0]["effect"]["loss"]["float32"] < 1e-3


def test_command_without_a_base_measures_none(tmp_path: Path) -> None:
    """No weights are looked for, even where the adapter names a base."""
    write_adapter(HraAdapter({"a.q": vectors(32, 2)}, rank=2, base="no/where"), tmp_path / "adapter")
    result = CliRunner().invoke(command, [str(tmp_path / "adapter"), "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["targets"][0]["effect"] is None
