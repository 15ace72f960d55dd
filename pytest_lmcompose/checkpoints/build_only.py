"""The test that `lmcompose build --no-measure` runs: it builds a composition and measures nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_lmcompose.build.states import ModelState
    from pytest_lmcompose.composition import Composition


def test_build(composition: Composition, intervened_model: ModelState) -> None:
    """Building is all."""
    assert intervened_model.composition == composition
