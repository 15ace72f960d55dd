"""The grid of a scheme."""

from __future__ import annotations

import torch

from interventions.compress.kernels.floating import Floats
from interventions.compress.kernels.grid import Grid
from interventions.compress.kernels.integers import Integers
from interventions.compress.schemes import Scheme
from interventions.floats import E2M1, E2M3, E4M3

_FLOATS = {4: E2M1, 6: E2M3, 8: E4M3}


def grid_of(scheme: Scheme, dtype: torch.dtype) -> Grid:
    """Return the grid for numbers that are stored in a dtype."""
    if scheme.floats:
        kind = "number" if scheme.scales == "sixteen" else scheme.scales
        return Floats(scheme.bits, scheme.group_size, _FLOATS[scheme.bits], kind, scheme.rows, dtype)
    # GPTQ's and AWQ's layouts store float16 scales, compressed-tensors those of the model's dtype.
    sixteen = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    scales = sixteen if scheme.scales == "sixteen" else dtype
    return Integers(scheme.bits, scheme.group_size, scheme.symmetric, dtype, scales)
