"""What holds for all tests: no haste, and runs that they start know nothing of the run they are part of."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# On a busy machine examples take long now and then, which says nothing of what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what marks a worker of pytest-xdist, or a job of a CI service, out of the environment of started runs."""
    for name in [name for name in os.environ if name.startswith(("PYTEST_XDIST_", "GITHUB_"))]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tokenizer of tiny models."""
    from tests.tokenizers import tiny_tokenizer  # which loads transformers

    return tiny_tokenizer()
