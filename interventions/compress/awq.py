"""AWQ: activation-aware weight quantisation (Lin et al., MLSys 2024, arXiv 2306.00978).

Channels of a layer's input that are large on real text get finer weights: column j of W is
multiplied by s_j before rounding and x_j divided by s_j where it is made. The s of each group of
linears that share an input is the best of a grid, s = mean|x|^r / mean|w|^(1-r), by the error it
leaves in the output of the attention, the MLP, or the linear itself. Then clipping thresholds are
searched, and the weights rounded to an asymmetric integer grid.

As in the reference implementations (mit-han-lab/llm-awq, AutoAWQ), the scales of a block's groups
are all searched on the block as it was, and blocks are calibrated on the outputs of unquantised
blocks. Unlike there, padding is left out of every sum, clipping is judged on all tokens instead of
512, and the scales of attention and MLP inputs by default on 512 tokens instead of all
(`search_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from interventions.anatomy import LinearGroup
from interventions.compress.awq_search import Seen, clip_weight, search_scales
from interventions.compress.blockwise import float_blocks
from interventions.compress.capture import Call
from interventions.compress.engines.run import run_engine
from interventions.compress.engines.table import OWN
from interventions.compress.folding import fold_
from interventions.compress.grid import fake_quantise
from interventions.compress.settings import AwqSettings
from interventions.statistics import InputStatistics
from interventions.step import Context
from interventions.types import Resources

BATCH_TOKENS = 512
"""Small batches: `search_tokens` is made up of whole ones."""


@torch.no_grad()
def awq(
    model: nn.Module, tokenizer: Any, settings: AwqSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Quantise the linear layers of every decoder block, in place, as de-quantised weights.

    Each block is worked on as a float32 copy and rounded once to the stored dtype; embeddings and
    head stay as they are. Returns, for every group of linears, the exponent r that was chosen
    (None where nothing can take up a scale), the loss of plain rounding and of the chosen scale
    (mean squared error of the compared output, before clipping), and the share of weight groups
    that were clipped.
    """
    if settings.engine != OWN:
        return run_engine("awq", model, tokenizer, settings, resources, context)
    groups: list[dict[str, Any]] = []
    tokens = 0
    for block in float_blocks(
        model,
        tokenizer,
        resources,
        context,
        method="awq",
        samples=settings.samples,
        max_tokens=settings.max_tokens,
        sequential=settings.quantised_inputs,
        batch_tokens=BATCH_TOKENS,
    ):
        scope_calls: dict[str, list[Call]] = {}
        seen = Seen(block.collect(block.groups, scope_calls, sums=InputStatistics), scope_calls, block.masks)
        tokens = seen.statistics["attention_in"].count
        groups += quantise_block_(block.groups, seen, settings)
    return {"calibration_tokens": tokens, "groups": groups}


def quantise_block_(groups: Sequence[LinearGroup], seen: Seen, settings: AwqSettings) -> list[dict[str, Any]]:
    """Scale, clip and round the linears of a float32 block in place; return what was chosen."""
    choices = [search_scales(group, seen, settings) for group in groups]
    grams = {role: statistics.gram for role, statistics in seen.statistics.items()}
    for group, choice in zip(groups, choices, strict=True):
        if choice.scales is not None:
            fold_(group, choice.scales)
            # The group now reads x / s. (The statistics themselves may be others' as well.)
            grams[group.role] = grams[group.role] / choice.scales / choice.scales.unsqueeze(1)
    report = []
    for group, choice in zip(groups, choices, strict=True):
        clipped = []
        for number, linear in enumerate(group.linears):
            weight = linear.weight
            if settings.clip and may_clip(group, number):
                weight, share = clip_weight(weight, grams[group.role], settings)
                clipped.append(share)
            linear.set_weight_(fake_quantise(weight, settings.bits, settings.group_size))
        report.append(
            {
                "linears": [linear.name for linear in group.linears],
                "ratio": choice.ratio,
                "rounding_loss": choice.rounding_loss,
                "loss": choice.loss,
                "clipped": sum(clipped) / len(clipped) if clipped else None,
            }
        )
    return report


def may_clip(group: LinearGroup, number: int) -> bool:
    """Tell whether clipping the linear at `number` is judged well by its own output.

    Not so for queries and keys, which are multiplied with each other, nor for a layer that is
    fused from them.
    """
    return group.role != "attention_in" or (len(group.linears) == 3 and number == 2)
