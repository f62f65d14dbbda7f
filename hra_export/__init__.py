"""hra-export: train, fold, export, convert, validate and ship Householder Reflection Adaptation (HRA) adapters.

The public names are loaded on first use, so that importing the package pulls in neither torch nor transformers.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hra_export.adapter import HraAdapter as HraAdapter
    from hra_export.adapter import read_adapter as read_adapter
    from hra_export.adapter import write_adapter as write_adapter
    from hra_export.attachment import attach as attach
    from hra_export.checkpoint import Checkpoint as Checkpoint
    from hra_export.checkpoint import open_checkpoint as open_checkpoint
    from hra_export.composition import composed as composed
    from hra_export.compression.outcome import compress_adapter as compress_adapter
    from hra_export.compression.plan import plan_compression as plan_compression
    from hra_export.errors import HraExportError as HraExportError
    from hra_export.export import export_graphs as export_graphs
    from hra_export.export import plan_export as plan_export
    from hra_export.graph.options import GraphOptions as GraphOptions
    from hra_export.graph.session import GraphSession as GraphSession
    from hra_export.householder import BlockReflector as BlockReflector
    from hra_export.householder import compact_wy as compact_wy
    from hra_export.inspection import inspect_adapter as inspect_adapter
    from hra_export.low_rank import HraSource as HraSource
    from hra_export.merge import MergeReport as MergeReport
    from hra_export.merge import merge_checkpoint as merge_checkpoint
    from hra_export.parity import ParityReport as ParityReport
    from hra_export.plan import MergePlan as MergePlan
    from hra_export.planning import plan_merge as plan_merge
    from hra_export.reflection import reflect as reflect
    from hra_export.registry import load_converter as load_converter
    from hra_export.strength import take_strength as take_strength
    from hra_export.training.tuner import accelerate_peft as accelerate_peft
    from hra_export.training.tuner import get_hra_model as get_hra_model
    from hra_export.training.tuner import load_hra_model as load_hra_model
    from hra_export.validation.graphs import validate_graph as validate_graph
    from hra_export.validation.merged import validate_merged as validate_merged

_ORIGIN = {
    "BlockReflector": "householder",
    "Checkpoint": "checkpoint",
    "GraphOptions": "graph.options",
    "GraphSession": "graph.session",
    "HraAdapter": "adapter",
    "HraExportError": "errors",
    "HraSource": "low_rank",
    "MergePlan": "plan",
    "MergeReport": "merge",
    "ParityReport": "parity",
    "accelerate_peft": "training.tuner",
    "attach": "attachment",
    "compact_wy": "householder",
    "composed": "composition",
    "compress_adapter": "compression.outcome",
    "export_graphs": "export",
    "get_hra_model": "training.tuner",
    "inspect_adapter": "inspection",
    "load_converter": "registry",
    "load_hra_model": "training.tuner",
    "merge_checkpoint": "merge",
    "open_checkpoint": "checkpoint",
    "plan_compression": "compression.plan",
    "plan_export": "export",
    "plan_merge": "planning",
    "read_adapter": "adapter",
    "reflect": "reflection",
    "take_strength": "strength",
    "validate_graph": "validation.graphs",
    "validate_merged": "validation.merged",
    "write_adapter": "adapter",
}

__all__ = ["__version__", *_ORIGIN]

__version__ = metadata.version("hra-export")


def __getattr__(name: str) -> object:
    if name not in _ORIGIN:
        raise AttributeError(f"module `hra_export` has no attribute `{name}`")
    return getattr(import_module(f"hra_export.{_ORIGIN[name]}"), name)
