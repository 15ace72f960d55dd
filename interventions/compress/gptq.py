"""GPTQ: one-shot weight quantisation with compensation (Frantar et al., ICLR 2023, arXiv 2210.17323).

What rounding a weight does to the output of its layer is made good, as well as the inputs seen on
the calibration text allow, by the weights that are rounded after it. Linears that share an input
share its Gram matrix and its factor, and are quantised in one go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import Linear, LinearGroup
from interventions.compress.blockwise import walk_blocks
from interventions.compress.engines.run import run_engine
from interventions.compress.engines.table import OWN
from interventions.compress.gptq_kernel import gptq_quantise
from interventions.compress.grid import fake_quantise
from interventions.compress.rounding import replace_
from interventions.compress.settings import GptqSettings
from interventions.statistics import InputStatistics
from interventions.step import Context
from interventions.types import Resources
from interventions.zeros import zero_masks


@torch.no_grad()
def gptq(
    model: nn.Module, tokenizer: Any, settings: GptqSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Quantise the linear layers of every decoder block, in place, as de-quantised weights.

    Returns for each linear how far its weights moved, as a share of their norm, and the mean squared
    error that is left in its output on the text, as far as the other layers' changes do not add to
    it; None where it had to be rounded to nearest.
    """
    if settings.engine != OWN:
        return run_engine("gptq", model, tokenizer, settings, resources, context)

    def work(group: LinearGroup, statistics: InputStatistics) -> list[dict[str, Any]]:
        weights = [linear.weight for linear in group.linears]
        result = gptq_quantise(
            torch.cat(weights),
            statistics.gram,
            bits=settings.bits,
            group_size=settings.group_size,
            symmetric=settings.symmetric,
            act_order=settings.act_order,
            static_groups=settings.static_groups,
            damping=settings.damping,
            zeros=zero_masks(weights) if settings.preserve_mask else None,
        )
        names = ", ".join(linear.name for linear in group.linears)
        if result is None:
            context.warn(
                f"gptq: {names}: rounded to nearest, as the Gram matrix of the input cannot be factored even with a "
                "damping of 1: give more or other calibration text (samples, max_tokens)"
            )
            rounded = [fake_quantise(w, settings.bits, settings.group_size, settings.symmetric) for w in weights]
            return [_outcome(linear, new, None) for linear, new in zip(group.linears, rounded, strict=True)]
        if result.damping > settings.damping:
            context.warn(
                f"gptq: {names}: damping raised to {result.damping:g}; set damping to that, or give more "
                "calibration text"
            )
        parts = [len(weight) for weight in weights]
        news, errors = torch.split(result.weight, parts), torch.split(result.errors, parts)
        return [
            _outcome(linear, new, float(error.mean()) / statistics.count)
            for linear, new, error in zip(group.linears, news, errors, strict=True)
        ]

    linears = walk_blocks(
        model,
        tokenizer,
        resources,
        context,
        method="gptq",
        samples=settings.samples,
        max_tokens=settings.max_tokens,
        sequential=settings.sequential,
        true_sequential=settings.true_sequential,
        work=work,
        sums=InputStatistics,
    )
    context.already("every linear layer lay on its grid before")  # the one reason why nothing would change
    return {"linears": linears}


def _outcome(linear: Linear, weight: Tensor, loss: float | None) -> dict[str, Any]:
    """Write the new weight of a linear and tell what it does."""
    return {"linear": linear.name, "loss": loss, "moved": replace_(linear, weight)}
