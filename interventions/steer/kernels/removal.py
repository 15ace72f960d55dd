"""Remove a direction from what a writer puts out."""

from __future__ import annotations

import torch
from torch import Tensor


def without(
    columns: Tensor, direction: Tensor, weight: float = 1.0, *, keep_norms: bool = False, keep_zeros: bool = False
) -> Tensor:
    """Return columns (width, number) in float64 without their component along the unit `direction` (width,).

    W - weight * r r^T W (Arditi et al., 2024, equation 5). With `keep_norms`, each column keeps its norm: only its
    direction changes. With `keep_zeros`, entries that are zero stay so: each column changes, as little as possible, in
    its other entries alone, and is orthogonal all the same.
    """
    old, r = columns.double(), direction.to(columns.device).double()
    along = r @ old
    if keep_zeros:
        shares = torch.where(old != 0, r.unsqueeze(1), 0.0)
        squares = shares.square().sum(dim=0)
        shares = shares / squares.clamp(min=torch.finfo(torch.float64).tiny)
    else:
        shares = r.unsqueeze(1)
    new = old - weight * shares * along
    if keep_norms:
        norms = new.norm(dim=0)
        scale = torch.where(norms > 1e-12 * old.norm(dim=0), old.norm(dim=0) / norms, 1.0)
        new = new * torch.nan_to_num(scale, nan=1.0, posinf=1.0)
    return new


def apart(direction: Tensor, other: Tensor) -> Tensor:
    """Return a direction without its component along another one, of length 1."""
    other = other / other.norm()
    return torch.nn.functional.normalize(direction - (direction @ other) * other, dim=0)
