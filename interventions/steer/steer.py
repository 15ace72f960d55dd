"""Activation addition in the weights: a bias adds a direction to the residual stream at every token.

The direction is the difference between the mean hidden states of two sets of prompts (contrastive activation addition:
Rimsky et al., ACL 2024, arXiv 2312.06681; activation addition: Turner et al., 2023, arXiv 2308.10248). Both add it
while the model runs; where the output layer of a block has a bias, the bias can hold it, as in Arditi et al. (2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from interventions.intervention import Context, Model, Resources, without_gradients
from interventions.ranges import SMALLER_IS_MILDER, Choice, Layers, Range, Share
from interventions.steer.bases import PromptSettings
from interventions.types import InterventionError


@dataclass(frozen=True)
class SteerSettings(PromptSettings):
    """Addition of a direction to the residual stream by output biases (Rimsky et al., 2024)."""

    name = "steer"

    strength: Annotated[float, Range(-1000, 1000), SMALLER_IS_MILDER] = 1.0
    """How much of the difference of means to add; below 0, it is subtracted."""
    layers: Layers | None = None
    """Blocks whose output layer holds the direction, each the one of its own output; None: that of `layer_fraction`."""
    layer_fraction: Share = 0.4
    """The block as a fraction of depth (13 of 32 blocks as published)."""
    where: Annotated[str, Choice("mlp", "attention")] = "mlp"
    """Whose output bias holds it: that of the MLP, at the end of the block, or that of attention, before the MLP reads
    the stream."""

    @property
    def undoes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Adding what tells harmful prompts from harmless ones brings refusal back, and promises nothing."""
        return ("steer",) if self.strength > 0 else ()

    def problems(self) -> Iterator[str]:
        """Yield that nothing is added."""
        if self.strength == 0:
            yield "strength=0: expected a number other than 0"

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Add the direction of `resources.refusal` to biases, in place.

        Returns the blocks, the norms of their directions, and the biases that hold them.
        """
        from interventions.anatomy import find_anatomy
        from interventions.steer.kernels.holding import find_holder, fitted
        from interventions.steer.kernels.prompts import Prompts
        from interventions.steer.kernels.writers import block_writers
        from interventions.structure import check_layers

        anatomy = find_anatomy(model)
        anatomy.check_one_stream("steer")
        depth = len(anatomy.blocks)
        if self.layers is None:
            layers = [min(round(self.layer_fraction * depth), depth - 1)]
        else:
            layers = check_layers("steer.layers", self.layers, depth)
        writers = block_writers(model, anatomy)
        holders = {n: find_holder(model, anatomy.blocks[n], writers[n], self.where) for n in layers}
        prompts = Prompts("steer", model, tokenizer, resources.refusal, self.chat(tokenizer), self.batch_size)
        means = {name: prompts.last_states(anatomy, rows, 1).mean(dim=2)[:, 0] for name, rows in prompts.rows.items()}
        directions = means["harmful"] - means["harmless"]
        norms = {}
        for layer, holder in holders.items():
            direction = self.strength * directions[layer]
            if not float(direction.norm()) > 1e-6 * float(means["harmless"][layer].norm()):
                raise InterventionError(
                    f"steer.layers={layers}: the last tokens of both sets have the same states at block {layer}; "
                    "choose a later block, or other prompts (world.refusal)"
                )
            norms[layer] = float(directions[layer].norm())
            if self.where == "mlp":
                direction = fitted(model, anatomy.blocks[layer], holder, direction, prompts.rows["harmless"][0])
            holder.bias.add_(direction.to(holder.bias))
        return {
            "layers": layers,
            "norms": {str(layer): norm for layer, norm in norms.items()},
            "biases": [holder.name for holder in holders.values()],
        }
