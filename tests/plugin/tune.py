"""A category, a method and a metric from outside, complete. A conftest that imports this module adds all three."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from evaluators import Measurement, registry
from interventions import Category, Intervention, register, register_category
from interventions.ranges import Range

SILENT = registry.Metric("silent_inputs", "share", low=0, high=1, sampled=False, targeted_by=("tune",), advice="thin!")
register_category(Category("tune", "thins out", promises=("silent_inputs",), promised="that inputs stay silent"))


@dataclass(frozen=True)
class Thin(Intervention):
    """Every n-th input of each linear layer, switched off."""

    name = "thin"
    category = "tune"

    every: Annotated[int, Range(2)] = 4

    def run(self, model: Any, tokenizer: Any, resources: Any, context: Any) -> dict[str, Any]:
        """Set the columns to zero."""
        for linear in linears(model):
            weight = linear.weight.clone()
            weight[:, :: self.every] = 0
            linear.set_weight_(weight)
        return {}

    def promises(self) -> Mapping[str, float]:
        """Return the share of zeros."""
        return {"sparsity": 1 / self.every}


def linears(model: Any) -> list[Any]:
    from interventions.anatomy import find_anatomy

    return [linear for block in find_anatomy(model).blocks for linear in block.linears]


def silent(model: Any, tokenizer: Any, settings: Any, asked: Any) -> list[Measurement]:
    """Return the share of inputs that are switched off."""
    shares = [float((linear.weight == 0).all(0).double().mean()) for linear in linears(model)]
    share = sum(shares) / len(shares)
    return [Measurement("silent_inputs", share, 0.0, 1, True, (share,))]


register(Thin)
registry.register(
    registry.Evaluator("silent", "inputs", "evaluators.settings:NoSettings", f"{__name__}:silent", (SILENT,))
)
