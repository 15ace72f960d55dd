"""Registry of evaluators and their metrics.

Modules of evaluators are imported when needed, so a lookup imports no torch. Packages add evaluators through the
entry-point group `lmcompose.evaluators`, whose entries refer to an `Evaluator`; notebooks and `conftest.py` call
`register`. Recipes switch built-in evaluators with `evaluate.NAME`, and run others with `evaluate.also.NAME={...}`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from evaluators.data import EvaluationData as EvaluationData
from evaluators.measurement import Measurement
from interventions.names import near_names

ENTRY_POINT_GROUP = "lmcompose.evaluators"
FLIPS = ("flips", "flips_to_wrong", "churn")
"""Kinds of metrics of changed answers, each of them of another metric; see `evaluators.flips`."""


@dataclass(frozen=True)
class Metric:
    """Descriptor of a metric; look it up with `evaluators.metrics.find_metric`."""

    name: str
    """Name or glob, such as `accuracy/*`."""
    unit: str = ""
    higher_is_better: bool | None = True
    """None: defined by the measurement."""
    low: float = -math.inf
    high: float = math.inf
    """Range of possible values."""
    sampled: bool = True
    """False: deterministic, such as read from the weights."""
    targeted_by: tuple[str, ...] = ()
    """Categories whose steps aim at the metric; empty: it concerns every step."""
    data: str = ""
    """Data it is measured on: edits, facts, texts, questions, unlearning data, tuning data, refusal prompts, weights or
    nothing; empty: unknown."""
    advice: str = ""
    """What to try if its gate fails."""
    headline: bool = False
    """Whether summaries show it even if no gate judged it."""
    by_settings: bool = False
    """Whether it concerns only steps whose settings promise a value."""
    answers: bool = False
    """Whether its samples are right or wrong answers that should stay as they are, see `evaluators.flips`."""

    def concerns(self, categories: Collection[str], promised: Collection[str] | None = None) -> bool:
        """Return whether the metric is relevant for steps of `categories`.

        `promised` are the metrics that the steps' settings promise a value of; None: unknown.
        """
        if self.by_settings and promised is not None:
            return self.name in promised
        return not self.targeted_by or not set(self.targeted_by).isdisjoint(categories)


@dataclass(frozen=True)
class Evaluator:
    """One evaluator. `settings` and `function` are `module:attribute` targets."""

    name: str
    summary: str
    """One line on what it measures."""
    settings: str
    function: str
    metrics: tuple[Metric, ...] = ()
    """Its metrics; empty: known only after it ran."""

    def settings_type(self) -> type:
        """Return the frozen settings dataclass (its module imports no torch)."""
        return _resolve(self.settings)  # type: ignore[no-any-return]

    def load(self) -> Callable[[Any, Any, Any, EvaluationData], Sequence[Measurement]]:
        """Return the function `f(model, tokenizer, settings, data) -> measurements`."""
        return _resolve(self.function)  # type: ignore[no-any-return]

    @property
    def modules(self) -> tuple[str, str]:
        """Modules of function and settings, whose source is part of the cache key of measurements."""
        return self.function.partition(":")[0], self.settings.partition(":")[0]


_EDIT_AGAIN = (
    "edit after the step that undid it, train longer (memit.z.steps, ft.steps), or compress less (docs/faq.md)"
)
_UNLEARN_LAST = (
    "unlearn last, or longer (rmu.max_num_batches, gd.samples); compression can bring knowledge back (docs/faq.md)"
)
_TUNE_MORE = "tune after the step that undid it, or longer and faster (sft.epochs, sft.lr, dpo.epochs, dpo.lr)"
_COMPRESS_LAST = (
    "repeat the compression at the end, as the message says, or keep zeros by preserve_mask=true (docs/gates.md)"
)
_WEAKEN = (
    "find the step that costs most in the interference table, and weaken it: more bits, a lower rate, fewer edits "
    "(docs/gates.md)"
)


def _share(name: str, data: str, **more: Any) -> Metric:
    return Metric(name, "share", low=0, high=1, data=data, **{"advice": _WEAKEN, **more})


def _edit(name: str, unit: str = "share", low: float = 0) -> Metric:
    exact = name.endswith("_exact")
    return Metric(name, unit, True, low, 1, targeted_by=("edit",), data="edits", advice=_EDIT_AGAIN, headline=exact)


def _perplexity(name: str, data: str, **more: Any) -> Metric:
    return Metric(name, "perplexity", False, low=1, data=data, **{"advice": _WEAKEN, **more})


def _weights(name: str, unit: str, higher_is_better: bool, high: float = math.inf, **more: Any) -> Metric:
    about: dict[str, Any] = {"targeted_by": ("compress",), "data": "weights", "advice": _COMPRESS_LAST}
    return Metric(name, unit, higher_is_better, 0, high, sampled=False, **{**about, **more})


_FORGOTTEN: dict[str, Any] = {"higher_is_better": False, "targeted_by": ("unlearn",), "advice": _UNLEARN_LAST}


def _unlearned(name: str, unit: str = "share", **more: Any) -> Metric:
    return Metric(name, unit, **{"low": 0, "high": 1, "data": "unlearning data", **_FORGOTTEN, **more})


def _tuned(name: str, unit: str = "share", higher_is_better: bool = True, **more: Any) -> Metric:
    about: dict[str, Any] = {"low": 0, "high": 1, "targeted_by": ("tune",), "data": "tuning data", "advice": _TUNE_MORE}
    return Metric(name, unit, higher_is_better, **{**about, **more})


_REFUSAL: dict[str, Any] = {
    "higher_is_better": None,
    "targeted_by": ("steer",),
    "data": "refusal prompts",
    "advice": "remove the direction last, from all blocks, or measure it at another block (abliterate.layer)",
}
_OVER_REFUSAL: dict[str, Any] = {
    "higher_is_better": False,
    "data": "refusal prompts",
    "advice": "tune on answers to harmless prompts too (sft.sets), or steer less (steer.strength)",
}

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
            _edit("edit_survival/*"),
        ),
    ),
    Evaluator(
        "recall",
        "facts that the model still knows",
        "evaluators.settings:NoSettings",
        "evaluators.recall:evaluate",
        (
            _share("recall", "facts", headline=True, answers=True),
            _share("recall/*", "facts"),
            _share("recall_same_subject", "facts", answers=True),
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
        "closeness",
        "closeness to the base model: divergence on running text, and answers that became wrong, right or other",
        "evaluators.settings:PerplexitySettings",
        "evaluators.closeness:evaluate",
        (
            Metric("kl_to_base", "nats per token", False, low=0, data="texts", advice=_WEAKEN),
            _share("top1_agreement", "texts"),
            *(
                _share(f"{kind}/{metric}", data, higher_is_better=False)
                for kind in FLIPS
                for metric, data in (("recall*", "facts"), ("accuracy/*", "questions"), ("*", ""))
            ),
        ),
    ),
    Evaluator(
        "questions",
        "accuracy on the question tasks of the world, or any of lm-evaluation-harness",
        "evaluators.settings:QuestionSettings",
        "evaluators.pools:evaluate",
        (
            _share("accuracy/harmless", "questions", headline=True, answers=True),
            _share("accuracy/hazardous", "questions", headline=True, **_FORGOTTEN),
            _share("accuracy/*", "questions", answers=True),
            _share("accuracy/*", "questions", **_FORGOTTEN),
        ),
    ),
    Evaluator(
        "unlearning",
        "TOFU's and MUSE's metrics of what was forgotten and kept",
        "evaluators.settings:UnlearningSettings",
        "evaluators.unlearning:evaluate",
        (
            *(_unlearned(f"{kind}/forget") for kind in ("rouge", "answer_probability", "extraction_strength")),
            *(_share(f"{kind}/*", "unlearning data") for kind in ("rouge", "answer_probability", "truth_ratio")),
            _unlearned("truth_ratio/forget", higher_is_better=True),
            _unlearned("forget_quality", "p-value", higher_is_better=True, headline=True),
            _share("model_utility", "unlearning data", headline=True),
            _unlearned("verbmem", headline=True),
            _unlearned("extraction_strength/verbatim"),
            _unlearned("knowmem/forget", headline=True),
            _share("knowmem/retain", "unlearning data", headline=True),
            _unlearned("membership_auc", "area"),
            _unlearned("privleak", "%", higher_is_better=True, low=-100, high=math.inf),
            _unlearned("privleak_distance", "%", high=math.inf, headline=True),
        ),
    ),
    Evaluator(
        "tuning",
        "loss and answers on held-out examples of tuning, and preferences",
        "evaluators.settings:NoSettings",
        "evaluators.tuning:evaluate",
        (
            _tuned("tuning_loss/*", "nats per token", False, high=math.inf),
            _tuned("tuning_recall/*", targeted_by=("tune", "merge"), headline=True),
            _tuned("preference_wins", headline=True),
        ),
    ),
    Evaluator(
        "refusal",
        "held-out prompts that are refused: harmful ones, and harmless ones",
        "evaluators.settings:RefusalSettings",
        "evaluators.refusal:evaluate",
        (
            Metric("refusal_rate", "share", low=0, high=1, headline=True, **_REFUSAL),
            Metric("refusal_score", "nats", **_REFUSAL),
            Metric("over_refusal_rate", "share", low=0, high=1, headline=True, **_OVER_REFUSAL),
            Metric("over_refusal_score", "nats", **_OVER_REFUSAL),
        ),
    ),
    Evaluator(
        "efficiency",
        "average bits, sparsity, packed size and operations per token",
        "evaluators.settings:PassSettings",
        "evaluators.efficiency:evaluate",
        (
            _weights("average_bits", "bits", False, 64, headline=True, by_settings=True),
            _weights("overhead_bits", "bits", False),
            _weights("sparsity", "share", True, 1, headline=True, by_settings=True),
            _weights("sparsity_2_4", "share", True, 1, by_settings=True),
            _weights("packed_megabytes", "MB", False),
            _weights("input_bits", "bits", False, 64, by_settings=True),
            _weights("kv_cache_bits", "bits", False, 64, by_settings=True),
            _weights("flops_per_token", "FLOPs", False, advice=""),
        ),
    ),
    Evaluator(
        "latency",
        "time of a forward pass; off by default",
        "evaluators.settings:PassSettings",
        "evaluators.latency:evaluate",
        (
            Metric("latency_ms", "ms", False, low=0, data="nothing"),
            Metric("tokens_per_second", "1/s", True, low=0, data="nothing"),
        ),
    ),
)
"""Each has a switch in the recipe's section `evaluate`."""


class UnknownEvaluator(ValueError):
    """Unknown name of a third-party evaluator; the message lists similar names."""


@cache
def evaluators() -> dict[str, Evaluator]:
    """Return all evaluators by name, built-in ones first."""
    table: dict[str, Evaluator] = {evaluator.name: evaluator for evaluator in BUILT_IN}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        _add(table, entry.load(), f"entry point {entry.value!r}")
    return table


def register(evaluator: Evaluator) -> Evaluator:
    """Register an evaluator in this process and return it; registering it again has no effect.

    Raises ValueError if another evaluator has the name.
    """
    _add(evaluators(), evaluator, evaluator.function)
    return evaluator


def find_evaluator(name: str) -> Evaluator:
    """Return the third-party evaluator `name`; raises UnknownEvaluator, which lists similar names, if there is none."""
    found = evaluators().get(name)
    if found in BUILT_IN:
        raise UnknownEvaluator(f"{name!r} is built in: use evaluate.{name}=true")
    if found is not None:
        return found
    others = sorted(key for key, evaluator in evaluators().items() if evaluator not in BUILT_IN)
    known = f"Known: {', '.join(others)}." if others else "No installed package provides evaluators."
    raise UnknownEvaluator(f"unknown evaluator {name!r}.{near_names(name, others, n=1)} {known}")


def _add(table: dict[str, Evaluator], evaluator: Evaluator, source: str) -> None:
    if table.setdefault(evaluator.name, evaluator) != evaluator:
        raise ValueError(f"{source} redefines the evaluator {evaluator.name!r}")


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
