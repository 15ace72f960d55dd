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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.compress.bases import Calibrated, GridQuantiser
from interventions.compress.engines.table import OWN
from interventions.intervention import Context, Model, Resources, without_gradients
from interventions.ranges import Count

if TYPE_CHECKING:
    from torch.nn import Module

    from interventions.compress.kernels.awq_search import Seen
    from interventions.compress.kernels.capture import Call
    from interventions.compress.kernels.grid import Grid
    from interventions.structure import LinearGroup


BATCH_TOKENS = 512
"""Small batches: `search_tokens` is made up of whole ones."""


@dataclass(frozen=True)
class AwqSettings(Calibrated, GridQuantiser):
    """AWQ (Lin et al., 2024). Defaults are those of the reference implementations."""

    name = "awq"

    grid: Count = 20
    """Scale exponents tried, evenly in [0, 1)."""
    duo_scaling: bool = True
    """Weigh activations against weights, x^r / w^(1-r), instead of x^r alone."""
    clip: bool = True
    """Search a clipping threshold for each group of weights before rounding."""
    max_tokens: Count = 512
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    search_tokens: Count | None = 512
    """Tokens, spread over the calibration text, on which a scale's effect on the outputs of
    attention (in whole batches) and MLP is compared; None: all, as published and much slower.
    Means, losses of single linears and clipping read all tokens in any case."""
    quantised_inputs: bool = False
    """Calibrate each block on what the already quantised blocks put out. Off as published: the
    blocks before it are at full precision."""

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Quantise the linear layers of every decoder block, in place, as de-quantised weights.

        Each block is worked on as a float32 copy and rounded once to the stored dtype; embeddings and
        head stay as they are. Returns, for every group of linears, the exponent r that was chosen
        (None where no scale can be folded into what comes before), the loss of plain rounding and of the chosen scale
        (mean squared error of the compared output, before clipping), and the share of weight groups
        that were clipped.
        """
        from interventions.compress.engines.run import run_engine
        from interventions.compress.kernels.awq_search import Seen
        from interventions.compress.kernels.blockwise import float_blocks
        from interventions.compress.kernels.chosen import chosen_grids
        from interventions.compress.kernels.run_time import round_as_it_runs_
        from interventions.statistics import InputStatistics

        if self.engine != OWN:
            return run_engine("awq", model, tokenizer, self, resources, context)
        grids = chosen_grids(model, self)
        groups: list[dict[str, Any]] = []
        tokens = 0
        options: dict[str, Any] = {"batch_tokens": BATCH_TOKENS, "scaled": True}
        for block in float_blocks(model, tokenizer, self, resources, context, self.quantised_inputs, **options):
            scope_calls: dict[str, list[Call]] = {}
            statistics = block.collect(block.groups, scope_calls, sums=InputStatistics)
            seen = Seen(statistics, scope_calls, block.masks, block.unreached)
            tokens = next(iter(seen.statistics.values())).count
            groups += quantise_block_(block.groups, grids, seen, self)
        rounded = round_as_it_runs_(model, tokenizer, self, resources, context)
        return {"calibration_tokens": tokens, "groups": groups} | rounded


def quantise_block_(
    groups: Sequence[LinearGroup], grids: Mapping[str, Grid | None], seen: Seen, settings: AwqSettings
) -> list[dict[str, Any]]:
    """Scale, clip and round the linears of a float32 block in place; return what was chosen.

    Groups of which no linear has a grid stay as they are.
    """
    from interventions.compress.kernels.awq_search import clip_weight, search_scales
    from interventions.compress.kernels.folding import fold_
    from interventions.compress.kernels.grid import fake_quantise

    kept = [linear.module for group in groups for linear in group.linears if grids[linear.name] is None]
    groups = [group for group in groups if any(grids[linear.name] is not None for linear in group.linears)]
    choices = [search_scales(group, grids, seen, settings, may_scale=not touches(group, kept)) for group in groups]
    grams = {key: statistics.gram for key, statistics in seen.statistics.items()}
    for group, choice in zip(groups, choices, strict=True):
        if choice.scales is not None:
            fold_(group, choice.scales)
            # The group now reads x / s. (The statistics themselves may be others' as well.)
            grams[group.key] = grams[group.key] / choice.scales / choice.scales.unsqueeze(1)
    report = []
    for group, choice in zip(groups, choices, strict=True):
        clipped = []
        for number, linear in enumerate(group.linears):
            weight, grid = linear.weight, grids[linear.name]
            if grid is None:
                continue
            if settings.clip and may_clip(group, number) and group.key not in seen.unreached:
                weight, share = clip_weight(weight, grams[group.key], grid)
                clipped.append(share)
            linear.set_weight_(fake_quantise(weight, grid))
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


def touches(group: LinearGroup, kept: Sequence[Module]) -> bool:
    """Tell whether scaling the input of a group would change one of these layers."""
    return any(module in (group.previous, *(linear.module for linear in group.linears)) for module in kept)


def may_clip(group: LinearGroup, number: int) -> bool:
    """Tell whether clipping the linear at `number` is judged well by its own output.

    Not so for queries and keys, which are multiplied with each other, nor for a layer that is
    fused from them, nor for what a mixer reads.
    """
    if group.role == "mixer_in":
        return False
    return group.role != "attention_in" or (len(group.linears) == 3 and number == 2)
