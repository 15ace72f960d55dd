"""What holds for all tests: the runs that they start know nothing of the run they are part of."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what marks a worker of pytest-xdist out of the environment that started runs inherit."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)
