"""The suite: every composition is built, measured and held to its thresholds."""

from __future__ import annotations

import pytest

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.results import Gate


def test_composition(composition: Composition, gates: tuple[Gate, ...], subtests: pytest.Subtests) -> None:
    """Every gate is a result of its own."""
    assert gates, f"no threshold applies to {composition}: a composition without a promise proves nothing"
    for gate in gates:
        with subtests.test(f"{gate.metric} {gate.gate}"):
            if not gate.passed:
                pytest.fail(gate.message, pytrace=False)
