"""Snapshots of a few changed matrices against a copy of the whole model, both timed in one run."""

from __future__ import annotations

import time

import pytest
import torch

from pytest_lmcompose.build.load import hash_weights
from pytest_lmcompose.build.snapshot import WorkingModel

pytestmark = pytest.mark.benchmark


def test_snapshot_and_restore_of_three_matrices_take_a_fraction_of_copying_the_model() -> None:
    # 40 matrices of 1 MiB; three change.
    model = torch.nn.Module()
    model.config = None  # type: ignore[assignment]
    model.weights = torch.nn.ParameterList(torch.zeros(512, 512) for _ in range(40))
    working = WorkingModel(model)
    names = [f"weights.{i}" for i in range(3)]

    def seconds(work: str) -> float:
        start = time.perf_counter()
        if work == "part":
            snapshot = working.take(working.base, names)
            working.restore(working.base)
            working.restore(snapshot)
        else:
            {name: p.detach().clone() for name, p in model.named_parameters()}
            hash_weights(model)
        return time.perf_counter() - start

    part = min(seconds("part") for _ in range(5))
    whole = min(seconds("whole") for _ in range(5))
    assert part < whole / 4
    assert part < 0.05
