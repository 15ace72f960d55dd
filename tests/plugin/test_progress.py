"""What the user sees of a run that is working, and how it ends when the user stops it."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from _pytest._io import TerminalWriter

from pytest_lmcompose.composition import parse
from pytest_lmcompose.counter import Counter
from pytest_lmcompose.progress import Progress
from tests.plugin.conftest import Project

A, B, C, BASE = map(parse, ("rtn", "awq", "gptq", "base"))


def counter(repeats: int = 1) -> Counter:
    found = Counter(repeats)
    found.expected = frozenset((A, B, C))
    return found


def test_the_estimate_is_made_of_what_compositions_took_themselves() -> None:
    found = counter()
    assert str(found) == "[0/3]"
    found.measured(BASE, 300.0)  # which gates compare with
    assert str(found) == "[0/3]"
    found.measured(A, 10.0)
    assert str(found) == "[1/3], about 20 s left"
    found.measured(B, None)  # from the cache
    assert str(found) == "[2/3], about 10 s left"
    found.failed(C)
    assert str(found) == "[3/3]"


def test_what_the_cache_had_gives_no_estimate() -> None:
    found = counter()
    found.measured(A, None)
    assert str(found) == "[1/3]"


def test_repeats_count_as_parts_of_a_composition() -> None:
    found = counter(repeats=2)
    found.measured(A, 4.0)
    assert str(found) == "[0.5/3], about 20 s left"
    found.failed(A)
    assert str(found) == "[1/3], about 16 s left"


def test_the_bar_grows_with_what_is_done() -> None:
    found = counter()
    assert found.bar == "  0%|          |"
    found.measured(A, 1.0)
    assert found.bar == " 33%|###3      |"
    for composition in (B, C):
        found.measured(composition, 1.0)
    assert found.bar == "100%|##########|"


def test_nothing_is_counted_where_the_number_is_not_known() -> None:
    found = Counter()
    found.measured(A, 1.0)
    assert str(found) == "" == found.bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Reporter:
    """What is needed of pytest's terminal reporter."""

    def __init__(self, file: Terminal) -> None:
        self._tw = TerminalWriter(file)
        self._tw.fullwidth = 20
        self.isatty = file.isatty()
        self.write_line, self.flush = self._tw.line, self._tw.flush

    def ensure_newline(self) -> None:
        pass


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Terminal]:
    """A config whose reporter writes to a terminal."""
    for name in ("CI", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    plugins = {"terminalreporter": Reporter(terminal)}
    manager = SimpleNamespace(getplugin=plugins.get)
    config = SimpleNamespace(verbosity=0, pluginmanager=manager)
    config.get_verbosity = lambda: config.verbosity
    return config, terminal


def test_a_status_line_is_written_over_and_removed(terminal: tuple[Any, Terminal]) -> None:
    progress, written = Progress(terminal[0]), terminal[1]
    progress.doing("measuring editing 1 of 2")
    progress.doing("short")
    progress("done")
    progress.clear()
    first, *others = written.getvalue().split("\n")
    assert first.split("\r") == ["", "measuring editing 1", "short".ljust(19), " " * 5, "done"]
    assert others == [""]


@pytest.mark.parametrize("how", ["ci", "quiet", "worker", "pipe"])
def test_without_a_terminal_that_somebody_watches_there_is_no_status_line(
    terminal: tuple[Any, Terminal], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    config, written = terminal
    if how == "ci":
        monkeypatch.setenv("CI", "true")
    elif how == "worker":
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    elif how == "quiet":
        config.verbosity = -1
    else:
        config.pluginmanager.getplugin("terminalreporter").isatty = False
    Progress(config).doing("measuring")
    assert written.getvalue() == ""


def test_without_the_reporter_nothing_is_written(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(pytester.parseconfig("-p", "no:terminal"))
    progress("done")
    progress.doing("measuring")
    assert capsys.readouterr().out == ""


STOPPED = """
import os, signal, time

def test_it(composition):
    os.killpg(os.getpgrp(), signal.SIGINT)  # as a terminal does for Ctrl-C
    time.sleep(20)
"""


@pytest.mark.parametrize(("workers", "cached"), [((), False), (("-n", "2"), True)])
def test_an_interrupt_ends_with_the_report_and_says_how_to_go_on(
    pytester: pytest.Pytester, workers: tuple[str, ...], cached: bool
) -> None:
    pytester.makepyfile(test_it=STOPPED)
    store = f"--lmcompose-cache-dir={pytester.path / 'cache'}" if cached else "--lmcompose-no-cache"
    chosen = ("--lmcompose-compose=rtn", "--lmcompose-compose=awq", "--lmcompose-json=report.json", store)
    command = [sys.executable, "-m", "pytest", "-pno:cacheprovider", "-pno:hypothesispytest", *workers, *chosen]
    found = subprocess.run(
        command,
        cwd=pytester.path,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a job of the background
    )
    text = found.stdout + found.stderr
    assert found.returncode == pytest.ExitCode.INTERRUPTED, text
    assert json.loads((pytester.path / "report.json").read_text())["status"] == "interrupted"
    expected = "add --lmcompose-resume to the same command" if cached else "it cannot be resumed"
    assert text.count("lmcompose: stopped; ") == 1 and expected in text
    assert "Traceback" not in text and "INTERNALERROR" not in text


def test_a_failed_gate_is_counted_once_in_a_worker_without_any_option(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("composition", ["rtn"], indirect=True)
        def test_it(composition, subtests):
            with subtests.test("gate"):
                pytest.fail("too low")

        def test_other(subtests):
            with subtests.test("part"):
                pytest.fail("wrong")
    """)
    result = pytester.runpytest_subprocess("-n", "1", "-pno:cacheprovider", "-pno:hypothesispytest")
    result.assert_outcomes(failed=3)  # the other test as pytest counts it: the subtest, and the test that holds it


def test_the_step_and_the_evaluation_are_shown(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Progress, "doing", lambda self, text, **_: shown.append(text))
    assert project.run(compose=("nudge+round",)).ret == pytest.ExitCode.OK
    assert any(text.startswith("  0%|          | [0/1] loading ") for text in shown)
    assert "  0%|          | [0/1] nudge+round  step 2/2 round" in shown
    assert any("[0/1] nudge+round  measuring perplexity (" in text for text in shown)
