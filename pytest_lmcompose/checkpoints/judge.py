"""Measure a folder and judge it against a report. Imports torch on first use.

The folder is measured as a model without steps, with the seeds, data and evaluation settings of the report. Its gates
compare it with the report: bounds relative to the base model with the report's base model, others with the report's
compositions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_lmcompose.baseline.reference import Baseline, Circumstances, architecture_at
from pytest_lmcompose.composition import BASE, Composition
from pytest_lmcompose.errors import CheckpointError, ModelError
from pytest_lmcompose.gate.judge import Reference, count_paired, judge, settle
from pytest_lmcompose.gate.off import why_off
from pytest_lmcompose.gate.paired import BASE_MODEL
from pytest_lmcompose.gate.promises import promises
from pytest_lmcompose.gate.thresholds import BASELINE, Rule, compares_with, read_rules
from pytest_lmcompose.locate import preset_overrides
from pytest_lmcompose.options import Options
from pytest_lmcompose.recipe import Recipe, load_recipe
from pytest_lmcompose.results import CompositionResult, replace
from pytest_lmcompose.run import Run

if TYPE_CHECKING:
    from evaluators import UneditedAnswers
    from evaluators.measurement import Measurement

UNKNOWN = "folder"
"""Stands for the composition of a folder if nobody says which one it is."""
_OF_BASE = ("edit_locality_agreement", "preference_wins", "kl_to_base", "top1_agreement")
"""Metrics that compare answers with those of the base model."""


class Judged(NamedTuple):
    """The folder and the report's base model, for a table."""

    base: CompositionResult
    folder: CompositionResult


class FolderRun(Run):
    """The run that measures a folder like the models of a report, except for what the options set."""

    compares_with_own_base = False

    def __init__(
        self,
        folder: Path,
        report: Baseline,
        composition: str | None,
        options: Options,
        progress: Callable[[str], None],
        *,
        trusts: bool,
    ) -> None:
        """Judge `folder` as `composition`, or only by the rules for all; `trusts` runs the model's own code."""
        super().__init__(options, progress)
        self.report, self._composition = report, composition
        self._folder, self._trusts = folder, trusts

    @cached_property
    def judged_as(self) -> Composition | None:
        """The composition that the folder is judged as; None: unknown. Raises RecipeError."""
        return None if self._composition is None else self.recipe.read(self._composition)

    @property
    def name(self) -> str:
        """The id that rules are applied to."""
        return UNKNOWN if self.judged_as is None else self.judged_as.id

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the report, for the model in the folder; options override it."""
        options, stored = self.options, self.report.report.recipe
        model = {
            **stored.model,
            "path": str(self._folder.absolute()),
            "revision": None,
            "trust_remote_code": self._trusts,
        }
        world = {} if options.world is not None else {"world": stored.world}
        chosen: tuple[str, ...] = ("model=any",)
        if options.world is not None:
            chosen += preset_overrides("world", options.world, self.conf, options.folder)
        overrides = (*chosen, *options.overrides)
        return load_recipe(self.conf, overrides, {"model": model, "evaluate": stored.evaluate, **world})

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The thresholds that the options name, else those of the report's run, else those of the world."""
        plan = self.report.report.plan
        if self.options.thresholds is None and plan is not None:
            return tuple(rule for rule in plan.rules if not rule.source)
        return read_rules(self.thresholds)

    @cached_property
    def run_cache(self) -> None:
        """None: what is measured depends on the report's base model too."""
        return None

    def _unedited(self, number: int) -> UneditedAnswers | None:
        """Return the answers of the report's base model, if a gate needs them."""
        if number not in self._answers:
            self._answers[number] = None
            rules = [rule for rule in self.rules if rule.covers(self.name) and rule.bounds]
            if needed := [metric for metric in _OF_BASE if any(rule.judges(metric) for rule in rules)]:
                self._capture(" and ".join(needed))
        return self._answers[number]

    def _capture(self, what: str) -> None:
        """Load the report's base model, record its answers and release it."""
        from pytest_lmcompose.build.load import choose_device, hash_weights, load_model
        from pytest_lmcompose.measure import capture_unedited
        from pytest_lmcompose.settings import ModelSettings

        facts = self.report.report.model
        assert facts is not None
        settings = ModelSettings(**{**self.report.report.recipe.model, "revision": facts.revision})
        self._progress(f"{what} needs the answers of {facts.location}: loading it")
        try:
            loaded = load_model(settings, facts.location, choose_device(self.options.device))
            if hash_weights(loaded.model) != facts.weight_hash:
                raise ModelError(f"{facts.location} has other weights now")
        except ModelError as error:
            self._progress(f"{what} cannot be measured: {error}")
            return
        predictions = None  # on the same texts in all repeats
        for number, data in enumerate(self.data):
            found = capture_unedited(loaded.model, loaded.tokenizer, data, self.recipe.evaluate, predictions)
            predictions = None if found is None else found.predictions
            self._answers[number] = found

    def _measured_base(self, number: int) -> Sequence[Measurement]:
        """Return the measurements of the report's base model that the folder's can be paired with."""
        found = self.report.reference(BASE, Circumstances(self.model_facts(), self.data_hashes, self.seeds))
        other = {*found.unlike, *found.unpaired}
        return [] if found.missing else [m for m in found.runs[number] if m.metric not in other]


def judge_folder(run: FolderRun) -> Judged:
    """Measure the folder of `run` and judge it.

    Raises RecipeError, ModelError, WorldError or EvaluationError, and CheckpointError if nothing can be compared.
    """
    report, base = run.report, Composition()
    if report.report.model is None or BASE not in report.report.by_id:
        raise CheckpointError(f"{report.path} has no measurements of the base model: test {BASE} in its run too")
    if (problem := report.unlike(architecture_at(run.location))) is not None:
        raise CheckpointError(f"{run.location} cannot be compared with {report.path}: {problem}")
    name, steps = run.name, run.judged_as or base  # errors in the options come before any work
    measured = run.measurements(base)
    total = max(1, count_paired(run.rules, name, measured))
    world, evaluate = run.recipe.world, run.recipe.evaluate
    gates = judge(
        run.rules,
        name,
        measured,
        _references(run),
        runs=[repeat.measurements for repeat in run.results[base].repeats],
        gates=total,
        promises=tuple(promises(run.recipe, steps)),
        off=lambda glob: why_off(glob, world, evaluate),
    )
    gates = settle({name: gates}, total)[name]
    return Judged(report.report.by_id[BASE], replace(run.results[base].record(), id=name, gates=gates))


def _references(run: FolderRun) -> dict[str, Reference]:
    """Return the states that the gates compare with, all from the report."""
    report, now = run.report, Circumstances(run.model_facts(), run.data_hashes, run.seeds)
    known = {BASE: dataclasses.replace(report.reference(BASE, now), name=BASE_MODEL)}
    if run.judged_as is None:
        reason = "nobody says which composition the folder is; name it with --as"
        return known | {BASELINE: Reference(report.name, missing=reason)}
    for other in compares_with(run.rules, run.judged_as):
        known.setdefault(other.id, report.reference(other.id, now))
    return known | {BASELINE: report.reference(run.judged_as.id, now)}
