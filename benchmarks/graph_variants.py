"""One base graph with one adapter in every form: folded, as an operator, as plain operators, as dense matrices.

Nothing here is imported by the process that measures memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray

from hra_export.adapter import HraAdapter
from hra_export.bench import take_turns
from hra_export.contenders import Contender
from hra_export.graph.constants import add_constant_, dtype_of, exact
from hra_export.graph.document import open_graph
from hra_export.graph.exporting import export_graph
from hra_export.graph.families import graph_specs
from hra_export.graph.forms import Form, lower_
from hra_export.graph.genai_builder import run_builder
from hra_export.graph.genai_names import builder_names
from hra_export.graph.grouped_operator import declare_used_
from hra_export.graph.grouping import ReflectionSite, groups
from hra_export.graph.insertion import insert_reflections_
from hra_export.graph.operator import declare_
from hra_export.graph.options import GraphOptions
from hra_export.graph.regrouping import group_
from hra_export.graph.splitting import take_over_
from hra_export.graph.values import TensorSpec
from hra_export.workload import Load, feeds_of

# Sessions of these run the operator's kernels; all others inline its body.
NATIVE = ("native", "native-grouped")
# `auto` is what --plain-ops writes; `output` is what LoRA of this rank looks like.
FORMS = ("auto", *(form for form in get_args(Form) if form != "gemm"))
VARIANTS = ("merged", "function", *NATIVE, *FORMS, "materialized")
AGREEMENT = 1e-3  # of the largest output; forms differ by roundings, a wrong one by the adapter's effect


@dataclass(frozen=True)
class Case:
    """One load of one model.

    Attributes:
        model: `minilm` or `smollm2`.
        load: what is run.
    """

    model: str
    load: Load

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.model} {self.load.name}, batch {self.load.batch}"


CASES = (
    Case("minilm", Load("length 128", "model", 1, 128)),
    Case("minilm", Load("length 128", "model", 8, 128)),
    Case("smollm2", Load("prefill 128", "model", 1, 128)),
    Case("smollm2", Load("decode at 128", "model", 1, 1, past=128)),
)


def make_base_graph(model: str, base: Path, folder: Path) -> None:
    """The graph of a base without adapter: an encoder as we export it, a decoder as ONNX Runtime GenAI builds it.

    The builder's decoder has the runtime's own grouped attention, the fastest one there is to be compared with.
    """
    folder.mkdir(parents=True)
    if model == "smollm2":
        run_builder(base, folder, GraphOptions(mode="reflect", runtime="genai"), fuse_attention=False)
        (folder / "built").rename(folder / "graph")
        return
    from transformers import AutoModel

    (spec,) = graph_specs(AutoModel.from_pretrained(base, local_files_only=True).eval())
    (folder / "graph").mkdir()
    ir.save(export_graph(spec), folder / "graph" / "model.onnx", external_data="model.onnx.data")


def make_variants(graph: Path, widths: Mapping[str, int], rank: int, folder: Path, names: Sequence[str]) -> None:
    """Write one file for each variant, all of the same adapter.

    Args:
        graph: of the base.
        widths: target → d.
        rank: of its chain.
        folder: where `<variant>/model.onnx` are written.
        names: of the variants.
    """
    adapter = _adapter(widths, rank)
    for name in names:
        model = open_graph(graph)
        insert_reflections_(model, [adapter], rename=builder_names(widths) if "model.layers.0" in min(widths) else {})
        if name == "merged":
            _fold_(model)
        elif name in ("function", "native"):
            declare_(model)
        elif name == "native-grouped":
            group_(model)
            declare_used_(model)
        elif name == "materialized":
            _materialize_(model)
        else:
            lower_(model, name)  # type: ignore[arg-type]  # one of the forms
        (folder / name).mkdir(parents=True)
        ir.save(model, folder / name / "model.onnx", external_data="model.onnx.data")


def time_variants(
    folder: Path, names: Sequence[str], cases: Sequence[Case], *, rounds: int, threads: int, library: Path | None = None
) -> dict[str, dict[str, list[float]]]:
    """Case → variant → seconds of each run: one process, one pool of threads for all sessions, bound inputs.

    Args:
        folder: of the variants' files.
        names: of the variants, in the order they are loaded.
        cases: what is run.
        rounds: turns of each variant.
        threads: of the pool; 0 for all cores.
        library: with the operator's kernels, for the native variants; the others never see it.

    Raises:
        RuntimeError: a variant computes something else than the first one.
    """
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    libraries = {name: library if name in NATIVE else None for name in names}
    # The session that is loaded first is some percent slower than all that follow, whatever it holds.
    first_in_memory = _session(folder / names[0] / "model.onnx", libraries[names[0]])
    sessions = {name: _session(folder / name / "model.onnx", libraries[name]) for name in names}
    taken = {}
    for case in cases:
        first = next(iter(sessions.values()))
        specs = [TensorSpec.of(argument) for argument in first.get_inputs()]
        feeds = feeds_of(specs, case.load, widths={"kv_cache_dim": 64})
        _check(sessions, feeds)
        contenders = [Contender(name, _bound(session, feeds)) for name, session in sessions.items()]
        taken[case.name] = take_turns(contenders, rounds=rounds)
    del first_in_memory
    return taken


def _adapter(widths: Mapping[str, int], rank: int) -> HraAdapter:
    """Pairs of vectors a few degrees apart, as a trained adapter has them."""
    random = torch.Generator().manual_seed(1)
    chains = {}
    for target, d in widths.items():
        pairs = (torch.rand(d, rank // 2, generator=random) * 2 - 1).repeat_interleave(2, dim=1)
        chains[target] = pairs + 0.05 * torch.randn(pairs.shape, generator=random)
    return HraAdapter(chains, rank)


def _fold_(model: ir.Model) -> None:
    """W + (W's rows through U V) in place of the reflections."""
    for sites in groups(model):
        for site in sites:
            for product in site.products:
                w = product.matrix().astype(np.float64)  # (o, d)
                folded = w + (w @ exact(site.v).T) @ exact(site.u).T
                stored = folded if product.is_transposed else folded.T
                dtype = dtype_of(product.weight)
                product.weight.const_value = ir.tensor(np.ascontiguousarray(stored, dtype.numpy()))
                product.node.replace_input_with(0, site.x)
            _remove_(site)


def _materialize_(model: ir.Model) -> None:
    """x (I + U V) with a dense (d, d) matrix, as PEFT computes it."""
    for sites in groups(model):
        for site in sites:
            dense = np.eye(len(exact(site.u))) + exact(site.u) @ exact(site.v)
            matrix = add_constant_(site.graph, f"{site.target}.hra_R", dense, dtype_of(site.u))
            node = ir.node("MatMul", [site.x, matrix], name=site.name)
            site.graph.insert_before(site.node, node)
            take_over_(site.y, node.outputs[0])
            _remove_(site)


def _remove_(site: ReflectionSite) -> None:
    graph = site.graph
    graph.remove(site.node, safe=True)
    for value in (site.u, site.v):
        if not value.uses():
            del graph.initializers[str(value.name)]


def _session(path: Path, library: Path | None) -> Any:
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.use_per_session_threads = False  # pools that spin side by side would slow each other down
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _bound(session: Any, feeds: Mapping[str, NDArray[Any]]) -> Any:
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def _check(sessions: Mapping[str, Any], feeds: Mapping[str, NDArray[Any]]) -> None:
    answers = {name: session.run(None, dict(feeds))[0] for name, session in sessions.items()}
    first = next(iter(answers.values()))
    for name, answer in answers.items():
        error = np.abs(answer - first).max() / np.abs(first).max()
        if not error <= AGREEMENT:
            raise RuntimeError(f"`{name}` departs from `{next(iter(answers))}` by {error:.1e}")
