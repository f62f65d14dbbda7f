"""Sessions of ONNX Runtime on the provider that was asked for, or none.

Their adapters are inputs like all others, so they hold for a plain run and for IO binding alike; the runtime's own
active adapters hold only for a plain run.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hra_export.errors import DeviceError, GraphError
from hra_export.graph import runtime
from hra_export.graph.adapter_file import read_adapter_file
from hra_export.graph.bank import AdapterBank
from hra_export.graph.binding import BoundRun
from hra_export.graph.grouped_operator import OPERATORS
from hra_export.graph.native import Operator, OperatorChoice, choose_operator
from hra_export.graph.providers import EXECUTION_PROVIDERS, AssignedNode, Provider, fallen_back
from hra_export.graph.runtime import available_providers
from hra_export.graph.swap_sites import SwapContract, Swapping
from hra_export.graph.values import Array, TensorSpec, as_tensors, misfits, to_array
from hra_export.kernels.operator_library import OperatorLibrary

__all__ = ["GraphSession", "available_providers"]

MODEL_NAME = "model.onnx"
NO_CUDA_GRAPH = -1


class GraphSession:
    """A graph on one execution provider, and the adapters it can run with.

    Runs may come from several threads at a time. Made by `GraphSession.open`.

    Attributes:
        path: the model file.
        provider: the provider that runs every compute node.
        nodes: every node, and the provider that runs it.
        operator: the library of operators that is registered, or why there is none.
        inputs: what every run must be fed.
        optional: inputs with defaults, U and V of a swappable graph among them.
        outputs: what a run gives.
        metadata: the file's own properties.
        contract: what the graph asks of an adapter; None when it is not swappable.
    """

    def __init__(
        self,
        session: Any,
        path: Path,
        provider: Provider,
        *,
        nodes: Sequence[AssignedNode],
        operator: OperatorChoice,
        device: int,
        cuda_graph: bool,
    ) -> None:
        self.path = path
        self.provider = provider
        self.nodes = tuple(nodes)
        self.operator = operator
        self.inputs = tuple(TensorSpec.of(argument) for argument in session.get_inputs())
        self.optional = tuple(TensorSpec.of(argument) for argument in session.get_overridable_initializers())
        self.outputs = tuple(TensorSpec.of(argument) for argument in session.get_outputs())
        self.metadata: Mapping[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        self.contract = SwapContract.of(self.optional, self.metadata)
        self._session = session
        self._device = ("cpu" if provider == "cpu" else "cuda", device)
        self._cuda_graphs = itertools.count(1) if cuda_graph else None
        self._bank = AdapterBank(self.contract, partial(runtime.to_device, device=self._device))
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        provider: Provider = "cpu",
        optimize: bool = True,
        threads: int | None = None,
        device: int = 0,
        cuda_graph: bool = False,
        operator: Operator = "auto",
    ) -> "GraphSession":
        """Load a graph and make sure that the provider runs it.

        Args:
            path: a model file, or a directory with `model.onnx`.
            provider: must run every compute node; `providers.py` has the rule for nodes on shapes.
            optimize: let the runtime rewrite the graph; off, nodes run as they stand.
            threads: of one operator on the CPU; all cores when left out.
            device: which GPU.
            cuda_graph: record the kernels of a bound run and replay them; only with `provider="cuda"` and `bind`.
            operator: library with kernels for the reflections; `auto` for the one that is found, if it serves the
                provider, None for the operators' bodies.

        Raises:
            GraphError: no such file, corrupt, or with an operator that nobody knows.
            FormatError: the library is not ours, or of another version.
            DeviceError: the provider is not there, other providers would run some of the nodes, or the library that
                is named has no kernels for it.
            UnsupportedModelError: the provider has no kernel for a node's type.
            ValueError: no provider of this name, or one that records no CUDA graph.
        """
        if provider not in EXECUTION_PROVIDERS:
            raise ValueError(f"provider: expected one of {', '.join(EXECUTION_PROVIDERS)}, got `{provider}`")
        if cuda_graph and provider != "cuda":
            raise ValueError(f"cuda_graph: only the `cuda` provider records one, got `{provider}`")
        file, choice = _model_file(path), choose_operator(operator, provider)
        library = None if choice.library is None else choice.library.path
        with runtime.runtime_errors(file):
            session = runtime.make_session(
                file,
                provider,
                optimize=optimize,
                threads=threads,
                device=device,
                cuda_graph=cuda_graph,
                library=library,
            )
        nodes = _placed_nodes(session, file, provider)
        return cls(session, file, provider, nodes=nodes, operator=choice, device=device, cuda_graph=cuda_graph)

    @property
    def native(self) -> OperatorLibrary | None:
        """The library whose kernels run the graph's reflections; None when their bodies do, or there are none."""
        return self.operator.library if self.native_nodes else None

    @property
    def native_nodes(self) -> int:
        """How many nodes the library's kernels run."""
        return sum(OPERATORS.fullmatch(node.op_type) is not None for node in self.nodes)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded, in the order they came."""
        return tuple(self._bank.adapters)

    @property
    def swapping(self) -> Swapping | None:
        """How the graph takes adapters: one a run, one a row, or none."""
        return None if self.contract is None else self.contract.swapping

    def load_adapter(self, name: str, path: Path) -> None:
        """Read an adapter file, check that it was made for this graph, and keep it under a name.

        Raises:
            MismatchError: made for another graph, partial, or of other shapes or types; all findings at once.
            FormatError: not an adapter file, or corrupt.
            ValueError: the graph takes no adapters.
        """
        contract = self._swappable()
        stored = read_adapter_file(path)
        stored.check(contract)
        self.add_adapter(name, stored.parameters)

    def add_adapter(self, name: str, parameters: Mapping[str, Array]) -> None:
        """Keep U and V of every site under a name.

        Args:
            name: any but the empty one; a known name is replaced, and runs that have begun keep the old one.
            parameters: `<target>.hra_U` (d, r) and `<target>.hra_V` (r, d).

        Raises:
            MismatchError: something is missing, left over, or of another shape or type; all findings at once.
            ValueError: the graph takes no adapters, or the name is empty.
        """
        contract = self._swappable()
        if not name:
            raise ValueError("name: an adapter needs one, got the empty string")
        contract.check(parameters, name)
        with self._lock:
            self._bank = self._bank.having(name, parameters)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: there is none of this name.
        """
        with self._lock:
            self._bank = self._bank.without(name)

    def run(
        self,
        feeds: Mapping[str, Any],
        *,
        adapter: str | None = None,
        adapters: Sequence[str | None] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Run the graph once.

        Args:
            feeds: name → array or torch tensor; inputs with defaults may be among them.
            adapter: for the whole run; None is what the graph has as its default.
            adapters: one a row, None for the base; only for a graph whose rows name their adapters.
            outputs: those that are wanted; all when left out.

        Returns:
            Name → array on the CPU, bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            ValueError: names, types, ranks or sizes do not fit, or an adapter is unknown; all findings at once.
            GraphError: the runtime failed.
        """
        feeds = as_tensors(feeds)
        chosen = self._bank.chosen(feeds, self.inputs, adapter=adapter, adapters=adapters)
        findings = misfits({**feeds, **chosen}, self.inputs, self.optional)
        if findings:
            raise ValueError("\n  ".join([f"inputs that do not fit `{self.path.name}`:", *findings]))
        wanted = [spec.name for spec in self._wanted(outputs)]
        values = {**{name: runtime.to_value(value) for name, value in feeds.items()}, **chosen}
        with runtime.runtime_errors(self.path):
            results = self._session.run_with_ort_values(wanted, values, runtime.run_options(NO_CUDA_GRAPH))
        return dict(zip(wanted, map(to_array, results), strict=True))

    def bind(
        self,
        feeds: Mapping[str, Any],
        *,
        adapter: str | None = None,
        adapters: Sequence[str | None] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> BoundRun:
        """Bind inputs, outputs and an adapter for repeated runs; arguments and errors as of `run`.

        Memory on the provider's device is used where it is: torch tensors come by DLPack.
        """
        feeds = as_tensors(feeds)
        chosen = self._bank.chosen(feeds, self.inputs, adapter=adapter, adapters=adapters)

        def make() -> tuple[Any, Callable[[], None]]:
            binding = self._session.io_binding()
            number = NO_CUDA_GRAPH if self._cuda_graphs is None else next(self._cuda_graphs)
            if number != NO_CUDA_GRAPH:  # what was recorded is of no use without its memory
                weakref.finalize(binding, runtime.release_cuda_graph, self._session, number).atexit = False
            return binding, partial(self._run_bound, binding, runtime.run_options(number))

        bound = BoundRun(
            make,
            runtime.to_value,
            specs=(self.inputs, self.optional, self._wanted(outputs)),
            adapter=chosen,
            device=self._device,
        )
        return bound.feed(feeds)

    def _run_bound(self, binding: Any, options: Any) -> None:
        with runtime.runtime_errors(self.path):
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

    def _wanted(self, outputs: Sequence[str] | None) -> Sequence[TensorSpec]:
        if outputs is None:
            return self.outputs
        known = {spec.name: spec for spec in self.outputs}
        unknown = [name for name in outputs if name not in known]
        if unknown:
            raise ValueError(f"unknown outputs: {', '.join(unknown)}; the graph has {', '.join(known)}")
        return [known[name] for name in outputs]

    def _swappable(self) -> SwapContract:
        if self.contract is None:
            raise ValueError(f"`{self.path}` takes no adapters; export it with `--swappable`")
        return self.contract


def _model_file(path: Path) -> Path:
    file = path / MODEL_NAME if path.is_dir() else path
    if not file.is_file():
        raise GraphError(f"`{file}`: no such model file")
    return file


def _placed_nodes(session: Any, file: Path, provider: Provider) -> list[AssignedNode]:
    name = EXECUTION_PROVIDERS[provider]
    if name not in session.get_providers():
        raise runtime.no_provider(name, f"the session has only {', '.join(session.get_providers())}")
    nodes = runtime.assigned_nodes(session)
    if not nodes and provider != "cpu":
        raise DeviceError(f"`{file}`: the runtime does not say which provider runs its nodes")
    findings = fallen_back(nodes, provider, file)
    if findings:
        raise DeviceError(
            f"`{file}`: {len(findings)} of {len(nodes)} nodes fall back from `{name}`",
            findings=findings,
            hint="the provider has no kernel for them in this type: try another precision or provider",
        )
    return nodes
