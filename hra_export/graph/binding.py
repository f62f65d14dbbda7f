"""Repeated runs on memory that stays where it is: IO binding, with adapters that hold.

Under IO binding the runtime ignores its own active adapters and gives the default's numbers without a word. Here U and
V are bound like any other input.

The runtime reads a bound input where it lies when that is the provider's device, and else copies it once, when it is
bound. Outputs are made by the first run and stay where they are. So every address is fixed, which is what a recorded
CUDA graph needs; each binding records its own, with its own adapter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hra_export.graph.values import TensorSpec, as_tensors, misfits

Value = Any  # an OrtValue


class BoundRun:
    """Inputs, outputs and an adapter that are bound once and run many times.

    Made by `GraphSession.bind`. Inputs on the provider's device may be overwritten in place between runs; a torch
    tensor on a GPU must be ready by then (`torch.cuda.current_stream().synchronize()`). What a GPU's run is fed from
    the CPU was copied when it was bound: feed it again. Not for several threads: make one each.

    Args:
        make: a fresh `onnxruntime.IOBinding` and what runs it.
        to_value: an array or torch tensor as an OrtValue that shares its memory where it can.
        specs: inputs without defaults, inputs with defaults, outputs that are wanted.
        adapter: values of the adapter; none for the graph's default.
        device: where outputs are made that are not given.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Any, Callable[[], None]]],
        to_value: Callable[[Any], Value],
        *,
        specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec], Sequence[TensorSpec]],
        adapter: Mapping[str, Value],
        device: tuple[str, int],
    ) -> None:
        self._make = make
        self._to_value = to_value
        self._required, self._optional, self._results = specs
        self._device = device
        self._feeds: dict[str, Value] = {}
        self._adapter = adapter
        self._given: dict[str, Value] = {}
        self._binding: Any = None
        self._made: dict[str, Value] | None = None
        self._execute: Callable[[], None]

    def feed(self, feeds: Mapping[str, Any]) -> "BoundRun":
        """Bind inputs, beside or in place of those that are bound.

        Raises:
            ValueError: an input that the graph has not, or of another dtype, rank or size; all findings at once.
        """
        feeds = as_tensors(feeds)
        findings = misfits(feeds, (), (*self._required, *self._optional))
        if findings:
            raise ValueError("\n  ".join(["inputs that do not fit the graph:", *findings]))
        self._feeds |= {name: self._to_value(value) for name, value in feeds.items()}
        self._binding = None
        return self

    def into(self, outputs: Mapping[str, Any]) -> "BoundRun":
        """Have outputs written to arrays or tensors of the right size.

        Raises:
            ValueError: an output that is not bound, or of another dtype, rank or size; all findings at once.
        """
        findings = misfits(outputs, (), self._results)
        if findings:
            raise ValueError("\n  ".join(["outputs that do not fit the graph:", *findings]))
        self._given |= {name: self._to_value(value) for name, value in outputs.items()}
        self._binding = None
        return self

    def run(self) -> dict[str, Value]:
        """Run once.

        Returns:
            The outputs as OrtValues, on the device they were bound to; the next run may write over them. `.numpy()`
            copies one to the CPU, and `values.to_array` also does so for bfloat16.

        Raises:
            ValueError: an input is not bound.
            GraphError: the runtime failed.
        """
        if self._binding is None:
            self._bind()
        self._execute()
        if self._made is None:  # later runs write to the same memory
            self._made = dict(zip((spec.name for spec in self._results), self._binding.get_outputs(), strict=True))
        return dict(self._made)

    def _bind(self) -> None:
        values = {**self._feeds, **self._adapter}
        missing = [f"`{spec.name}`: missing, expected {spec}" for spec in self._required if spec.name not in values]
        if missing:
            raise ValueError("\n  ".join(["inputs that are not bound:", *missing]))
        binding, self._execute = self._make()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for spec in self._results:
            if spec.name in self._given:
                binding.bind_ortvalue_output(spec.name, self._given[spec.name])
            else:
                binding.bind_output(spec.name, *self._device)
        binding.synchronize_inputs()
        self._binding, self._made = binding, None
