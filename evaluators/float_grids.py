"""Detect grids of floating-point numbers from the values of a weight: FP8, MXFP4, MXFP6, MXFP8 and NVFP4.

The largest magnitude of a group is one of the format's numbers times the scale. A scale that is half as large has all
the numbers of its double, except the largest, so only the upper ones are tried.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from interventions.floats import E2M1, E2M3, E4M3, FloatFormat, power_of_two

_CHUNK = 2**20  # values per chunk


class Layout(NamedTuple):
    """Numbers of a format with a scale for blocks of a weight."""

    format: FloatFormat
    cols: int
    """Columns of a block; -1: all."""
    rows: int
    """Rows of a block; -1: all."""
    scale_bits: int
    """16: scales of the model's dtype. 8: powers of two (MX), or FP8 numbers over one of the matrix (NVFP4)."""

    @property
    def powers(self) -> bool:
        """Whether scales are powers of two."""
        return self.scale_bits == 8 and self.cols == 32

    @property
    def two_levels(self) -> bool:
        """Whether scales are FP8 numbers over one of the matrix."""
        return self.scale_bits == 8 and not self.powers


LAYOUTS = (
    Layout(E2M1, 32, 1, 8),
    Layout(E2M1, 16, 1, 8),
    Layout(E2M3, 32, 1, 8),
    Layout(E4M3, 32, 1, 8),
    Layout(E4M3, -1, -1, 16),
    Layout(E4M3, 128, 128, 16),
    Layout(E4M3, -1, 1, 16),
)
"""In the order of their bits. FP8 numbers times one power of two are on the grids of all of the last four; no other
weights are on that of MXFP8, so it is the first of them."""


def blocks_of(weight: Tensor, layout: Layout) -> Tensor:
    """Return a weight (out, in) as (n, values), one row a block, padded with zeros; in the order of rows."""
    rows, cols = weight.shape
    height, width = (size if size > 0 else whole for size, whole in ((layout.rows, rows), (layout.cols, cols)))
    padded = pad(weight, (0, -cols % width, 0, -rows % height))
    blocks = padded.reshape(len(padded) // height, height, padded.shape[1] // width, width).transpose(1, 2)
    return blocks.reshape(-1, height * width)


def find_scales(blocks: Tensor, layout: Layout) -> Tensor | None:
    """Return the scales (n, 1) of blocks (n, values), float32; 1 for zeros; None if one is not of the layout."""
    parts = torch.split(blocks, max(1, _CHUNK // blocks.shape[1]))
    found = [_scales(part.float(), layout, torch.finfo(blocks.dtype)) for part in parts]
    return None if any(part is None for part in found) else torch.cat(found)  # type: ignore[arg-type]


def _scales(blocks: Tensor, layout: Layout, stored: torch.finfo) -> Tensor | None:
    largest = blocks.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)
    candidates = _candidates(largest, layout)
    # Most weights are on no grid, as their first block shows.
    if not bool(_fit(blocks[:1], torch.cat([tried[:1] for tried in candidates]), layout, stored).any()):
        return None
    scales = torch.zeros_like(largest)
    for tried in candidates:
        rows = (scales == 0).squeeze(1).nonzero().flatten()
        if not len(rows):
            break
        fits = _fit(blocks[rows], tried[rows], layout, stored)
        scales[rows[fits]] = tried[rows[fits]]
    return scales if bool((scales > 0).all()) else None


def _fit(blocks: Tensor, scales: Tensor, layout: Layout, stored: torch.finfo) -> Tensor:
    """Return whether each block (n or 1, values) is on the grid of a scale (n, 1), (n,)."""
    numbers = blocks / scales
    off = (numbers - layout.format.round(numbers)).abs_()
    # A value and the largest one each have a relative error of eps / 2, or half the smallest number of float16;
    # powers of two are exact.
    slack = numbers.abs_().mul_(4e-7 if layout.powers else stored.eps + 4e-7)
    return (off <= slack.add_(stored.smallest_normal * stored.eps / scales)).all(dim=1)


def _candidates(largest: Tensor, layout: Layout) -> list[Tensor]:
    """Return possible scales for blocks with these largest magnitudes, the most likely first."""
    greatest = layout.format.greatest
    if layout.powers:
        scale = power_of_two(largest, 22) / float(power_of_two(torch.tensor([greatest]), 22))
        return [torch.where(largest > scale * greatest, scale * 2, scale)]
    steps = 2**layout.format.mantissa
    octave = float(power_of_two(torch.tensor([greatest]), 22))
    numbers = [octave * (1 + step / steps) for step in range(steps)]
    numbers = [number if number <= greatest else number / 2 for number in numbers]
    return [largest / number for number in sorted(numbers, reverse=True)]
