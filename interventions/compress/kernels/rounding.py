"""What the methods that round a linear's weights share: writing them back, and telling what was moved."""

from __future__ import annotations

import torch
from torch import Tensor

from interventions.structure import Linear


def replace_(linear: Linear, weight: Tensor) -> float:
    """Write new weights (out, in) into a linear; return how far they moved, as a share of their norm."""
    before = linear.weight.float()
    moved = float((weight - before).norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny))
    linear.set_weight_(weight)
    return moved
