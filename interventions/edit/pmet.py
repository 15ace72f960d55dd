"""PMET: precise model editing in a transformer (Li et al., AAAI 2024, arXiv 2308.08742).

MEMIT's target value is the output of a block, which attention and MLP make together, but only the MLP is changed to
produce it. PMET searches for the best outputs of both at once, and stores only that of the MLP. Each layer takes
1/sqrt(n) of the change that remains when n layers are left to edit, where MEMIT's takes 1/n.

Details follow the published code: while all target tokens of an edit are the most likely ones, its likelihood has a
tenth of the weight, and it stops when its KL term is small. What remains is read at the output of the last edited MLP
alone, so that an earlier layer counts as far as it changes the inputs of that MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from interventions.edit.bases import LayersRewriter, ValueSettings
from interventions.intervention import Context, Model, Resources
from interventions.ranges import LARGER_IS_MILDER, SMALLER_IS_MILDER, Fractions, Positive, Range, Weight


@dataclass(frozen=True)
class PmetValueSettings(ValueSettings):
    """Optimisation of PMET's target values; defaults as published for GPT-J."""

    steps: Annotated[int, Range(2)] = 30
    """Forward passes; the last one only computes the loss."""
    lr: Positive = 0.2
    weight_decay: Weight = 0.5
    clamp_norm_factor: Annotated[Positive, SMALLER_IS_MILDER] = 0.75
    """Maximum norm of the change of each output, relative to the norm of the output."""
    kl_factor: Weight = 1.0
    sure_weight: Weight = 0.1
    """Weight of an edit's likelihood while all its target tokens are the most likely ones."""
    sure_divergence: Weight = 0.01
    """Such an edit stops when its KL term is not above this."""


@dataclass(frozen=True)
class PmetSettings(LayersRewriter):
    """PMET (Li et al., 2024); defaults as published for GPT-J, layers as fractions of depth."""

    name = "pmet"

    layer_fractions: Fractions = field(default_factory=lambda: [0.11, 0.29])
    """First and last edited block as fractions of depth (3 to 8 of 28 blocks as published)."""
    covariance_weight: Annotated[Positive, LARGER_IS_MILDER] = 6000.0
    """Weight of preserving other keys, relative to the edits."""
    z: PmetValueSettings = field(default_factory=PmetValueSettings)

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.edits` in place, preserving the keys of `resources.calibration`."""
        import math

        from interventions.edit.kernels.closed_form import memit_update
        from interventions.edit.kernels.rewriting import rewrite, with_factor
        from interventions.edit.kernels.target_values import Components

        make_solve = with_factor(memit_update, context, weight=self.covariance_weight)
        components = Components(self.z.sure_weight, self.z.sure_divergence)
        remedy = "lower pmet.covariance_weight"
        return rewrite(
            model,
            tokenizer,
            self,
            resources,
            context,
            make_solve,
            remedy=remedy,
            components=components,
            spread=math.sqrt,
        )
