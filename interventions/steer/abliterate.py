"""Abliteration: remove a direction from the weights (Arditi et al., NeurIPS 2024, arXiv 2406.11717).

The direction is the difference between the mean hidden states of two sets of prompts at their last token: harmful ones,
which are refused, and harmless ones. Any other two sets give the direction of another concept. It is removed from
everything that writes into the residual stream, so that no state has it any more and the model runs without hooks.

`norm_preserving` keeps the norm of every column of a writer, and of every embedding, as "norm-preserving biprojected
abliteration" does (J. Lai, 2025); that also spares the mean state of harmless prompts: `spare_harmless=each`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from interventions.intervention import Context, Model, Resources, without_gradients
from interventions.ranges import SMALLER_IS_MILDER, Choice, Count, Items, Layer, Layers, Preserve, Range, Weight
from interventions.steer.bases import PromptSettings
from interventions.types import InterventionError

if TYPE_CHECKING:
    from torch import Tensor

    from interventions.steer.kernels.prompts import Prompts
    from interventions.steer.kernels.writers import Writer
    from interventions.structure import Anatomy

_EVERY = 5
"""One prompt in so many is left out of the mean, and the direction is chosen on it."""
_PROOF = 4
"""Prompts of each set on which the changed model is measured."""
_LEFT = 1e-3
"""Greatest component along a removed direction, relative to that before; float32 gives 1e-6, bfloat16 1e-2."""


@dataclass(frozen=True)
class AbliterateSettings(PromptSettings):
    """Removal of a direction from what writes into the residual stream (Arditi et al., 2024)."""

    name = "abliterate"

    layer: Layer | None = None
    """Block at whose output the direction is measured; None: chosen by what the directions do to the prompts. The
    reference numbers the block after it."""
    last_tokens: Count = 1
    """Tokens at the end of the prompts at which directions are measured, such as those that a chat template writes
    after the user's turn; the best one is chosen."""
    refusal_starts: Annotated[list[str], Items()] = field(default_factory=lambda: ["I", "As", "Sorry"])
    """Starts of refusals. The choice is the direction whose removal leaves the lowest probability of their first
    tokens after harmful prompts."""
    max_divergence: Weight = 0.1
    """Maximum KL divergence (nats) that removing the chosen direction may cause after harmless prompts."""
    max_depth: Annotated[float, Range(above=0, high=1)] = 0.8
    """Only directions from blocks before this fraction of depth are chosen."""
    weight: Annotated[float, Range(above=0, high=2), SMALLER_IS_MILDER] = 1.0
    """Share of the direction to remove; above 1, it is turned around."""
    layers: Layers | None = None
    """Blocks whose writers change; None: all."""
    embeddings: bool = True
    """Change the embeddings too, of tokens and of positions."""
    untie: bool = False
    """Give a head that shares the weights of the embeddings a copy of its own, as they were. Off: it changes with them,
    as in the reference."""
    norm_preserving: bool = False
    """Keep the norm of each column of a writer and of each embedding: only their directions change."""
    spare_harmless: Annotated[str, Choice("no", "once", "each")] = "no"
    """Remove only what is orthogonal to the mean state of harmless prompts: `once` to that where the direction was
    measured, `each` to that of each changed block, so that each has a direction of its own."""
    preserve_mask: Preserve = False
    """Keep pruned weights at zero in matrices with at least 5 % exact zeros; the others take over their share."""

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Remove the direction of `resources.refusal` from the weights, in place.

        Returns the chosen block and token, what the candidates do, and the greatest component along the direction of
        any block's output before and after.
        """
        from interventions.anatomy import find_anatomy
        from interventions.steer.kernels.prompts import Prompts
        from interventions.steer.kernels.proof import components
        from interventions.steer.kernels.removal import apart
        from interventions.steer.kernels.writers import block_writers, outer_writers
        from interventions.structure import check_layers
        from interventions.tying import tied_head, untie_head_

        anatomy = find_anatomy(model)
        anatomy.check_one_stream("abliterate")
        depth = len(anatomy.blocks)
        changed = list(range(depth)) if self.layers is None else check_layers("abliterate.layers", self.layers, depth)
        prompts = Prompts("abliterate", model, tokenizer, resources.refusal, self.chat(tokenizer), self.batch_size)
        writers = block_writers(model, anatomy)
        outer = outer_writers(model, anatomy) if self.embeddings else []
        found, harmless, details = self.find(prompts, anatomy, writers, context)
        direction = found / found.norm()
        if self.spare_harmless != "no":
            direction = apart(direction, harmless[details["layer"]])
        proof = [row for rows in prompts.rows.values() for row in rows[:_PROOF]]
        before = max(components(model, anatomy, proof, direction))
        tied = tied_head(model) is not None
        if tied and self.untie and outer:
            untie_head_(model)
        for number, own in [(None, outer), *((number, writers[number]) for number in changed)]:
            removed = direction
            if self.spare_harmless == "each" and number is not None:
                removed = apart(found / found.norm(), harmless[number])
            for writer in own:
                self.remove_(writer, removed)
        after = max(components(model, anatomy, proof, direction))
        whole = self.weight == 1 and self.layers is None and self.embeddings and self.spare_harmless != "each"
        precise = all(p.element_size() >= 4 for writer in outer for p in writer.parameters)
        if whole and precise and not after <= _LEFT * before:
            context.warn(
                f"abliterate: the residual stream still has the direction: {after:.2g} of the norm of a state, before "
                f"{before:.2g}. Something else writes into it, such as a norm with a bias, or normalises it"
            )
        return details | {
            "norm": float(found.norm()),
            "writers": [writer.name for own in (outer, *(writers[number] for number in changed)) for writer in own],
            "head_changed": tied and bool(outer) and not self.untie,
            "component_before": before,
            "component_after": after,
        }

    def find(
        self, prompts: Prompts, anatomy: Anatomy, writers: Sequence[Sequence[Writer]], context: Context
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return the chosen difference of means, the mean states of harmless prompts by block, and details."""
        from interventions.steer.kernels.choice import best, evaluate_candidates
        from interventions.structure import check_layers

        depth, tokens = len(anatomy.blocks), self.last_tokens
        if prompts.shortest() < tokens:
            raise InterventionError(
                f"abliterate.last_tokens={tokens}: the shortest prompt has {prompts.shortest()} tokens"
            )
        if self.layer is not None:
            blocks = check_layers("abliterate.layer", [self.layer], depth)
        else:
            blocks = [number for number in range(depth) if number + 1 < self.max_depth * depth] or [0]
        one = len(blocks) * tokens == 1
        rows, held = {}, {}
        for name, own in prompts.rows.items():
            rows[name] = [row for i, row in enumerate(own) if one or len(own) < _EVERY or i % _EVERY != _EVERY - 1]
            held[name] = own[_EVERY - 1 :: _EVERY] or own
        means = {name: prompts.last_states(anatomy, own, tokens).mean(dim=2) for name, own in rows.items()}
        directions = means["harmful"] - means["harmless"]
        norms = directions.norm(dim=-1) / means["harmless"].norm(dim=-1)
        places = [(block, token) for block in blocks for token in range(tokens) if float(norms[block, token]) > 1e-6]
        if not places:
            raise InterventionError(
                "abliterate: the last tokens of both sets have the same states at these blocks; choose a later block "
                "(abliterate.layer), or other prompts (world.refusal)"
            )
        block, token = places[0]
        details: dict[str, Any] = {"layer": block, "token": token - tokens}
        if not one:
            starts = prompts.start_ids(self.refusal_starts)
            candidates = []
            for candidate in evaluate_candidates(
                prompts, anatomy, writers, directions, places, starts, held["harmful"], held["harmless"]
            ):
                candidates.append(candidate)
                context.progress(f"abliterate: block {candidate.block}, refusal score {candidate.refusal:.3g}")
            chosen, sound = best(candidates, self.max_divergence)
            if not sound:
                context.warn(
                    f"abliterate: no direction makes the model refuse harmless prompts and spares them when it is "
                    f"removed; that of block {chosen.block} was taken. Does the model refuse, with one of "
                    f"{', '.join(self.refusal_starts)}? Set abliterate.layer for another concept"
                )
            details = {
                "layer": chosen.block,
                "token": chosen.token,
                "chosen_on": len(held["harmful"]),
                "candidates": [candidate.plain() for candidate in candidates],
            }
            block, token = chosen.block, chosen.token + tokens
        return directions[block, token], means["harmless"][:, token], details

    def remove_(self, writer: Writer, stream: Tensor) -> None:
        """Remove a direction of the stream from what a writer puts out, in place."""
        from interventions.steer.kernels.removal import without
        from interventions.zeros import zero_mask

        columns, bias = writer.columns, writer.bias
        own = writer.direction(stream.to(columns.device))
        kept = self.preserve_mask and zero_mask(columns) is not None
        columns.copy_(without(columns, own, self.weight, keep_norms=self.norm_preserving, keep_zeros=kept))
        if bias is not None:
            bias.copy_(without(bias.unsqueeze(1), own, self.weight, keep_norms=self.norm_preserving).squeeze(1))
        for norm in writer.norms[-1:]:
            shift = getattr(norm, "bias", None)
            if shift is not None:
                shift.copy_(without(shift.unsqueeze(1), stream, self.weight, keep_norms=self.norm_preserving)[:, 0])
