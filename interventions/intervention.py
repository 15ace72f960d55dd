"""The base of every method: a frozen dataclass that is its name, its settings and what it does. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from interventions.context import Context
from interventions.ranges import Checked, SettingError
from interventions.types import Resources

__all__ = [
    "ZEROS",
    "Context",
    "Intervention",
    "Model",
    "Resources",
    "checkpoints",
    "identity",
    "misplaced",
    "promised",
    "read_compositions",
    "unready",
    "without_gradients",
]

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
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of `Resources`, and keys of a world, that the method cannot do without: checked before any work."""
    function: ClassVar[str | None] = None
    """`module:function` to call instead of `run`, with the settings after the tokenizer; for a setting of that name."""
    resizes: ClassVar[bool] = False
    """Whether the method may change how many experts the model has, and so the shapes of its weights."""
    runs_commands: ClassVar[bool] = False
    """Whether the settings contain commands of the user, which only `--lmcompose-allow-commands` permits."""

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Change the model in place and return plain data for the report; `interventions.apply` guards the call."""
        raise NotImplementedError

    def may_change(self, model: Model) -> Collection[str] | None:
        """Return the names of the parameters that the step may change; None: any.

        Only these are copied before the step, to restore them if it fails. Raises InterventionError for settings that
        do not fit the model.
        """
        return None

    def contradictions(self, given: Collection[str]) -> Iterator[str]:
        """Yield what is wrong with settings that were given by name, even if with the value of the default."""
        yield from ()

    def promises(self) -> Mapping[str, float]:
        """Return what these settings promise, by metric; thresholds hold it with `promised: SLACK`."""
        return {}

    def promises_on(self, model: Model) -> Mapping[str, float]:
        """Return what these settings promise for a model; other than `promises`, if that depends on its layers."""
        return self.promises()

    def aims_at(self, metric: str) -> bool:
        """Say whether the promise of the category includes `metric` with these settings."""
        return True

    def keeps(self, metric: str) -> bool:
        """Say whether a later step with these settings leaves an earlier step's promise of `metric` intact."""
        return metric in ZEROS and bool(getattr(self, "preserve_mask", False))

    def identity(self, folder: Path) -> Any:
        """Return what stands for these settings in cache addresses; it differs whenever the result may.

        It has the content of the files and the versions of the programs that the settings name. Relative paths start at
        `folder`.
        """
        return self

    def unready(self, folder: Path) -> Iterator[str]:
        """Yield why a step with these settings cannot start here, such as a missing file, each as `key=value: ...`.

        Called before any work. Relative paths start at `folder`.
        """
        yield from ()

    def checkpoints(self) -> tuple[str, ...]:
        """Return the folders and hub ids of models that the settings name, which must have the model's architecture."""
        return ()

    def compositions(self) -> tuple[str, ...]:
        """Return the compositions that the settings name: the run builds them first, and `Context.states` has them."""
        return ()

    def misplaced(self, before: str, others: Mapping[str, str]) -> Iterator[str]:
        """Yield why a step with these settings cannot follow the composition `before`, each as `key=value: ...`.

        `others` has the id of each of its `compositions`, by the text that names it. Called before any work.
        """
        yield from ()


def check_given(settings: Any, given: Collection[str]) -> None:
    """Raise SettingError if settings that were given by name contradict others."""
    if isinstance(settings, Intervention):
        for problem in settings.contradictions(given):
            raise SettingError(problem)


def promised(settings: Any, model: Model | None = None) -> Mapping[str, float]:
    """Return the promised values of metrics, for a model if it is given; a plain dataclass promises nothing."""
    found: Mapping[str, float] = {}
    if model is not None and hasattr(settings, "promises_on"):
        found = settings.promises_on(model)
    elif hasattr(settings, "promises"):
        found = settings.promises()
    return found


def identity(settings: Any, folder: Path) -> Any:
    """Return what stands for settings in cache addresses; those of a plain dataclass stand for themselves."""
    return settings.identity(folder) if isinstance(settings, Intervention) else settings


def unready(settings: Any, folder: Path) -> Iterator[str]:
    """Yield why a step with these settings cannot start; a plain dataclass has no reason."""
    if isinstance(settings, Intervention):
        yield from settings.unready(folder)


def checkpoints(settings: Any) -> tuple[str, ...]:
    """Return the folders and hub ids of models that settings name; those of a plain dataclass name none."""
    return settings.checkpoints() if isinstance(settings, Intervention) else ()


def read_compositions(settings: Any) -> tuple[str, ...]:
    """Return the compositions that settings name; those of a plain dataclass name none."""
    return settings.compositions() if isinstance(settings, Intervention) else ()


def misplaced(settings: Any, before: str, others: Mapping[str, str]) -> Iterator[str]:
    """Yield why a step with these settings cannot follow the composition `before`; a plain dataclass can."""
    if isinstance(settings, Intervention):
        yield from settings.misplaced(before, others)


def without_gradients(function: Function) -> Function:
    """Run a function under `torch.no_grad`, which is imported with the first call."""

    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        import torch

        with torch.no_grad():
            return function(*arguments, **keywords)

    return run  # type: ignore[return-value]
