"""`lmcompose repair` and `lmcompose tune`: what is tried, judged and found, on simulated and on tiny models."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from evaluators.measurement import Measurement
from interventions import registry
from interventions.ranges import Checked, Range, Search, field_name, searched
from interventions.registry import Method, methods
from interventions.types import StepReport
from pytest_lmcompose.cli import main, searching
from pytest_lmcompose.composition import Composition, parse
from pytest_lmcompose.errors import BuildError
from pytest_lmcompose.gate.judge import Reference, judge
from pytest_lmcompose.gate.margin import margins
from pytest_lmcompose.gate.thresholds import read_rules
from pytest_lmcompose.options import read_options
from pytest_lmcompose.report import tuning as page
from pytest_lmcompose.results import CompositionResult, Fix, Measured, decode
from pytest_lmcompose.run import Run, ignore
from pytest_lmcompose.search.bench import Bench, Deadline
from pytest_lmcompose.search.records import Repair, Trial, Tuning, with_repairs
from pytest_lmcompose.search.repair import Repairer
from pytest_lmcompose.search.space import space_of
from pytest_lmcompose.search.study import Study
from pytest_lmcompose.search.tune import SearchError, Tuner
from pytest_lmcompose.steps import StepRecord
from tests.plugin import documents
from tests.plugin.conftest import Project
from tests.plugin.documents import typed
from tests.plugin.stubs import round_weights

Metrics = Callable[[Composition], Mapping[str, float]]
LOWER = ("perplexity", "average_bits", "accuracy/hazardous")


# Settings


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_value_to_try_is_one_that_the_method_takes(name: str) -> None:
    kind = methods()[name].settings_type()
    settings = kind()
    for key, value, hint, search in searched(settings):
        options = search.options(value, hint)
        assert bool(options) == bool((value is not None and value != 0) or value is False) or search.layers, key
        assert not options or (value in options and len(set(options)) == len(options) > 1), key
        for option in options:
            inner, _, last = key.rpartition(".")
            if inner:
                nested = dataclasses.replace(getattr(settings, inner), **{last: option})
                dataclasses.replace(settings, **{inner: nested})
            else:
                dataclasses.replace(settings, **{field_name(key): option})


def test_most_methods_can_be_searched() -> None:
    without = [name for name, method in methods().items() if not [*searched(method.settings_type()())]]
    assert sorted(without) == ["adapter", "command", "load", "rotate", "smooth"]


@pytest.mark.parametrize(
    ("search", "value", "hint", "options"),
    [
        (Search((2, 3, 4, 8)), 3, int, [2, 3, 4, 8]),
        (Search((2, 4, 8)), 3, int, [2, 3, 4, 8]),
        (Search((0.9, 0.5, 0.1)), 0.6, float, [0.9, 0.6, 0.5, 0.1]),
        (Search((-1, 128, 64, 32)), 100, int, [-1, 128, 100, 64, 32]),
        (Search((-1, 128, 64, 32)), -1, int, [-1, 128, 64, 32]),
        (Search(times=(4, 2, 1, 0.5)), 1e-5, float, [4e-5, 2e-5, 1e-5, 5e-6]),
        (Search(times=(4, 2, 1, 0.5)), 1, Annotated[int, Range(1)], [4, 2, 1]),
        (Search(times=(0.5, 1, 2)), 0.123456, Annotated[float, Range(0, 0.2)], [0.0617, 0.123456]),
        (Search(plus=(-2, -1, 0, 1)), 1, Annotated[int, Range(0)], [0, 1, 2]),
        (Search(times=(1, 2)), None, float | None, []),
        (Search(times=(1, 2)), 0.0, float, []),
        (Search((False, True)), False, bool, [False, True]),
        (Search(("a", "b")), "c", str, []),
    ],
)
def test_values_to_try_are_in_order(search: Search, value: Any, hint: Any, options: Any) -> None:
    assert search.options(value, hint) == options


# Margins

RULES = """
"*":
  a: {min: 0.8}
  b: {max: 10}
  c: {min_ratio_of_base: 0.5}
  d: {max_rise: {value: 2, of: base}}
  e: {max_loss: 10%}
  f: {not_worse_than: 0.5}
  g: {no_drop_p: 0.05}
  average_bits: {promised: 0.01}
"""


@pytest.mark.parametrize(
    ("metric", "value", "base", "margin"),
    [
        ("a", 0.9, 1.0, 0.125),
        ("a", 0.6, 1.0, -0.25),
        ("a", 0.8, 1.0, 0.0),
        ("b", 12.0, 1.0, -0.2),
        ("b", 40.0, 1.0, -1 - math.log(3)),
        ("b", 1e9, 1.0, -10.0),
        ("c", 0.6, 1.0, 0.2),
        ("c", 0.4, 1.0, -0.2),
        ("d", 5.0, 2.0, -0.25),
        ("e", 0.85, 1.0, -0.05555),
        ("e", math.nan, 1.0, -10.0),
        ("f", 0.9, 1.0, 0.5496),  # the loss is below 0.2252 with 0.95 confidence
        ("g", 0.2, 1.0, -0.9998),
    ],
)
def test_a_margin_is_the_distance_from_the_limit(
    tmp_path: Path, metric: str, value: float, base: float, margin: float
) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    rules = [rule for rule in read_rules(tmp_path / "rules.yaml") if rule.metric == metric]
    higher = metric not in "bd"
    now, before = (Measurement(metric, v, 0.0, 20, higher, (v,) * 20) for v in (value, base))
    gates = judge(rules, "memit", [now], {"base": Reference("the base model", [before], [[before]])})
    fields: dict[str, Any] = {"requested": (), "executed": (), "status": "measured", "error": None, "state_hash": None}
    fields |= {"steps": (), "evaluate_seconds": None}
    ((gate, found),) = margins(CompositionResult("memit", **fields, measurements=(Measured.of(now),), gates=gates))
    assert found == pytest.approx(margin, abs=1e-4)
    assert gate.passed == (found >= 0)


# Simulated models


class SimulatedRun(Run):
    """A run that computes measurements from settings, without a model."""

    metrics: Metrics
    built: list[str]

    def measurements(self, composition: Composition) -> tuple[Measurement, ...]:
        result = self.result(composition)
        if result.measurements is None:
            self.built.append(composition.id)
            with self._kept(result):
                report = {"settings": {}, "changed": (), "details": {}, "warnings": (), "peak_memory_bytes": 1}
                found = self.metrics(composition)
                result.steps = tuple(
                    StepRecord(step, 0, StepReport(step.method, seconds=1.0, **report))  # type: ignore[arg-type]
                    for step in composition.steps
                )
                measured: list[Measurement] = []
                for name in sorted(found, key=lambda name: name not in self.first):
                    if measured and self.watch is not None:
                        self.watch(composition, result.steps, measured)
                    measured.append(Measurement(name, found[name], 0.0, 10, name not in LOWER, (found[name],) * 10))
                result.measurements = tuple(measured)
                result.evaluate_seconds, result.repeats = 1.0, ()
        assert result.measurements is not None
        return result.measurements

    def address(self, composition: Composition, number: int) -> str:
        return f"{composition} {number}"


Simulate = Callable[..., SimulatedRun]


@pytest.fixture
def simulated(pytestconfig: pytest.Config, tmp_path: Path, heavy_modules: None) -> Simulate:
    """Make a run whose composition `asked` has these metrics, by these rules."""

    def make(metrics: Metrics, rules: str, *asked: str) -> SimulatedRun:
        (tmp_path / "rules.yaml").write_text(rules)
        options = dataclasses.replace(
            read_options(pytestconfig),
            thresholds=tmp_path / "rules.yaml",
            cache_dir=tmp_path / "cache",
            compose=asked,
        )
        run = SimulatedRun(options, ignore)
        run.metrics, run.built = metrics, []
        run.check()
        return run

    return make


def setting(run_or: Composition, method: str, key: str, default: float) -> float:
    """Return a setting of the first step of a method."""
    step = next(step for step in run_or.steps if step.method == method)
    return float(dict(step.settings).get(key, default))


def repaired(run: SimulatedRun, say: Callable[[str], None] = ignore) -> Repairer:
    search = Repairer(Bench(run), run.compositions[0], Deadline(1000), say)
    search.search()
    return search


PROMISES = "'*': {edit_success_exact: {promised: 0.9}, average_bits: {promised: 0.01}, recall: {min: 0.9}}"


def fine(**values: float) -> dict[str, float]:
    return {"edit_success_exact": 1.0, "average_bits": 4.0, "recall": 1.0} | values


def test_what_is_green_is_left_alone(simulated: Simulate) -> None:
    search = repaired(simulated(lambda c: fine(), PROMISES, "memit+rtn"))
    assert search.best is search.first and search.best.green and len(search.study.known) == 1


def test_another_order_is_the_nearest_change(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        return fine(edit_success_exact=1.0 if c.steps and c.steps[-1].method == "memit" else 0.5)

    search = repaired(simulated(metrics, "'*': {edit_success_exact: {promised: 0.9}}", "memit+rtn"))
    assert search.best.composition == "rtn+memit" and search.best.distance == 1
    assert search.best.changes == ("order rtn, memit",)


def test_a_broken_promise_is_repaired_by_repeating_the_step(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        last = c.steps[-1].method if c.steps else ""
        edited = last == "memit" or c.id == "rtn+memit+rtn"
        return fine(average_bits=4.0 if last == "rtn" else 7.0, edit_success_exact=1.0 if edited else 0.3)

    search = repaired(simulated(metrics, PROMISES, "rtn+memit"))
    assert search.best.composition == "rtn+memit+rtn" and search.best.changes == ("rtn again",)


@pytest.mark.parametrize("needed", [4, 6, 8])
def test_settings_are_moved_on_as_long_as_that_helps(simulated: Simulate, needed: int) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        bits = setting(c, "rtn", "bits", 3) if c.steps else 16
        return fine(average_bits=bits, recall=min(1.0, 0.9 + 0.05 * (bits - needed)))

    search = repaired(simulated(metrics, PROMISES, "memit+rtn[bits=3]"))
    assert search.best.composition == f"memit+rtn[bits={needed}]"
    assert search.best.changes == (f"rtn.bits 3 -> {needed}",) and search.best.bits == needed
    assert len(search.study.known) < 30


def test_two_changes_are_put_together_and_nothing_that_is_not_needed_stays(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        if not c.steps:
            return fine()
        bits, weight = setting(c, "rtn", "bits", 3), setting(c, "memit", "covariance_weight", 1000)
        return fine(average_bits=bits, recall=0.75 + 0.1 * (bits > 3) + 0.1 * (weight > 1000) + 0.01 * (bits > 4))

    search = repaired(simulated(metrics, PROMISES, "memit+rtn[bits=3]"))
    assert search.best.green
    assert search.best.changes == ("memit.covariance_weight 1000.0 -> 3000.0", "rtn.bits 3 -> 4")


def test_optuna_finds_what_no_single_change_points_to(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        both = c.steps and c.steps[0].method == "rtn" and setting(c, "rtn", "bits", 3) == 5
        return {"recall": 1.0 if both else 0.5, "average_bits": 4.0}

    search = repaired(simulated(metrics, "'*': {recall: {min: 0.9}}", "memit+rtn[bits=3]"))
    assert search.best.composition == "rtn[bits=5]+memit"


def test_an_order_that_undoes_what_a_step_promised_is_not_tried(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        bits = setting(c, "rtn", "bits", 3) if c.steps else 16
        return fine(average_bits=bits if c.id.startswith("memit") else 7.0, recall=min(1.0, 0.15 * bits))

    run = simulated(metrics, PROMISES, "memit+rtn[bits=3]")
    repaired(run)
    assert run.built and not any("memit" in name.partition("+")[2] for name in run.built)
    accepted = simulated(metrics, f"{PROMISES}\n'*+memit': {{average_bits: {{max: 9}}}}", "memit+rtn[bits=3]")
    repaired(accepted)
    assert any("memit" in name.partition("+")[2] for name in accepted.built), "another rule judges it"


def test_a_trial_stops_when_it_is_no_better_and_counts_no_better_than_it_is(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        bits = setting(c, "rtn", "bits", 3) if c.steps else 16
        weight = setting(c, "memit", "covariance_weight", 1000) if c.steps else 0
        return fine(recall=min(1.0, 0.1 * (bits + 4) - (weight > 1000)), perplexity=20.0 - bits)

    rules = "'*': {recall: {min: 0.9}, perplexity: {max: 16}, edit_success_exact: {promised: 0.9}}"
    run = simulated(metrics, rules, "memit[covariance_weight=1000]+rtn[bits=3]")
    search = repaired(run)
    changes = ("memit.covariance_weight 1000.0 -> 3000.0",)
    (worse,) = (trial for trial in search.study.known.values() if trial.changes == changes)
    assert worse.stopped and not worse.green and worse.violation >= search.first.violation
    assert worse.composition not in {c.id for c in run.results}, "nothing of it is kept"
    assert set(worse.failed) == set(search.first.failed), "what was not judged counts as asked for"


def test_without_a_repair_the_nearest_trial_is_found_and_the_budget_kept(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        bits = setting(c, "rtn", "bits", 3) if c.steps else 16
        return fine(average_bits=bits, recall=0.05 * bits)

    class ThreeSeconds(Deadline):
        """Each trial takes three seconds."""

        @property
        def left(self) -> float:
            return self.seconds - 3 * len(run.built)

    for seconds, trials in ((3, 1), (4, 1), (15, 5)):
        run = simulated(metrics, PROMISES, "memit+rtn[bits=3]")
        shutil.rmtree(run.options.cache_dir, ignore_errors=True)
        search = Repairer(Bench(run), run.compositions[0], ThreeSeconds(seconds), ignore)
        search.search()
        assert len(search.study.known) == len(run.built) == trials and not search.best.green


def test_a_step_that_fails_is_a_red_trial(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        if c.steps and setting(c, "rtn", "bits", 3) == 3:
            raise BuildError("step 2, rtn: out of memory")
        return fine(average_bits=setting(c, "rtn", "bits", 3) if c.steps else 16)

    said: list[str] = []
    search = repaired(simulated(metrics, PROMISES, "memit+rtn[bits=3]"), say=said.append)
    assert "failed: BuildError: step 2, rtn: out of memory" in said[0]
    assert search.best.changes == ("rtn.bits 3 -> 4",)


def test_an_interrupted_search_goes_on(simulated: Simulate) -> None:
    stop = True

    def metrics(c: Composition) -> Mapping[str, float]:
        bits = setting(c, "rtn", "bits", 3) if c.steps else 16
        if bits == 5 and stop:
            raise KeyboardInterrupt
        return fine(average_bits=bits, recall=0.9 if bits >= 6 else 0.1 * bits)

    first = simulated(metrics, PROMISES, "memit+rtn[bits=3]")
    with pytest.raises(KeyboardInterrupt):
        repaired(first)
    stop, said = False, []
    second = simulated(metrics, PROMISES, "memit+rtn[bits=3]")
    search = repaired(second, say=said.append)
    assert search.best.composition == "memit+rtn[bits=6]"
    again = set(first.built[:-1]) & set(second.built)
    assert again == {"memit+rtn[bits=3]"}, "which a run reads from its cache"
    assert any("trials of earlier calls" in line for line in said)


def test_a_study_that_was_cut_off_does_not_stop_a_search(simulated: Simulate, tmp_path: Path) -> None:
    run = simulated(lambda c: fine(recall=0.5), PROMISES, "memit+rtn")
    space = space_of(run.recipe, parse("memit+rtn"), {})
    said: list[str] = []
    (tmp_path / "cut").write_text('{"op_code": 0, "stu\n{"op')
    study = Study(space, tmp_path / "cut", ["minimize"], 0, said.append)
    assert study.propose(()) is not None and "starts again" in said[0]
    (tmp_path / "file").touch()
    assert Study(space, tmp_path / "file" / "study", ["minimize"], 0, said.append).propose(()) is not None


def test_a_rule_for_the_asked_composition_alone_is_noted(simulated: Simulate) -> None:
    rules = "'*': {recall: {min: 0.9}}\n'rtn+memit': {edit_success_exact: {min: 0.2}}"
    run = simulated(lambda c: fine(recall=0.5 if c.id == "rtn+memit" else 1.0), rules, "rtn+memit")
    (note,) = repaired(run).notes()
    assert "edit_success_exact" in note and "'rtn+memit' does not judge memit+rtn" in note


# Spaces


@pytest.mark.parametrize(
    "asked",
    ["memit+rtn[bits=3]", "rmu+memit+gptq", "awq[keep=['first:8']]+ft", "wanda", "memit[z={stop_loss: 0.1}]+awq"],
)
def test_every_point_is_a_composition_that_the_recipe_reads(simulated: Simulate, asked: str) -> None:
    run = simulated(lambda c: fine(), PROMISES, asked)
    composition = run.compositions[0]
    space = space_of(run.recipe, composition, {0: ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"]})
    assert space.composition(space.asked) == composition and space.distance(space.asked) == 0
    seen = {composition}
    for place, point in space.neighbours(space.asked):
        found = space.composition(point)
        if found is None:
            assert space.dials[place].kind == "again"
            continue
        assert run.read(found.id) == found not in seen
        assert space.distance(point) > 0 and len(space.words(point)) == 1
        seen.add(found)


def test_layers_that_other_steps_changed_can_be_spared(simulated: Simulate) -> None:
    run = simulated(lambda c: fine(), PROMISES, "memit+rtn[keep=['last:8']]")
    names = ["model.layers.0.mlp.down_proj.weight"]
    space = space_of(run.recipe, run.compositions[0], {0: names, 1: ["model.layers.1.mlp.up_proj.weight"]})
    (dial,) = (dial for dial in space.dials if dial.kind == "layers")
    assert dial.options[1:3] == (
        ["last:8", "model.layers.0.mlp.down_proj:8"],
        ["last:8", "model.layers.0.mlp.down_proj:16"],
    )


# Tuning


def test_the_front_has_what_nothing_beats(simulated: Simulate) -> None:
    def metrics(c: Composition) -> Mapping[str, float]:
        bits = setting(c, "hqq", "bits", 4) if c.steps else 16
        size = setting(c, "hqq", "group_size", 64) if c.steps else 128
        return fine(average_bits=bits, recall=min(1.0, 0.2 * bits) - (0.05 if size > 32 else 0.0))

    run = simulated(metrics, PROMISES, "hqq")
    search = Tuner(Bench(run), run.compositions[0], Deadline(1000), ignore, "average_bits")
    search.search()
    front = [(trial.metrics["average_bits"], round(trial.margin, 3)) for trial in search.front()]
    assert front == [(2, -0.556), (3, -0.333), (4, -0.111), (5, 0.111)]
    assert all("group_size" in " ".join(trial.changes) for trial in search.front())
    with pytest.raises(SearchError, match=r"average_bit is not measured\. Did you mean"):
        Tuner(Bench(run), run.compositions[0], Deadline(10), ignore, "average_bit")


def test_the_page_of_a_tuning_is_safe_and_complete() -> None:
    def trial(changes: tuple[str, ...], bits: float, margin: float) -> Trial:
        failed = {"recall min": margin} if margin < 0 else {}
        return Trial("rtn", changes, 1, 2, failed, margin, bits, 1.0, 2.0, {"average_bits": bits})

    trials = (trial((), 4.0, 0.2), trial(("rtn.bits 4 -> 2<script>",), 2.0, -0.5))
    tuning = Tuning("tune", 1, "rtn", "average_bits", True, trials[0], trials, trials, 60.0, 3.0)
    text = page.render(tuning)
    assert "rtn.bits 4 -&gt; 2&lt;script&gt;" in text and "-0.500" in text and "recall min" in text
    assert msgspec.json.decode(msgspec.json.encode(tuning), type=Tuning) == tuning


# The commands


@dataclass(frozen=True)
class BluntSettings(Checked):
    digits: Annotated[int, Range(0, 4), Search((0, 1, 2, 3, 4))] = 2


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.fixture
def blunt(project: Project, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a run on a tiny model, which a coarse step called blunt makes red."""
    method = Method("blunt", "compress", f"{__name__}:BluntSettings", f"{round_weights.__module__}:round_weights")
    monkeypatch.setitem(registry._table, "blunt", method)
    (project.path / "thresholds.yaml").write_text("'*': {perplexity: {max_ratio_of_base: 1.001}}")
    return [argument for argument in project.arguments if "no-cache" not in argument]


def test_repair_of_a_tiny_model(blunt: list[str], tmp_path: Path) -> None:
    given = [*blunt, f"--cache-dir={tmp_path / 'cache'}"]
    short = call("repair", "blunt[digits=0]", *given, "--budget=0.001s")
    assert short.exit_code == 1 and "not repaired; the best found: blunt[digits=0]" in short.output
    result = call("repair", "blunt[digits=0]", *given, "--json", "found.json", "--budget=5min")
    assert result.exit_code == 0 and "going on after 1 trial of earlier calls" in result.output
    found = json.loads(Path("found.json").read_text())["repairs"][0]
    assert found["repaired"] and found["best"]["composition"] == f"blunt[digits={found['best']['distance'] - 1}]"
    assert "\nrepaired: blunt[digits=" in result.output and "  run it: pytest --pyargs compositions" in result.output
    for trial in found["trials"]:
        assert (trial["margin"] < 0) == bool(trial["failed"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repair", "memti+awq"], "Did you mean"),
        (["repair", "gone.json"], "no such file"),
        (["repair", "memit+awq", "--budget=soon"], "expected a time such as 90s, 10min or 1h, not 'soon'"),
        (["repair", "memit+awq", "--json=/missing/x.json"], "does not exist"),
        (["repair"], "Missing argument"),
        (["repair", "memit+awq", "--html=page.html"], "--html is about a run: name its report or a stored run"),
        (["tune", "base"], "name a method"),
        (["tune", "rotate"], "has no setting to search"),
    ],
)
def test_usage_errors_come_before_any_work(words: list[str], message: str, heavy_modules: None) -> None:
    result = call(*words)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_a_missing_optuna_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_lmcompose.search.study.find_spec", lambda name: None)
    result = call("repair", "memit+awq")
    assert result.exit_code == 2
    assert result.stderr == "Error: Optuna is not installed: pip install 'pytest-lmcompose[search]'\n"


def test_a_report_names_what_to_repair(tmp_path: Path, heavy_modules: None) -> None:
    (tmp_path / "green.json").write_text(json.dumps(documents.report({"base": {}, "memit": {"recall": [1.0]}})))
    result = call("repair", str(tmp_path / "green.json"))
    assert result.exit_code == 0 and "nothing to repair" in result.output
    other = documents.report({"base": {}}, recipe={"model": {}, "world": {}, "evaluate": {"edits": 7}, "suite": {}})
    other["compositions"].append(documents.composition("memit", {}, gates=[documents.gate("recall", passed=False)]))
    (tmp_path / "red.json").write_text(json.dumps(other))
    result = call("repair", str(tmp_path / "red.json"), "--no-cache")
    assert result.exit_code == 2 and "the run had evaluate.edits=7, not 20" in result.stderr


def test_what_a_search_found_becomes_the_cheapest_fix() -> None:
    def trial(name: str, changes: tuple[str, ...], failed: Mapping[str, float], bits: float) -> Trial:
        return Trial(name, changes, len(changes), 5, dict(failed), 0.0, bits, 2.0, 3.0, {})

    red = trial("rtn+memit", (), {"average_bits promised": -0.2}, 7.0)
    green = trial("memit+rtn", ("order memit, rtn",), {}, 4.0)
    near = trial("rtn+memit", ("x",), {"recall min": -0.1}, 7.0)
    found = Repair("rtn+memit", red, green, True, "pytest", (), (red, green), 6.0)
    none = Repair("rtn+ft", red, near, False, "pytest", (), (red, near), 600.0)
    alone = Repair("ft", green, green, True, "pytest", (), (green,), 3.0)
    old = Fix("rtn+memit", "rtn+memit+rtn", "of an earlier search")
    before = typed(documents.report({"base": {}}) | {"repairs": [msgspec.to_builtins(old)]})
    assert with_repairs(before, (found, none, alone)).repairs == (
        Fix(
            "rtn+memit",
            "memit+rtn",
            "order memit, rtn: 4 bits a weight instead of 7, 2 s to build as before; tested, 5 gates passed",
        ),
        Fix(
            "rtn+ft",
            None,
            "lmcompose repair found none (2 trials, 10 min 0 s); nearest: rtn+memit, red, 1 of 5 gates, "
            "worst recall min -0.100",
        ),
        Fix("ft", "memit+rtn", "by itself, it passed all gates"),
    )


def test_a_page_and_a_report_of_the_run_with_its_repairs(
    tmp_path: Path, simulated: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    red = documents.composition("rtn+memit", {}, gates=[documents.gate("recall", passed=False)])
    document = documents.report({"base": {}}) | {"compositions": [documents.composition("base", {}), red]}
    (tmp_path / "run.json").write_text(json.dumps(document))
    run = simulated(lambda c: fine(recall=0.5 if c.id == "rtn+memit" else 1.0), PROMISES, "rtn+memit")
    monkeypatch.setattr(searching, "_in_run", lambda work, given, what: work(Bench(run)))
    monkeypatch.setattr(searching, "_same_settings", ignore)
    page_file, report_file = tmp_path / "page.html", tmp_path / "repaired.json"
    result = call("repair", str(tmp_path / "run.json"), "--html", str(page_file), "--report", str(report_file))
    assert result.exit_code == 0, result.output
    (fix,) = decode(report_file.read_text()).repairs
    assert (fix.composition, fix.use) == ("rtn+memit", "memit+rtn")
    text = page_file.read_text()
    assert f"<code>rtn+memit</code>: use <code>memit+rtn</code> ({fix.note})" in text
    assert f"<p>Repair: use <code>memit+rtn</code> ({fix.note})" in text
