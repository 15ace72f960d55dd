"""Interventions: methods that change a causal language model's weights in place.

    from interventions import apply
    report = apply(model, tokenizer, "memit", edits=edits)

Knows neither pytest nor the evaluators. Importing it imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interventions.categories import Category, register_category
from interventions.intervention import Intervention
from interventions.registry import Method, UnknownMethod, find_method, methods, register
from interventions.types import Edit, Example, InterventionError, Preference, Resources, StepReport

if TYPE_CHECKING:
    from interventions.step import apply

__all__ = [
    "Category",
    "Edit",
    "Example",
    "Intervention",
    "InterventionError",
    "Method",
    "Preference",
    "Resources",
    "StepReport",
    "UnknownMethod",
    "apply",
    "find_method",
    "methods",
    "register",
    "register_category",
]


def __getattr__(name: str) -> Any:
    if name == "apply":
        from interventions.step import apply

        return apply
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
