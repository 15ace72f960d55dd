"""SparseGPT for one weight matrix: a pure function on tensors.

Columns are taken from left to right. In each, the weights to prune become zero, and all columns to
the right are shifted so that the output changes least: the update of Optimal Brain Surgeon over the
columns still free (Frantar & Alistarh, ICML 2023, arXiv 2301.00774, algorithm 1). Which weights are
pruned is chosen for a block of columns at a time, by the error that each would cause alone.

The matrix is worked on transposed, so that a column lies in one piece, and the shifts are put off
twice: those of a column reach only its strip of a few columns at once, those of a strip its block,
those of a block, as one matrix product, the rest. The result is that of the plain loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from interventions.compress.kernels.gram_factor import gram_factor
from interventions.compress.kernels.masks import Pattern, check_divides, lowest, lowest_of_few

STRIP = 32
SUBSTITUTED = 128
"""Width of the triangles that are inverted by substitution."""


class Pruned(NamedTuple):
    """A pruned matrix."""

    weight: Tensor
    """(rows, cols) float32."""
    mask: Tensor
    """(rows, cols) bool, true where the weight was pruned."""
    losses: Tensor
    """(rows,) squared error of each output, summed over the tokens in H, damping included."""
    damping: float
    """Damping used, as a share of H's mean diagonal; larger than requested if that was too small."""


def sparsegpt_prune(
    W: Tensor,
    H: Tensor,
    *,
    sparsity: float,
    pattern: Pattern | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    parts: Sequence[int] | None = None,
    kept: Tensor | None = None,
) -> Pruned | None:
    """Prune W (rows, cols) for inputs whose Gram matrix is H (cols, cols), float32, without changing either.

    Of each block of columns the share `sparsity` is pruned, rounded so that of the columns done
    exactly that share is, or all but n of every m weights of a row by `pattern`. W may be several
    matrices that read one input on top of each other, of `parts` rows: each has its own share.
    Weights where `kept` (rows, cols) is true are pruned in any case, and count. Columns whose input
    is always zero become zero.

    Returns None where H cannot be inverted, whatever the damping. Raises InterventionError for a
    pattern that does not divide the columns.
    """
    check_divides(pattern, W.shape[1])
    factor = gram_factor(H, damping)
    if factor is None:
        return None
    U = invert_triangle(factor.R)
    diagonal = U.diagonal().unsqueeze(1)
    rows, cols = W.shape
    parts = [rows] if parts is None else list(parts)
    Wt = W.float().t().clone(memory_format=torch.contiguous_format)
    Wt[factor.dead] = 0
    mask = torch.zeros_like(Wt, dtype=torch.bool)
    forced = None if kept is None else kept.t()
    losses = Wt.new_zeros(rows)
    of = 1 if pattern is None else pattern.of
    width, strip = (max(of, size - size % of) for size in (block_size, STRIP))
    for start in range(0, cols, width):
        end = min(start + width, cols)
        E = torch.empty_like(Wt[start:end])  # error of each column that the others compensate, divided by U[j, j]
        if pattern is None:
            counts = [int(sparsity * part * end) - int(sparsity * part * start) for part in parts]
            chosen = _lowest_of_parts(_scores(Wt, diagonal, forced, slice(start, end)), parts, counts)
            mask[start:end] = chosen if forced is None else chosen | forced[start:end]
            torch.div(mask[start:end], diagonal[start:end], out=E)
        for low in range(start, end, strip):
            high = min(low + strip, end)
            for j in range(low, high):
                if pattern is not None and j % of == 0:
                    group = slice(j, j + of)
                    chosen = lowest_of_few(_scores(Wt, diagonal, forced, group), of - pattern.kept)
                    mask[group] = chosen if forced is None else chosen | forced[group]
                    torch.div(mask[group], diagonal[group], out=E[j - start : j - start + of])
                error = E[j - start].mul_(Wt[j])
                if j + 1 < high:
                    Wt[j + 1 : high].addr_(U[j, j + 1 : high], error, alpha=-1)
            if high < end:
                Wt[high:end].addmm_(U[low:high, high:end].t(), E[low - start : high - start], alpha=-1)
        if end < cols:
            Wt[end:].addmm_(U[start:end, end:].t(), E, alpha=-1)
        losses += E.square_().sum(dim=0)
    return Pruned(Wt.masked_fill_(mask, 0).t(), mask.t(), losses, factor.damping)


def _scores(Wt: Tensor, diagonal: Tensor, forced: Tensor | None, columns: slice) -> Tensor:
    """Return the root of the error of pruning each weight alone; below 0 for weights that must be pruned."""
    scores = (Wt[columns] / diagonal[columns]).abs_()
    return scores if forced is None else scores.masked_fill_(forced[columns], -1)


def _lowest_of_parts(scores: Tensor, parts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return the mask of the `counts` lowest scores of each part of the rows; `scores` is (columns, rows)."""
    chosen = [
        lowest(part.reshape(1, -1), count).view(part.shape)
        for part, count in zip(torch.split(scores, list(parts), dim=1), counts, strict=True)
    ]
    return torch.cat(chosen, dim=1)


def invert_triangle(R: Tensor) -> Tensor:
    """Return the inverse of an upper triangular R, computed recursively by halves, mostly with matrix products."""
    size = R.shape[0]
    if size <= SUBSTITUTED:
        eye = torch.eye(size, dtype=R.dtype, device=R.device)
        inverse: Tensor = torch.linalg.solve_triangular(R, eye, upper=True)
        return inverse
    half = size // 2
    inverse = torch.zeros_like(R, memory_format=torch.contiguous_format)
    inverse[:half, :half] = invert_triangle(R[:half, :half])
    inverse[half:, half:] = invert_triangle(R[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ R[:half, half:]) @ inverse[half:, half:]
    return inverse
