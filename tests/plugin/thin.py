"""A category, a method and a metric from outside: the whole of it. Importing this module adds all three."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from evaluators import Evaluator, Measurement, Metric
from evaluators.registry import register as register_evaluator
from interventions import Category, Intervention, register, register_category
from interventions.ranges import Range

register_category(Category("thinning", "thins out layers", promises=("thinned",), promised="that layers are thin"))


@dataclass(frozen=True)
class Thin(Intervention):
    """Every n-th input of each linear layer, switched off."""

    name = "thin"
    category = "thinning"

    every: Annotated[int, Range(2)] = 4

    def run(self, model: Any, tokenizer: Any, resources: Any, context: Any) -> dict[str, Any]:
        """Set the columns to zero."""
        for linear in _linears(model):
            weight = linear.weight.clone()
            weight[:, :: self.every] = 0
            linear.set_weight_(weight)
        return {}

    def promises(self) -> Mapping[str, float]:
        """Return the share of zeros."""
        return {"sparsity": 1 / self.every}


def measure(model: Any, tokenizer: Any, settings: Any, asked: Any) -> list[Measurement]:
    """Return the share of layers without a first input."""
    return [Measurement.mean("thinned", [float(not linear.weight[:, 0].any()) for linear in _linears(model)])]


def _linears(model: Any) -> list[Any]:
    from interventions.anatomy import find_anatomy

    return [linear for block in find_anatomy(model).blocks for linear in block.linears]


register(Thin)
THINNED = Metric("thinned", "share", low=0, high=1, targeted_by=("thinning",), data="weights", headline=True)
NAMES = ("evaluators.settings:NoSettings", f"{__name__}:measure")
register_evaluator(Evaluator("thinness", "layers that are thin", *NAMES, (THINNED,)))
