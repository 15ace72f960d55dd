"""The closed forms of MEMIT, ROME, EMMET and AlphaEdit against dense formulations of what they solve."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions import InterventionError
from interventions.edit.kernels.closed_form import (
    alphaedit_update,
    emmet_update,
    factorise,
    memit_update,
    null_space,
    rome_update,
)


def _problem(d_k: int, d_out: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(d_k, n, generator=generator)
    residuals = torch.randn(d_out, n, generator=generator)
    text = torch.randn(4 * d_k, d_k, generator=generator) * torch.logspace(-2, 1, d_k)
    return keys, residuals, text.t() @ text / len(text)


@settings(max_examples=25)
@given(
    d_k=st.integers(2, 40),
    d_out=st.integers(1, 12),
    n=st.integers(1, 30),
    weight=st.floats(1e-2, 1e5),
    seed=st.integers(0, 10_000),
)
def test_update_solves_the_full_normal_equations(d_k: int, d_out: int, n: int, weight: float, seed: int) -> None:
    keys, residuals, second_moment = _problem(d_k, d_out, n, seed)
    stored = factorise(second_moment)
    update = memit_update(keys, residuals, stored, weight)
    K, R, C = keys.double(), residuals.double(), second_moment.double()
    dense = torch.linalg.solve(weight * C + K @ K.t(), R @ K.t(), left=False)
    assert stored.ridge == 0.0
    assert update.dtype == torch.float64
    assert float((update - dense).norm()) <= 1e-6 * float(dense.norm())


def test_update_minimises_the_weighted_squared_error() -> None:
    keys, residuals, second_moment = _problem(12, 5, 7, seed=1)
    update = memit_update(keys, residuals, factorise(second_moment), 3.0)
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
    light = memit_update(keys, residuals, factorise(second_moment), 1e-9)
    heavy = memit_update(keys, residuals, factorise(second_moment), 1e9)
    assert torch.allclose(light @ keys.double(), residuals.double(), atol=1e-5)
    assert float((heavy @ keys.double()).norm()) < 1e-4 * float(residuals.norm())


def test_a_key_that_is_never_used_needs_a_ridge_and_says_so() -> None:
    keys, residuals, second_moment = _problem(10, 3, 2, seed=4)
    keys[3] = 0
    second_moment[3] = 0
    second_moment[:, 3] = 0
    stored = factorise(second_moment)
    update = memit_update(keys, residuals, stored, 5.0)
    kept = [i for i in range(10) if i != 3]
    smaller = memit_update(keys[kept], residuals, factorise(second_moment[kept][:, kept]), 5.0)
    assert 0 < stored.ridge <= 1e-6
    assert float(update[:, 3].abs().max()) == 0.0
    assert torch.allclose(update[:, kept], smaller, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_empty_or_broken_second_moment_is_refused(value: float) -> None:
    for use in (factorise, lambda second_moment: null_space(second_moment, 1.0)):
        with pytest.raises(InterventionError, match="second moment"):
            use(torch.full((4, 4), value))


@settings(max_examples=25)
@given(d_k=st.integers(2, 30), d_out=st.integers(1, 8), n=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_rome_solves_a_constrained_least_squares_problem_for_each_edit(d_k: int, d_out: int, n: int, seed: int) -> None:
    keys, residuals, second_moment = _problem(d_k, d_out, n, seed)
    update = rome_update(keys, residuals, factorise(second_moment)).numpy()
    C = (second_moment.double() + second_moment.double().t()).numpy() / 2
    total = np.zeros((d_out, d_k))
    for k, r in zip(keys.double().numpy().T, residuals.double().numpy().T, strict=True):
        # The least tr(D C D^T) with (total + D) k = r, by its Lagrange equations, all at once.
        system = np.block([[C, k[:, None]], [k[None, :], np.zeros((1, 1))]])
        wanted = np.concatenate([np.zeros((d_k, d_out)), (r - total @ k)[None, :]])
        total = total + np.linalg.solve(system, wanted)[:d_k].T
    assert np.linalg.norm(update - total) <= 1e-6 * np.linalg.norm(total)
    assert np.allclose(update @ keys.double().numpy()[:, -1], residuals.double().numpy()[:, -1], atol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_the_null_space_is_that_of_an_eigendecomposition(relative: bool) -> None:
    _, _, second_moment = _problem(40, 3, 2, seed=6)
    threshold = 0.05
    basis = null_space(second_moment, threshold, relative=relative).numpy()
    C = second_moment.double().numpy()
    U, S, _ = np.linalg.svd((C + C.T) / 2)
    small = U[:, threshold * (np.trace(C) / 40 if relative else 1.0) > S]
    assert 0 < small.shape[1] < 40
    assert np.abs(basis @ basis.T - small @ small.T).max() < 1e-6


def test_a_space_without_a_null_space_names_its_eigenvalues_and_the_setting() -> None:
    with pytest.raises(InterventionError, match=r"below 0\.02 \(they go from 1 to 1.*nullspace_threshold"):
        null_space(torch.eye(5), 0.02)


@settings(max_examples=25)
@given(
    d_k=st.integers(3, 30),
    n=st.integers(1, 12),
    m=st.integers(0, 12),
    ridge=st.floats(0.1, 100.0),
    seed=st.integers(0, 10_000),
)
def test_alphaedit_solves_its_dense_equations_in_the_null_space(
    d_k: int, n: int, m: int, ridge: float, seed: int
) -> None:
    keys, residuals, second_moment = _problem(d_k, 5, n + m, seed)
    C = second_moment.double()
    basis = null_space(second_moment, float(torch.linalg.eigvalsh(C)[d_k // 2]) * 1.001)
    new, earlier = keys[:, :n], keys[:, n:]
    update = alphaedit_update(new, residuals[:, :n], earlier, basis, ridge)
    P, K, R = basis @ basis.t(), keys.double(), residuals.double()
    dense = torch.linalg.solve(P @ K @ K.t() + ridge * torch.eye(d_k).double(), P @ K[:, :n] @ R[:, :n].t()).t()
    assert float((update - dense).norm()) <= 1e-8 * float(dense.norm())
    assert float((update @ (torch.eye(d_k).double() - P)).norm()) <= 1e-9 * float(update.norm())


def test_a_batch_leaves_what_an_earlier_one_stored() -> None:
    keys, residuals, second_moment = _problem(40, 5, 8, seed=7)
    basis = null_space(second_moment, 1.0)
    free = alphaedit_update(keys[:, :4], residuals[:, :4], keys[:, :0], basis, 1e-6)
    kept = alphaedit_update(keys[:, :4], residuals[:, :4], keys[:, 4:], basis, 1e-6)
    stored = keys[:, 4:].double()
    assert float((kept @ stored).norm()) < 1e-4 * float((free @ stored).norm())


@settings(max_examples=25)
@given(d_k=st.integers(2, 30), d_out=st.integers(1, 8), n=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_emmet_solves_the_lagrangian_of_all_edits_at_once(d_k: int, d_out: int, n: int, seed: int) -> None:
    n = min(n, d_k)
    keys, residuals, second_moment = _problem(d_k, d_out, n, seed)
    update = emmet_update(keys, residuals, factorise(second_moment), 0.0).numpy()
    C = (second_moment.double() + second_moment.double().t()).numpy() / 2
    K, R = keys.double().numpy(), residuals.double().numpy()
    system = np.block([[C, K], [K.T, np.zeros((n, n))]])
    dense = np.linalg.solve(system, np.concatenate([np.zeros((d_k, d_out)), R.T]))[:d_k].T
    assert np.linalg.norm(update - dense) <= 1e-6 * np.linalg.norm(dense)
    assert np.linalg.norm(update @ K - R) <= 1e-12 * np.linalg.norm(R) * np.linalg.cond(K.T @ np.linalg.solve(C, K))


@given(ridge=st.floats(1e-3, 1e3), seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_emmets_ridge_is_the_published_one(ridge: float, seed: int) -> None:
    keys, residuals, second_moment = _problem(20, 4, 6, seed)
    update = emmet_update(keys, residuals, factorise(second_moment), ridge)
    K, R, C_inv = keys.double(), residuals.double(), torch.linalg.inv(second_moment.double())
    dense = R @ torch.linalg.solve(K.t() @ C_inv @ K + ridge * torch.eye(6).double(), K.t() @ C_inv)
    assert float((update - dense).norm()) <= 1e-6 * float(dense.norm())


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_one_edit_of_emmet_is_one_of_rome(ridge: float) -> None:
    keys, residuals, second_moment = _problem(20, 4, 1, seed=8)
    stored = factorise(second_moment)
    one, other = emmet_update(keys, residuals, stored, ridge), rome_update(keys, residuals, stored)
    assert float((one - other).norm()) <= 1e-10 * float(other.norm())


def test_emmet_stores_edits_with_the_same_key_once() -> None:
    keys, residuals, second_moment = _problem(20, 4, 3, seed=9)
    stored = factorise(second_moment)
    alone = emmet_update(keys, residuals, stored, 0.0)
    again = emmet_update(keys[:, [0, 0, 1, 2]], residuals[:, [0, 0, 1, 2]], stored, 0.0)
    assert float((alone - again).norm()) <= 1e-8 * float(alone.norm())
