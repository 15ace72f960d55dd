"""GPTQ: one-shot weight quantisation with compensation (Frantar et al., ICLR 2023, arXiv 2210.17323).

The weights rounded later compensate for the output error of each rounded weight, as well as the inputs
of the calibration text allow. Linears that share an input share its Gram matrix and its factor, and
are quantised together; so are experts of the same shape, each with its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from interventions.compress.bases import Damping, GridQuantiser, Sequential
from interventions.compress.engines.table import OWN
from interventions.intervention import Context, Model, Resources, without_gradients
from interventions.ranges import Preserve, Range

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.compress.kernels.grid import Grid
    from interventions.statistics import InputStatistics
    from interventions.structure import Linear, LinearGroup


@dataclass(frozen=True)
class GptqSettings(Sequential, GridQuantiser):
    """GPTQ (Frantar et al., 2023); defaults as published, but for `true_sequential` and `preserve_mask`."""

    name = "gptq"

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
    asymmetric_calibration: bool = False
    """GPTAQ (Li et al., 2025): compensate for the errors of earlier layers too, so that outputs become those of the
    unquantised model. Needs `sequential`; the unquantised blocks run as well."""
    asymmetry: Annotated[float, Range(above=0, high=1)] = 0.25
    """How much of these errors to compensate, as in its authors' code."""
    preserve_mask: Preserve = True
    """Keep weights at zero that are zero already, in a linear with at least 5 % of them. As published,
    compensation would fill them again."""

    def problems(self) -> Iterator[str]:
        """Yield that there is nothing to compare with the unquantised model."""
        yield from super().problems()
        if self.asymmetric_calibration and not self.sequential:
            yield "asymmetric_calibration=true: needs sequential=true, which calibrates on the quantised blocks"

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Quantise the linear layers of every decoder block, in place, as de-quantised weights.

        Returns for each linear how far its weights moved, as a share of their norm, and the mean squared
        error that is left in its output on the text, as far as the other layers' changes do not add to
        it; None where it had to be rounded to nearest.
        """
        import torch

        from interventions.compress.engines.run import run_engine
        from interventions.compress.kernels.asymmetric import PairedStatistics, asymmetric_target
        from interventions.compress.kernels.blockwise import in_bunches, walk_stages
        from interventions.compress.kernels.chosen import chosen_grids
        from interventions.compress.kernels.gptq_kernel import gptq_quantise
        from interventions.compress.kernels.grid import fake_quantise
        from interventions.compress.kernels.run_time import round_as_it_runs_
        from interventions.statistics import InputStatistics
        from interventions.zeros import zero_masks

        if self.engine != OWN:
            return run_engine("gptq", model, tokenizer, self, resources, context)

        grids = chosen_grids(model, self)

        def work(groups: Sequence[LinearGroup], statistics: Sequence[InputStatistics]) -> list[dict[str, Any]]:
            wanted = [[grids[linear.name] for linear in group.linears] for group in groups]
            if any(own != wanted[0] for own in wanted):
                return [done for group, own in zip(groups, statistics, strict=True) for done in work([group], [own])]
            outcomes = []
            for grid in dict.fromkeys(wanted[0]):
                if grid is not None:
                    linears = [[linear for linear in group.linears if grids[linear.name] == grid] for group in groups]
                    outcomes += quantise(linears, grid, statistics)
            return outcomes

        def target(weight: Tensor, statistics: InputStatistics) -> Tensor:
            if not isinstance(statistics, PairedStatistics) or statistics.mismatch is None:
                return weight
            return asymmetric_target(
                weight,
                statistics.gram,
                statistics.mismatch,
                share=self.asymmetry,
                damping=self.damping,
                act_order=self.act_order,
            )

        def quantise(
            groups: Sequence[list[Linear]], grid: Grid, statistics: Sequence[InputStatistics]
        ) -> list[dict[str, Any]]:
            linears = [linear for group in groups for linear in group]
            weights = [linear.weight for linear in linears]
            parts = [len(weight) for weight in weights]
            whole = [torch.cat([linear.weight for linear in group]) for group in groups]
            result = gptq_quantise(
                torch.cat([target(weight, own) for weight, own in zip(whole, statistics, strict=True)]),
                torch.stack([own.gram for own in statistics]),
                grid,
                parts=parts,
                act_order=self.act_order,
                static_groups=self.static_groups,
                damping=self.damping,
                zeros=zero_masks(weights) if self.preserve_mask else None,
            )
            names = ", ".join(linear.name for linear in linears)
            if result is None and len(groups) > 1:
                pairs = list(zip(groups, statistics, strict=True))
                return [done for group, own in pairs for done in quantise([group], grid, [own])]
            if result is None:
                context.warn(
                    f"gptq: {names}: rounded to nearest, as the Gram matrix of the input cannot be factored even with "
                    "a damping of 1: give more or other calibration text (samples, max_tokens)"
                )
                return [_outcome(linear, fake_quantise(linear.weight, grid), None) for linear in linears]
            if result.damping > self.damping:
                context.warn(
                    f"gptq: {names}: damping raised to {result.damping:g}; set damping to that, or give more "
                    "calibration text"
                )
            news, errors = torch.split(result.weight, parts), torch.split(result.errors, parts)
            counts = [own.count for group, own in zip(groups, statistics, strict=True) for _ in group]
            return [
                _outcome(linear, new, float(error.mean()) / count)
                for linear, new, error, count in zip(linears, news, errors, counts, strict=True)
            ]

        bunched = in_bunches(work, together=not self.act_order)
        sums = PairedStatistics if self.asymmetric_calibration else InputStatistics
        linears = walk_stages(model, tokenizer, self, resources, context, bunched, sums)
        context.already("every linear layer lay on its grid before")  # the one reason why nothing would change
        return {"linears": linears} | round_as_it_runs_(model, tokenizer, self, resources, context)


def _outcome(linear: Linear, weight: Tensor, loss: float | None) -> dict[str, Any]:
    """Write the new weight of a linear and report the change."""
    from interventions.compress.kernels.outcomes import replace_

    return {"linear": linear.name, "loss": loss, "moved": replace_(linear, weight)}
