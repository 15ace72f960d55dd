"""Runs of pytest-xdist: who tests what, what a worker's death leaves, which GPUs a worker sees."""

from __future__ import annotations

import itertools
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from execnet import XSpec
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lmcompose.composition import Composition, parse, permutations
from pytest_lmcompose.costs import Costs, StepCost
from pytest_lmcompose.distribute import forecast
from pytest_lmcompose.distribute.forecast import Simulated
from pytest_lmcompose.distribute.gpus import share_of, visible_gpus
from pytest_lmcompose.distribute.schedule import Workers, composition_in
from pytest_lmcompose.options import SUITE_FOLDER, asked_for_distribution, read_options
from pytest_lmcompose.plan import Plan, longest_first
from pytest_lmcompose.recipe import load_recipe
from pytest_lmcompose.session import Session
from tests.plugin.conftest import Project
from tests.plugin.test_cache import without_times
from tests.plugin.test_run import by_id, read_report

LIGHT = tuple(f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest", "anyio", "benchmark"))
NAMES = ("ft", "memit", "rmu", "ga", "awq")
SECONDS = dict(zip(NAMES, (5.0, 4.0, 3.0, 2.0, 1.0), strict=True))
COSTS = Costs.of([StepCost(name, name, seconds, 0) for name, seconds in SECONDS.items()], [1.0])


def simulate(
    ids: Sequence[str], workers: int = 2, expected: Costs = COSTS, shared: bool = True, deadly: Collection[str] = ()
) -> Simulated:
    """Let workers go through tests of `ids` in simulated time, dying in those that are `deadly`."""
    named = {name if "::" in name else f"test_it.py::test_it[{name}]": name for name in ids}
    found = forecast.simulate(
        list(named), workers, COSTS, shared=shared, expected=expected, dies=lambda nodeid: named[nodeid] in deadly
    )
    return found._replace(by={named[nodeid]: worker for nodeid, worker in found.by.items()})


def within(limit: float, found: Simulated, ids: Sequence[str], workers: int) -> None:
    """Check that the work took at most `limit` times its share, and a test's length more."""
    work = Plan.of(map(parse, ids)).seconds(COSTS)
    assert found.seconds <= limit * work / workers + 1 + max(SECONDS.values())


compositions = st.lists(st.sampled_from(NAMES), max_size=3, unique=True).map(lambda names: "+".join(names) or "base")
suites = st.lists(compositions, max_size=25, unique=True)


@given(suites, st.integers(1, 4), st.booleans(), st.sets(compositions, max_size=3))
@settings(max_examples=200)
def test_each_test_runs_once_whoever_dies(ids: list[str], workers: int, shared: bool, deadly: set[str]) -> None:
    ids = [*ids, "test_plain.py::test_a", "test_plain.py::test_b[x-1]"]
    found = simulate(ids, workers, shared=shared, deadly=deadly)
    assert sorted(found.by) == sorted(ids)
    if shared:
        assert max(found.built.values(), default=1) == 1
    if workers == 1 and not deadly.intersection(ids):
        assert sum(found.built.values()) == Plan.of(map(parse, ids[:-2])).applications


@given(suites)
def test_the_order_is_depth_first_and_of_siblings_the_longest_first(ids: list[str]) -> None:
    uses = [parse(name) for name in ids]
    order = [uses[i] for i in longest_first(uses, lambda step: 1.0 if step is None else SECONDS[step.method])]
    assert sorted(order) == sorted(uses)
    assert Plan.of(order).order == tuple(order)
    for above in {use.prefixes()[k] for use in uses for k in range(len(use.steps))} | {Composition()}:
        level = len(above.steps) + 1
        subtrees = [
            list(tests)
            for state, tests in itertools.groupby(order, key=lambda use: use.steps[:level])
            if len(state) == level and state[:-1] == above.steps
        ]
        seconds = [
            Plan.of(tests).seconds(COSTS) - sum(SECONDS[step.method] for step in above.steps) for tests in subtrees
        ]
        assert seconds == sorted(seconds, reverse=True)


def test_the_pairs_suite_stays_in_subtrees_and_keeps_both_workers_busy() -> None:
    recipe = load_recipe(SUITE_FOLDER / "conf", ["suite=pairs"])
    wanted = [c for c in recipe.suite_compositions() if all(step.method in SECONDS for step in c.steps)]
    ids = [str(c) for c in wanted]
    for shared in (True, False):
        found = simulate(ids, 2, shared=shared)
        assert sum(found.built.values()) - Plan.of(wanted).applications <= (0 if shared else 1)
        within(1.1, found, ids, 2)
    assert next(iter(found.by)) == "base"  # every gate that compares needs it


@pytest.mark.parametrize("shared", [True, False])
def test_a_single_big_subtree_is_split(shared: bool) -> None:
    wanted = [c for c in permutations([parse(n).steps[0] for n in NAMES], 4) if c.steps[0].method == "awq"]
    ids = [str(c) for c in wanted]
    for workers in (2, 4):
        found = simulate(ids, workers, shared=shared)
        shares = Counter(found.by.values())
        assert len(shares) == workers
        within(1.2, found, ids, workers)


def test_a_worker_is_not_sent_for_what_it_would_have_to_build_again() -> None:
    ids = ["ft", "ft+awq", "ft+awq+ga"]
    alone = simulate(ids, 2, shared=False)
    assert set(alone.by.values()) == {"gw0"}
    # The other one could only wait for the first step, but then measures at the same time.
    assert simulate(ids, 2, shared=True).seconds <= alone.seconds


def test_without_any_earlier_run_every_step_counts_alike() -> None:
    ids = ["awq", "memit", "memit+awq", "memit+ga", "awq+memit", "ga"]
    assert list(simulate(ids, 1, expected=Costs()).by) == ["memit", "memit+awq", "memit+ga", "awq", "awq+memit", "ga"]


def test_the_forecast_of_one_worker_is_the_plan_and_more_are_never_slower() -> None:
    wanted = permutations([parse(name).steps[0] for name in NAMES], 3)
    times = [forecast.forecast(wanted, workers, COSTS) for workers in (1, 2, 4, 64)]
    assert times[0] == pytest.approx(Plan.of(wanted).seconds(COSTS))
    assert times == sorted(times, reverse=True)
    assert times[1] < 1.1 * times[0] / 2
    longest = max(sum(SECONDS[step.method] for step in composition.steps) for composition in wanted)
    assert times[-1] >= longest + 1.0  # no number of workers builds a state before its parent


@pytest.mark.parametrize(
    ("nodeid", "expected"),
    [
        ("a/test_x.py::test_it[memit+awq]", "memit+awq"),
        ("test_x.py::TestIt::test_it[base]", "base"),
        ("test_x.py::test_it[3-ft[lr=1e-4]+awq-x]", "ft[lr=1e-4]+awq"),
        ("test_x.py::test_it[awq[bits=3]]", "awq[bits=3]"),
        ("test_x.py::test_it", None),
        ("test_x.py::test_it[3-x]", None),
        ("test_x.py::test_it[memit+unheard-of]", None),
        ("a[memit]/test_x.py::test_it", None),
    ],
)
def test_a_composition_is_found_in_a_node_id(nodeid: str, expected: str | None) -> None:
    assert composition_in(nodeid) == (None if expected is None else parse(expected))


@pytest.mark.parametrize(
    ("worker", "arguments", "released"),
    [(True, [], ["awq+ga", "awq+ga+ft"]), (True, ["--dist=load"], []), (False, [], [])],
)
def test_a_worker_forgets_states_of_the_subtree_that_it_leaves(
    pytester: pytest.Pytester, worker: bool, arguments: list[str], released: list[str]
) -> None:
    config: Any = pytester.parseconfig(*LIGHT, *arguments)
    if worker:
        config.workerinput = {}
    session = Session(config, read_options(config))
    found: list[str] = []
    recipe = SimpleNamespace(reads=lambda step: ())
    run: Any = SimpleNamespace(release=lambda states: found.extend(map(str, states)), results={}, recipe=recipe)
    session._run = run
    # As far as this process knows, all tests may still come here.
    session.expect([parse(name) for name in ("awq+ga+ft", "awq+ga+ft", "awq+memit", "awq+ga")])
    session.tested(parse("awq+ga+ft"), parse("awq+memit"))
    assert found == released


# On real workers; without torch, which takes seconds to import.

LOG = """
import os, pathlib, signal
import pytest

def note(kind, text):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "none")
    with open(pathlib.Path(__file__).parent / kind, "a") as stream:
        stream.write(f"{worker} {text}\\n")
"""
COMPOSED = (
    LOG
    + """
def test_it(composition):
    note("ran", composition)
    if str(composition) in pathlib.Path(__file__).with_name("deadly").read_text().split():
        os.kill(os.getpid(), signal.SIGKILL)
"""
)
CHOSEN = """
import sys
def pytest_sessionfinish(session):
    workers = session.config.pluginmanager.getplugin("dsession")
    if workers is not None:
        print("\\nchosen", type(getattr(workers.sched, "_chosen", workers.sched)).__name__)
        assert "torch" not in sys.modules
"""


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


@pytest.fixture
def logged(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project whose tests note who ran them, and die in those that the file `deadly` names."""
    pytester.makeconftest(CHOSEN)
    pytester.makepyfile(test_inner=COMPOSED)
    (pytester.path / "deadly").write_text("")
    return pytester


def run(pytester: pytest.Pytester, *arguments: str, compose: Sequence[str] = ()) -> pytest.RunResult:
    chosen = [f"--lmcompose-compose={name}" for name in compose]
    return pytester.runpytest_subprocess(*LIGHT, "-s", "--lmcompose-no-cache", *chosen, *arguments)


SUITE = ("base", "memit", "memit+awq", "memit+ga", "awq", "awq+memit", "awq+ga")


def test_workers_keep_subtrees_and_one_that_dies_is_told_once_while_the_rest_goes_on(logged: pytest.Pytester) -> None:
    deadly = ("memit+awq", "awq+memit")
    (logged.path / "deadly").write_text(" ".join(deadly))
    result = run(logged, "-n2", "--lmcompose-json=report.json", compose=SUITE)
    result.assert_outcomes(passed=5, failed=2)
    result.stdout.fnmatch_lines(["chosen PrefixScheduling"])
    assert result.stdout.str().count("replacing crashed worker") == 2
    ran = [(who, parse(composition)) for who, composition in lines(logged.path / "ran")]
    assert sorted(str(composition) for _, composition in ran) == sorted(SUITE)
    for worker in {who for who, _ in ran}:
        own = [composition for who, composition in ran if who == worker]
        assert Plan.of(own).order == tuple(own)
    records = by_id(read_report(logged.path / "report.json"))
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(deadly, "failed")
    assert re.search(r"worker 'gw\d' crashed while running .*\[memit\+awq\]", records["memit+awq"]["error"])


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["-n2"], False),
        (["-n2", "--dist=no"], False),
        (["-n2", "--dist=load"], True),
        (["--dist", "worksteal", "-nauto"], True),
        (["-d", "--tx=2*popen"], True),
    ],
)
def test_what_counts_as_asking_for_a_distribution(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, arguments: list[str], asked: bool
) -> None:
    assert asked_for_distribution(pytester.parseconfig(*LIGHT, *arguments)) == asked
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(arguments))
    assert asked_for_distribution(pytester.parseconfig(*LIGHT)) == asked


def test_nothing_here_needs_xdist(logged: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    logged.makepyfile(without_xdist="import sys\nsys.modules['xdist'] = sys.modules['execnet'] = None")
    monkeypatch.setenv("PYTHONPATH", str(logged.path))
    blocked = ("-pwithout_xdist", "-pno:xdist", "-pno:xdist.looponfail")
    result = run(logged, *blocked, "--lmcompose-gpus-per-worker=2", compose=SUITE)
    result.assert_outcomes(passed=7)


# GPUs.

LISTED = """\
GPU 0: NVIDIA H200 (UUID: GPU-11111111-2222-3333-4444-555555555555)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22222222-2222-3333-4444-555555555555)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-2222-3333-4444-555555555555)
  MIG 3g.20gb     Device  1: (UUID: MIG-bbbbbbbb-2222-3333-4444-555555555555)
GPU 2: NVIDIA H200 (UUID: GPU-33333333-2222-3333-4444-555555555555)
"""
FOUND = ("0", "MIG-aaaaaaaa-2222-3333-4444-555555555555", "MIG-bbbbbbbb-2222-3333-4444-555555555555", "2")


def fake_nvidia_smi(folder: Path, text: str = LISTED, code: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nassert sys.argv[1:] == ['-L']\nsys.stdout.write({text!r})\nsys.exit({code})\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0,1", ("0", "1")),
        (" 3 , 1", ("3", "1")),
        ("GPU-1a,GPU-2b", ("GPU-1a", "GPU-2b")),
        ("MIG-GPU-1a/1/0,MIG-2b", ("MIG-GPU-1a/1/0", "MIG-2b")),
        ("", ()),
        ("-1", ()),
        ("0,-1,1", ("0",)),
        ("NoDevFiles", ()),
    ],
)
def test_the_variable_says_which_gpus_there_are(value: str, expected: tuple[str, ...]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value, "PATH": "/nowhere"}) == expected


def test_without_the_variable_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, expected in ((0, FOUND), (9, ())):
        folder = fake_nvidia_smi(tmp_path / str(code), code=code)
        monkeypatch.setenv("PATH", str(folder))
        assert visible_gpus({"PATH": str(folder)}) == expected
    monkeypatch.setenv("PATH", "/nowhere")
    assert visible_gpus({}) == ()


def test_workers_share_gpus_if_there_are_more_of_them() -> None:
    gpus = ("a", "b", "c", "d", "e")
    assert [share_of(gpus, worker, 2) for worker in range(3)] == [("a", "b"), ("c", "d"), ("a", "b")]


def workers(pytester: pytest.Pytester, *arguments: str) -> Workers:
    """Return the hooks of a run with `arguments`, before it starts."""
    config = pytester.parseconfig(*LIGHT, *arguments)
    return Workers(pytest.fail, lambda: read_options(config))


def pins(hooks: Workers, *specs: str) -> list[str | None]:
    """Return the variable that workers of `specs` are started with."""
    found = [XSpec(spec) for spec in specs]
    for number, spec in enumerate(found):
        spec.id = f"gw{number}"
    hooks.pytest_xdist_setupnodes(found)
    assert [spec.id for spec in found] == [f"gw{number}" for number in range(len(specs))]
    return [spec.env.get("CUDA_VISIBLE_DEVICES") for spec in found]


@pytest.mark.parametrize(
    ("arguments", "variable", "count", "pinned"),
    [
        ([], "3,1,2", 3, ["3", "1", "2", "3"]),
        (["--lmcompose-gpus-per-worker=2"], "GPU-c,MIG-b,5,1,0", 2, ["GPU-c,MIG-b", "5,1", "GPU-c,MIG-b", "5,1"]),
        (["--lmcompose-gpus-per-worker=0"], "3,1", None, [None] * 4),
        (["--lmcompose-device=cpu"], "3,1", None, [None] * 4),
        (["--lmcompose-device=cuda:1"], "3,1", 1, [None] * 4),
        (["--lmcompose-device=cuda"], "3,1", 2, ["3", "1", "3", "1"]),
        ([], "", None, [None] * 4),
    ],
)
def test_who_gets_which_gpus(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    variable: str,
    count: int | None,
    pinned: list[str | None],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    hooks = workers(pytester, *arguments)
    assert hooks.pytest_xdist_auto_num_workers() == count
    assert pins(hooks, *["popen"] * 4) == pinned
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "7")
    assert hooks.pytest_xdist_auto_num_workers() is None


def test_workers_elsewhere_or_with_gpus_of_the_users_choice_are_left_alone(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    specs = ("ssh=there", "popen//env:CUDA_VISIBLE_DEVICES=7", "popen//python=python3")
    assert pins(workers(pytester), *specs) == [None, "7", "0"]


SEES = (
    LOG
    + """
@pytest.mark.parametrize("number", range(6))
def test_it(number):
    note("sees", f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.environ['PYTEST_XDIST_WORKER_COUNT']}")
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
"""
)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [(None, (",".join(FOUND[:2]), ",".join(FOUND[2:]))), ("GPU-c,GPU-a,5,MIG-b,7", ("GPU-c,GPU-a", "5,MIG-b"))],
)
def test_real_workers_and_those_that_replace_them_see_gpus_of_their_own(
    pytester: pytest.Pytester,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    expected: tuple[str, str],
) -> None:
    pytester.makeconftest(CHOSEN)
    pytester.makepyfile(test_inner=SEES)
    folder = fake_nvidia_smi(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    result = run(pytester, "-nauto", "--lmcompose-gpus-per-worker=2")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["chosen LoadScheduling"])  # there are no compositions among the tests
    seen = {who: what for who, *what in lines(pytester.path / "sees")}
    gpus = dict(zip(("gw0", "gw1"), expected, strict=True))
    crashed = re.search(r"worker '(gw[01])' crashed", result.stdout.str())
    assert crashed is not None
    gpus["gw2"] = gpus[crashed[1]]  # the one that replaced it, if there was work left
    assert crashed[1] in seen
    assert seen == {who: [gpus[who], "2"] for who in seen}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lmcompose-gpus-per-worker=some", "-n2"], "expected a whole number from 0 up, not 'some'"),
        (["--lmcompose-gpus-per-worker=5", "-n2"], "--lmcompose-gpus-per-worker=5: only 4 GPUs are visible"),
        (["--lmcompose-gpus-per-worker=5", "-nauto"], "--lmcompose-gpus-per-worker=5: only 4 GPUs are visible"),
    ],
)
def test_gpus_that_are_not_there(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    pytester.makepyfile(test_inner="def test_it(): pass")
    result = pytester.runpytest_inprocess(*LIGHT, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str() + result.stdout.str()


# Whole runs. What is not here, -n 2 alone on one store, is in test_cache.


@pytest.mark.slow
def test_reports_are_the_same_however_tests_are_distributed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums of other threads round otherwise
    (project.path / "thresholds.yaml").write_text("'*': {perplexity: {max_ratio_of_base: 100, no_drop_p: 0.001}}")
    ids = ("base", "nudge", "nudge+round", "nudge+refuse", "round", "round+nudge")

    told: list[str] = []

    def report(*arguments: str, apart: bool = False) -> dict[str, Any]:
        result = (project.run_apart if apart else project.run)("--lmcompose-json=report.json", *arguments, compose=ids)
        result.assert_outcomes(passed=5, errors=1)
        found: dict[str, Any] = without_times(read_report(project.path / "report.json"))
        told.append(result.stdout.str())
        found["compositions"].sort(key=lambda record: ids.index(record["id"]))
        return found

    alone = report("-n0")
    assert report("--dist=no") == alone
    assert report("-pno:xdist", "-pno:xdist.looponfail") == alone
    for distribution, scheduler in (("load", "LoadScheduling"), ("worksteal", "WorkStealingScheduling")):
        assert report("-n2", f"--dist={distribution}", "-v", apart=True) == alone
        assert f"scheduling tests via {scheduler}" in told[-1]
