"""Interventions: methods that change a causal language model's weights in place.

    from interventions import apply
    report = apply(model, tokenizer, "memit", edits=edits)

Knows neither pytest nor the evaluators. Importing it imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interventions.registry import Method, UnknownMethod, find_method, methods
from interventions.types import Category, Edit, InterventionError, Resources, StepReport

if TYPE_CHECKING:
    from interventions.step import apply

__all__ = [
    "Category",
    "Edit",
    "InterventionError",
    "Method",
    "Resources",
    "StepReport",
    "UnknownMethod",
    "apply",
    "find_method",
    "methods",
]


def __getattr__(name: str) -> Any:
    if name == "apply":
        from interventions.step import apply

        return apply
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
