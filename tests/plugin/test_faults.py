"""Faults, for real: processes that are killed in the middle of their work, disks that are full, runs that meet.

Nothing that had finished is lost, and nothing that is left is half.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from pytest_lmcompose.cache.folder import Cache
from tests.plugin.conftest import NO_CACHE, Project
from tests.plugin.test_cache import applied, measured, wait_for, without_times
from tests.plugin.test_run import by_id, read_report

IDS = ("base", "nudge", "nudge+round", "round", "round+nudge")
STATES = {"nudge", "nudge+round", "round", "round+nudge"}

# What happens in the middle of the step `round` after another one, while its state is being made.
IN_THE_MIDDLE = """
import os, pathlib, signal, time
from tests.plugin import stubs
fast = stubs.round_weights
def slow(model, tokenizer, settings, resources, context):
    found = fast(model, tokenizer, settings, resources, context)
    here = pathlib.Path(__file__).parent
    if (here / "die").exists():
        (here / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if (here / "wait").exists():
        (here / "reached").write_text(str(os.getpid()))
        time.sleep(120)
    return found
stubs.round_weights = slow
"""


@pytest.fixture
def shared(project: Project) -> Project:
    """A project with a store of its own, whose `round` dies or waits if a file of that name is there."""
    project.arguments[project.arguments.index(NO_CACHE)] = "--lmcompose-cache-dir=store"
    conftest = project.path / "conftest.py"
    conftest.write_text(conftest.read_text() + IN_THE_MIDDLE)
    return project


@contextmanager
def started(project: Project, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the project in a process of its own; it and its workers are gone at the end."""
    process = subprocess.Popen(
        project.command(*arguments, compose=IDS),
        cwd=project.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def check_store(project: Project, states: set[str] = STATES) -> None:
    """Check that the store holds `states`, each whole, and the right one."""
    told: list[str] = []
    store = Cache(project.path / "store", 10**9, told.append)
    entries = store.entries()
    assert all(store.read(e.folder.name, store.about(e)[0]) is not None for e in entries) and told == []
    kinds = [store.about(entry) for entry in entries]
    assert {about["composition"] for kind, about in kinds if kind == "state"} == states


def check_same_as_undisturbed(project: Project, report: str) -> None:
    """Check that `report` says what a run says in which nothing went wrong."""
    index = project.arguments.index("--lmcompose-cache-dir=store")
    project.arguments[index] = NO_CACHE
    project.run("--lmcompose-json=undisturbed.json", compose=IDS)
    project.arguments[index] = "--lmcompose-cache-dir=store"
    one, other = (by_id(without_times(read_report(project.path / name))) for name in (report, "undisturbed.json"))
    assert one == other


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_step_costs_only_its_test(
    shared: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (shared.path / "die").touch()
    result = shared.run_apart("-n1", "--lmcompose-json=report.json", compose=IDS)
    result.assert_outcomes(passed=4, failed=1)
    records = by_id(read_report(shared.path / "report.json"))
    lost = [name for name, record in records.items() if record["status"] != "measured"]
    assert lost in (["round"], ["nudge+round"])  # what came first
    check_store(shared, STATES - {*lost} | {"round"})  # on the way to the last one
    again = shared.run("--lmcompose-resume", "--lmcompose-json=report.json", compose=IDS)
    again.assert_outcomes(passed=5)
    assert measured(again, IDS) == lost and len(applied(again)) == len({*lost} - {"round"})
    check_store(shared)
    check_same_as_undisturbed(shared, "report.json")


@pytest.mark.slow
def test_when_the_controller_is_killed_its_workers_end_and_the_run_can_go_on(
    shared: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (shared.path / "wait").touch()
    with started(shared, "-n1") as process:
        wait_for(shared.path / "reached", process)  # type: ignore[arg-type]
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert alive == []
    (shared.path / "wait").unlink()
    result = shared.run("--lmcompose-resume", "--lmcompose-json=report.json", compose=IDS)
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(["lmcompose: resuming the run of *"])
    check_store(shared)
    check_same_as_undisturbed(shared, "report.json")


@pytest.mark.slow
def test_a_run_takes_over_what_another_one_was_killed_in(shared: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (shared.path / "wait").touch()
    with started(shared) as process:
        wait_for(shared.path / "reached", process)  # type: ignore[arg-type]
        (shared.path / "wait").unlink()
        killer = threading.Timer(1.0, process.kill)
        killer.start()
        start = time.monotonic()
        result = shared.run("--lmcompose-json=report.json", compose=IDS)
        killer.join()
        assert time.monotonic() - start > 1
    result.assert_outcomes(passed=5)
    assert "nudge 1/1 nudge" not in applied(result)  # which the other one had finished
    check_store(shared)
    check_same_as_undisturbed(shared, "report.json")


@contextmanager
def small_disk(folder: Path, count: int) -> Iterator[bool]:
    """Put a disk of `count` bytes at `folder`; where that may not be, let this process write no larger files.

    Yields whether only that folder is small.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={count}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (count // 2, hard))
    try:
        yield mounted
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_it_has_and_stops_no_run(shared: Project) -> None:
    told: list[str] = []
    with small_disk(shared.path / "store", 80_000) as reports:
        for report in ("first.json", "again.json"):
            result = shared.run(*[f"--lmcompose-json={report}"] * reports, compose=IDS)
            result.assert_outcomes(passed=5)
            assert result.stdout.str().count("going on without storing") == 1
            store = Cache(shared.path / "store", 10**9, told.append)
            entries = store.entries()
            assert (
                entries
                and all(store.read(e.folder.name, store.about(e)[0]) is not None for e in entries)
                and told == []
            )
    for report in ("first.json", "again.json") if reports else ():
        check_same_as_undisturbed(shared, report)
