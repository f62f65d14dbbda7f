"""Model cards of what is written: where it comes from, in the front matter that the Hub understands."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hra_export.adapter import HraAdapter
    from hra_export.plan import MergePlan

# Front matter worth keeping from the base's card; the rest describes another model.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def merged_card(plan: "MergePlan") -> str:
    """README.md of the merged checkpoint: `base_model`, `base_model_relation: merge`, and a line on each adapter."""
    library = "diffusers" if plan.base.component or "_class_name" in plan.base.config else "transformers"
    adapters = _adapter_lines(plan.sources)
    return (
        f"{_head(plan, library, ['hra', 'merge'])}# {plan.base.root.name}, with HRA adapters merged\n\n"
        "The Householder reflections of these adapters are folded into the weights, in this order:\n\n"
        f"{adapters}{_strength_line(plan)}\n\n"
        "`hra_export_manifest.json` says what was done to each tensor, and what rounding cost. "
        "Made with `hra-export merge`.\n"
    )


def graph_card(plan: "MergePlan", mode: str) -> str:
    """README.md of an exported graph.

    Args:
        plan: of the merge that the graph stands for.
        mode: `merged` or `reflect`.
    """
    how = "folded into the weights" if mode == "merged" else "operators of the graph, in front of the base's weights"
    return (
        f"{_head(plan, 'onnx', ['hra', 'onnx'])}# {plan.base.root.name}, with HRA adapters, as ONNX\n\n"
        f"The Householder reflections of these adapters are {how}, in this order:\n\n"
        f"{_adapter_lines(plan.sources)}{_strength_line(plan)}\n\n"
        "`hra_export_manifest.json` lists the graphs, their inputs and their outputs. Made with `hra-export onnx`.\n"
    )


def adapter_card(adapter: "HraAdapter", done: str) -> str:
    """README.md of an HRA adapter that was made of others.

    Args:
        adapter: with its origin.
        done: what was done to them, as a clause that ends the sentence `These HRA adapters, …`.
    """
    front = adapter_front_matter(adapter.base, {"library_name": "peft", "tags": ["hra"]})
    return (
        f"{front}# {len(adapter.chains)} chains of rank {adapter.rank}\n\n"
        f"{_adapter_lines(adapter.sources)}\n\nThese HRA adapters, {done}. "
        "`hra_export_manifest.json` says more. Made with hra-export.\n"
    )


def adapter_front_matter(base: str | None, fields: "Mapping[str, Any]") -> str:
    """The front matter of an adapter's card, between its lines and with the blank one behind.

    Args:
        base: what the adapter calls its base; `base_model` where that means something to others.
        fields: what else it says.
    """
    named = {"base_model": base, "base_model_relation": "adapter"} if _is_hub_id(base) else {}
    return _between_lines({**fields, **named})


def _is_hub_id(base: str | None) -> bool:
    """Whether a base's name means something to others; a path on somebody's disk does not."""
    if base is None or base.startswith((".", "~", "/")) or base.endswith(".gguf"):
        return False
    return base.count("/") == 1


def _head(plan: "MergePlan", library: str, tags: list[str]) -> str:
    """The front matter of what was made of a base."""
    base = next((adapter.base for adapter in plan.sources if adapter.base), None)
    inherited = {key: value for key, value in _front_matter(plan).items() if key in INHERITED}
    fields: dict[str, Any] = {
        "library_name": library,
        **inherited,
        "tags": tags,
        "base_model_relation": "merge",
    }
    if _is_hub_id(base):
        fields["base_model"] = base
    return _between_lines(fields)


def _between_lines(fields: "Mapping[str, Any]") -> str:
    import yaml

    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)}---\n\n"


def _adapter_lines(adapters: "Sequence[HraAdapter]") -> str:
    return "\n".join(
        f"- `{adapter.path.name if adapter.path else 'adapter'}`: rank {adapter.rank}, {len(adapter.chains)} targets"
        f"{', Gram-Schmidt' if adapter.orthogonalize else ''}"
        for adapter in adapters
    )


def _strength_line(plan: "MergePlan") -> str:
    if plan.strength == 1:
        return ""
    what = "part of the rotation's angles" if plan.interpolation == "geodesic" else "part of the weights' change"
    return f"\n\nThe adapters act at strength {plan.strength:g} ({plan.interpolation}: that {what})."


def _front_matter(plan: "MergePlan") -> dict[str, object]:
    """The base card's front matter; empty when it has no card, or one that cannot be read."""
    import yaml

    path = plan.base.root / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        data = yaml.safe_load(text.removeprefix("---\n").partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}
