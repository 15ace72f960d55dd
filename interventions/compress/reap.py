"""REAP: router-weighted expert activation pruning (Lasby et al., 2025, arXiv 2510.13999).

An expert counts as much as what it adds to the output: the mean, over the calibration tokens that are routed to it, of
its router weight times the norm of its output. The experts that count least are removed from every layer, with their
rows of the router. The other experts and rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from interventions.intervention import ZEROS, Context, Intervention, Model, Resources, without_gradients
from interventions.ranges import SMALLER_IS_MILDER, Count, Range

if TYPE_CHECKING:
    from interventions.compress.kernels.expert_saliency import Saliency


@dataclass(frozen=True)
class ReapSettings(Intervention):
    """REAP (Lasby et al., 2025): remove whole experts of a mixture of experts."""

    name = "reap"
    category = "compress"
    resizes = True

    share: Annotated[float, Range(above=0, below=1), SMALLER_IS_MILDER] = 0.5
    """Share of the routed experts of every layer that is removed; the number is rounded down."""
    samples: Count = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: Count = 2048
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""

    def promises(self) -> Mapping[str, float]:
        """Promise nothing: the share of experts is not a metric."""
        return {}

    def keeps(self, metric: str) -> bool:
        """The experts that stay keep their zeros and their grids."""
        return metric in (*ZEROS, "average_bits")

    @without_gradients
    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Remove experts from every layer that has some, in place; the model's configuration says how many are left.

        Returns for each layer the experts that are kept, by their old numbers, and the saliency of all.
        """
        from interventions.compress.kernels.expert_saliency import chosen_experts, expert_saliency
        from interventions.expert_count import check_buildable, one_per_expert, set_count_

        found = expert_saliency(model, tokenizer, self, resources, context)
        kept = {saliency.name: chosen_experts(saliency, self.share) for saliency in found}
        for saliency in found:
            for tensor in one_per_expert(saliency.block, saliency.layer).values():
                tensor.data = tensor[kept[saliency.name]].clone()
        first = found[0]
        set_count_(model, first.layer.count, len(kept[first.name]))
        check_buildable(model, "reap")
        return {"layers": [_outcome(saliency, kept[saliency.name]) for saliency in found]}


def _outcome(saliency: Saliency, kept: list[int]) -> dict[str, Any]:
    return {
        "experts": saliency.name,
        "kept": kept,
        "saliency": saliency.means.tolist(),
        "tokens": saliency.tokens.tolist(),
    }
