"""Clipping: what an intervention looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from interventions import Intervention, Resources
from interventions.ranges import Range

if TYPE_CHECKING:
    from torch import nn

    from interventions.context import Context


@dataclass(frozen=True)
class Clip(Intervention):
    """Outlying weights of each linear layer, cut to a number of standard deviations."""

    name = "clip"
    category = "compress"

    deviations: Annotated[float, Range(above=0)] = 3.0
    """Weights further from zero than so many standard deviations of their layer are cut."""

    def run(self, model: nn.Module, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Cut the outlying weights of every decoder block, in place.

        The anatomy finds the linear layers of any supported architecture. The report has what is returned.
        """
        import torch

        from interventions.anatomy import find_anatomy

        cut = total = 0
        with torch.no_grad():
            for block in find_anatomy(model).blocks:
                for linear in block.linears:
                    weight = linear.weight
                    limit = self.deviations * weight.std()
                    cut += int((weight.abs() > limit).sum())
                    total += weight.numel()
                    linear.set_weight_(weight.clamp(-limit, limit))
        context.progress(f"cut {cut} of {total} weights")
        return {"cut": cut, "total": total}

    def keeps(self, metric: str) -> bool:
        """Clipping leaves zeros at zero."""
        return metric in ("sparsity", "sparsity_2_4")
