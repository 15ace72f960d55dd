"""HQQ: half-quadratic quantisation (Badri and Shaji, 2023, mobiusml.github.io/hqq_blog).

Each group of weights gets the grid that makes an lp norm of its rounding errors small, p < 1: a norm that does not
mind a few large errors. The solver reads the weights alone, no text.

As published, zero points are any numbers, so that 0 is no level of the grid: pruned weights do not stay zero, and
neither `average_bits` nor packed formats, whose zero points are levels, see a grid. So they are whole numbers by
default. Unlike in the authors' code, scales are fitted as well, and each group keeps its best turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from interventions.compress.bases import GroupSize, Quantiser
from interventions.intervention import Context, Model, Resources, without_gradients
from interventions.ranges import Count, Positive, Range

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**20
"""Weights that are solved at once."""


@dataclass(frozen=True)
class HqqSettings(Quantiser):
    """HQQ (Badri and Shaji, 2023); defaults as published, but for `whole_zeros`."""

    name = "hqq"

    group_size: GroupSize = 64
    """Weights of a row that share a scale and zero point, the last ones of a row maybe fewer; -1: the whole row."""
    whole_zeros: bool = True
    """Round zero points, so that 0 is a level. `false`, as published: any numbers; errors are smaller, but
    `average_bits` and packed formats see no grid."""
    lp_norm: Annotated[float, Range(above=0, below=1)] = 0.7
    beta: Positive = 10.0
    """Weight of the quadratic term in the first turn."""
    kappa: Annotated[float, Range(1)] = 1.01
    """Factor of `beta` from turn to turn."""
    iterations: Count = 20
    """Turns at most."""

    def promises(self) -> Mapping[str, float]:
        """Return the bits of a weight, where the grid can be seen."""
        return super().promises() if self.whole_zeros else {}

    def keeps(self, metric: str) -> bool:
        """Zero is rounded to zero if it is a level."""
        return self.whole_zeros and super().keeps(metric)

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Quantise the linear layers of every decoder block, in place, as de-quantised weights.

        Returns for each linear how far its weights moved, as a share of their norm.
        """
        from interventions.compress.kernels.blockwise import each_linear
        from interventions.compress.kernels.outcomes import replace_

        linears = []
        for linear in each_linear(model, context, "hqq"):
            linears.append({"linear": linear.name, "moved": replace_(linear, self.rounded(linear.weight))})
        if not self.whole_zeros:
            context.warn(
                "hqq: the zero points are no whole numbers: average_bits and packed formats see weights in full "
                "precision; set hqq.whole_zeros=true for a grid that they know"
            )
        context.already("every linear layer lay on its grid before")
        return {"linears": linears}

    def rounded(self, W: Tensor) -> Tensor:
        """Return W (rows, cols) on its grids, float32."""
        import torch

        from interventions.compress.kernels.grid import join_groups, split_groups
        from interventions.compress.kernels.half_quadratic import solve

        groups = split_groups(W.float(), self.group_size)
        rows = max(1, CHUNK // max(1, W.shape[1]))
        solved = [
            solve(
                part,
                self.bits,
                p=self.lp_norm,
                beta=self.beta,
                kappa=self.kappa,
                iterations=self.iterations,
                whole_zeros=self.whole_zeros,
            ).weights
            for part in torch.split(groups, rows)
        ]
        return join_groups(torch.cat(solved), W.shape[1])
