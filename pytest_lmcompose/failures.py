"""Errors as pytest shows them: of the user's options as usage errors, of a step without a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn errors in what the user asked for into pytest's own kind."""
    try:
        yield
    except OSError as error:  # such as a name that is too long for a file
        raise pytest.UsageError(f"lmcompose: {error.filename}: {error.strerror}") from None
    except ValueError as error:
        from pytest_lmcompose.baseline.storage import StorageError
        from pytest_lmcompose.errors import RecipeError
        from pytest_lmcompose.gate.thresholds import ThresholdError
        from pytest_lmcompose.report.files import TargetError

        if isinstance(error, (RecipeError, ThresholdError, StorageError, TargetError)):
            raise pytest.UsageError(f"lmcompose: {error}") from None
        raise


@contextmanager
def plain_failures(stop: Callable[[str], None]) -> Iterator[None]:
    """Show errors whose message says everything without a traceback.

    One that every other test would meet as well, of the model or the data, ends the run: `stop` is called with the
    reason.
    """
    try:
        yield
    except Exception as error:
        from pytest_lmcompose.data.records import WorldError
        from pytest_lmcompose.errors import ModelError

        if isinstance(error, (ModelError, WorldError)):
            stop("lmcompose: the model or the data cannot be used: see the failure above")
        if _says_everything(error):
            raise pytest.fail.Exception(str(error), pytrace=False) from error
        raise


def _says_everything(error: Exception) -> bool:
    from evaluators.measurement import EvaluationError
    from interventions.types import InterventionError
    from pytest_lmcompose.baseline.storage import StorageError
    from pytest_lmcompose.data.records import WorldError
    from pytest_lmcompose.errors import BuildError, RecipeError
    from pytest_lmcompose.gate.thresholds import ThresholdError

    if isinstance(error, BuildError):
        return isinstance(error.__cause__, InterventionError)
    return isinstance(error, (RecipeError, ThresholdError, StorageError, WorldError, EvaluationError))
