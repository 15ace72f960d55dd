"""The table of evaluators: a name, what it measures, where its settings and its function live.

Targets are resolved only when asked for, so that looking a name up imports no torch.
Other packages add theirs through the entry-point group `lmcompose.evaluators`, whose entries name an
`Evaluator`. A recipe switches it on, with its settings, by `evaluate.also.NAME={...}`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from evaluators.measurement import Measurement

if TYPE_CHECKING:
    from evaluators.editing import EditCase
    from evaluators.recall import Fact

ENTRY_POINT_GROUP = "lmcompose.evaluators"


@dataclass(frozen=True)
class Asked:
    """What a run offers to an evaluator of another package; the same for every state."""

    edits: tuple[EditCase, ...]
    """The run's edits, made in this state or not."""
    facts: tuple[Fact, ...]
    """Facts that no edit is about."""
    texts: tuple[str, ...]
    """Running text that no method has read."""
    batch_size: int
    """Sequences that are to be read at a time."""


@dataclass(frozen=True)
class Evaluator:
    """One evaluator. `settings` and `function` are `module:attribute` targets."""

    name: str
    summary: str
    """What it measures, in a few words."""
    settings: str
    function: str

    def settings_type(self) -> type:
        """Return the frozen settings dataclass (its module imports no torch)."""
        return _resolve(self.settings)  # type: ignore[no-any-return]

    def load(self) -> Callable[[Any, Any, Any, Asked], Sequence[Measurement]]:
        """Return the function `f(model, tokenizer, settings, asked) -> measurements`."""
        return _resolve(self.function)  # type: ignore[no-any-return]

    @property
    def modules(self) -> tuple[str, str]:
        """The modules of both targets: their source counts in what is kept of a measurement."""
        return self.function.partition(":")[0], self.settings.partition(":")[0]


class BuiltIn(Evaluator):
    """An evaluator of this package: a function of its own signature, a switch of the recipe."""

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(name, summary, "", "")


BUILT_IN = (
    BuiltIn("editing", "success, paraphrase, portability and locality of the edits"),
    BuiltIn("recall", "facts that the model still knows"),
    BuiltIn("perplexity", "of running text, of the edits' targets, and of the facts' answers"),
    BuiltIn("questions", "accuracy on the question tasks of the world, or any of lm-evaluation-harness"),
    BuiltIn("efficiency", "average bits, sparsity, packed size and operations by token"),
    BuiltIn("latency", "time of a forward pass; off unless asked for"),
)
"""Each has a switch of its name in the recipe's section `evaluate`."""


class UnknownEvaluator(ValueError):
    """A name that no evaluator of another package has; the message lists near names."""


@cache
def evaluators() -> dict[str, Evaluator]:
    """Return every known evaluator by name, built-in ones first."""
    table: dict[str, Evaluator] = {evaluator.name: evaluator for evaluator in BUILT_IN}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        evaluator = entry.load()
        if evaluator.name in table:
            raise ValueError(f"entry point {entry.value!r} redefines the evaluator {evaluator.name!r}")
        table[evaluator.name] = evaluator
    return table


def find_evaluator(name: str) -> Evaluator:
    """Return the evaluator of another package that is called `name`.

    Raises UnknownEvaluator, with near names and the full list, if there is none.
    """
    table = {key: found for key, found in evaluators().items() if not isinstance(found, BuiltIn)}
    if name in table:
        return table[name]
    if name in evaluators():
        raise UnknownEvaluator(f"{name!r} is built in: it is switched by evaluate.{name}=true")
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    known = f"Known: {', '.join(sorted(table))}." if table else "No installed package has one."
    raise UnknownEvaluator(f"unknown evaluator {name!r}.{hint} {known}")


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
