"""GPTQ on one weight matrix (Frantar et al., ICLR 2023, arXiv 2210.17323): pure functions on tensors.

Columns of W (rows, cols) are rounded one after the other; what the rounding of a column did to the
output is compensated by the columns still to come. With H = X X^T the Gram matrix of the inputs and
H = R R^T, R upper triangular, the error of the output is (W - Q) R, and its column j is least for

    Q_j = round(W_j + sum_{i<j} (W_i - Q_i) R_ij / R_jj).

That is the published update, without the inverse: there U = R^-1 is made by two Cholesky
factorisations and an inversion, and W itself is updated. (So GPTQ is Babai's nearest plane: Chen et
al., 2025, arXiv 2507.18553.)

The matrix is worked on transposed, so that a column lies in one piece, and sums are put off twice:
a column is brought up to date within its strip, a strip's errors reach its block, a block's, as one
matrix product, the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from interventions.compress.kernels.gram_factor import gram_factors
from interventions.compress.kernels.grid import Grid, split_groups, width_of_group

BLOCK = 128
"""Columns per block, as in the reference implementation. It changes results, not only speed: the grids of all groups
that start in a block are computed from the weights at the start of the block."""
STRIP = 32


class GptqResult(NamedTuple):
    """A quantised matrix and its error."""

    weight: Tensor
    """(rows, cols) float32."""
    errors: Tensor
    """(rows,) squared error of each output, summed over the tokens in H, damping included."""
    damping: float
    """Damping used, as a share of H's mean diagonal; larger than requested if that was too small. Of several, the
    largest."""


def gptq_quantise(
    W: Tensor,
    H: Tensor,
    grid: Grid,
    *,
    parts: Sequence[int] | None = None,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    zeros: Tensor | None = None,
) -> GptqResult | None:
    """Round W (rows, cols) for inputs whose Gram matrix is H (cols, cols), float32, without changing either.

    W may be several matrices that read one input on top of each other, of `parts` rows; they share no scales. H may
    also be several Gram matrices (count, cols, cols): of W's rows, cut into as many equal parts, each part reads inputs
    of its own. That is the same as a loop over the parts, but faster; not with `act_order`.

    The scales of a group are found when its turn comes, or beforehand with `static_groups`. With `act_order` the
    columns with the largest inputs come first, and groups are static. Weights where `zeros` (rows, cols) is true become
    zero.
    Columns whose input is always zero become zero.

    Returns None where H cannot be factored, whatever the damping.
    """
    rows, cols = W.shape
    width = width_of_group(cols, grid.group_size)
    groups = -(-cols // width)
    static = static_groups or act_order or groups == 1
    Wt = W.float().t().clone(memory_format=torch.contiguous_format)
    H = H if H.dim() == 3 else H.unsqueeze(0)
    count = len(H)
    dead = H.diagonal(dim1=1, dim2=2) == 0
    fit = _Fit(grid, Wt, width, [rows] if parts is None else list(parts))
    if groups == 1:  # as in the reference implementation, before dead columns are removed
        fit.find(Wt, 0, 1)
    _parts(Wt, count)[dead] = 0
    if static and groups > 1:
        fit.find(Wt, 0, groups)
    order = torch.arange(cols)
    zeros_t = None if zeros is None else zeros.t()
    if act_order:
        (one,) = H
        order = one.diagonal().argsort(descending=True, stable=True)
        H, Wt = one[order][:, order].unsqueeze(0), Wt[order]
        zeros_t = None if zeros_t is None else zeros_t[order]
    factors = gram_factors(H, damping)
    if factors is None:
        return None
    diagonal = factors.R.diagonal(dim1=1, dim2=2).unsqueeze(1)
    R = factors.R / diagonal
    group_of = (order if static else torch.arange(cols)).div(width, rounding_mode="floor").tolist()
    E = Wt.clone()  # W - Q in the end
    steps = torch.empty_like(Wt)  # Q in units of the scale
    columns = list(zip(Wt.unbind(), E.unbind(), steps.unbind(), strict=True))
    errors = Wt.new_zeros(rows)
    for start in range(0, cols, BLOCK):
        end = min(start + BLOCK, cols)
        first, last = -(-start // width), -(-end // width)
        if not static and first < last:
            span = slice(start, min(last * width, cols))
            best = _best_completion(R[:, span, span], Wt[span], E[span])
            fit.find(best[first * width - start :], first, last)
        scalings = [group.unbind() for group in fit.found.unbind(1)]
        for low in range(start, end, STRIP):
            high = min(low + STRIP, end)
            strip_R = R[:, low:high, low:high].mT.contiguous()
            for j in range(low, high):
                w, e, step = columns[j]
                scale, least, greatest = scalings[group_of[j]]
                if j > low:
                    _add_(w.unsqueeze(0), strip_R[:, j - low, : j - low].unsqueeze(1), E[low:j])
                torch.div(w, scale, out=step)
                grid.round_(step, least, greatest)
                if zeros_t is not None:
                    step.masked_fill_(zeros_t[j], 0)
                e.addcmul_(step, scale, value=-1)
            if high < end:
                _add_(Wt[high:end], R[:, low:high, high:end].mT, E[low:high])
        if end < cols:
            _add_(Wt[end:], R[:, start:end, end:].mT, E[start:end])
        rounded = steps[start:end].mul_(fit.found[0, group_of[start:end]])
        rest = Wt[start:end].sub_(rounded)
        _parts(rest, count).mul_(diagonal[:, :, start:end].mT)
        errors += rest.square_().sum(dim=0)
    if act_order:
        steps = torch.empty_like(steps).index_copy_(0, order, steps)
    return GptqResult(steps.t(), errors, max(factors.damping))


def _best_completion(R: Tensor, Wt: Tensor, E: Tensor) -> Tensor:
    """Return the best values for the columns of a span if none of them were rounded.

    This is what the published update has in place of W there; Wt has the sums so far, E still the
    original weights.
    """
    eye = torch.eye(R.shape[1], dtype=R.dtype, device=R.device)
    inverse = torch.linalg.solve_triangular(R, eye, upper=True, unitriangular=True)
    sums = Wt - E
    best = torch.zeros_like(Wt)
    _add_(best, inverse.mT, sums)
    return best.sub_(sums).add_(Wt)  # the first column is bit-identical to Wt's


def _parts(Wt: Tensor, count: int) -> Tensor:
    """Return a transposed matrix (cols, count * rows) as (count, cols, rows), a view."""
    return Wt.view(len(Wt), count, -1).transpose(0, 1)


def _add_(target: Tensor, factors: Tensor, source: Tensor) -> None:
    """Add, in place, each of the factors (count, a, b) times its part of the source (b, count * rows)."""
    if len(factors) > 1:
        _parts(target, len(factors)).baddbmm_(factors, _parts(source, len(factors)))
    elif len(target) > 1:
        target.addmm_(factors[0], source)
    else:  # faster
        target[0].addmv_(source.t(), factors[0, 0])


class _Fit:
    """The scales of all groups of a transposed matrix (cols, rows), as they are found."""

    def __init__(self, grid: Grid, Wt: Tensor, width: int, parts: list[int]) -> None:
        self.grid = grid
        self.width = width
        self.parts = [Wt.shape[1]] if grid.rows_apart else parts  # all at once is faster
        self.largest = torch.cat([W.abs().amax().expand(W.shape[1], 1, 1) for W in torch.split(Wt, parts, dim=1)])
        self.found = Wt.new_empty(3, -(-len(Wt) // width), Wt.shape[1])
        """(3, groups, rows): scale, smallest and largest number."""

    def find(self, Wt: Tensor, first: int, last: int) -> None:
        """Find the scales of groups `first` to `last`; Wt (cols, rows) begins with the first one's columns."""
        groups = split_groups(Wt[: (last - first) * self.width].t(), self.width)
        row = 0
        for part in torch.split(groups, self.parts):
            rows = slice(row, row := row + len(part))
            for kind, value in enumerate(self.grid.scaling(part, self.largest[rows])):
                self.found[kind, first:last, rows] = value[:, :, 0].t() if isinstance(value, Tensor) else value
