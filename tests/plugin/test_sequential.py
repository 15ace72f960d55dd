"""`--lmcompose-sequential`: questions are asked in parts until the gates on them are decided, and verdicts hold."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from evaluators.flips import measure_flips
from evaluators.measurement import Measurement
from evaluators.pools import PARTS
from pytest_lmcompose.baseline.compare import compare_metric
from pytest_lmcompose.composition import Composition, parse
from pytest_lmcompose.gate.evaluator import GateEvaluator
from pytest_lmcompose.gate.repeats import Repeat
from pytest_lmcompose.options import read_options
from pytest_lmcompose.report.composability import composability
from pytest_lmcompose.results import Gate, Measured
from pytest_lmcompose.run import Run, ignore
from tests.plugin.documents import composition, typed_record

N = 200
METRIC = "accuracy/harmless"
Answers = Sequence[float]


class AskedRun(Run):
    """A run whose states have given answers, which are asked in parts."""

    answers: dict[str, Answers]

    def measurements(self, composition: Composition) -> tuple[Measurement, ...]:
        result = self.result(composition)
        if result.measurements is None:
            found: Measurement | None = None
            for before, share in pairwise(PARTS):
                part = self.answers[composition.id][round(N * before) : round(N * share)]
                new = dataclasses.replace(Measurement.mean(METRIC, part), total=N, level_share=(len(part) / N) ** 2)
                found = new if found is None else found.with_part(new)
                if self.enough is not None and self.enough(composition, (), (found,)):
                    break
            assert found is not None
            result.measurements, result.state_hash = (found,), "a" * 64
            result.repeats = (Repeat(0, "a" * 64, (), (found,), 1.0),)
        return result.measurements


Judge = Callable[[str, Answers], tuple[int, Gate]]


@pytest.fixture
def judged(pytestconfig: pytest.Config, tmp_path: Path, heavy_modules: None) -> Judge:
    """Judge answers by a bound, against a base model that has 190 of 200 right; return n and the gate."""

    def judge(bound: str, answers: Answers, *references: str) -> tuple[int, Gate]:
        (tmp_path / "rules.yaml").write_text(f"'*': {{{METRIC}: {bound}}}")
        options = dataclasses.replace(
            read_options(pytestconfig),
            thresholds=tmp_path / "rules.yaml",
            cache_dir=None,
            compose=("rtn",),
            overrides=("evaluate.sequential=true",),
        )
        run = AskedRun(options, ignore)
        run.answers = {"base": BASE, "rtn": answers}
        evaluator = GateEvaluator(run)
        evaluator.expected = run.compositions
        (gate,) = evaluator.gates(parse("rtn"))
        return run.result(parse("rtn")).measurements[0].n, gate  # type: ignore[index]

    return judge


BASE = [0.0 if i % 20 == 0 else 1.0 for i in range(N)]


def answers(lost: float) -> Answers:
    """Return the base model's answers, of which this share became wrong."""
    return [0.0 if (i * lost) % 1 > 1 - lost - 1e-9 else x for i, x in enumerate(BASE)]


@pytest.mark.parametrize(
    ("bound", "lost", "n", "passed"),
    [
        ("{no_drop_p: 0.05}", 0.0, N, True),  # no evidence of a drop is no verdict before the end
        ("{no_drop_p: 0.05}", 0.5, 25, False),  # 12 losses: p = 0.0002, and 1/64 of the level is 0.0008
        ("{no_drop_p: 0.05}", 0.3, 50, False),  # 7 losses of 25 are too few
        ("{not_worse_than: 0.2}", 0.0, 50, True),
        ("{not_worse_than: 0.02}", 0.0, N, True),  # 0.98 ** 200 = 0.018, and 3/4 of the level is 0.038
        ("{not_worse_than: 0.01}", 0.0, N, False),
        ("{not_worse_than: 0.2}", 0.5, N, False),
        ("{min: 0.8}", 0.0, N, True),  # the others might be wrong
        ("{min: 0.3}", 0.0, 100, True),  # more than 60 of 200 are right
        ("{min: 0.9}", 0.5, 50, False),  # 21 are wrong already
        ("{min_ratio_of_base: 0.9}", 0.5, 100, False),
        ("{max_loss: 3se}", 0.5, N, False),
    ],
)
def test_questions_end_with_the_verdict(judged: Judge, bound: str, lost: float, n: int, passed: bool) -> None:
    assert (judged(bound, answers(lost))[0], judged(bound, answers(lost))[1].passed) == (n, passed)


@pytest.mark.parametrize("bound", ["{min: 0.8}", "{max: 0.5}", "{max_drop: 0.1}", "{min_ratio_of_base: 0.95}"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.85, 0.95])
def test_a_bound_of_a_value_has_the_verdict_of_all_questions(judged: Judge, bound: str, share: float) -> None:
    rng = random.Random(f"{bound} {share}")
    given = [float(rng.random() < share) for _ in range(N)]
    value, base = sum(given) / N, sum(BASE) / N
    expected = {
        "{min: 0.8}": value >= 0.8,
        "{max: 0.5}": value <= 0.5,
        "{max_drop: 0.1}": value >= base - 0.1,
        "{min_ratio_of_base: 0.95}": value >= 0.95 * base,
    }
    assert judged(bound, given)[1].passed == expected[bound]


def test_a_part_is_not_kept_and_not_compared_with_other_orders() -> None:
    part, whole = (dataclasses.replace(Measurement.mean(METRIC, BASE[:n]), total=N) for n in (50, N))
    assert Repeat(0, "", (), (part,), 1.0).partial and not Repeat(0, "", (), (whole,), 1.0).partial
    assert {m.n for m in measure_flips([whole], [part])} == {50}, "beside the same questions of the base model"
    assert compare_metric("rtn", Measured.of(whole), Measured.of(part)).note == "measured in part"
    for other, compared in ((whole, 1), (part, 0)):
        found = [("rtn+memit", whole), ("memit+rtn", other)]
        records = [
            typed_record(composition(name, {}, measurements=[msgspec.to_builtins(Measured.of(m))])) for name, m in found
        ]
        assert len(composability(records, 0).orders) == compared


@pytest.mark.parametrize(
    "flags", [["--lmcompose-save=v1"], ["--lmcompose-repeats=2"], ["--lmcompose-update-baseline", "--lmcompose-force"]]
)
def test_what_needs_all_questions_is_refused(pytester: pytest.Pytester, flags: list[str]) -> None:
    result = pytester.runpytest("--pyargs", "compositions", "--collect-only", "--lmcompose-sequential", *flags)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--lmcompose-sequential asks some of the questions: it cannot be used with *"])
