"""The names that Stable Diffusion's own code (LDM) has for the parameters of a UNet, in diffusers' terms.

Source: diffusers `loaders/single_file_utils.py`, whose conversion is run on names instead of tensors.
"""

import re
from collections.abc import Collection

from hra_export.errors import ConversionError, UnsupportedModelError

LDM_PREFIX = "model.diffusion_model."
_BLOCK = re.compile(r"(?P<side>input_blocks|middle_block|output_blocks)\.(?P<number>\d+)\.")
_DOWNSAMPLER = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")


def diffusers_names(names: Collection[str], *, layers_per_block: int | None = None) -> dict[str, str]:
    """LDM's parameter names → diffusers', of those that diffusers has.

    Args:
        names: of UNet parameters, with the prefix `model.diffusion_model.`; they need not be all.
        layers_per_block: of diffusers' configuration; left out, it is told from where the downsamplers stand.

    Raises:
        ConversionError: it is left out, and there is no downsampler among the names.
        UnsupportedModelError: diffusers is not installed.
    """
    try:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    except ImportError as error:
        raise UnsupportedModelError(
            "names of Stable Diffusion's own code need diffusers", hint="`pip install 'hra-export[diffusers]'`"
        ) from error
    own = {name for name in names if name.startswith(LDM_PREFIX)}
    config = {"layers_per_block": layers_per_block or _layers_per_block(own)}
    # diffusers counts the blocks that it sees, and a file with chains alone lacks those without attention.
    padding = [f"{LDM_PREFIX}{block}.none" for block in _blocks(own)]
    converted = convert_ldm_unet_checkpoint({name: name for name in [*sorted(own), *padding]}, config)
    return {name: new for new, name in converted.items() if name in own}


def _layers_per_block(names: Collection[str]) -> int:
    found = [int(match[1]) for name in names if (match := _DOWNSAMPLER.fullmatch(name.removeprefix(LDM_PREFIX)))]
    if not found:
        raise ConversionError(
            "how many layers a block of this UNet has cannot be told: the file has no downsampler",
            hint="pass the base in diffusers' layout with `--base`",
        )
    return min(found) - 1


def _blocks(names: Collection[str]) -> list[str]:
    last: dict[str, int] = {}
    for name in names:
        match = _BLOCK.match(name.removeprefix(LDM_PREFIX))
        if match is not None:
            last[match["side"]] = max(last.get(match["side"], 0), int(match["number"]))
    return [f"{side}.{number}" for side, highest in last.items() for number in range(highest + 1)]
