"""Defaults of OpenMP's environment."""

from __future__ import annotations

import pytest

from pytest_lmcompose.distribute.threads import set_defaults, torch_threads


@pytest.mark.parametrize(
    ("before", "cores", "after"),
    [
        ({}, 8, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_WAIT_POLICY": "active"}, 8, {"OMP_WAIT_POLICY": "active"}),
        (
            {"PYTEST_XDIST_WORKER_COUNT": "3"},
            8,
            {"PYTEST_XDIST_WORKER_COUNT": "3", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"},
        ),
        (
            {"PYTEST_XDIST_WORKER_COUNT": "4", "OMP_NUM_THREADS": "3"},
            2,
            {"PYTEST_XDIST_WORKER_COUNT": "4", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "3"},
        ),
    ],
)
def test_set_defaults(before: dict[str, str], cores: int, after: dict[str, str]) -> None:
    set_defaults(before, cores)
    assert before == after


def test_more_workers_than_cores_get_one_thread_each() -> None:
    environ = {"PYTEST_XDIST_WORKER_COUNT": "5"}
    set_defaults(environ, 2)
    assert torch_threads(environ) == 1


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("", None), ("4,2", None), ("0", None)])
def test_torch_threads_reads_plain_numbers_only(value: str, expected: int | None) -> None:
    assert torch_threads({"OMP_NUM_THREADS": value}) == expected
