"""The model card of a trained adapter."""

from collections.abc import Mapping
from typing import Any

from hra_export.modelcard import adapter_front_matter
from hra_export.training.settings import Settings

REST = """\
`train_config.toml` repeats the run: `hra-export train --config train_config.toml`.
`history.csv` and `loss.png` show it.
`hra-export merge` folds the adapter into the base.

![loss](loss.png)
"""
PIPELINES = {"causal-lm": "text-generation", "sequence-classification": "text-classification"}


def adapter_card(settings: Settings, facts: Mapping[str, Any], best: Mapping[str, float]) -> str:
    """README.md of an adapter: the base, what was trained, and the figures of the published step.

    Args:
        settings: resolved.
        facts: `targets`, `trainable_parameters`, `rows`, `steps`, `step`, `base` as in the manifest.
        best: the held-out figures of the published step; empty without held-out rows.
    """
    base = facts["base"]["name"]
    fields: dict[str, Any] = {"library_name": "peft", "pipeline_tag": PIPELINES[settings.task], "tags": ["hra"]}
    form = "Gram-Schmidt" if settings.is_gram_schmidt else f"regularization {settings.regularization:g}"
    lines = [
        f"{adapter_front_matter(base, fields)}# {settings.output.name}, an HRA adapter\n",
        f"Householder Reflection Adaptation of `{base}` for {settings.task.replace('-', ' ')}, in PEFT's layout.\n",
        "| | |\n|---|---|",
        f"| chains | {facts['targets']} of rank {settings.rank}, {form} |",
        f"| trained parameters | {facts['trainable_parameters']:,} |",
        f"| rows | {facts['rows']['train']:,} to train on, {facts['rows']['held_out']:,} held out |",
        f"| steps | {facts['steps']:,}, of which {facts['step']:,} is published |",
        f"| learning rate | {settings.learning_rate:g}, {settings.schedule} |",
    ]
    lines += [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in best.items()]
    if settings.labels:
        lines.append(f"| classes | {', '.join(settings.labels)} |")
    return "\n".join([*lines, "", REST])
