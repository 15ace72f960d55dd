"""A category and a method from outside: the whole of it. A conftest that imports this module adds both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from interventions import Category, Intervention, register, register_category
from interventions.ranges import Range

register_category(Category("tune", "thins out rows", promises=("recall",), promised="that facts are still known"))


@dataclass(frozen=True)
class Thin(Intervention):
    """Every n-th input of each linear layer, switched off."""

    name = "thin"
    category = "tune"

    every: Annotated[int, Range(2)] = 4

    def run(self, model: Any, tokenizer: Any, resources: Any, context: Any) -> dict[str, Any]:
        """Set the columns to zero."""
        from interventions.anatomy import find_anatomy

        linears = [linear for block in find_anatomy(model).blocks for linear in block.linears]
        for linear in linears:
            weight = linear.weight.clone()
            weight[:, :: self.every] = 0
            linear.set_weight_(weight)
        return {"linears": len(linears)}

    def promises(self) -> Mapping[str, float]:
        """Return the share of zeros."""
        return {"sparsity": 1 / self.every}


register(Thin)
