"""`lmcompose repair` and `lmcompose tune`: search for compositions and settings that keep all promises."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from pytest_lmcompose.baseline.storage import Storage, StorageError
from pytest_lmcompose.cli.listing import aligned
from pytest_lmcompose.cli.planning import RunCommand, arguments, run_pytest
from pytest_lmcompose.cli.problems import ERROR, FAILED, CommandError
from pytest_lmcompose.cli.runs import STORAGE, load
from pytest_lmcompose.composition import BASE, Composition
from pytest_lmcompose.costs import SECONDS
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.texts import counted

if TYPE_CHECKING:
    from pytest_lmcompose.results import Report
    from pytest_lmcompose.search.bench import Bench
    from pytest_lmcompose.search.records import Repair, Tuning

_RUN = (
    *("model", "world", "conf", "set", "thresholds", "seed", "repeats", "device"),
    *("cache-dir", "no-cache", "allow-commands"),
)
_INTERRUPTED = "interrupted: the trials are kept, so call this again to go on"


class _Duration(click.ParamType[float]):
    """A time such as 90s, 10min or 1h; a number without unit is in seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*(s|min|h)?", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"expected a time such as 90s, 10min or 1h, not {value!r}", param, ctx)
        return float(match[1]) * SECONDS[match[2] or "s"]


_BUDGET = click.option(
    "--budget", type=_Duration(), default="10min", show_default=True, help="Time to search, for each composition."
)
_JSON = click.option("--json", "json_file", metavar="PATH", help="Write all trials as JSON.")


class _InRun:
    """A pytest plugin that works with a run as soon as options and ini values are known, and collects no tests."""

    def __init__(self, work: Callable[[Bench], None]) -> None:
        self._work = work

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        from evaluators.measurement import EvaluationError
        from pytest_lmcompose.data.records import WorldError
        from pytest_lmcompose.devices import check_device
        from pytest_lmcompose.failures import usage_errors
        from pytest_lmcompose.options import read_options
        from pytest_lmcompose.run import Run, ignore
        from pytest_lmcompose.search.bench import Bench
        from pytest_lmcompose.search.tune import SearchError

        with usage_errors():
            run = Run(read_options(config), ignore, lambda text: _show(f"{text}, {bench.deadline} left"))
            bench = Bench(run)
            run.check()
            check_device(run.options.device)
            try:
                self._work(bench)
            except KeyboardInterrupt:
                click.echo(_INTERRUPTED)
            except (WorldError, EvaluationError, SearchError) as error:
                raise pytest.UsageError(f"lmcompose: {error}") from None
        return 0


def _in_run(work: Callable[[Bench], None], given: Sequence[str], compose: Sequence[str]) -> None:
    """Call `work` in a run with these arguments; exit with 2 if it cannot start. An interrupt ends the work."""
    from pytest_lmcompose.search.study import missing_optuna

    if (problem := missing_optuna()) is not None:
        raise CommandError(problem)
    ids = [f"--lmcompose-compose={name}" for name in compose]
    if run_pytest(_InRun(work), "-n0", *given, *ids):
        raise click.exceptions.Exit(ERROR)


def _say(line: str) -> None:
    _show("")
    click.echo(visible(line))


def _show(text: str) -> None:
    """Show `text` as the last line of a terminal, until the next line is printed."""
    if sys.stderr.isatty() and not os.environ.get("CI"):
        width = shutil.get_terminal_size().columns - 1
        click.echo(f"\r{visible(text)[:width]:{width}}\r", nl=False, err=True)


@click.command(cls=RunCommand, shown=_RUN)
@click.argument("what", nargs=-1, required=True, metavar="COMPOSITION...|RUN")
@_BUDGET
@_JSON
@click.option("--html", metavar="PATH", help="Write the page of RUN, with the repairs as the cheapest fixes.")
@click.option("--report", "report_file", metavar="PATH", help="Write the report of RUN with the repairs.")
@STORAGE
def repair(
    what: Sequence[str],
    budget: float,
    json_file: str | None,
    html: str | None,
    report_file: str | None,
    storage: Path,
    **values: Any,
) -> None:
    """Search for the smallest change of a red COMPOSITION, or of each red one of RUN, that turns all gates green.

    Tries another order, a repeated step, layers to spare, and the settings that matter most: single changes first,
    then several, at last what Optuna proposes. Every trial is built, measured and judged as pytest does, with the same
    thresholds. Takes the options of `pytest compositions`; seed and repeats are those of RUN unless you set others.

    Needs the extra search. An interrupted search goes on when you call it again. The exit code is 0 if everything is
    repaired or was green, and 1 if not: then the best composition found is printed.
    """
    from pytest_lmcompose.results import encode
    from pytest_lmcompose.search.records import Repairs, with_repairs

    report = _report(what[0], storage) if len(what) == 1 else None
    if report is None and (html or report_file):
        raise click.UsageError(f"{'--html' if html else '--report'} is about a run: name its report or a stored run")
    _check_files({"--json": json_file, "--html": html, "--report": report_file})
    if report is not None:
        red = [r for r in report.compositions if r.id != BASE and (r.error or any(not g.passed for g in r.gates))]
        what = [record.id for record in red]
        if not what:
            click.echo("every composition is green: there is nothing to repair")
            return
        seeds = {"seed": str(report.seed), "repeats": str(report.repeats)}
        values |= {key: values[key] or value for key, value in seeds.items()}
    given = arguments(values)
    found: list[Repair] = []

    def work(bench: Bench) -> None:
        if report is not None:
            _same_settings(report, bench)
        for composition in bench.run.compositions:
            found.extend(_repaired(bench, composition, budget, given))

    _in_run(work, given, what)
    if len(found) > 1 or len(what) > 1:
        click.echo(f"{sum(one.repaired for one in found)} of {counted(len(what), 'composition')} repaired")
    _write(json_file, lambda: encode(Repairs("repair", 1, budget, tuple(found)), indent=1))
    if report is not None:
        fixed = with_repairs(report, found)
        _write(report_file, lambda: encode(fixed, indent=1))
        if html is not None:
            from pytest_lmcompose.report import html as page

            _write(html, lambda: page.render(fixed))
    if len(found) < len(what) or not all(one.repaired for one in found):
        raise click.exceptions.Exit(FAILED)


@click.command(cls=RunCommand, shown=_RUN)
@click.argument("composition")
@_BUDGET
@click.option("--cost", metavar="METRIC", help="What should be cheap.  [default: average_bits, or perplexity]")
@_JSON
@click.option("--html", metavar="PATH", help="Write a page with the front.")
def tune(
    composition: str, budget: float, cost: str | None, json_file: str | None, html: str | None, **values: Any
) -> None:
    """Search the settings of the last step of COMPOSITION, such as "rmu" or "memit+awq".

    Prints the front: settings that no others beat both in cost and in the least margin of the gates. A margin is the
    distance of a metric from its limit, as a share of the limit; below 0, a gate fails. Every trial is built, measured
    and judged as pytest does. Takes the options of `pytest compositions`.

    Needs the extra search. An interrupted search goes on when you call it again. The exit code is 1 if no settings on
    the front pass all gates.
    """
    from pytest_lmcompose.results import encode

    _check_files({"--json": json_file, "--html": html})
    found: list[Tuning] = []

    def work(bench: Bench) -> None:
        found.append(_tuned(bench, bench.run.compositions[0], budget, cost))

    _in_run(work, arguments(values), [composition])
    if not found:  # interrupted before the first trial
        raise click.exceptions.Exit(FAILED)
    (tuning,) = found
    from pytest_lmcompose.report import tuning as tables

    for line in aligned(iter([tables.head(tuning), *tables.rows(tuning, tuning.front)])):
        _say(line)
    _write(json_file, lambda: encode(tuning, indent=1))
    _write(html, lambda: tables.render(tuning))
    if not any(trial.green for trial in tuning.front):
        raise click.exceptions.Exit(FAILED)


def _tuned(bench: Bench, composition: Composition, budget: float, cost: str | None) -> Tuning:
    from interventions.ranges import searched
    from interventions.registry import category_of
    from pytest_lmcompose.search.bench import Deadline
    from pytest_lmcompose.search.records import Tuning
    from pytest_lmcompose.search.tune import SearchError, Tuner

    if not composition.steps:
        raise SearchError("the base model has no settings: name a method")
    if not any(searched(bench.run.recipe.settings(composition.steps[-1]))):
        raise SearchError(f"{composition.steps[-1].method} has no setting to search")
    usual = "average_bits" if category_of(composition.steps[-1].method) == "compress" else "perplexity"
    limit = Deadline(budget)
    search = Tuner(bench, composition, limit, _say, cost or usual)
    try:
        search.search()
    except KeyboardInterrupt:
        click.echo(_INTERRUPTED)
    return Tuning(
        "tune",
        1,
        composition.id,
        search.cost,
        search.lower_is_cheaper,
        search.first,
        tuple(search.front()),
        tuple(search.study.known.values()),
        budget,
        limit.spent,
    )


def _repaired(bench: Bench, composition: Composition, budget: float, given: Sequence[str]) -> Iterator[Repair]:
    """Search for a repair; print and yield what is found, also if the search is interrupted."""
    from pytest_lmcompose.search.bench import Deadline
    from pytest_lmcompose.search.records import Repair
    from pytest_lmcompose.search.repair import Repairer

    limit, interrupted = Deadline(budget), None
    search = Repairer(bench, composition, limit, _say)
    try:
        search.search()
    except KeyboardInterrupt as error:
        interrupted = error
    best = search.best
    command = shlex.join(["pytest", "--pyargs", "compositions", *given])
    command += f" --lmcompose-compose={shlex.quote(best.composition)}"
    trials = tuple(search.study.known.values())
    found = Repair(composition.id, search.first, best, best.green, command, tuple(search.notes()), trials, limit.spent)
    _print_repair(found)
    yield found
    if interrupted is not None:
        raise interrupted


def _print_repair(found: Repair) -> None:
    from pytest_lmcompose.costs import duration
    from pytest_lmcompose.search.records import extra_cost, verdict

    asked, best = found.asked, found.best
    _show("")
    if asked.green:
        click.echo(visible(f"{found.composition} is green as it is"))
        return
    trials = f"{counted(len(found.trials), 'trial')}, {duration(found.seconds)}"
    head = "repaired" if found.repaired else "not repaired; the best found"
    click.echo(visible(f"{head}: {best.composition}  ({trials})"))
    click.echo(visible(f"  changes: {'; '.join(best.changes) or 'none'} (distance {best.distance})"))
    click.echo(f"  costs: {extra_cost(found)}")
    click.echo(visible(f"  gates: {verdict(best)}"))
    for note in found.notes:
        click.echo(visible(f"  note: {note}"))
    click.echo(visible(f"  run it: {found.command}"))


def _report(name: str, storage: Path) -> Report | None:
    """Return the report of a run of this name; None if there is none, so that it is a composition."""
    try:
        Storage(storage).find(name)
    except StorageError as error:
        if name.endswith(".json") or "/" in name.partition("[")[0]:
            raise CommandError(str(error)) from None
        return None
    return load(name, storage)[1]


def _same_settings(report: Report, bench: Bench) -> None:
    """Raise SearchError if the report has another model, world or evaluation than the run."""
    from interventions.ranges import shown
    from pytest_lmcompose.search.tune import SearchError

    now = bench.run.recipe.plain()
    for name in ("model", "world", "evaluate"):
        for key, value in getattr(report.recipe, name).items():
            if now[name].get(key, value) != value:
                here = shown(now[name][key])
                raise SearchError(f"the run had {name}.{key}={shown(value)}, not {here}: use the options of that run")


def _check_files(files: Mapping[str, str | None]) -> None:
    from pytest_lmcompose.report.files import TargetError, check_targets

    try:
        check_targets({flag: Path(name) for flag, name in files.items() if name is not None}, {})
    except TargetError as error:
        raise CommandError(str(error)) from None


def _write(file: str | None, render: Callable[[], str]) -> None:
    from pytest_lmcompose.report.files import write_text

    if file is not None:
        write_text(Path(file), render().rstrip("\n") + "\n")
