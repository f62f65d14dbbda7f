"""What a candidate may differ from the reference by, each bound with its reason.

`TOLERANCES` is for weights stored in a dtype and run in float32; `GRAPH_TOLERANCES` is for graphs, which also compute
in their precision.
"""

from dataclasses import dataclass, replace

# Rounding moves outputs about as much, relative to the adapter's effect, as it changes ΔW; layers that weigh their
# targets unevenly raise that by a small factor.
EFFECT_PER_ROUNDING = 4.0
# The KL divergence that a rounded base explains in the adapted model, for each of its own: measured 1 to 2.3.
KL_PER_BASE = 4.0
LEAST_KL = 1e-4
# An effect that rounding hides by more than this cannot be told from another.
MOST_HIDDEN = 0.1


@dataclass(frozen=True)
class Tolerance:
    """What a candidate of one precision may differ by, and why.

    Attributes:
        effect: bound on the relative error of the adapter's effect; None where rounding of the base hides it, and
            `share` says whether the adapter is there.
        kl: bound on the mean KL divergence of next-token distributions, in nats; less where the candidate also runs
            without its adapter, and rounding of its base explains less.
        reason: where the bounds come from.
        noise: what arithmetic in this precision moves outputs by, relative to their size, whatever the adapter does.
        share: bound on how far the share of the adapter's effect that arrived may be from 1.
        is_typical: only the better half of the outputs is held to it.
    """

    effect: float | None
    kl: float
    reason: str
    noise: float = 0.0
    share: float | None = None
    is_typical: bool = False

    def allowed_effect(self, effect_size: float) -> float | None:
        """The bound for an output that the adapter moves by `effect_size` of its size: noise hides small effects."""
        if self.effect is None or not effect_size > 0:
            return self.effect
        return max(self.effect, min(self.noise / effect_size, MOST_HIDDEN))

    def allowed_kl(self, base_kl: float | None) -> float:
        """The bound for an output whose candidate without its adapter is `base_kl` off from the base."""
        if base_kl is None or self.share is None:
            return self.kl
        return min(self.kl, max(KL_PER_BASE * base_kl, LEAST_KL))


TOLERANCES: dict[str, Tolerance] = {
    "float64": Tolerance(1e-4, 1e-6, "the reference itself runs in float32, whose own noise is the bound"),
    "float32": Tolerance(
        1e-3,
        1e-6,
        "one rounding of 2⁻²⁴ for each weight and about 10 layers of float32 sums give 1e-6 of the logits; an adapter "
        "that moves them by a thousandth still shows to 1e-3",
    ),
    "float16": Tolerance(
        0.05,
        1e-4,
        "one rounding of 2⁻¹² for each folded weight: an adapter whose effect is off by more than this is better kept "
        "in float32; where the merge measured what rounding cost, four times that",
    ),
    "bfloat16": Tolerance(
        0.25,
        1e-3,
        "one rounding of 2⁻⁹ for each folded weight: an adapter whose effect is off by more than this is better kept "
        "in float32; where the merge measured what rounding cost, four times that",
    ),
}

ROUNDED_ACTIVATIONS = (
    "against PyTorch with the same rounded weights: products round activations to 8 bits, measured as 6e-2 of the "
    "adapter's effect on prompts, 0.1 on half of the inputs, and up to 1.2 on a few random tokens that amplify what "
    "is rounded; so half of the outputs are held to it, and all of them without that rounding to 2e-4"
)

# Figures of SmolLM2-135M with an adapter on all its products that moves logits by 0.3 to 0.6 of their size, on random
# tokens and on prompts; quantized in blocks of 32, the head in 8 bits, on the CPU.
GRAPH_TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(
        1e-4,
        1e-6,
        "two float32 runs of one model differ by the order of sums: measured 2e-6 of the logits and 3e-6 of the "
        "adapter's effect; ten times that is noise, which hides small effects by more",
        noise=2e-5,
    ),
    "fp16": Tolerance(
        1e-2,
        1e-4,
        "activations and weights of 2⁻¹¹: measured 2e-3 of the logits, 3e-3 of the adapter's effect, 1e-5 nats",
        noise=4e-3,
    ),
    "bf16": Tolerance(
        0.08,
        5e-3,
        "as fp16 with 2⁻⁸ in place of 2⁻¹¹; rounding of the weights alone was measured as 1e-2 of the logits and of "
        "the adapter's effect, 2e-4 nats",
        noise=3e-2,
    ),
    "int8": Tolerance(0.3, 1.0, ROUNDED_ACTIVATIONS, noise=0.3, is_typical=True),
    "int4": Tolerance(0.3, 1.0, ROUNDED_ACTIVATIONS, noise=0.3, is_typical=True),
    "dynamic int8": Tolerance(
        0.3,
        1.0,
        "against PyTorch with the same rounded weights: activations have one scale of 8 bits for a whole tensor; "
        "measured 1e-2 to 3e-2 of the adapter's effect on tiny encoders",
        noise=0.3,
        is_typical=True,
    ),
}

# A graph of rounded weights with float32 activations that are not rounded, against PyTorch with the same weights.
UNROUNDED = Tolerance(
    2e-4,
    1e-6,
    "the order of sums, as fp32, and scales that are multiplied in later: measured 5e-5 of the logits on random "
    "tokens, 1e-4 of the adapter's effect; twice that",
    noise=1e-4,
)

# Inputs that amplify the rounding of activations amplify the order of sums too: measured as 1.5e-4 to 2.3e-3 of what
# that rounding does to the effect, and 3e-6 of its divergence.
SUMS_PER_ROUNDING = 5e-3
KL_PER_ROUNDING = 1e-4

# For graphs of rounded weights whose matrices cannot be read back or assigned to parameters: against the float model.
UNREAD_TOLERANCES: dict[str, Tolerance] = {
    "int8": Tolerance(
        None,
        0.1,
        "rounded weights move logits on their own (measured 0.013 nats, 0.008 without the adapter), in no direction: "
        "92 % to 103 % of the adapter's effect was seen to arrive",
        share=0.2,
    ),
    "int4": Tolerance(
        None,
        3.0,
        "rounded weights move logits on their own (measured 0.7 to 1.5 nats, 0.6 to 1 without the adapter), in no "
        "direction: 76 % to 130 % of the adapter's effect was seen to arrive",
        share=0.5,
    ),
}


def unrounded(row: Tolerance, effect_error: float, kl: float | None) -> Tolerance:
    """What an output may be off by without rounding of activations, where with it it is off by so much."""
    if row.effect is None or not effect_error >= 0:
        return row
    effect = max(row.effect, min(SUMS_PER_ROUNDING * effect_error, MOST_HIDDEN))
    return replace(row, effect=effect, kl=max(row.kl, min(KL_PER_ROUNDING * (kl or 0.0), LEAST_KL)))


def tolerance_for(dtype: str, rounding_loss: float | None = None) -> Tolerance:
    """The row of `TOLERANCES` for a dtype, tightened to what rounding is known to have cost.

    Args:
        dtype: that was promised.
        rounding_loss: relative error of ΔW through rounding, as the merge measured it; None when nobody did.
    """
    row = TOLERANCES[dtype]
    if rounding_loss is None or row.effect is None or dtype in ("float32", "float64"):
        return row
    measured = max(EFFECT_PER_ROUNDING * rounding_loss, TOLERANCES["float32"].effect or 0.0)
    return replace(row, effect=min(row.effect, measured))
