"""Import torch and transformers in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_USER = "transformers.generation.candidate_generator"


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import without the garbage collector, which would go again and again through what imports make.

    scikit-learn, which transformers imports for one kind of assisted generation, is imported when that runs: it takes
    as long as torch.
    """
    with no_collection():
        if not sys.modules.keys() & {"sklearn", _USER} and find_spec("sklearn") is not None:
            _import_without_sklearn()
        yield


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause the garbage collector while many objects are made that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _import_without_sklearn() -> None:
    """Import the module of transformers that uses scikit-learn with a stand-in for its function."""
    from transformers.utils.import_utils import is_sklearn_available

    is_sklearn_available()  # which remembers the answer
    metrics: Any = ModuleType("sklearn.metrics")
    metrics.roc_curve = _roc_curve
    sys.modules |= {"sklearn": ModuleType("sklearn"), "sklearn.metrics": metrics}
    try:
        with suppress(ImportError):  # then transformers imports it in its own way
            __import__(_USER)
    finally:
        del sys.modules["sklearn"], sys.modules["sklearn.metrics"]


def _roc_curve(*arguments: Any, **named: Any) -> Any:
    from sklearn.metrics import roc_curve

    return roc_curve(*arguments, **named)
