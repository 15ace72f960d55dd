"""Latency of each composition through pytest-benchmark: dense kernels, whatever the weights could be packed to.

Left out unless asked for, as `pytest compositions -m latency --benchmark-json=latency.json` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_lmcompose.composition import Composition
from pytest_lmcompose.session import SESSION

if TYPE_CHECKING:
    from pytest_lmcompose.build.states import ModelState


@pytest.mark.latency
def test_latency(
    benchmark: Any, composition: Composition, intervened_model: ModelState, request: pytest.FixtureRequest
) -> None:
    """A forward pass over evaluate.latency_batch texts of evaluate.latency_length tokens."""
    from evaluators import forward_pass  # torch comes with it, and collecting needs none

    evaluate = request.config.stash[SESSION].run.recipe.evaluate
    batch, length = evaluate.latency_batch, evaluate.latency_length
    benchmark.group = f"forward pass, dense kernels, batch {batch}, {length} tokens"
    benchmark.extra_info |= {"composition": str(composition), "batch": batch, "length": length, "kernels": "dense"}
    run = forward_pass(intervened_model.model, batch=batch, length=length)
    benchmark.pedantic(run, rounds=evaluate.latency_repeats, warmup_rounds=3)
