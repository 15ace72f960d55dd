"""What is imported, when, and how fast."""

from __future__ import annotations

import gc

import pytest

from pytest_lmcompose.imports import _roc_curve, fast_imports


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_paused_and_then_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), fast_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_assisted_generation_still_has_scikit_learn() -> None:
    false_positives, true_positives, _ = _roc_curve([0, 1, 1], [0.1, 0.4, 0.9])
    assert (max(false_positives), max(true_positives)) == (1, 1)
