"""GPTQ: one-shot weight quantisation with compensation (Frantar et al., ICLR 2023, arXiv 2210.17323).

The weights rounded later compensate for the output error of each rounded weight, as well as the inputs
of the calibration text allow. Linears that share an input share its Gram matrix and its factor, and
are quantised together; so are experts of the same shape, each with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.compress.bases import Damping, Quantiser, Sequential
from interventions.compress.engines.table import OWN
from interventions.intervention import Context, Model, Resources, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.statistics import InputStatistics
    from interventions.structure import Linear, LinearGroup


@dataclass(frozen=True)
class GptqSettings(Sequential, Quantiser):
    """GPTQ (Frantar et al., 2023); defaults as published, but for `true_sequential` and `preserve_mask`."""

    name = "gptq"

    symmetric: bool = False
    """Zero in the middle of the grid, instead of a grid from the least to the greatest weight."""
    act_order: bool = False
    """Round the columns with the largest inputs first. Groups still have neighbouring columns: implies
    `static_groups`."""
    static_groups: bool = False
    """Find the grids of all groups on the weights as they were, not when the rounding reaches them."""
    damping: Damping = 0.01
    """Added to the diagonal of the Gram matrix, as a share of its mean; raised tenfold, with a warning, where it
    leaves the matrix singular."""
    true_sequential: bool = True
    """The same within a block: calibrate each group of linears on the quantised ones before it. More forward passes."""
    preserve_mask: bool = True
    """Keep weights at zero that are zero already, in a linear with at least 5 % of them. As published,
    compensation would fill them again."""

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Quantise the linear layers of every decoder block, in place, as de-quantised weights.

        Returns for each linear how far its weights moved, as a share of their norm, and the mean squared
        error that is left in its output on the text, as far as the other layers' changes do not add to
        it; None where it had to be rounded to nearest.
        """
        import torch

        from interventions.compress.engines.run import run_engine
        from interventions.compress.kernels.blockwise import in_bunches, walk_stages
        from interventions.compress.kernels.gptq_kernel import gptq_quantise
        from interventions.compress.kernels.grid import fake_quantise
        from interventions.statistics import InputStatistics
        from interventions.zeros import zero_masks

        if self.engine != OWN:
            return run_engine("gptq", model, tokenizer, self, resources, context)

        def work(groups: Sequence[LinearGroup], statistics: Sequence[InputStatistics]) -> list[dict[str, Any]]:
            linears = [linear for group in groups for linear in group.linears]
            weights = [linear.weight for linear in linears]
            result = gptq_quantise(
                torch.cat(weights),
                torch.stack([own.gram for own in statistics]),
                bits=self.bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                act_order=self.act_order,
                static_groups=self.static_groups,
                damping=self.damping,
                zeros=zero_masks(weights) if self.preserve_mask else None,
            )
            names = ", ".join(linear.name for linear in linears)
            if result is None and len(groups) > 1:
                pairs = list(zip(groups, statistics, strict=True))
                return [done for group, own in pairs for done in work([group], [own])]
            if result is None:
                context.warn(
                    f"gptq: {names}: rounded to nearest, as the Gram matrix of the input cannot be factored even with "
                    "a damping of 1: give more or other calibration text (samples, max_tokens)"
                )
                rounded = [fake_quantise(w, self.bits, self.group_size, self.symmetric) for w in weights]
                return [_outcome(linear, new, None) for linear, new in zip(linears, rounded, strict=True)]
            if result.damping > self.damping:
                context.warn(
                    f"gptq: {names}: damping raised to {result.damping:g}; set damping to that, or give more "
                    "calibration text"
                )
            parts = [len(weight) for weight in weights]
            news, errors = torch.split(result.weight, parts), torch.split(result.errors, parts)
            counts = [own.count for group, own in zip(groups, statistics, strict=True) for _ in group.linears]
            return [
                _outcome(linear, new, float(error.mean()) / count)
                for linear, new, error, count in zip(linears, news, errors, counts, strict=True)
            ]

        bunched = in_bunches(work, together=not self.act_order)
        linears = walk_stages(model, tokenizer, self, resources, context, bunched, InputStatistics)
        context.already("every linear layer lay on its grid before")  # the one reason why nothing would change
        return {"linears": linears}


def _outcome(linear: Linear, weight: Tensor, loss: float | None) -> dict[str, Any]:
    """Write the new weight of a linear and report the change."""
    from interventions.compress.kernels.outcomes import replace_

    return {"linear": linear.name, "loss": loss, "moved": replace_(linear, weight)}
