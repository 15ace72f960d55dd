"""AWQ: activation-aware weight quantisation (Lin et al., MLSys 2024, arXiv 2306.00978).

Channels of a layer's input that are large on real text get finer weights: column j of W is
multiplied by s_j before rounding and x_j divided by s_j where it is made. The s of each group of
linears that share an input is the best of a grid, s = mean|x|^r / mean|w|^(1-r), by the error it
leaves in the output of the attention, the MLP, or the linear itself. Then clipping thresholds are
searched, and the weights rounded to an asymmetric integer grid.

As in the reference implementations (mit-han-lab/llm-awq, AutoAWQ), the scales of a block's groups
are all searched on the block as it was, and blocks are calibrated on the outputs of unquantised
blocks. Unlike there, calibration texts are not joined and cut into equal sequences, padding is
left out of every sum, clipping is judged on all tokens instead of 512, and the scales of
attention and MLP inputs by default on 512 tokens instead of all (`search_tokens`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from interventions.anatomy import Block, LinearGroup, find_anatomy
from interventions.compress.awq_search import clip_weight, search_scales
from interventions.compress.capture import Observed, catch_block_calls, observe
from interventions.compress.folding import fold_
from interventions.compress.grid import fake_quantise
from interventions.compress.settings import AwqSettings
from interventions.statistics import token_batches
from interventions.step import Context
from interventions.types import InterventionError, Resources

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
    check_settings(settings)
    if not resources.calibration:
        raise InterventionError("awq needs calibration texts: give `calibration`")
    batches = token_batches(
        tokenizer,
        resources.calibration,
        max_tokens=settings.max_tokens,
        batch_size=max(1, BATCH_TOKENS // settings.max_tokens),
        max_texts=settings.samples,
    )
    blocks = find_anatomy(model).blocks
    calls = catch_block_calls(model, batches, blocks)
    masks = [
        batch["attention_mask"].bool().to(call.hidden.device) for batch, call in zip(batches, calls[0], strict=True)
    ]
    hidden = [call.hidden for call in calls[0]]
    groups: list[dict[str, Any]] = []
    for block, block_calls in zip(blocks, calls, strict=True):
        context.progress(f"awq: block {block.index + 1} of {len(blocks)}")
        work = copy.deepcopy(block)
        work.module.float()
        seen = observe(work, [call.on(h) for call, h in zip(block_calls, hidden, strict=True)], masks)
        groups += quantise_block_(work, seen, settings, context)
        for stored, new in zip(block.module.parameters(), work.module.parameters(), strict=True):
            stored.copy_(new)
        hidden = seen.outputs
        if settings.quantised_inputs:
            hidden = [call(work.module) for call in seen.calls]
        block_calls.clear()
    return {"calibration_tokens": int(sum(mask.sum() for mask in masks)), "groups": groups}


def check_settings(settings: AwqSettings) -> None:
    """Raise InterventionError, naming the setting, for a value that AWQ cannot take."""
    if not 2 <= settings.bits <= 8:
        raise InterventionError(f"awq: bits must be 2 to 8, not {settings.bits}")
    if settings.group_size != -1 and settings.group_size < 1:
        raise InterventionError(f"awq: group_size must be at least 1, or -1 for whole rows, not {settings.group_size}")
    for name in ("grid", "samples", "max_tokens"):
        if getattr(settings, name) < 1:
            raise InterventionError(f"awq: {name} must be at least 1, not {getattr(settings, name)}")
    if settings.search_tokens is not None and settings.search_tokens < 1:
        raise InterventionError(f"awq: search_tokens must be at least 1, or null for all, not {settings.search_tokens}")


def quantise_block_(block: Block, seen: Observed, settings: AwqSettings, context: Context) -> list[dict[str, Any]]:
    """Scale, clip and round the linears of a float32 block in place; return what was chosen."""
    choices = [search_scales(group, seen, settings) for group in block.linear_groups]
    for group, choice in zip(block.linear_groups, choices, strict=True):
        if choice.scales is not None:
            fold_(group, choice.scales)
            # The group now reads x / s.
            seen.statistics[group.role].gram.div_(choice.scales).div_(choice.scales.unsqueeze(1))
    report = []
    for group, choice in zip(block.linear_groups, choices, strict=True):
        clipped = []
        for number, linear in enumerate(group.linears):
            weight = linear.weight
            if settings.clip and may_clip(group, number):
                weight, share = clip_weight(weight, seen.statistics[group.role].gram, settings)
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
