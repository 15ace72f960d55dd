"""ROME: rank-one model editing (Meng et al., NeurIPS 2022, arXiv 2202.05262).

One projection is changed by one rank-one update for each edit, the least one that makes the
subject's key yield the target value exactly. Target values and keys are found as for MEMIT: z is
the output of the block, where the authors' first code took that of the MLP, and the bare prompt
counts as much in the key as all other contexts together.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from interventions.anatomy import Linear
from interventions.edit.closed_form import factorise, rome_update
from interventions.edit.rewriting import Solve, rewrite
from interventions.edit.settings import RomeSettings
from interventions.step import Context
from interventions.types import InterventionError, Resources


def rome(
    model: nn.Module, tokenizer: Any, settings: RomeSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Make `resources.edits` in place, one after another, in one layer."""

    def make_solve(output: Linear, second_moment: Tensor) -> Solve:
        stored = factorise(second_moment)
        if stored.ridge:
            context.warn(f"{output.parameter_name}: singular second moment, solved with a ridge of {stored.ridge}")
        return partial(rome_update, stored=stored)

    return rewrite(
        model,
        tokenizer,
        settings,
        resources,
        context,
        method="rome",
        choose_layers=lambda depth: [_chosen_layer(settings, depth)],
        make_solve=make_solve,
        remedy="make fewer edits, or set rome.contexts_per_length lower",
    )


def _chosen_layer(settings: RomeSettings, depth: int) -> int:
    if settings.layer is not None:
        if not 0 <= settings.layer < depth:
            raise InterventionError(f"rome.layer={settings.layer}: the model's blocks are 0 to {depth - 1}")
        return settings.layer
    return min(round(settings.layer_fraction * depth), depth - 1)
