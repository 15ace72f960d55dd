"""The grid of every linear layer, as the settings of a quantiser say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from interventions.anatomy import find_anatomy
from interventions.compress.bases import Quantiser
from interventions.compress.keep import UNTOUCHED, rules
from interventions.compress.kernels.floating import Floats
from interventions.compress.kernels.grid import Grid
from interventions.compress.kernels.integers import Integers
from interventions.compress.schemes import SCHEMES, Scheme
from interventions.floats import E2M1, E2M3, E4M3
from interventions.types import InterventionError

_FLOATS = {4: E2M1, 6: E2M3, 8: E4M3}


def grid_of(scheme: Scheme, weights: torch.dtype) -> Grid:
    """Return the grid for weights that are stored in a dtype."""
    if scheme.floats:
        kind = "number" if scheme.scales == "sixteen" else scheme.scales
        return Floats(scheme.bits, scheme.group_size, _FLOATS[scheme.bits], kind, scheme.rows, weights)
    # GPTQ's and AWQ's layouts store float16 scales, compressed-tensors those of the model's dtype.
    sixteen = torch.bfloat16 if weights == torch.bfloat16 else torch.float16
    scales = sixteen if scheme.scales == "sixteen" else weights
    return Integers(scheme.bits, scheme.group_size, scheme.symmetric, weights, scales)


def chosen_grids(model: nn.Module, settings: Quantiser) -> Mapping[str, Grid | None]:
    """Return the grid of each linear layer of the blocks, by name; None for layers that stay as they are.

    Raises InterventionError for an exception that no layer matches.
    """
    blocks = find_anatomy(model).blocks
    exceptions = rules(settings.keep)
    unused = set(exceptions)
    found: dict[str, Grid | None] = {}
    for block in blocks:
        for group in block.linear_groups:
            role = f"{block.name}.{group.role}"
            for linear in group.linears:
                names = (linear.name, linear.parameter_name, role, group.role)
                matching = [rule for rule in exceptions if rule.holds(block.index, len(blocks), names)]
                unused.difference_update(matching)
                scheme = _scheme(matching[-1].format, settings) if matching else settings.number_format
                found[linear.name] = None if scheme is None else grid_of(scheme, linear.weight.dtype)
    for rule in exceptions:
        if rule in unused:
            raise InterventionError(
                f"{settings.name}.keep={rule.layers}:{rule.format}: no layer matches; names are like "
                f"{next(iter(found))} and {blocks[0].name}.{blocks[0].linear_groups[-1].role}"
            )
    return found


def average_bits(model: nn.Module, settings: Quantiser) -> float:
    """Return the mean bits of a weight of the blocks' linear layers; as stored, in layers that stay as they are."""
    grids = chosen_grids(model, settings)
    bits = weights = 0
    for linear in (linear for block in find_anatomy(model).blocks for linear in block.linears):
        grid = grids[linear.name]
        weights += linear.weight.numel()
        bits += linear.weight.numel() * (torch.finfo(linear.weight.dtype).bits if grid is None else grid.bits)
    return bits / weights


def _scheme(form: str, settings: Quantiser) -> Scheme | None:
    """Return the scheme of an exception: None for layers that stay as they are."""
    if form == UNTOUCHED:
        return None
    if form in SCHEMES:
        return SCHEMES[form]
    given = settings.number_format
    if given.floats:
        given = Scheme(4, settings.group_size, settings.symmetric, scales="sixteen")
    return replace(given, bits=int(form))
