"""Runs on a Ray cluster: how they are divided, what a part does on a node, and a cluster of two nodes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lmcompose.composition import Composition, Step, parse
from pytest_lmcompose.distribute.ray.parts import Part, parts
from pytest_lmcompose.distribute.ray.work import Job, run_part
from pytest_lmcompose.plan import Plan
from tests.plugin.conftest import NO_CACHE, Project
from tests.plugin.test_cache import STEPS, applied, without_times
from tests.plugin.test_plan import plans
from tests.plugin.test_run import by_id, read_report


def alike(step: Step | None) -> float:
    return 1.0


def built(part: Part) -> set[Composition]:
    """Return the states that a part builds from the one that it starts from."""
    ends = (*part.compositions, *([part.leaves] if part.leaves is not None else []))
    return {prefix for c in ends for prefix in c.prefixes()} - set(part.start.prefixes())


@given(plans, st.integers(1, 9))
def test_parts_test_everything_once_and_build_every_state_once(wanted: list[Composition], tasks: int) -> None:
    found = parts(wanted, tasks, alike)
    assert sorted(c for part in found for c in part.compositions) == sorted(set(wanted))
    for number, part in enumerate(found):
        if part.after is None:
            assert part.start == Composition()
        else:
            assert part.after < number and found[part.after].leaves == part.start
    states = [state for part in found for state in sorted(built(part) | {part.leaves or Composition()} - {part.start})]
    first_states = [state for state in states if state.steps]
    # Two bundles below the same state share nothing; so no state is built twice.
    assert sorted(first_states) == sorted(Plan.of(wanted).states)


@given(plans, st.integers(1, 9))
def test_no_part_is_larger_than_its_share_or_one_state(wanted: list[Composition], tasks: int) -> None:
    whole = Plan.of(wanted).applications + len(set(wanted))
    for part in parts(wanted, tasks, alike):
        size = len(built(part)) + len(part.compositions)
        assert size <= max(whole / tasks, 2.0) or len(part.compositions) <= 1
        assert part.cost >= size


def test_what_is_small_stays_together() -> None:
    wanted = [parse(text) for text in ("a", "a+b", "a+c", "b", "b+a")]
    assert len(parts(wanted, 8, alike)) > 3
    assert [part.compositions for part in parts(wanted, 8, alike, least=100)] == [tuple(sorted(wanted))]


def job(project: Project, compose: tuple[str, ...], **environment: str) -> Job:
    chosen = (f"--lmcompose-compose={name}" for name in compose)
    arguments = ("-pno:cacheprovider", "-pno:hypothesispytest", *project.arguments, *chosen)
    return Job(arguments, str(project.path), environment, {})


def ids(*compositions: str) -> list[str]:
    return [f"test_inner.py::test_it[{name}]" for name in compositions]


@pytest.mark.slow
def test_a_part_starts_from_the_state_that_another_node_built(project: Project) -> None:
    project.arguments.remove(NO_CACHE)
    compose = ("nudge", "nudge+round")
    stores = [str(project.path / name) for name in ("one", "two")]
    outcome, parcels = run_part(job(project, compose, XDG_CACHE_HOME=stores[0]), "p1", ids("nudge"), "nudge")
    assert len(parcels) == 1 and not outcome.unreported and not outcome.crashed
    assert [report["outcome"] for report in outcome.reports if report.get("when") == "call"].count("passed") >= 1
    assert "[p1] nudge  step 1/1 nudge" in "\n".join(outcome.lines)
    behind, nothing = run_part(job(project, compose, XDG_CACHE_HOME=stores[1]), "p2", ids("nudge+round"), None, parcels)
    lines = "\n".join(behind.lines)
    assert "nudge  read from the cache" in lines and "step 2/2 round" in lines and "step 1/2" not in lines
    assert nothing == {} and not behind.unreported


CRASH = """
import os, signal
import pytest

@pytest.fixture(autouse=True)
def crash(composition):
    if composition.id == "nudge":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_test_that_kills_its_process_is_told_and_the_next_ones_run(project: Project) -> None:
    path = project.path / "test_inner.py"
    path.write_text(CRASH + path.read_text())
    tests = ids("base", "nudge", "round")
    outcome, parcels = run_part(job(project, ("base", "nudge", "round")), "p1", tests, None)
    assert list(outcome.crashed) == ids("nudge")
    assert outcome.crashed[tests[1]].startswith("the process was killed by signal 9 while it ran this test")
    passed = {report["nodeid"] for report in outcome.reports if report["when"] == "call"}
    assert passed == {tests[0], tests[2]} and parcels == {} and outcome.unreported == []


def test_a_project_that_is_not_there_is_told(project: Project) -> None:
    outcome, _ = run_part(job(project, ("base",)), "p1", ["test_gone.py::test_it[base]"], None)
    assert outcome.unreported == ["test_gone.py::test_it[base]"] and "deselected" in outcome.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lmcompose-engine=cloud"], "--lmcompose-engine=cloud: there is no such engine"),
        (["--lmcompose-engine=ray", NO_CACHE], "passes states between tasks through the cache"),
        (["--lmcompose-engine=ray", "-n2"], "--lmcompose-engine=ray and -n cannot be combined"),
    ],
)
def test_flags_that_do_not_go_with_it(
    project: Project, refused: Callable[..., str], arguments: list[str], message: str
) -> None:
    project.arguments.remove(NO_CACHE)
    assert message in refused(*arguments)


def test_without_ray_the_extra_is_named(
    project: Project, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    assert "Ray is not installed; pip install 'pytest-lmcompose[ray]'" in refused("--lmcompose-engine=ray")


class Nodes:
    """A cluster of two nodes on this machine, each with a store of its own."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.folder = folder
        self._cluster: Any = Cluster()
        self.add("one", _system_config={"health_check_period_ms": 500, "health_check_timeout_ms": 500})
        self.add("two")
        self.address: str = self._cluster.address

    def add(self, name: str, **kwargs: Any) -> Any:
        variables = {"XDG_CACHE_HOME": str(self.folder / name), "LMCOMPOSE_TEST_NODE": name}
        return self._cluster.add_node(
            num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, env_vars=variables, **kwargs
        )

    def kill(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("nodes"))
    yield nodes
    nodes.shutdown()


IDS = ("base", "nudge", "nudge+round", "nudge+round[digits=1]", "round", "round+nudge")


def start(project: Project, cluster: Nodes, *arguments: str) -> subprocess.Popen[str]:
    command = project.command(*arguments, "--lmcompose-engine=ray", compose=IDS)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "XDG_CACHE_HOME": str(cluster.folder / "controller")}
    return subprocess.Popen(command, cwd=project.path, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_nodes_report_what_one_process_does(project: Project, cluster: Nodes) -> None:
    project.arguments.remove(NO_CACHE)
    project.pytester.makepyfile(test_other="def test_of_no_composition(): pass")
    process = start(project, cluster, "--lmcompose-json=ray.json", "--junitxml=junit.xml")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert f"{len(IDS) + 1} passed" in output
    steps = [step for step in STEPS if step.startswith("nudge ")]
    told = pytest.RunResult(0, output.splitlines(), [], 0.0)
    assert [step for step in applied(told) if step.endswith(" 1/1 nudge")] == steps  # shared, over both nodes
    assert sum(" 1/2 " in step for step in applied(told)) <= 1
    stores = [list((cluster.folder / name).rglob("changed.safetensors")) for name in ("one", "two")]
    assert all(stores)  # both nodes worked
    project.arguments.append(NO_CACHE)
    project.run("--lmcompose-json=alone.json", compose=IDS)
    one, two = (without_times(read_report(project.path / f"{name}.json")) for name in ("ray", "alone"))
    assert by_id(one) == by_id(two) and one["composability"] == two["composability"]
    assert (project.path / "junit.xml").read_text().count("<testcase") == len(IDS) + 1


WAITS = """
import os, time
import pytest

@pytest.fixture(autouse=True)
def wait(composition):
    node = os.environ["LMCOMPOSE_TEST_NODE"]
    with open("runs", "a") as runs:
        runs.write(f"{composition} {node}\\n")
    while node == "doomed":
        time.sleep(0.1)
"""


@pytest.mark.slow
def test_what_a_dead_node_was_doing_is_done_elsewhere(project: Project, cluster: Nodes) -> None:
    project.arguments.remove(NO_CACHE)
    path = project.path / "test_inner.py"
    path.write_text(WAITS + path.read_text())
    doomed = cluster.add("doomed")
    process = start(project, cluster, "--lmcompose-json=ray.json")
    runs = project.path / "runs"
    deadline = time.monotonic() + 300
    while not (runs.exists() and " doomed\n" in runs.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    cluster.kill(doomed)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0 and f"{len(IDS)} passed" in output, output
    ran = [tuple(line.rsplit(" ", 1)) for line in runs.read_text().splitlines()]
    lost = {composition for composition, node in ran if node == "doomed"}
    assert lost and lost <= {composition for composition, node in ran if node != "doomed"}
    assert set(by_id(read_report(project.path / "ray.json"))) == set(IDS)
