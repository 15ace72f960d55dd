"""Make edits in a sequence of batches: each batch edits the model that the one before it produced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from interventions.types import Edit

Batch = Callable[[int, Sequence[Edit]], dict[str, Any]]
"""Makes some edits, given the number of the first, and returns details; those in `edits` are one by one."""


def batch_sizes(count: int, size: int | None) -> list[int]:
    """Return how many of `count` edits each batch has; None: all are one batch."""
    size = size or count
    return [min(size, count - start) for start in range(0, count, size)]


def in_sequence(
    edits: Sequence[Edit], size: int | None, make: Batch, totals: Sequence[str], at_end: Callable[[], Tensor]
) -> dict[str, Any]:
    """Make all edits, `size` at once, and return the details of the step.

    They are those of the last batch, with the sums of `totals` over all batches and the edits of all batches, each with
    its negative log-likelihood after the last batch, `at_end` (edits,).
    """
    sizes, done = batch_sizes(len(edits), size), []
    for number, width in enumerate(sizes):
        start = sum(sizes[:number])
        done.append(make(start, edits[start : start + width]))
    made = [edit for details in done for edit in details["edits"]]
    after = at_end().tolist() if len(sizes) > 1 else [edit["nll"] for edit in made]
    return {
        **done[-1],
        **{name: sum(details[name] for details in done) for name in totals},
        "sequence": sizes,
        "edits": [{**edit, "nll_after": nll} for edit, nll in zip(made, after, strict=True)],
    }
