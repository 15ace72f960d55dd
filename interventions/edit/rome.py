"""ROME: rank-one model editing (Meng et al., NeurIPS 2022, arXiv 2202.05262).

Each edit adds one rank-one update to one projection: the smallest one that maps the subject's key exactly to the
target value. Target values and keys are computed as for MEMIT: z is the output of the block (of the MLP in the
authors' first code), and keys are the mean of the bare prompt's key and the mean key of the other contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from interventions.edit.bases import Rewriter
from interventions.intervention import Context, Model, Resources
from interventions.ranges import Count, Items, Layer, Range, Share
from interventions.types import InterventionError


@dataclass(frozen=True)
class RomeSettings(Rewriter):
    """ROME (Meng et al., 2022); defaults as published, the layer as a fraction of depth."""

    name = "rome"

    batch_size: Count | None = 1
    """Edits whose target values are optimised together; the rank-one updates are always sequential."""
    layer: Layer | None = None
    """Decoder block whose MLP output projection is edited; None: that of `layer_fraction`."""
    layer_fraction: Share = 0.16
    """The edited block as a fraction of depth (5 of 32 blocks as published)."""
    context_lengths: Annotated[list[Count], Items()] = field(default_factory=lambda: [5, 10])
    """Lengths, in tokens, of the contexts that the model generates before the prompts."""
    contexts_per_length: Annotated[int, Range(0)] = 10

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Make `resources.edits` in place, one after another, in one layer."""
        from interventions.edit.kernels.closed_form import rome_update
        from interventions.edit.kernels.rewriting import rewrite, with_factor

        make_solve = with_factor(rome_update, context)
        remedy = "make fewer edits, or lower rome.contexts_per_length"
        return rewrite(model, tokenizer, self, resources, context, make_solve, remedy=remedy)

    def choose_layers(self, depth: int) -> list[int]:
        """Return the one block that is edited."""
        if self.layer is None:
            return [min(round(self.layer_fraction * depth), depth - 1)]
        if not 0 <= self.layer < depth:
            raise InterventionError(f"rome.layer={self.layer}: the model's blocks are 0 to {depth - 1}")
        return [self.layer]
