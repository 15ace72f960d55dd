"""AlphaEdit: editing in the null space of what is stored (Fang et al., ICLR 2025, arXiv 2410.02355).

As MEMIT, but instead of weighing edits against the keys of other text, an update is confined to the
directions in which those keys hardly reach. Keys of earlier batches keep what they were made to yield.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import Linear
from interventions.edit.closed_form import alphaedit_update, null_space
from interventions.edit.rewriting import Solve, chosen_layers, rewrite
from interventions.edit.settings import AlphaEditSettings
from interventions.step import Context
from interventions.types import InterventionError, Resources


def alphaedit(
    model: nn.Module, tokenizer: Any, settings: AlphaEditSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Make `resources.edits` in place; `resources.calibration` gives the keys whose outputs stay.

    The details have, besides MEMIT's, the share of each layer's directions that were free.
    """
    free: dict[str, float] = {}

    def choose_layers(depth: int) -> list[int]:
        return chosen_layers("alphaedit", settings.layers, settings.layer_fractions, depth)

    def make_solve(output: Linear, second_moment: Tensor) -> Solve:
        try:
            basis = null_space(second_moment, settings.nullspace_threshold, relative=settings.nullspace_relative)
        except InterventionError as error:
            raise InterventionError(f"alphaedit: {output.parameter_name}: {error}") from None
        free[output.parameter_name] = basis.shape[1] / basis.shape[0]
        if basis.shape[1] == basis.shape[0]:
            context.warn(
                f"{output.parameter_name}: every direction is below nullspace_threshold="
                f"{settings.nullspace_threshold}, so nothing is kept; lower it"
            )
        return _NullSpaceSolve(basis, settings.ridge)

    details = rewrite(
        model,
        tokenizer,
        settings,
        resources,
        context,
        method="alphaedit",
        choose_layers=choose_layers,
        make_solve=make_solve,
        remedy="lower alphaedit.ridge or raise alphaedit.nullspace_threshold",
    )
    return {**details, "free_directions": free}


class _NullSpaceSolve:
    """The solve of one layer, which remembers the keys of its batches.

    A layer's keys depend on the weights below it alone, and those are changed before: the keys
    that a batch was solved with are still its keys when the batch is done.
    """

    def __init__(self, basis: Tensor, ridge: float) -> None:
        self._basis = basis
        self._ridge = ridge
        self._earlier = basis.new_zeros(basis.shape[0], 0)

    def __call__(self, keys: Tensor, residuals: Tensor) -> Tensor:
        update = alphaedit_update(keys, residuals, self._earlier, self._basis, self._ridge)
        self._earlier = torch.cat([self._earlier, keys.double()], dim=1)
        return update
