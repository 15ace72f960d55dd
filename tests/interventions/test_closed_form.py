"""MEMIT's closed form against the dense normal equations it solves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions import InterventionError
from interventions.edit.closed_form import memit_update


def _problem(d_k: int, d_out: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(d_k, n, generator=generator)
    residuals = torch.randn(d_out, n, generator=generator)
    text = torch.randn(4 * d_k, d_k, generator=generator) * torch.logspace(-2, 1, d_k)
    return keys, residuals, text.t() @ text / len(text)


@settings(deadline=None, max_examples=25)
@given(
    d_k=st.integers(2, 40),
    d_out=st.integers(1, 12),
    n=st.integers(1, 30),
    weight=st.floats(1e-2, 1e5),
    seed=st.integers(0, 10_000),
)
def test_update_solves_the_full_normal_equations(d_k: int, d_out: int, n: int, weight: float, seed: int) -> None:
    keys, residuals, second_moment = _problem(d_k, d_out, n, seed)
    update, ridge = memit_update(keys, residuals, second_moment, weight)
    K, R, C = keys.double(), residuals.double(), second_moment.double()
    dense = torch.linalg.solve(weight * C + K @ K.t(), R @ K.t(), left=False)
    assert ridge == 0.0
    assert update.dtype == torch.float64
    assert float((update - dense).norm()) <= 1e-6 * float(dense.norm())


def test_update_minimises_the_weighted_squared_error() -> None:
    keys, residuals, second_moment = _problem(12, 5, 7, seed=1)
    update, _ = memit_update(keys, residuals, second_moment, 3.0)
    K, R, C = keys.double(), residuals.double(), second_moment.double()

    def error(delta: torch.Tensor) -> float:
        return float((delta @ K - R).square().sum() + 3.0 * torch.trace(delta @ C @ delta.t()))

    best = error(update)
    generator = torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            other = update + size * torch.randn(update.shape, generator=generator, dtype=torch.float64)
            assert error(other) > best


def test_light_weight_stores_the_edits_and_heavy_weight_keeps_the_rest() -> None:
    keys, residuals, second_moment = _problem(30, 6, 4, seed=3)
    light, _ = memit_update(keys, residuals, second_moment, 1e-9)
    heavy, _ = memit_update(keys, residuals, second_moment, 1e9)
    assert torch.allclose(light @ keys.double(), residuals.double(), atol=1e-5)
    assert float((heavy @ keys.double()).norm()) < 1e-4 * float(residuals.norm())


def test_a_key_that_is_never_used_needs_a_ridge_and_says_so() -> None:
    keys, residuals, second_moment = _problem(10, 3, 2, seed=4)
    keys[3] = 0
    second_moment[3] = 0
    second_moment[:, 3] = 0
    update, ridge = memit_update(keys, residuals, second_moment, 5.0)
    kept = [i for i in range(10) if i != 3]
    smaller, _ = memit_update(keys[kept], residuals, second_moment[kept][:, kept], 5.0)
    assert 0 < ridge <= 1e-6
    assert float(update[:, 3].abs().max()) == 0.0
    assert torch.allclose(update[:, kept], smaller, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_empty_or_broken_second_moment_is_refused(value: float) -> None:
    keys, residuals, _ = _problem(4, 3, 2, seed=5)
    with pytest.raises(InterventionError, match="second moment"):
        memit_update(keys, residuals, torch.full((4, 4), value), 1.0)
