"""Rounding to nearest: every weight to the nearest level of its grid; the baseline of the other quantisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interventions.compress.bases import GridQuantiser
from interventions.intervention import Context, Model, Resources, without_gradients


@dataclass(frozen=True)
class RtnSettings(GridQuantiser):
    """Rounding each weight to the nearest level of its grid; reads no text."""

    name = "rtn"

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Quantise the linear layers of every decoder block, in place, as de-quantised weights.

        Zero is a level of every grid, so that pruned weights stay at zero. Returns for each linear how
        far its weights moved, as a share of their norm.
        """
        from interventions.compress.kernels.blockwise import each_linear
        from interventions.compress.kernels.chosen import chosen_grids
        from interventions.compress.kernels.grid import fake_quantise
        from interventions.compress.kernels.outcomes import replace_
        from interventions.compress.kernels.run_time import round_as_it_runs_

        grids = chosen_grids(model, self)
        linears = []
        for linear in each_linear(model, context, "rtn"):
            grid = grids[linear.name]
            if grid is not None:
                moved = replace_(linear, fake_quantise(linear.weight, grid))
                linears.append({"linear": linear.name, "moved": moved})
        context.already("every linear layer lay on its grid before")  # the one reason why nothing would change
        return {"linears": linears} | round_as_it_runs_(model, tokenizer, self, resources, context)
