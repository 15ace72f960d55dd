"""Compute pruning masks from scores or from weights. Pure functions on tensors.

A mask is a bool matrix, true where a weight is zero or must become zero. Unstructured masks take an exact
number of the lowest scores; of equal ones, those further left. A pattern n:m keeps n of every m
weights that stand next to each other in a row.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from interventions.types import InterventionError


class Pattern(NamedTuple):
    """n:m sparsity, such as 2:4."""

    kept: int
    of: int


def check_divides(pattern: Pattern | None, cols: int, name: str = "a matrix") -> None:
    """Raise InterventionError, with `name`, if the pattern's group size does not divide the columns."""
    if pattern is not None and cols % pattern.of:
        raise InterventionError(
            f"pattern {pattern.kept}:{pattern.of} does not divide the {cols} columns of {name}: "
            "choose another pattern, or none"
        )


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` lowest scores of each row; `scores` is (rows, cols) without NaN.

    The same as the first `count` places of a stable sort, for every row.
    """
    if count <= 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_lowest(scores, count)
    mask = scores <= threshold
    # If the threshold occurs several times in a row, too many scores were taken.
    tied = (mask.view(torch.uint8).sum(dim=1, dtype=torch.int32) != count).nonzero().squeeze(1)
    if tied.numel():
        at = threshold[tied]
        below = scores[tied] < at
        equal = scores[tied] == at
        wanted = count - below.sum(dim=1, keepdim=True)
        mask[tied] = below | (equal & (equal.cumsum(dim=1) <= wanted))
    return mask


def kth_lowest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th lowest score of each row (the first is 1), (rows, 1).

    On a CPU by NumPy's partition, in as many threads as torch has: a quarter of the time that
    torch.kthvalue takes.
    """
    if scores.device.type != "cpu":
        return scores.kthvalue(k, dim=1, keepdim=True).values
    scratch = scores.detach().clone(memory_format=torch.contiguous_format)
    parts = [part.numpy() for part in scratch.chunk(torch.get_num_threads())]
    if len(parts) == 1:
        parts[0].partition(k - 1, axis=1)
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: part.partition(k - 1, axis=1), parts))
    return scratch[:, k - 1 : k].clone()


def lowest_of_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask that keeps the `pattern.kept` highest of every `pattern.of` scores of a row.

    `scores` is (rows, cols). Raises InterventionError if cols is no multiple of `pattern.of`.
    """
    check_divides(pattern, scores.shape[1])
    groups = scores.reshape(-1, pattern.of).t().contiguous()
    return lowest_of_few(groups, pattern.of - pattern.kept).t().reshape(scores.shape)


def lowest_of_few(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` lowest scores of each column, the upper of equal ones; (few, many).

    Ranks them by comparing each row with those below it: faster than a sort for up to 32 rows.
    """
    few = len(scores)
    ranks = torch.zeros_like(scores, dtype=torch.int16)
    for i in range(few - 1):
        behind = (scores[i] <= scores[i + 1 :]).view(torch.uint8)
        ranks[i + 1 :] += behind
        ranks[i] += few - 1 - i - behind.sum(dim=0, dtype=torch.int16)
    return ranks < count
