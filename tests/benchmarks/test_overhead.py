"""What the plugin itself costs over thousands of compositions: collection, sending, judging, reporting."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path

import pytest

from tests.plugin.conftest import Project

pytestmark = pytest.mark.benchmark

CASES = 5000
# Evaluators that take no time, and steps whose own time is told: what a method does is none of the plugin's.
STUBS = """
import atexit, pathlib, time
from evaluators.measurement import Measurement
import pytest_lmcompose.build.states, pytest_lmcompose.measure
names = ("edit_success_f1", "perplexity", "recall", "bits", "sparsity")
found = [Measurement(name, 0.5, 0.1, 4, True, (0.0, 1.0, 0.0, 1.0)) for name in names]
pytest_lmcompose.measure.measure_state = lambda *arguments: found
pytest_lmcompose.measure.capture_unedited = lambda *arguments: None
spent = [0.0]
apply = pytest_lmcompose.build.states.apply
def timed(*arguments, **named):
    start = time.process_time()
    try:
        return apply(*arguments, **named)
    finally:
        spent[0] += time.process_time() - start
pytest_lmcompose.build.states.apply = timed
atexit.register(lambda: pathlib.Path(__file__).with_name("applying").write_text(str(spent[0])))
"""
PLAIN = """
import pytest
@pytest.mark.parametrize("number", range({cases}))
def test_it(number): pass
"""
OURS = "def test_it(gates): assert gates and all(gate.passed for gate in gates)"


def seconds(project: Project, *arguments: str) -> float:
    """Return the processor time of a run in a process of its own, without that of steps."""
    applying = project.path / "applying"
    applying.write_text("0")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = project.run_apart("-q", "-pno:logging", *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.ret == pytest.ExitCode.OK
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime - float(applying.read_text())


def write_suite(folder: Path, count: int) -> None:
    steps = [f"nudge[scale=0.0{i}]" for i in range(1, 10)]
    orders = (order for k in range(1, 6) for order in itertools.permutations(steps, k))
    ids = ["+".join(order) for order in itertools.islice(orders, count)]
    assert len(ids) == count
    (folder / "pytest.ini").write_text("[pytest]\nlmcompose_compose =\n" + "".join(f"    {name}\n" for name in ids))


def test_thousands_of_compositions_are_collected_and_run_with_little_overhead(project: Project) -> None:
    conftest = project.path / "conftest.py"
    plain = conftest.read_text()
    write_suite(project.path, CASES)
    collected = seconds(project, "--collect-only")
    conftest.write_text(plain + STUBS)
    spent: dict[tuple[str, int], float] = {}
    for count in (CASES // 10, CASES):
        write_suite(project.path, count)
        runs = {
            "plain": (PLAIN.format(cases=count),),
            "ours": (OURS,),
            "reported": (OURS, "--lmcompose-json=report.json"),
        }
        for kind, (module, *flags) in runs.items():
            (project.path / "test_inner.py").write_text(module)
            spent[kind, count] = seconds(project, *flags)
    per_case = {kind: 1000 * (spent[kind, CASES] - spent[kind, CASES // 10]) / (CASES * 0.9) for kind in runs}
    overhead, reported = per_case["ours"] - per_case["plain"], per_case["reported"] - per_case["plain"]
    print(
        f"collection {collected:.2f} s, a case {per_case['ours']:.2f} ms, {overhead:.2f} ms over pytest's; "
        f"with a report {reported:.2f} ms over it"
    )
    assert collected < 3
    assert overhead < 2  # ms
