"""Whole runs on one store: what is read, what is made again, and what survives a kill."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.distribute.threads import available_cores
from tests.plugin.conftest import NO_CACHE, Project
from tests.plugin.test_run import by_id, read_report
from tests.plugin.tiny import replace_text

IDS = ("nudge", "nudge+round", "round+nudge")
STEPS = ["nudge 1/1 nudge", "nudge+round 2/2 round", "round+nudge 1/2 round", "round+nudge 2/2 nudge"]
TIMES = re.compile(r"started|finished|seconds|peak_memory_bytes")


@pytest.fixture
def cached(project: Project) -> Project:
    """A project with a store of its own."""
    project.arguments[project.arguments.index(NO_CACHE)] = "--lmcompose-cache-dir=store"
    return project


def applied(result: pytest.RunResult) -> list[str]:
    """Return what was applied: composition, number and step."""
    text = result.stdout.str() + result.stderr.str()
    return [" ".join(found) for found in re.findall(r"(\S+)  step (\d/\d) (\S+)  ", text)]


def measured(result: pytest.RunResult, ids: tuple[str, ...]) -> list[str]:
    """Return which of `ids` were measured anew."""
    text = result.stdout.str() + result.stderr.str()
    read = re.findall(r"(\S+)  (?:\[[\d./]+\][^:]*: )?measurements read from the cache", text)
    return [name for name in ids if name not in read]


def without_times(report: Any) -> Any:
    if isinstance(report, dict):
        return {key: without_times(value) for key, value in report.items() if not TIMES.search(key)}
    return [without_times(item) for item in report] if isinstance(report, list) else report


def test_a_repeated_run_reads_everything_and_reports_the_same(cached: Project) -> None:
    first = cached.run("--lmcompose-json=first.json", compose=IDS)
    again = cached.run("--lmcompose-json=again.json", compose=IDS)
    for result in (first, again):
        result.assert_outcomes(passed=3)
    assert applied(first) == STEPS and measured(first, IDS) == list(IDS)
    assert applied(again) == [] and measured(again, ("base", *IDS)) == []
    one, two = (without_times(read_report(cached.path / f"{name}.json")) for name in ("first", "again"))
    assert one == two
    store = Cache(cached.path / "store", 10**9, print)
    about = [about for kind, about in map(store.about, store.entries()) if kind != "facts"]
    hashes = {entry["composition"]: entry["state_hash"] for entry in about}
    assert hashes == {**{name: record["state_hash"] for name, record in by_id(one).items()}, "round": hashes["round"]}
    wider = cached.run(compose=("nudge+round+nudge", *IDS))
    assert applied(wider) == ["nudge+round+nudge 3/3 nudge"]


def test_no_cache_reads_and_keeps_nothing(cached: Project) -> None:
    cached.run(compose=IDS[:1])
    kept = len(Cache(cached.path / "store", 0, print).entries())
    assert kept == 4  # the facts of the model, the state, and its measurements and the base model's
    cached.arguments.remove("--lmcompose-cache-dir=store")
    cached.pytester.makeini(f"[pytest]\nlmcompose_cache_dir = {cached.path / 'store'}")
    result = cached.run(NO_CACHE, compose=IDS)
    assert applied(result) == STEPS and measured(result, IDS) == list(IDS)
    assert len(Cache(cached.path / "store", 0, print).entries()) == kept
    assert applied(cached.run(compose=IDS)) == STEPS[1:]


CHANGES: dict[str, tuple[Callable[[Path], object] | str, bool]] = {
    "a fact": (lambda world: replace_text(world / "facts.jsonl", "Karth", "Kerth"), False),
    "perplexity text": (lambda world: replace_text(world / "perplexity-heldout.jsonl", "seen", "heard"), False),
    "a question that nobody asks": (
        lambda world: replace_text(world / "questions" / "botany.jsonl", "Where", "Whence"),
        False,
    ),
    "a task that nobody asks": (
        lambda world: replace_text(world.parent / "tasks" / "tinyworld_botany.yaml", "task:", "# Plants.\ntask:"),
        False,
    ),
    "an edit": (lambda world: replace_text(world / "zsre.json", "was born in", "is born in"), True),
    "calibration text": (lambda world: replace_text(world / "calibration.jsonl", "seen", "heard"), True),
    "retain text": (lambda world: replace_text(world / "retain.jsonl", "seen", "heard"), True),
    "forget text": (lambda world: replace_text(world / "forget-venomcraft.jsonl", "seen", "heard"), True),
    "a setting of evaluate": ("--lmcompose-set=evaluate.window=64", False),
    "a setting of the method": ("--lmcompose-set=nudge.scale=0.5", True),
    "the seed": ("--lmcompose-seed=1", True),
    "the dtype": ("--lmcompose-set=model.dtype=bfloat16", True),
}


def test_what_changed_is_made_again(cached: Project, tiny_world: Path) -> None:
    world = Path(shutil.copytree(tiny_world.parent, cached.path / "world")) / tiny_world.name
    cached.arguments[1] = f"--lmcompose-set=world.folder='{world}'"
    cached.run(compose=("nudge",))
    for what, (change, rebuilt) in CHANGES.items():  # one on top of the other
        if callable(change):
            change(world)
        else:
            cached.arguments.append(change)
        result = cached.run(compose=("nudge",))
        # The base model stays what it is if only a step's settings change.
        remade = [] if "nobody" in what else ["nudge"] if "method" in what else ["nudge", "base"]
        assert measured(result, ("nudge", "base")) == remade, what
        assert applied(result) == (["nudge 1/1 nudge"] if rebuilt else []), what
    again = cached.run(compose=("nudge",))
    assert measured(again, ("nudge", "base")) == applied(again) == []


# In a worker of two, as OpenMP's variables are not set.
SHARE = """
def test_share_of_the_cores():
    import os, torch
    from pytest_lmcompose.distribute.threads import available_cores
    assert torch.get_num_threads() == max(1, available_cores() // 2)
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
"""


@pytest.mark.slow
def test_workers_share_cores_and_what_they_build_and_report_the_same_as_one_process(
    cached: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    (cached.path / "thresholds.yaml").write_text("'*': {perplexity: {max_ratio_of_base: 100, no_drop_p: 0.001}}")
    ids = ("nudge", *(f"nudge+round[digits={i}]" for i in (1, 2)), "round[digits=2]+nudge")
    arguments = ("--lmcompose-repeats=2", "--lmcompose-set=evaluate.edits=2")
    share = cached.pytester.makepyfile(test_share=SHARE)
    spread = cached.run_apart("--lmcompose-json=spread.json", *arguments, "-n", "2", compose=ids)
    spread.assert_outcomes(passed=5)
    share.unlink()
    steps = applied(spread)
    assert sum(line.endswith((" 1/1 nudge", " 1/2 nudge")) for line in steps) == 2  # the shared prefix, by repeat
    assert len(steps) == 2 * 5  # in each repeat nudge, two roundings, and both steps of the other order
    cached.arguments[cached.arguments.index("--lmcompose-cache-dir=store")] = NO_CACHE
    monkeypatch.setenv("OMP_NUM_THREADS", str(max(1, available_cores() // 2)))  # sums of other threads round otherwise
    alone = cached.run("--lmcompose-json=alone.json", *arguments, compose=ids)
    alone.assert_outcomes(passed=4)
    for result in (alone, spread):
        result.stdout.fnmatch_lines(["nudge+round* *", "lmcompose report: *"])
    spread.stderr.fnmatch_lines(["[[]gw*[]] nudge+round*  step 2/2 round* *"])
    one, two = (without_times(read_report(cached.path / f"{name}.json")) for name in ("spread", "alone"))
    assert one["composability"] == two["composability"]
    assert one["composability"]["orders"] and one["composability"]["interference"]
    assert by_id(one) == by_id(two)


# Sleeps where a test can kill it: after the first composition was measured, before the second one's step.
SLOW = """
from tests.plugin import stubs
import time, pathlib
fast = stubs.round_weights
def slow(model, tokenizer, settings, resources, context):
    if pathlib.Path("slow").exists():
        pathlib.Path("reached").touch()
        time.sleep(60)
    return fast(model, tokenizer, settings, resources, context)
stubs.round_weights = slow
"""


def start(project: Project, *arguments: str) -> subprocess.Popen[bytes]:
    command = project.command(*arguments, compose=IDS)
    return subprocess.Popen(command, cwd=project.path, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(cached: Project) -> None:
    conftest = cached.path / "conftest.py"
    text = conftest.read_text()
    conftest.write_text(text + SLOW)
    (cached.path / "slow").touch()
    process = start(cached, "-n", "1")
    wait_for(cached.path / "reached", process)
    os.killpg(process.pid, signal.SIGKILL)  # the controller and its worker
    process.wait()
    conftest.write_text(text)
    result = cached.run("--lmcompose-resume", "--lmcompose-json=report.json", compose=IDS)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["lmcompose: resuming the run of *: 2 compositions had finished"])
    assert applied(result) == STEPS[1:] and "nudge" not in measured(result, IDS)
    assert set(by_id(read_report(cached.path / "report.json"))) == {"base", *IDS}
    over = cached.run("--lmcompose-resume", compose=IDS)
    over.stdout.fnmatch_lines(["lmcompose: no interrupted run with these options*"])


MEET = """
import pathlib, torch
pathlib.Path("ready").touch()
"""


@pytest.mark.slow
def test_two_runs_on_one_store_at_once(cached: Project) -> None:
    conftest = cached.path / "conftest.py"
    text = conftest.read_text()
    conftest.write_text(text + MEET)
    process = start(cached, "--lmcompose-json=report0.json")
    wait_for(cached.path / "ready", process)  # it is about to build, as this process is
    conftest.write_text(text)
    cached.run("--lmcompose-json=report1.json", compose=IDS).assert_outcomes(passed=3)
    assert process.wait(timeout=240) == 0
    one, two = (without_times(read_report(cached.path / f"report{i}.json")) for i in range(2))
    assert one == two
    told: list[str] = []
    store = Cache(cached.path / "store", 10**9, told.append)
    assert len(store.entries()) == 1 + 4 + 4  # facts, states, and measurements with the base model's
    assert all(store.read(e.folder.name, store.about(e)[0]) is not None for e in store.entries()) and told == []


def test_a_full_disk_does_not_stop_a_run(cached: Project) -> None:
    # As on a full disk, files cannot grow beyond some bytes; a state is larger.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        result = cached.run(compose=IDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    result.assert_outcomes(passed=3)
    assert applied(result) == STEPS
    assert result.stdout.str().count("going on without storing") == 1


def test_the_plan_is_printed_in_place_of_the_run(cached: Project) -> None:
    ids = ("base", *IDS, "nudge+refuse")
    unknown = cached.run("--lmcompose-plan", "--lmcompose-json=report.json", compose=ids)
    assert unknown.ret == 0
    unknown.stdout.fnmatch_lines(
        [
            "5 compositions: 5 steps to apply instead of 7 (2 saved by shared prefixes)",
            "no cached run shows the cost of nudge, refuse, round",
            "(in brackets: intermediate states, not tested)",
            "base",
            "  nudge",
            "    round",
            "    refuse",
            "  (round)",
            "    nudge",
        ],
        consecutive=True,
    )
    assert applied(unknown) == [] and not (cached.path / "report.json").exists()
    cached.run(compose=IDS)
    known = cached.run("--lmcompose-plan", "-n2", "-k", "nudge and round", compose=IDS)
    known.stdout.fnmatch_lines(
        [
            "2 compositions: 4 steps to apply instead of 4 *",
            "about * s in one process; snapshots take up to * KiB *",
            "about * s with -n 2, if each worker has a core or GPU of its own",
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lmcompose-no-cache", "--lmcompose-cache-dir=x"], "cannot be combined"),
        (["--lmcompose-no-cache", "--lmcompose-resume"], "--lmcompose-resume needs the cache"),
        (["--lmcompose-cache-size=much"], "expected a number of GiB, such as 20 or 0.5, not 'much'"),
        (["--lmcompose-cache-size=0"], "expected a number of GiB"),
        (["--lmcompose-cache-dir=test_inner.py"], "this is not a folder"),
    ],
)
def test_flags_that_cannot_be_used(
    project: Project, refused: Callable[..., str], arguments: list[str], message: str
) -> None:
    project.arguments.remove(NO_CACHE)
    assert message in refused(*arguments)
