"""Which library of operators, if any, runs the reflections of a graph on a provider, and why none does.

Without one the runtime inlines the operators' bodies. A library that has no kernels for the provider is not registered:
its CPU kernels would take the nodes from a GPU, and everything around them would be copied to and fro.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hra_export.errors import DeviceError
from hra_export.graph.providers import Provider
from hra_export.kernels.operator_library import OperatorLibrary, find, open_library

# The library's file; `auto` for the one that is found, where it serves the provider; None for the bodies.
Operator = Path | Literal["auto"] | None


@dataclass(frozen=True)
class OperatorChoice:
    """What runs reflections.

    Attributes:
        library: whose kernels do; None for the bodies.
        reason: why it is the bodies; empty otherwise.
    """

    library: OperatorLibrary | None
    reason: str = ""


def choose_operator(operator: Operator, provider: Provider) -> OperatorChoice:
    """Find the library that was asked for.

    Raises:
        DeviceError: the one that is named has no kernels for the provider.
        FormatError: there is one, and it cannot be used.
    """
    if operator is None:
        return OperatorChoice(None, "no library was asked for")
    library = find() if operator == "auto" else open_library(operator)
    if library is None:
        return OperatorChoice(None, "no library was found")
    if provider in library.providers:
        return OperatorChoice(library)
    lacking = f"`{library.path}` has kernels for {' and '.join(library.providers)}, none for {provider}"
    if operator == "auto":
        return OperatorChoice(None, lacking)
    hint = (
        "`hra-export build-op --cuda on` builds one" if provider == "cuda" else "run it without: the bodies serve there"
    )
    raise DeviceError(f"the operator library cannot run on {provider}", findings=[lacking], hint=hint)
