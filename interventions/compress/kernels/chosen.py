"""The scheme and the grid of every linear layer, as the settings of a quantiser say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import nn

from interventions.anatomy import find_anatomy
from interventions.compress.keep import UNTOUCHED, rules
from interventions.compress.kernels.formats import grid_of
from interventions.compress.kernels.grid import Grid
from interventions.compress.schemes import SCHEMES, Scheme
from interventions.types import InterventionError


class Chooser(Protocol):
    """The settings of a quantiser."""

    name: ClassVar[str]

    @property
    def group_size(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def keep(self) -> list[str] | None: ...
    @property
    def number_format(self) -> Scheme: ...


def chosen_grids(model: nn.Module, settings: Chooser) -> Mapping[str, Grid | None]:
    """Return the grid of each linear layer of the blocks, by name; None for layers that stay as they are.

    Raises InterventionError for an exception that no layer matches.
    """
    modules = {linear.name: linear for block in find_anatomy(model).blocks for linear in block.linears}
    schemes = chosen_schemes(model, settings)
    return {
        name: None if scheme is None else grid_of(scheme, modules[name].weight.dtype)
        for name, scheme in schemes.items()
    }


def chosen_schemes(model: nn.Module, settings: Chooser) -> Mapping[str, Scheme | None]:
    """Return the scheme of each linear layer of the blocks, by name; None for layers that stay as they are.

    Raises InterventionError for an exception that no layer matches.
    """
    blocks = find_anatomy(model).blocks
    exceptions = rules(settings.keep)
    unused = set(exceptions)
    found: dict[str, Scheme | None] = {}
    for block in blocks:
        for group in block.linear_groups:
            role = f"{block.name}.{group.role}"
            for linear in group.linears:
                names = (linear.name, linear.parameter_name, role, group.role)
                matching = [rule for rule in exceptions if rule.holds(block.index, len(blocks), names)]
                unused.difference_update(matching)
                found[linear.name] = _scheme(matching[-1].format, settings) if matching else settings.number_format
    for rule in exceptions:
        if rule in unused:
            raise InterventionError(
                f"{settings.name}.keep={rule.layers}:{rule.format}: no layer matches; names are like "
                f"{next(iter(found))} and {blocks[0].name}.{blocks[0].linear_groups[-1].role}"
            )
    return found


def average_bits(model: nn.Module, settings: Chooser) -> float:
    """Return the mean bits of a weight of the blocks' linear layers; as stored, in layers that stay as they are."""
    grids = chosen_grids(model, settings)
    bits = weights = 0
    for linear in (linear for block in find_anatomy(model).blocks for linear in block.linears):
        grid = grids[linear.name]
        weights += linear.weight.numel()
        bits += linear.weight.numel() * (torch.finfo(linear.weight.dtype).bits if grid is None else grid.bits)
    return bits / weights


def _scheme(form: str, settings: Chooser) -> Scheme | None:
    """Return the scheme of an exception: None for layers that stay as they are."""
    if form == UNTOUCHED:
        return None
    if form in SCHEMES:
        return SCHEMES[form]
    given = settings.number_format
    if given.floats:
        given = Scheme(4, settings.group_size, settings.symmetric, scales="sixteen")
    return replace(given, bits=int(form))
