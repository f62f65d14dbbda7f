"""Converters by name.

They are strings here, loaded on use: nothing may import `hra_export.converters` statically, because the folder lies
beside the package in the repository, and type checkers see it under another name.
"""

from importlib import import_module
from types import ModuleType

CONVERTERS = {
    "from_bitsandbytes": "hra_export.converters.from_bitsandbytes",
    "from_full_model": "hra_export.converters.from_full_model",
    "from_gguf": "hra_export.converters.from_gguf",
    "from_lora": "hra_export.converters.from_lora",
    "from_official": "hra_export.converters.from_official",
    "to_gguf": "hra_export.converters.to_gguf",
    "to_hra": "hra_export.converters.to_hra",
    "to_lora": "hra_export.converters.to_lora",
    "to_merged": "hra_export.converters.to_merged",
    "to_ort_adapter": "hra_export.converters.to_ort_adapter",
}


def load_converter(name: str) -> ModuleType:
    """The module of one converter.

    Raises:
        ValueError: there is no converter of this name.
    """
    if name not in CONVERTERS:
        raise ValueError(f"no converter is called {name!r}; there are: {', '.join(CONVERTERS)}")
    return import_module(CONVERTERS[name])
