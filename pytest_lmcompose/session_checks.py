"""Check the options before any work: raise pytest.UsageError, or return error messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_lmcompose.checkpoints.options import PLAIN
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.failures import usage_errors
from pytest_lmcompose.options import LOCAL
from pytest_lmcompose.report.files import check_targets

if TYPE_CHECKING:
    from pytest_lmcompose.session import Session


def check(session: Session) -> None:
    """Check all options before collection; raises pytest.UsageError."""
    baselines = session.options.baselines
    with usage_errors():
        session.run.check()
        if session.writes and session.options.engine == LOCAL:  # other engines may run on machines with other devices
            from pytest_lmcompose.devices import check_device

            check_device(session.options.device)
        if session.writes and baselines.update:
            from pytest_lmcompose.baseline.history import check_tree

            check_tree(baselines, session.config.rootpath)
    whole = "several repeats" if session.options.repeats > 1 else ""
    whole = "stored runs" if baselines.stores or session.run.baseline is not None else whole
    if whole and session.run.recipe.evaluate.sequential:
        raise pytest.UsageError(f"--lmcompose-sequential asks some of the questions: it cannot be used with {whole}")
    if baselines.stores and session.options.shard is not None:
        raise pytest.UsageError("--lmcompose-shard: store the whole run after `lmcompose merge` has joined it")


def check_outputs(session: Session) -> None:
    """Check that all reports are writable and overwrite no input; raises pytest.UsageError."""
    targets = session.options.targets
    if not targets:
        return
    with usage_errors():
        check_targets(targets, _inputs(session))


def check_exports(session: Session) -> None:
    """Check that exports can be written and overwrite nothing of others; raises pytest.UsageError."""
    if session.exports is not None:
        with usage_errors():
            session.exports.check(Path(session.run.location))


def unpackable(session: Session, compositions: Iterable[Composition]) -> Iterator[str]:
    """Yield why nothing of an exported composition can be packed, where that is certain before any work."""
    if session.exports is None or session.exports.format == PLAIN:
        return
    from pytest_lmcompose.checkpoints.packable import why_not

    for composition in dict.fromkeys(compositions):
        if session.exported(composition) and (reason := why_not(session.run, composition, session.exports.format)):
            yield reason


def _inputs(session: Session) -> dict[str, Path]:
    """Return the files and folders that no report may overwrite, by description."""
    from pytest_lmcompose.baseline.storage import Storage
    from pytest_lmcompose.data.source import parse_source
    from pytest_lmcompose.data.sources import local_path
    from pytest_lmcompose.presets import is_preset_file

    config, options = session.config, session.options
    found = {"the file of thresholds": session.run.thresholds, "the model's folder": Path(session.run.location)}
    world = session.run.world_folder
    if not options.folder.resolve().is_relative_to(world.resolve()):  # a world's file may lie beside the reports
        found["the world's folder"] = world
    for key, source in session.run.recipe.world.sources():
        if (path := local_path(parse_source(source), world)) is not None:
            found[f"data of world.{key}"] = path
    for name in filter(None, (options.world, options.model, options.suite)):
        if is_preset_file(name):
            found[f"the file {name}"] = options.folder / os.path.expanduser(name)
    if options.conf is not None:
        found["the folder of presets"] = options.conf
    if session.run.baseline is not None:
        found["the stored run to compare with"] = session.run.baseline.path
    found |= {f"the stored run {run}": run.path for run in Storage(options.baselines.storage).runs()}
    if config.inipath is not None:
        found["the file of pytest's settings"] = config.inipath
    if (junit := getattr(config.option, "xmlpath", None)) is not None:
        found["the file of --junitxml"] = options.folder / os.path.expanduser(junit)
    return found


def unmatched(session: Session) -> list[str]:
    """Return errors for --lmcompose-compare-fail expressions that match no gate."""
    if session.planned is None or not session.options.baselines.fail:
        return []
    from pytest_lmcompose.report import planned

    return list(planned.unmatched(session.run.rules, session.planned.judged))


def dropped(session: Session) -> list[str]:
    """Return errors for --lmcompose-compare-fail expressions whose stored compositions are no longer tested."""
    baselines, baseline = session.options.baselines, session.run.baseline
    if session.planned is None or not baselines.fail or baseline is None or baselines.update:
        return []
    from pytest_lmcompose.report import planned

    return list(planned.dropped(session.run.rules, session.planned.tested, baseline))
