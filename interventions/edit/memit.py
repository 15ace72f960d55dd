"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023, arXiv 2210.07229)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from interventions.anatomy import Linear
from interventions.edit.closed_form import factorise, memit_update
from interventions.edit.rewriting import Solve, chosen_layers, rewrite
from interventions.edit.settings import MemitSettings
from interventions.step import Context
from interventions.types import Resources


def memit(
    model: nn.Module, tokenizer: Any, settings: MemitSettings, resources: Resources, context: Context
) -> dict[str, Any]:
    """Make `resources.edits` in place, weighing them against the keys of `resources.calibration`."""

    def choose_layers(depth: int) -> list[int]:
        return chosen_layers("memit", settings.layers, settings.layer_fractions, depth)

    def make_solve(output: Linear, second_moment: Tensor) -> Solve:
        stored = factorise(second_moment)
        if stored.ridge:
            context.warn(f"{output.parameter_name}: singular second moment, solved with a ridge of {stored.ridge}")
        return partial(memit_update, stored=stored, weight=settings.covariance_weight)

    return rewrite(
        model,
        tokenizer,
        settings,
        resources,
        context,
        method="memit",
        choose_layers=choose_layers,
        make_solve=make_solve,
        remedy="lower memit.covariance_weight",
    )
