"""Half precision and quantized weights on exported graphs, against PyTorch with live layers in float32."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from hra_export.graph.half import to_half_, widened
from hra_export.graph.quantize import quantize_
from tests.graph_effect import Candidate, Case, Feeds, Outputs, candidate, effect_error
from tests.graph_scene import Scene, make_scene

# A random adapter moves these models by about their own size, so that this is the relative error of the outputs: some
# tens of roundings of an 11-bit significand (measured: at most 2e-3), of an 8-bit one, and of weights.
EFFECT = {"fp16": 0.005, "bf16": 0.04, "int8": 0.1, "int4": 0.6}
SLOW = ("bert", "t5", "vit", "unet")
SCENES = [
    ("llama", "reflect"),
    ("llama", "merged"),
    *(pytest.param((name, mode), marks=pytest.mark.slow) for name in SLOW for mode in ("reflect", "merged")),
]


@dataclass(frozen=True)
class InFloat32(Candidate):
    """Sessions that are fed and read in float32, whatever their caches are."""

    def run(self, name: str, feeds: Feeds) -> Outputs:
        wanted = {port.name: port.type for port in self.sessions[name].get_inputs()}
        cast = {key: value.half() if wanted[key] == "tensor(float16)" else value for key, value in feeds.items()}
        return {key: value.float() for key, value in super().run(name, cast).items()}


@pytest.fixture(scope="module", params=SCENES, ids="-".join)
def scene(request: pytest.FixtureRequest) -> Scene:
    name, mode = request.param
    return make_scene(name, mode=mode)


def at_precision(scene: Scene, precision: Any) -> Scene:
    graphs = {name: graph.clone() for name, graph in scene.graphs.items()}
    for name, graph in graphs.items():
        if precision in ("fp16", "bf16"):
            to_half_(graph, "float16" if precision == "fp16" else "bfloat16")
        else:
            quantize_(graph, precision, family=scene.family, block_size=16)
        graphs[name] = widened(graph) if precision == "bf16" else graph
    return replace(scene, graphs=graphs)


@pytest.mark.parametrize("precision", EFFECT)
def test_exported_graphs_keep_the_adapter_s_effect(scene: Scene, precision: str, tmp_path: Path) -> None:
    changed = at_precision(scene, precision)
    for optimized in (False, True):
        sessions = InFloat32(candidate(changed, tmp_path, optimized=optimized).sessions)
        case = Case(2, (5, 1)) if scene.family == "decoder" else Case(2, (5,))
        errors = effect_error(changed, sessions, case)
        assert all(error < EFFECT[precision] for error in errors.values()), errors


def test_exported_caches_are_half_and_other_ports_float(scene: Scene) -> None:
    half = at_precision(scene, "fp16")
    for name, graph in half.graphs.items():
        before = ports(scene.graphs[name])
        for port, dtype in ports(graph).items():
            is_cache = port.startswith(("past_key_values.", "present."))
            assert dtype == (ir.DataType.FLOAT16 if is_cache else before[port]), port


def ports(model: ir.Model) -> Mapping[str, ir.DataType | None]:
    return {str(value.name): value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
