"""Grids of weight matrices, the one interface of all quantisers: pure functions on tensors.

A row of W (rows, cols) is cut into groups of `group_size` columns; -1, or more columns than there are, makes the row
one group, and the last group of an odd width is shorter. The weights of a group, or of the groups of several rows, are
numbers of one kind times a scale: whole numbers (`interventions.compress.kernels.integers`) or floating-point numbers
of few bits (`interventions.compress.kernels.floating`). Zero is always among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Scaling(NamedTuple):
    """The scales of groups (rows, groups, 1), and the range of the numbers that they multiply."""

    scales: Tensor
    """float32, positive."""
    least: Tensor | float
    greatest: Tensor | float


@dataclass(frozen=True)
class Grid(ABC):
    """The kind of numbers, and which weights share a scale."""

    bits: int
    """Bits of a number."""
    group_size: int = -1

    @property
    def rows_apart(self) -> bool:
        """Whether no two rows share a scale."""
        return True

    @abstractmethod
    def scaling(self, groups: Tensor, largest: Tensor | None = None, *, refit: bool = False) -> Scaling:
        """Find the scales of float32 groups (rows, groups, width).

        `largest` is the greatest magnitude of the matrix that each row belongs to, (rows, 1, 1), where groups are not
        all of it. Groups that lie on a grid keep it, as far as it can be told, unless `refit` says not to look.
        """

    @abstractmethod
    def round_(self, numbers: Tensor, least: Tensor | float, greatest: Tensor | float) -> Tensor:
        """Round weights divided by their scale to the nearest numbers, in place; none becomes -0.0."""


def width_of_group(cols: int, group_size: int) -> int:
    """Return the width of a full group: `group_size`, or all columns if that is -1 or too wide."""
    return cols if group_size < 0 or group_size > cols else group_size


def split_groups(W: Tensor, group_size: int) -> Tensor:
    """Return W (rows, cols) as (rows, groups, group width), a view unless the last group is padded with zeros."""
    rows, cols = W.shape
    width = max(1, width_of_group(cols, group_size))
    groups = -(-cols // width)
    missing = groups * width - cols
    return (pad(W, (0, missing)) if missing else W).reshape(rows, groups, width)


def join_groups(groups: Tensor, cols: int) -> Tensor:
    """Undo `split_groups`: (rows, groups, width) to (rows, cols)."""
    return groups.reshape(groups.shape[0], groups.shape[1] * groups.shape[2])[:, :cols]


def fake_quantise(W: Tensor, grid: Grid, *, refit: bool = False) -> Tensor:
    """Return W (rows, cols) rounded to its grid, float32.

    With `refit`, groups that lie on a grid already are given a new one too, which saves looking for them.
    """
    groups = split_groups(W.float(), grid.group_size)
    return join_groups(fake_quantise_groups(groups, grid, refit=refit), W.shape[1])


def fake_quantise_groups(groups: Tensor, grid: Grid, *, refit: bool = False) -> Tensor:
    """Round float32 groups (rows, groups, width) to their grids."""
    if groups.numel() == 0:
        return groups
    scales, least, greatest = grid.scaling(groups, refit=refit)
    return grid.round_(groups / scales, least, greatest).mul_(scales)


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive float32 scales to the nearest numbers of a dtype.

    Where that would be far too small, because float16 has few digits left, it is the next larger number; scales beyond
    its range stay as they are.
    """
    if dtype == torch.float32:
        return scales
    info = torch.finfo(dtype)
    rounded = scales.to(dtype).float()
    if float(scales.amin()) < info.smallest_normal:
        rounded = torch.where(rounded < scales * (1 - 2**-9), rounded + info.smallest_normal * info.eps, rounded)
    return torch.where(rounded.isinf(), scales, rounded)


def positive(scales: Tensor) -> Tensor:
    """Set the scale of groups with only zeros (or numbers too small to divide by) to 1."""
    return torch.where(scales < torch.finfo(scales.dtype).tiny, 1.0, scales)
