"""Convert errors for pytest: invalid options become usage errors, expected failures lose their traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def usage_errors() -> Iterator[None]:
    """Convert errors in options, recipes, thresholds and stored runs to pytest.UsageError."""
    try:
        yield
    except OSError as error:  # for example a file name that is too long
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
    """Fail without a traceback on errors whose message is complete.

    If the model or the data are unusable, every test would fail: then also call `stop` with the reason.
    """
    try:
        yield
    except Exception as error:
        from pytest_lmcompose.data.records import WorldError
        from pytest_lmcompose.errors import ModelError

        if isinstance(error, (ModelError, WorldError)):
            stop("lmcompose: the model or the data cannot be used: see the failure above")
        if _is_expected(error):
            raise pytest.fail.Exception(str(error), pytrace=False) from error
        raise


def _is_expected(error: Exception) -> bool:
    """Return whether the message is enough; other errors are bugs and keep their traceback."""
    from evaluators.measurement import EvaluationError
    from interventions.types import InterventionError
    from pytest_lmcompose.baseline.storage import StorageError
    from pytest_lmcompose.data.records import WorldError
    from pytest_lmcompose.errors import BuildError, RecipeError
    from pytest_lmcompose.gate.thresholds import ThresholdError

    if isinstance(error, BuildError):
        return isinstance(error.__cause__, InterventionError)
    return isinstance(error, (RecipeError, ThresholdError, StorageError, WorldError, EvaluationError))
