"""`lmcompose build`, `verify` and `gate`: checkpoint folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import pytest

from pytest_lmcompose.cli.console import Console
from pytest_lmcompose.cli.logs import judge_two_logs, tell_github
from pytest_lmcompose.cli.planning import RunCommand, arguments, run_pytest
from pytest_lmcompose.cli.problems import ERROR, FAILED, CommandError
from pytest_lmcompose.cli.runs import STORAGE, load
from pytest_lmcompose.report.text import visible
from pytest_lmcompose.texts import counted

if TYPE_CHECKING:
    from pytest_lmcompose.checkpoints.judge import Judged
    from pytest_lmcompose.results import Report

_MEASURED = "compositions.test_compositions"
_BUILT = "pytest_lmcompose.checkpoints.build_only"
_BUILD = ("model", "world", "conf", "set", "thresholds", "seed", "device", "json", "cache-dir", "no-cache")
_GATE = ("world", "conf", "set", "thresholds", "seed", "repeats", "device")
_NOT_BUILD = ("compose", "suite", "shard", "plan", "export", "export-format", "engine", "gpus-per-worker")
"""Flags that make no sense for a single composition, or have another name here."""
_FOLDER = click.Path(path_type=Path)


class _Build:
    """A pytest plugin that exports the only composition of the run to a folder."""

    def __init__(self, folder: Path, format: str | None) -> None:
        self._folder, self._format = folder, format
        self.written = False

    @pytest.hookimpl(trylast=True)  # after the plugin has made its session
    def pytest_configure(self, config: pytest.Config) -> None:
        from pytest_lmcompose import session_checks
        from pytest_lmcompose.checkpoints.options import PLAIN, ExportOptions
        from pytest_lmcompose.session import SESSION

        session = config.stash[SESSION]
        session.exports = ExportOptions(self._folder.expanduser().absolute(), self._format or PLAIN, single=True)
        session_checks.check_exports(session)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from pytest_lmcompose.session import SESSION

        own = session.config.stash[SESSION]
        self.written = own.has_results and any(record.export is not None for record in own.collected.results)


@click.command(cls=RunCommand, shown=_BUILD, without=_NOT_BUILD)
@click.argument("composition")
@click.option("--output", "-o", required=True, type=_FOLDER, metavar="DIR", help="Folder to write.")
@click.option("--format", metavar="FORMAT", help="plain, compressed-tensors, gptq or awq.  [default: plain]")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure and judge it too.")
def build(composition: str, output: Path, format: str | None, measure: bool, **values: Any) -> None:
    """Build COMPOSITION, such as "memit+awq", and write it to a folder.

    The folder contains weights, config, tokenizer, a model card and lmcompose.json; `from_pretrained` loads it. It is
    replaced if this command wrote it before. Takes the options of `pytest compositions` and uses the same recipe, cache
    and seeds, so an interrupted build resumes. The exit code is 1 if a gate failed: the folder is written, and its card
    says so. It is 2 if nothing was written.
    """
    from pytest_lmcompose.checkpoints.options import FORMATS

    if format is not None and format not in FORMATS:
        raise CommandError(f"--format={format}: expected {', '.join(FORMATS)}")
    plugin = _Build(output, format)
    given = [*arguments(values), f"--lmcompose-compose={composition}"]
    code = pytest.main(
        ["--pyargs", _MEASURED if measure else _BUILT, "-p", "no:cacheprovider", "--no-header", "-n0", *given],
        plugins=[plugin],
    )
    if code:
        finished = code == pytest.ExitCode.TESTS_FAILED and plugin.written
        raise click.exceptions.Exit(FAILED if finished else ERROR)


@click.command()
@click.argument("folder", type=_FOLDER)
@click.argument("report")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model.")
@STORAGE
def verify(folder: Path, report: str, trust_remote_code: bool, storage: Path) -> None:
    """Say which composition of REPORT the model in FOLDER is.

    Hashes the weights, of a packed folder those that a loader gets, and the files that were written with them. The exit
    code is 0 if FOLDER is a composition of REPORT and unchanged, and 1 if not.
    """
    from pytest_lmcompose.checkpoints.verify import verify as answer
    from pytest_lmcompose.errors import RecipeError

    path, run = load(report, storage)
    try:
        found = answer(folder, run, str(path), trust_remote_code=trust_remote_code)
    except RecipeError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None
    click.echo(visible(found.message))
    if not found.same:
        raise click.exceptions.Exit(FAILED)


class _Judge:
    """A pytest plugin that judges a folder as soon as options and ini values are known, and collects no tests."""

    def __init__(self, folder: Path, baseline: Path, report: Report, composition: str | None, trusts: bool) -> None:
        self._folder, self._baseline, self._report = folder, baseline, report
        self._composition, self._trusts = composition, trusts
        self.found: Judged | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        from evaluators.measurement import EvaluationError
        from pytest_lmcompose.baseline.reference import Baseline
        from pytest_lmcompose.checkpoints.judge import FolderRun, judge_folder
        from pytest_lmcompose.data.records import WorldError
        from pytest_lmcompose.failures import usage_errors
        from pytest_lmcompose.options import read_options

        def progress(line: str) -> None:
            click.echo(visible(line), err=True)

        baseline = Baseline(self._baseline, self._report)
        options = read_options(config)
        run = FolderRun(self._folder, baseline, self._composition, options, progress, trusts=self._trusts)
        with usage_errors():
            try:
                self.found = judge_folder(run)
            except (WorldError, EvaluationError) as error:
                raise pytest.UsageError(f"lmcompose: {error}") from None
        return 0


@click.command(cls=RunCommand, shown=_GATE)
@click.argument("folder", type=_FOLDER)
@click.argument("new", type=_FOLDER, required=False)
@click.option("--baseline", metavar="RUN", help="Report, or stored run, to compare the model in FOLDER with.")
@click.option(
    "--fail", "-f", "expressions", multiple=True, metavar="METRIC:LIMIT", help="When NEW fails.  [default: *:p0.05]"
)
@click.option("--common", is_flag=True, help="Judge NEW by the samples that both logs have.")
@click.option("--any-prompt", is_flag=True, help="Pair samples by their ids although their prompts differ.")
@click.option("--as", "composition", metavar="ID", help="Judge by the rules for this composition, such as memit+awq.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model.")
@click.option("--all", "-a", "every", is_flag=True, help="Show every metric, not only those with a gate.")
@click.option("--no-github", is_flag=True, help="In GitHub Actions: no annotations, and no job summary.")
@STORAGE
def gate(
    folder: Path,
    new: Path | None,
    baseline: str | None,
    expressions: Sequence[str],
    common: bool,
    any_prompt: bool,
    composition: str | None,
    trust_remote_code: bool,
    every: bool,
    no_github: bool,
    storage: Path,
    **values: Any,
) -> None:
    """Measure the model in FOLDER and judge it, or judge the evaluation log NEW by an earlier one.

    With NEW, both are logs of lm-evaluation-harness, Inspect or LightEval, or reports of lmcompose. Nothing is
    measured; samples are compared in pairs. METRIC is TASK/METRIC, and LIMIT as for --lmcompose-compare-fail.

    Otherwise, seeds, data, evaluation settings and thresholds are those of the baseline's run unless you set others.
    Bounds relative to the base model compare with the base model of that run, and bounds that name a composition with
    that composition there. The exit code is 1 if a gate failed or none applied.
    """
    from pytest_lmcompose.report.terminal import write_summary

    if new is not None:
        if baseline is not None or composition is not None:
            raise click.UsageError("--baseline and --as are for a model's folder, not for two logs")
        judge_two_logs(
            folder, new, expressions, common=common, any_prompt=any_prompt, every=every, github=not no_github
        )
        return
    if baseline is None:
        raise click.UsageError("name a log NEW to judge by FOLDER, or --baseline to judge the model in FOLDER")
    if expressions or common or any_prompt:
        raise click.UsageError(
            "--fail, --common and --any-prompt are for two logs; a model's folder is judged by --thresholds"
        )
    path, report = load(baseline, storage)
    seeds = {"seed": str(report.seed), "repeats": str(report.repeats)}
    given = arguments({**values, **{key: values.get(key) or value for key, value in seeds.items()}})
    judge = _Judge(folder, path, report, composition, trust_remote_code)
    if run_pytest(judge, "-n0", *given) or judge.found is None:
        raise click.exceptions.Exit(ERROR)
    record = judge.found.folder
    console = cast(pytest.TerminalReporter, Console())
    write_summary(console, judge.found, lambda metric: every)
    for found in record.gates:
        if not found.passed:
            click.echo(visible(f"failed: {found.message}"))
    if not no_github:
        tell_github(f"{folder}, judged by {path}", record.gates, folder)
    failed = sum(not found.passed for found in record.gates)
    if not record.gates:
        click.echo(f"{folder}: no threshold applies to it")
    else:
        click.echo(visible(f"{folder}: {failed} of {counted(len(record.gates), 'gate')} failed"))
    if failed or not record.gates:
        raise click.exceptions.Exit(FAILED)
