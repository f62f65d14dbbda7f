"""Adapter key ↔ module path ↔ parameter name. Strings only.

A PEFT adapter file holds `base_model.model.<module>.hra_u` for each chain, and under the same prefix whatever
else was trained: `<module>.base_layer.bias` of a target, `<module>.bias` elsewhere, and the parameters of
`modules_to_save`. PEFT drops its own adapter name and its `modules_to_save` wrapper when it saves; with `bias="all"`
it also writes the biases inside that wrapper, the trained ones a second time and the base's own.
"""

from collections.abc import Collection
from typing import Literal, NamedTuple

PEFT_PREFIX = "base_model.model."
CHAIN_SUFFIX = ".hra_u"


class AdapterKey(NamedTuple):
    """What a tensor of an adapter file is: the chain of a module, or a parameter trained along with it.

    `path` is the module path of a chain, the parameter's own name in the base model otherwise. An `original` is the
    base's own value of a parameter of a saved module: the adapter does not use it.
    """

    kind: Literal["chain", "parameter", "original"]
    path: str


def parse_adapter_key(key: str, modules_to_save: Collection[str] = ()) -> AdapterKey | None:
    """Read one key of an adapter file; None when HRA has no such tensor."""
    if not key.startswith(PEFT_PREFIX):
        return None
    path = key.removeprefix(PEFT_PREFIX)
    if "" in path.split("."):
        return None
    if path.endswith(CHAIN_SUFFIX):
        return AdapterKey("chain", path.removesuffix(CHAIN_SUFFIX))
    name = path.replace(".base_layer.", ".")
    if is_under(name, modules_to_save):
        if ".original_module." in name:
            return AdapterKey("original", name.replace(".original_module.", "."))
        name = name.replace(".modules_to_save.", ".")
    if name.endswith((".weight", ".bias")) or is_under(name, modules_to_save):
        return AdapterKey("parameter", name)
    return None


def chain_key(module: str) -> str:
    """The key of a module's chain in an adapter file."""
    return f"{PEFT_PREFIX}{module}{CHAIN_SUFFIX}"


def parameter_key(name: str, targets: Collection[str] = ()) -> str:
    """The key of a trained parameter; one that belongs to a target lies under the target's `base_layer`."""
    module, _, leaf = name.rpartition(".")
    return f"{PEFT_PREFIX}{module}.base_layer.{leaf}" if module in targets else f"{PEFT_PREFIX}{name}"


def weight_name(module: str) -> str:
    """The parameter a chain of this module acts on."""
    return f"{module}.weight"


def is_under(name: str, modules: Collection[str]) -> bool:
    """Whether a dotted name passes through one of `modules`, compared literally, part by part."""
    dotted = f".{name}."
    return any(f".{module}." in dotted for module in modules)
