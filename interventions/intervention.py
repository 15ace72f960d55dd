"""The base of every method: a frozen dataclass that is its name, its settings and what it does. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from interventions.context import Context
from interventions.ranges import Checked
from interventions.types import Resources

__all__ = ["ZEROS", "Context", "Intervention", "Model", "Resources", "promised", "without_gradients"]

if TYPE_CHECKING:
    from torch.nn import Module as Model
else:
    Model = Any  # torch is imported when a method runs

Function = TypeVar("Function", bound=Callable[..., Any])
ZEROS = ("sparsity", "sparsity_2_4")
"""Metrics of pruned weights."""


class Intervention(Checked):
    """One method; its fields are the settings.

    A subclass with a `name` of its own is a method; one without is a base that methods share. Modules that define
    methods import torch and kernels inside `run`, so that looking a name up imports neither.
    """

    name: ClassVar[str]
    category: ClassVar[str]
    undoes: ClassVar[tuple[str, ...]] = ()
    """Categories whose promises this attacks; such a method promises nothing itself."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Change the model in place and return plain data for the report; `interventions.apply` guards the call."""
        raise NotImplementedError

    def may_change(self, model: Model) -> Collection[str] | None:
        """Return the names of the parameters that the step may change; None: any.

        Only these are copied before the step, to restore them if it fails. Raises InterventionError for settings that
        do not fit the model.
        """
        return None

    def promises(self) -> Mapping[str, float]:
        """Return what these settings promise, by metric; thresholds hold it with `promised: SLACK`."""
        return {}

    def keeps(self, metric: str) -> bool:
        """Say whether a later step with these settings leaves an earlier step's promise of `metric` intact."""
        return metric in ZEROS and bool(getattr(self, "preserve_mask", False))


def promised(settings: Any) -> Mapping[str, float]:
    """Return the promised values of metrics; the settings of a plain dataclass promise nothing."""
    found: Mapping[str, float] = settings.promises() if hasattr(settings, "promises") else {}
    return found


def without_gradients(function: Function) -> Function:
    """Run a function under `torch.no_grad`, which is imported with the first call."""

    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        import torch

        with torch.no_grad():
            return function(*arguments, **keywords)

    return run  # type: ignore[return-value]
