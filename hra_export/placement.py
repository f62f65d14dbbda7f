"""Where every tensor of the adapters goes in the base: by name, through transformers' own mapping, or through a tie.

Headers only. What does not fit is collected, so that all of it can be told at once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from hra_export import names
from hra_export.adapter import HraAdapter
from hra_export.checkpoint import Checkpoint
from hra_export.errors import MismatchError, UnsupportedModelError
from hra_export.layout import Layout, Region
from hra_export.locator import Locator
from hra_export.plan import Action, ChainSite, OutputTensor, Segment, matrix_shape
from hra_export.tensorfile import TensorInfo, dtype_name


@dataclass
class Draft:
    """Placements collected while the adapters are walked through; findings are kept and raised together."""

    base: Checkpoint
    adapters: tuple[HraAdapter, ...]
    config_changes: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    folds: dict[str, dict[Region, list[ChainSite]]] = field(default_factory=dict)
    values: dict[str, list[tuple[Region | None, Tensor]]] = field(default_factory=dict)
    untied: dict[str, TensorInfo] = field(default_factory=dict)
    taken: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = self.base.tensors
        first = self.adapters[0]
        self.locator = Locator(self.base, first.task, first.model_class)

    @property
    def layout(self) -> Layout:
        """transformers' own view of this checkpoint."""
        return self.locator.layout

    def raise_findings(self) -> None:
        """End here if anything did not fit."""
        if self.findings:
            labels = ", ".join(f"`{adapter.label}`" for adapter in self.adapters)
            raise MismatchError(
                f"adapter {labels} does not fit base `{self.base.root}`: {len(self.findings)} tensors have no place",
                findings=self.findings,
                hint=f"`hra-export inspect {self.adapters[0].label}` lists the adapter's targets",
            )

    def place_chain(self, adapter: int, module: str) -> None:
        """Find the tensors a chain folds into."""
        vectors = self.adapters[adapter].chains[module]
        regions = self._locate(module, names.weight_name(module))
        if not regions:
            self.findings.append(f"{module}: no weight of this name in the base")
        for region in regions:
            shape = self._shape(region)
            problem = _chain_problem(module, region, shape, tuple(vectors.shape))
            if problem is not None:
                self.findings.append(problem)
                continue
            self._fold(region, ChainSite(adapter, module))

    def _fold(self, region: Region, site: ChainSite) -> None:
        """Behind the chains that are folded into the same rows, whatever name those were found by."""
        places = self.folds.setdefault(region.tensor, {})
        rows = (region.index, region.features)
        sites = places.setdefault(next((each for each in places if (each.index, each.features) == rows), region), [])
        other = next((known.module for known in sites if known.adapter == site.adapter), None)
        if other is not None:
            self.findings.append(f"{site.module}: its weight is that of {other} too, which has a chain of its own")
        sites.append(site)

    def place_parameter(self, adapter: int, name: str) -> None:
        """Find the tensors that a trained parameter replaces, or add it as a new one."""
        value = self.adapters[adapter].parameters[name]
        if name in self.taken:
            if not self.taken[name].equal(value):
                self.findings.append(f"{name}: two adapters carry different values for it")
            return
        self.taken[name] = value
        regions = self._locate(name.rpartition(".")[0], name)
        if not regions:
            self._add_parameter(adapter, name, value)
        elif len(regions) == 1 and self._resizes_vocabulary(regions[0], value):
            self.config_changes["vocab_size"] = value.shape[0]
            self.values[regions[0].tensor] = [(None, value)]
        else:
            self._replace(name, regions, value)

    def output_tensors(self, strength: float) -> Iterator[OutputTensor]:
        """Base tensors in file order, then those the adapters add."""
        for name, info in {**self.tensors, **self.untied}.items():
            folds = self.folds.get(name, {}) if strength != 0 else {}
            values = self.values.get(name, [])
            shape = info.shape
            if values and values[0][0] is None:
                shape = tuple(values[0][1].shape)
            segments = _segments(info, shape, folds, values)
            yield OutputTensor(name, info.dtype, shape, segments, self._action(name, folds, values))
        for name, values in self.values.items():
            if name not in self.tensors and name not in self.untied:
                value = values[0][1]
                rows = matrix_shape(tuple(value.shape))[0]
                whole = (Segment(0, rows, value, 0),)
                yield OutputTensor(name, dtype_name(value.dtype), tuple(value.shape), whole, "add")

    def _action(self, name: str, folds: object, values: object) -> Action:
        if folds:
            return "fold"
        if values:
            return "replace"
        return "untie" if name in self.untied else "copy"

    def _locate(self, module: str, parameter: str) -> tuple[Region, ...]:
        """The disk regions of a parameter; one that is tied gets a tensor of its own."""
        found = self.locator.find(module, parameter)
        return found.regions if found.tied_to is None else (self._untie(parameter, found.tied_to),)

    def _untie(self, parameter: str, source: str) -> Region:
        """Give a tied parameter a tensor of its own, and its partners theirs, so that only one of them changes."""
        stored, info = self.layout.new_name(parameter), self.tensors[source]
        added = {name: self.tensors[origin] for name, origin in self.layout.tied_partners(parameter).items()}
        if stored not in self.tensors:
            added[stored] = info
        if not added.keys() <= self.untied.keys():
            self.notes.append(f"`{parameter}` is tied to `{source}` in the base; the merged model unties them")
        self.untied.update(added)
        self.config_changes.update(self.layout.untied_config_changes())
        return Region(stored, tuple((0, size) for size in info.shape), len(info.shape) - 1)

    def _shape(self, region: Region) -> tuple[int, ...]:
        return (self.untied.get(region.tensor) or self.tensors[region.tensor]).shape

    def _resizes_vocabulary(self, region: Region, value: Tensor) -> bool:
        shape = self._shape(region)
        resized = tuple(value.shape) != shape and tuple(value.shape[1:]) == shape[1:]
        return resized and shape[0] == self.base.config.get("vocab_size")

    def _add_parameter(self, adapter: int, name: str, value: Tensor) -> None:
        if not names.is_under(name, self.adapters[adapter].modules_to_save):
            self.findings.append(f"{name}: no tensor of this name in the base")
            return
        stored = self.layout.new_name(name) if self.base.config else name
        self.values[stored] = [(None, value)]
        self.config_changes.update(
            self.layout.head_config_changes(name, tuple(value.shape)) if self.base.config else {}
        )
        self.notes.append(f"`{name}` is not in the base; the merged model gets it from the adapter")

    def _replace(self, name: str, regions: Sequence[Region], value: Tensor) -> None:
        for region in regions:
            expected = tuple(stop - start for start, stop in region.index)
            try:
                part = region.part(value)
            except (IndexError, ValueError, RuntimeError):
                part = value
            if tuple(part.shape) != expected:
                self.findings.append(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
                continue
            _require_whole_rows(name, region, self._shape(region))
            self.values.setdefault(region.tensor, []).append((region, part))


def _chain_problem(module: str, region: Region, shape: tuple[int, ...], u_shape: tuple[int, ...]) -> str | None:
    """Why a chain cannot be folded into a region; None when it can."""
    features, rank = u_shape
    if len(shape) not in (2, 3, 4):
        return f"{module}: its weight has shape {shape}, for which HRA defines no chain"
    expected = math.prod(shape[1:]) if len(shape) == 4 else shape[region.input_axis]
    if len(shape) == 4 and features != expected and features % expected == 0:
        raise UnsupportedModelError(
            f"`{module}` is a grouped convolution (U has {features} rows, its weight {shape} has {expected} "
            "columns), for which HRA defines no chain"
        )
    if features != expected:
        return f"{module}: expected U of shape ({expected}, {rank}), got {u_shape}"
    _require_whole_rows(module, region, shape)
    return None


def _require_whole_rows(name: str, region: Region, shape: tuple[int, ...]) -> None:
    """Segments are rows: a region that is a part of the columns has no place in a plan."""
    columns = set(range(2 if len(shape) == 3 else 1, len(shape)))
    if any(region.index[axis] != (0, shape[axis]) for axis in columns):
        raise UnsupportedModelError(f"`{name}` is only some of the columns of `{region.tensor}` {shape}")


def _segments(
    info: TensorInfo,
    shape: tuple[int, ...],
    folds: Mapping[Region, Sequence[ChainSite]],
    values: Sequence[tuple[Region | None, Tensor]],
) -> tuple[Segment, ...]:
    """Cut a tensor into runs of rows, each with one source and one list of chains.

    A fold over rows that an adapter also replaces (PEFT saves a targeted embedding's weight) acts on the new values.
    """
    rows = matrix_shape(shape)[0]
    sources: list[tuple[int, int, TensorInfo | Tensor, int]] = []
    for region, value in values:
        done = 0
        for start, stop in [(0, rows)] if region is None else _row_runs(info.shape, region):
            sources.append((start, stop, value, done))
            done += stop - start
    runs = {
        run: (tuple(sites), _is_transposed(info.shape, region))
        for region, sites in folds.items()
        for run in _row_runs(info.shape, region)
    }
    _refuse_overlap(info.name, sorted(runs))
    cuts = {0, rows, *(edge for run in runs for edge in run), *(edge for source in sources for edge in source[:2])}
    edges = sorted(cuts)
    segments = []
    for start, stop in pairwise(edges):
        chains, transposed = next((fold for run, fold in runs.items() if run[0] <= start < run[1]), ((), False))
        source, source_start = next(
            ((value, start - first + done) for first, last, value, done in sources if first <= start < last),
            (info, start),
        )
        segments.append(Segment(start, stop, source, source_start, chains, transposed))
    return tuple(segments)


def _refuse_overlap(name: str, runs: Sequence[tuple[int, int]]) -> None:
    for (_, stop), (start, _) in pairwise(runs):
        if start < stop:
            raise MismatchError(f"two targets of the adapter claim the same rows of `{name}`")


def _is_transposed(shape: tuple[int, ...], region: Region) -> bool:
    return len(shape) in (2, 3) and region.features not in (None, len(shape) - 1)


def _row_runs(shape: tuple[int, ...], region: Region) -> list[tuple[int, int]]:
    """The runs of matrix rows that a region covers; a transposed region is one run for each stacked matrix."""
    if len(shape) != 3:
        return [region.index[0]] if shape else [(0, 1)]
    (first, last), (start, stop), _ = region.index
    if not _is_transposed(shape, region) and (start, stop) == (0, shape[1]):
        return [(first * shape[1], last * shape[1])]
    return [(i * shape[1] + start, i * shape[1] + stop) for i in range(first, last)]
