"""`lmcompose build`, `verify` and `gate`: checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from pytest_lmcompose.cli.planning import arguments, options
from pytest_lmcompose.cli.problems import ERROR, FAILED, CommandError
from pytest_lmcompose.report.text import visible

_MEASURED = "compositions.test_compositions"
_BUILT = "pytest_lmcompose.checkpoints.build_only"
_SHOWN = ("model", "world", "conf", "set", "thresholds", "seed", "device", "json", "cache-dir", "no-cache")
_OWN = ("compose", "suite", "shard", "plan", "export", "export-format", "engine", "gpus-per-worker")
"""Flags that make no sense for a single composition, or have another name here."""
_FOLDER = click.Path(path_type=Path)


class _RunCommand(click.Command):
    """A command that also takes the plugin's flags; they are created on first use, because importing them is slow."""

    _complete = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self._complete:
            own = {parameter.name for parameter in self.params}
            self.params += [option for option in options(_SHOWN, _OWN) if option.name not in own]
            self._complete = True
        return super().get_params(ctx)


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


@click.command(cls=_RunCommand)
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
@click.argument("report", type=_FOLDER)
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model.")
def verify(folder: Path, report: Path, trust_remote_code: bool) -> None:
    """Say which composition of REPORT the model in FOLDER is.

    Hashes the weights, of a packed folder those that a loader gets, and the files that were written with them. The exit
    code is 0 if FOLDER is a composition of REPORT and unchanged, and 1 if not.
    """
    from pytest_lmcompose.baseline.storage import StorageError, read_run
    from pytest_lmcompose.checkpoints.verify import verify as answer
    from pytest_lmcompose.errors import RecipeError

    try:
        found = answer(folder, read_run(report), str(report), trust_remote_code=trust_remote_code)
    except (StorageError, RecipeError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None
    click.echo(visible(found.message))
    if not found.same:
        raise click.exceptions.Exit(FAILED)
