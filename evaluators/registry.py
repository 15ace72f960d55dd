"""The table of evaluators: a name, what it measures, the metrics that it makes, where its settings and function live.

Targets are resolved only when asked for, so that looking a name up imports no torch. Other packages add evaluators
through the entry-point group `lmcompose.evaluators`, whose entries name an `Evaluator`; a notebook or a `conftest.py`
calls `register`. A recipe switches built-in evaluators by `evaluate.NAME`, and runs others, with their settings, by
`evaluate.also.NAME={...}`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from evaluators.asked import Asked as Asked
from evaluators.measurement import Measurement
from interventions.names import near_names

ENTRY_POINT_GROUP = "lmcompose.evaluators"


@dataclass(frozen=True)
class Metric:
    """What is known about a metric before it is measured; `evaluators.metrics.find_metric` looks it up."""

    name: str
    """A name, or a glob over names: `accuracy/*`."""
    unit: str = ""
    higher_is_better: bool | None = True
    """None: only the measurement says."""
    low: float = -math.inf
    high: float = math.inf
    """The range of possible values."""
    sampled: bool = True
    """False: read from the weights, without noise."""
    targeted_by: tuple[str, ...] = ()
    """Categories whose steps it is about; none: it concerns every step."""
    asks: str = ""
    """The data behind it: edits, facts, texts, questions, weights or nothing; empty: not known."""
    advice: str = ""
    """What to try when its gate fails."""
    headline: bool = False
    """Whether summaries show it besides metrics that a gate judged."""
    by_settings: bool = False
    """Whether it says something only of steps whose settings promise a value of it."""

    def concerns(self, categories: Collection[str], promised: Collection[str] | None = None) -> bool:
        """Say whether steps of `categories` aim at this metric, or must leave it alone.

        `promised` are the metrics of which the settings of the steps promise a value; None: that is not known.
        """
        if self.by_settings and promised is not None:
            return self.name in promised
        return not self.targeted_by or not set(self.targeted_by).isdisjoint(categories)


@dataclass(frozen=True)
class Evaluator:
    """One evaluator. `settings` and `function` are `module:attribute` targets."""

    name: str
    summary: str
    """What it measures, in a few words."""
    settings: str
    function: str
    metrics: tuple[Metric, ...] = ()
    """The metrics that it makes; none: they are known only when it has run."""

    def settings_type(self) -> type:
        """Return the frozen settings dataclass (its module imports no torch)."""
        return _resolve(self.settings)  # type: ignore[no-any-return]

    def load(self) -> Callable[[Any, Any, Any, Asked], Sequence[Measurement]]:
        """Return the function `f(model, tokenizer, settings, asked) -> measurements`."""
        return _resolve(self.function)  # type: ignore[no-any-return]

    @property
    def modules(self) -> tuple[str, str]:
        """The modules of both targets: their source is part of the address of a stored measurement."""
        return self.function.partition(":")[0], self.settings.partition(":")[0]


_EDIT_AGAIN = (
    "edit after the step that undid it, train longer (memit.z.steps, ft.steps), or compress less (docs/faq.md)"
)
_UNLEARN_LAST = (
    "unlearn last, or longer (rmu.max_num_batches, gd.samples); compression can bring knowledge back (docs/faq.md)"
)
_COMPRESS_LAST = (
    "repeat the compression at the end, as the message says, or keep zeros by preserve_mask=true (docs/gates.md)"
)
_WEAKEN = (
    "find the step that costs most in the interference table, and weaken it: more bits, a lower rate, fewer edits "
    "(docs/gates.md)"
)


def _share(name: str, asks: str, **more: Any) -> Metric:
    return Metric(name, "share", low=0, high=1, asks=asks, **{"advice": _WEAKEN, **more})


def _edit(name: str, unit: str = "share", low: float = 0) -> Metric:
    exact = name.endswith("_exact")
    return Metric(name, unit, True, low, 1, targeted_by=("edit",), asks="edits", advice=_EDIT_AGAIN, headline=exact)


def _perplexity(name: str, asks: str, **more: Any) -> Metric:
    return Metric(name, "perplexity", False, low=1, asks=asks, **{"advice": _WEAKEN, **more})


def _weights(name: str, unit: str, higher_is_better: bool, high: float = math.inf, **more: Any) -> Metric:
    about: dict[str, Any] = {"targeted_by": ("compress",), "asks": "weights", "advice": _COMPRESS_LAST}
    return Metric(name, unit, higher_is_better, 0, high, sampled=False, **{**about, **more})


_FORGOTTEN: dict[str, Any] = {"higher_is_better": False, "targeted_by": ("unlearn",), "advice": _UNLEARN_LAST}
_OF_EDITS: dict[str, Any] = {"targeted_by": ("edit",), "advice": _EDIT_AGAIN}
_ASPECTS = ("success", "paraphrase", "portability", "locality")

BUILT_IN = (
    Evaluator(
        "editing",
        "success, paraphrase, portability and locality of the edits",
        "evaluators.settings:NoSettings",
        "evaluators.editing:evaluate",
        (
            *(_edit(f"edit_{aspect}_{kind}") for aspect in _ASPECTS for kind in ("f1", "recall", "exact", "preferred")),
            *(_edit(f"edit_{aspect}_margin", "difference of probabilities", -1) for aspect in _ASPECTS),
            *(
                _edit(f"edit_{aspect}_{kind}/*")
                for aspect in ("portability", "locality")
                for kind in ("f1", "recall", "exact")
            ),
            _edit("edit_locality_agreement"),
        ),
    ),
    Evaluator(
        "recall",
        "facts that the model still knows",
        "evaluators.settings:NoSettings",
        "evaluators.recall:evaluate",
        (
            _share("recall", "facts", headline=True),
            _share("recall/*", "facts"),
            _share("recall_same_subject", "facts"),
            _share("recall_to_forget", "facts", **_FORGOTTEN),
        ),
    ),
    Evaluator(
        "perplexity",
        "of running text, of the edits' targets, and of the facts' answers",
        "evaluators.settings:PerplexitySettings",
        "evaluators.perplexity:evaluate",
        (
            _perplexity("perplexity_qa", "facts"),
            _perplexity("perplexity_edits", "edits", **_OF_EDITS),
            _perplexity("perplexity_edits_prompt", "edits", **_OF_EDITS),
            _perplexity("perplexity", "texts", headline=True),
        ),
    ),
    Evaluator(
        "questions",
        "accuracy on the question tasks of the world, or any of lm-evaluation-harness",
        "evaluators.settings:QuestionSettings",
        "evaluators.pools:evaluate",
        (
            _share("accuracy/harmless", "questions", headline=True),
            _share("accuracy/hazardous", "questions", headline=True, **_FORGOTTEN),
            _share("accuracy/*", "questions"),
            _share("accuracy/*", "questions", **_FORGOTTEN),
        ),
    ),
    Evaluator(
        "efficiency",
        "average bits, sparsity, packed size and operations by token",
        "evaluators.settings:PassSettings",
        "evaluators.efficiency:evaluate",
        (
            _weights("average_bits", "bits", False, 64, headline=True, by_settings=True),
            _weights("overhead_bits", "bits", False),
            _weights("sparsity", "share", True, 1, headline=True, by_settings=True),
            _weights("sparsity_2_4", "share", True, 1, by_settings=True),
            _weights("packed_megabytes", "MB", False),
            _weights("flops_per_token", "FLOPs", False, advice=""),
        ),
    ),
    Evaluator(
        "latency",
        "time of a forward pass; off unless asked for",
        "evaluators.settings:PassSettings",
        "evaluators.latency:evaluate",
        (
            Metric("latency_ms", "ms", False, low=0, asks="nothing"),
            Metric("tokens_per_second", "1/s", True, low=0, asks="nothing"),
        ),
    ),
)
"""Each has a switch of its name in the recipe's section `evaluate`."""


class UnknownEvaluator(ValueError):
    """A name that no evaluator of another package has; the message lists near names."""


@cache
def evaluators() -> dict[str, Evaluator]:
    """Return every known evaluator by name, built-in ones first."""
    table: dict[str, Evaluator] = {evaluator.name: evaluator for evaluator in BUILT_IN}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        _add(table, entry.load(), f"entry point {entry.value!r}")
    return table


def register(evaluator: Evaluator) -> Evaluator:
    """Add an evaluator to this process, and return it; the same one again changes nothing.

    Raises ValueError for a name that another evaluator has.
    """
    _add(evaluators(), evaluator, evaluator.function)
    return evaluator


def find_evaluator(name: str) -> Evaluator:
    """Return the evaluator of another package that is called `name`.

    Raises UnknownEvaluator, with near names and the full list, if there is none.
    """
    found = evaluators().get(name)
    if found in BUILT_IN:
        raise UnknownEvaluator(f"{name!r} is built in: it is switched by evaluate.{name}=true")
    if found is not None:
        return found
    others = sorted(key for key, evaluator in evaluators().items() if evaluator not in BUILT_IN)
    known = f"Known: {', '.join(others)}." if others else "No installed package has one."
    raise UnknownEvaluator(f"unknown evaluator {name!r}.{near_names(name, others, n=1)} {known}")


def _add(table: dict[str, Evaluator], evaluator: Evaluator, source: str) -> None:
    if table.setdefault(evaluator.name, evaluator) != evaluator:
        raise ValueError(f"{source} redefines the evaluator {evaluator.name!r}")


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
