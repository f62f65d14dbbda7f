"""The adapters that a session holds, ready to be fed.

A graph whose rows name their adapters takes all of them at once, stacked: U (a, d, r) and V (a, r, d), of the largest
rank, the smaller ones padded with zeros, which change nothing. Adapter 0 is all zeros: the base.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from hra_export.graph.swap_sites import ADAPTER_INDEX, Site, SwapContract
from hra_export.graph.values import Array, TensorSpec, numpy_dtype, shape_of

Parameters = Mapping[str, Array]


def stack_parameters(adapters: Sequence[Parameters], sites: Sequence[Site]) -> dict[str, Array]:
    """Adapters side by side, behind one of zeros.

    Args:
        adapters: name → U (d, r) or V (r, d) each, complete for the sites; ranks may differ.
        sites: those of the graph.

    Returns:
        name → U (a + 1, d, r) or V (a + 1, r, d), with r the largest rank of the target.
    """
    stacked: dict[str, Array] = {}
    for site in sites:
        rank = max((adapter[site.u].shape[1] for adapter in adapters), default=0)
        dtype = adapters[0][site.u].dtype if adapters else numpy_dtype(site.dtype)
        u = np.zeros((len(adapters) + 1, site.size, rank), dtype)
        v = np.zeros((len(adapters) + 1, rank, site.size), dtype)
        for row, adapter in enumerate(adapters, start=1):
            own = adapter[site.u].shape[1]
            u[row, :, :own] = adapter[site.u]
            v[row, :own, :] = adapter[site.v]
        stacked |= {site.u: u, site.v: v}
    return stacked


@dataclass(frozen=True)
class AdapterBank:
    """A snapshot: adding an adapter makes a new one, so that runs that have begun keep theirs.

    Attributes:
        contract: of the graph; None when it takes no adapters.
        to_value: moves an array to the session's device.
        adapters: name → parameters.
        values: adapter → what is fed for it; for rows nothing, they are fed all at once.
    """

    contract: SwapContract | None
    to_value: Callable[[Array], Any]
    adapters: Mapping[str, Parameters] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def having(self, name: str, parameters: Parameters) -> "AdapterBank":
        """With one adapter more, or another one under a known name."""
        return self._holding({**self.adapters, name: parameters}, name)

    def without(self, name: str) -> "AdapterBank":
        """With one adapter less.

        Raises:
            ValueError: there is none of this name.
        """
        self._require([name])
        return self._holding({key: value for key, value in self.adapters.items() if key != name}, None)

    def chosen(
        self,
        feeds: Mapping[str, Any],
        inputs: Sequence[TensorSpec],
        *,
        adapter: str | None,
        adapters: Sequence[str | None] | None,
    ) -> Mapping[str, Any]:
        """What is fed beside `feeds` so that a run has the adapters it names.

        Args:
            feeds: what the run brings itself; U, V and `adapter_index` may be among it when no adapter is named.
            inputs: of the graph, without those that have defaults.
            adapter: for all rows; None is the graph's default.
            adapters: one for each row; None is the base.

        Raises:
            ValueError: no such adapter, a wrong number of them, or the graph does not take them so.
        """
        if adapter is not None and adapters is not None:
            raise ValueError("adapter, adapters: give one of them")
        is_named = adapter is not None or adapters is not None
        if not self._is_rows:
            values = self._of_run(adapter, adapters)
        elif ADAPTER_INDEX in feeds and not is_named:
            self._check_index(feeds[ADAPTER_INDEX])
            values = self._stack
        else:
            rows = _count_rows(feeds, inputs)
            values = self._of_rows([adapter] * rows if adapters is None else adapters, rows)
        doubled = sorted(values.keys() & feeds.keys())
        if doubled and is_named:
            raise ValueError(f"adapters are named, and fed as well: {', '.join(doubled)}")
        return {name: value for name, value in values.items() if name not in feeds}

    def _of_run(self, adapter: str | None, adapters: Sequence[str | None] | None) -> Mapping[str, Any]:
        if adapters is not None:
            raise ValueError("`adapters`: this graph takes one adapter for all rows; name it with `adapter`")
        if adapter is None:
            return {}
        self._require([adapter])
        return self.values[adapter]

    def _of_rows(self, adapters: Sequence[str | None], rows: int) -> Mapping[str, Any]:
        if len(adapters) != rows:
            raise ValueError(f"`adapters`: expected {rows} names, one for each row, got {len(adapters)}")
        self._require([name for name in adapters if name is not None])
        order = {name: row for row, name in enumerate(self.adapters, start=1)}
        index = np.array([0 if name is None else order[name] for name in adapters], np.int64)
        return {**self._stack, ADAPTER_INDEX: self.to_value(index)}

    def _check_index(self, index: Any) -> None:
        """A number that is out of bounds fails on the CPU, and reads zeros on a GPU."""
        if self.adapters and isinstance(index, np.ndarray) and index.size:
            low, high = int(index.min()), int(index.max())
            if low < 0 or high > len(self.adapters):
                raise ValueError(f"`{ADAPTER_INDEX}`: expected 0 to {len(self.adapters)}, got {low} to {high}")

    @cached_property
    def _stack(self) -> Mapping[str, Any]:
        """All adapters at once, for a graph whose rows name theirs; before one is added, the graph's own stack.

        Made when it is first run, so that loading many adapters stacks once.
        """
        if self.contract is None or not self.adapters:
            return {}
        return self._moved(stack_parameters(list(self.adapters.values()), self.contract.sites))

    @property
    def _is_rows(self) -> bool:
        return self.contract is not None and self.contract.swapping == "rows"

    def _require(self, names: Sequence[str]) -> None:
        if self.contract is None:
            raise ValueError("adapters: this graph takes none; export it with `--swappable`")
        unknown = sorted({name for name in names if name not in self.adapters})
        if unknown:
            loaded = ", ".join(f"`{name}`" for name in self.adapters) or "none"
            raise ValueError(f"unknown adapters: {', '.join(f'`{name}`' for name in unknown)}; loaded: {loaded}")

    def _holding(self, adapters: Mapping[str, Parameters], changed: str | None) -> "AdapterBank":
        if self._is_rows:
            return replace(self, adapters=adapters)
        values = {name: self.values[name] for name in adapters if name in self.values and name != changed}
        if changed is not None:
            values[changed] = self._moved(adapters[changed])
        return replace(self, adapters=adapters, values=values)

    def _moved(self, parameters: Parameters) -> dict[str, Any]:
        return {name: self.to_value(array) for name, array in parameters.items()}


def _count_rows(feeds: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
    """The size that `adapter_index` shares with another input."""
    (symbol,) = next(spec.shape for spec in inputs if spec.name == ADAPTER_INDEX)
    if isinstance(symbol, int):
        return symbol
    for spec in inputs:
        sizes = shape_of(feeds[spec.name]) if spec.name in feeds and spec.name != ADAPTER_INDEX else ()
        for size, name in zip(sizes, spec.shape, strict=False):  # a feed of another rank is reported by name later
            if name == symbol:
                return size
    raise ValueError(f"`{ADAPTER_INDEX}`: missing, and no input that is fed has the size `{symbol}`")
