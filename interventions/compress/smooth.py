"""SmoothQuant: move outliers of activations into the weights (Xiao et al., ICML 2023, arXiv 2211.10438).

A few channels of a linear layer's input are far larger than the others, which makes the input hard to round. Channel j
of the input is divided by s_j and column j of the weights multiplied by it,

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),

so that the product stays as it is, and both sides share the difficulty. The division is folded into what makes the
input: a norm, or the linear layer before. Nothing is rounded: a later step does that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from interventions.compress.bases import Calibrated
from interventions.intervention import ZEROS, Context, Model, Resources, without_gradients
from interventions.layouts import ROLES
from interventions.ranges import Choice, Count, Items, Range

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.structure import Block, LinearGroup

LEAST = 1e-5
"""The least maximum of a column of weights, as in the reference implementation."""


@dataclass(frozen=True)
class SmoothSettings(Calibrated):
    """SmoothQuant's migration of scales (Xiao et al., 2023); leaves the function of the model as it is."""

    name = "smooth"
    category = "compress"

    alpha: Annotated[float, Range(0, 1)] = 0.5
    """How much of the difficulty the weights take: 0 leaves it to the activations, 1 leaves none."""
    targets: Annotated[list[Annotated[str, Choice(*ROLES)]], Items()] = field(
        default_factory=lambda: ["attention_in", "mlp_in"]
    )
    """Whose inputs to smooth. As published: the layers that read a norm's output."""
    samples: Count = 512
    """Windows of calibration text read, the first ones."""
    max_tokens: Count = 512
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""

    def keeps(self, metric: str) -> bool:
        """Scaled zeros are zeros."""
        return metric in ZEROS

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Scale the inputs and weights of groups of linear layers against each other, in place.

        Returns for each group its least and greatest factor, and the ratio of the greatest to the median
        maximum of its input's channels before and after. A warning names the groups whose scales cannot be folded.
        """
        from interventions.compress.kernels.blockwise import float_blocks
        from interventions.compress.kernels.folding import fold_
        from interventions.statistics import InputMaxima
        from interventions.types import InterventionError

        smoothed: list[dict[str, Any]] = []
        left: list[str] = []
        for block in float_blocks(model, tokenizer, self, resources, context, sequential=False, reads=InputMaxima):
            found, unfoldable = self.foldable(block.block)
            left += unfoldable
            maxima = block.collect(found, sums=InputMaxima).values()
            # All scales come from the block as it is: a fold changes the weights of the linear layer before.
            scales = [smoothing(group, inputs.abs_max, self.alpha) for group, inputs in zip(found, maxima, strict=True)]
            for group, inputs, s in zip(found, maxima, scales, strict=True):
                fold_(group, s)
                peaks = [float(x.max() / x.median().clamp(min=LEAST)) for x in (inputs.abs_max, inputs.abs_max / s)]
                names = [linear.name for linear in group.linears]
                smoothed.append({"linears": names, "factors": [float(s.min()), float(s.max())], "peak": peaks})
        if not smoothed:
            raise InterventionError(
                f"smooth: nothing before {left[0]}, or any other of the targets, can take up a scaling: leave this "
                "step out, or choose other targets"
            )
        if left:
            others = f" and {len(left) - 1} more groups of layers" if len(left) > 1 else ""
            context.warn(f"smooth: {left[0]}{others} stay as they are: nothing before them can take up a scaling")
        return {"groups": smoothed}

    def foldable(self, block: Block) -> tuple[list[LinearGroup], list[str]]:
        """Return the targets in a block whose scales can be folded, and the first linear layers of the others."""
        targets = [group for group in block.linear_groups if group.role in self.targets]
        fine = [group for group in targets if group.previous is not None]
        return fine, [group.linears[0].name for group in targets if group not in fine]


def smoothing(group: LinearGroup, x_max: Tensor, alpha: float) -> Tensor:
    """Return the factors s (d,) of the columns of a group whose input has the greatest magnitudes `x_max` (d,).

    A channel that is always zero, or that no weight reads, has nothing to share: 1.
    """
    import torch

    w_max = torch.stack([linear.weight.abs().amax(dim=0) for linear in group.linears]).amax(dim=0)
    s = x_max.pow(alpha) / w_max.clamp(min=LEAST).pow(1 - alpha)
    return torch.where((x_max > 0) & (w_max > 0), s.clamp(min=LEAST), 1.0)
