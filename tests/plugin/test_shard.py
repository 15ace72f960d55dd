"""Shards: which compositions each has, and what runs of them select and report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lmcompose.composition import Composition, parse
from pytest_lmcompose.distribute.shard import read_shard, split, work
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.plan import Plan
from pytest_lmcompose.recipe import load_recipe
from tests.plugin.conftest import Project
from tests.plugin.test_plan import plans
from tests.plugin.test_run import by_id, read_report

counts = st.integers(1, 7)


def scratch(compositions: tuple[Composition, ...]) -> float:
    """Return the work of a piece by its definition: distinct states to build, and compositions to measure."""
    return Plan.of(compositions).applications + len(compositions)


@given(plans, counts, st.randoms())
def test_shards_are_the_whole_disjoint_and_the_same_in_whatever_order_they_are_given(
    wanted: list[Composition], count: int, random: st.DataObject
) -> None:
    pieces = split(wanted, count)
    assert len(pieces) == count
    assert sorted(c for piece in pieces for c in piece) == sorted(set(wanted))
    assert sum(map(bool, pieces)) == min(count, len(set(wanted)))
    shuffled = [*wanted, *wanted[:3]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert split(shuffled, count) == pieces


@given(plans, counts)
def test_shards_are_balanced(wanted: list[Composition], count: int) -> None:
    pieces = split(wanted, count)
    assert [work(piece) for piece in pieces] == [scratch(piece) for piece in pieces]
    # A cut builds the prefix of one composition again, and is as coarse as one composition.
    longest = max((len(c.steps) + 1 for c in wanted), default=0)
    assert max(map(scratch, pieces)) <= scratch(tuple(set(wanted))) / count + 2 * longest


@given(plans, counts)
def test_no_other_cut_of_the_same_order_has_a_cheaper_worst_piece(wanted: list[Composition], count: int) -> None:
    order = sorted(set(wanted))
    best = [[0.0] * (len(order) + 1)]  # by number of pieces, then of compositions in them
    for _ in range(count):
        row = [min(max(best[-1][j], scratch(tuple(order[j:i]))) for j in range(i + 1)) for i in range(len(order) + 1)]
        best.append([max(row[i], 0.0) for i in range(len(order) + 1)])
        if len(best) == 2:
            best[1] = [scratch(tuple(order[:i])) for i in range(len(order) + 1)]
    assert max(map(scratch, split(wanted, count))) <= best[count][-1] * 1.001


def test_subtrees_stay_together() -> None:
    ids = ["a", "a+b", "a+c", "b", "b+a", "b+c", "c", "c+a", "c+b"]
    assert [[c.id for c in piece] for piece in split(map(parse, ids), 3)] == [ids[:3], ids[3:6], ids[6:]]


def test_the_shards_of_the_pairs_repeat_little() -> None:
    compositions = load_recipe(SUITE_FOLDER / "conf", ("suite=pairs",)).suite_compositions()
    whole, pieces = work(sorted(compositions)), [work(piece) for piece in split(compositions, 5)]
    assert max(pieces) < 1.1 * whole / 5 and sum(pieces) <= whole + 4


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "-1/3", "1/3/5", "a/b", ""])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ValueError, match="expected K/N"):
        read_shard(text)


def test_a_shard_that_cannot_be_is_refused(refused: Callable[..., str]) -> None:
    assert "--lmcompose-shard: expected K/N with K from 1 to N, such as 2/5, not '6/5'" in refused(
        "--lmcompose-shard=6/5"
    )


IDS = ("base", "nudge", "nudge+round", "round", "round+nudge")


def test_shards_of_a_run_test_everything_once(project: Project) -> None:
    project.pytester.makepyfile(test_other="def test_of_no_composition(): pass")
    found: list[str] = []
    others = 0
    for index in (1, 2, 3):
        result = project.run(f"--lmcompose-shard={index}/3", f"--lmcompose-json=report{index}.json", compose=IDS)
        outcomes = result.parseoutcomes()
        assert outcomes["passed"] + outcomes["deselected"] == len(IDS) + 1
        result.stdout.fnmatch_lines([f"lmcompose: shard {index}/3"])
        report = read_report(project.path / f"report{index}.json")
        assert report["shard"] == {"index": index, "count": 3}
        tested = [name for name, record in by_id(report).items() if record["gates"]]
        found += tested
        others += outcomes["passed"] - len(tested)
        assert report["model"] is not None and "base" in by_id(report)  # which gates compare with
    assert sorted(found) == sorted(IDS) and others == 1


def test_a_shard_is_of_what_other_flags_leave(project: Project, tmp_path: Path) -> None:
    lines = []
    for arguments in ("1/2", "2/2"):
        result = project.run(f"--lmcompose-shard={arguments}", "--collect-only", "-q", "-k", "round", compose=IDS)
        lines += [line for line in result.outlines if "::" in line]
    assert sorted(line.partition("[")[2] for line in lines) == ["nudge+round]", "round+nudge]", "round]"]
    plan = project.run("--lmcompose-shard=2/2", "--lmcompose-plan", compose=IDS)
    plan.stdout.fnmatch_lines(["2 compositions: 2 steps to apply instead of 3*"])


def test_a_worker_knows_its_shard(project: Project) -> None:
    result = project.run_apart("--lmcompose-shard=1/2", "-n1", "--lmcompose-json=report.json", compose=IDS)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["lmcompose: shard 1/2"])
    report = read_report(project.path / "report.json")
    assert set(by_id(report)) == {"base", "nudge", "nudge+round"}
    assert report["plan"]["compositions"] == report["plan"]["judged"] == sorted(IDS)


def test_a_shard_without_a_composition_has_nothing_to_do(project: Project) -> None:
    result = project.run("--lmcompose-shard=3/3", "--lmcompose-json=report.json", compose=IDS[:2])
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(deselected=2)
    report = read_report(project.path / "report.json")
    assert report["compositions"] == [] and report["plan"]["compositions"] == sorted(IDS[:2])
    nothing = project.run("--lmcompose-shard=1/3", "-k", "nothing", compose=IDS[:2])
    assert nothing.ret == pytest.ExitCode.NO_TESTS_COLLECTED
