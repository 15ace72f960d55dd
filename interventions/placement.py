"""Where a model is computed, and in how much memory: asked by methods that go through a model block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from interventions.structure import module_device
from interventions.types import InterventionError

NAME = "lmcompose_placement"


@dataclass
class Switch:
    """Whether an offloaded model is computed on its device just now."""

    on: bool = True


@dataclass(frozen=True)
class Placement:
    """Where a model is computed, and in how much memory."""

    device: torch.device
    budget: int | None = None
    """Bytes on the device that a block being worked on may take, with all that goes with it; None: no bound."""
    switch: Switch | None = None
    """There if the weights are on the host."""

    @property
    def streamed(self) -> bool:
        return self.switch is not None


def placement(model: nn.Module) -> Placement:
    """Return where the model is computed: as set by `offload` or `limit_memory`, else where its weights are."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, Placement) else Placement(module_device(model))


def limit_memory(model: nn.Module, budget: int) -> None:
    """Set the bytes that a block being worked on may take, for a model whose weights stay where they are."""
    check_budget(budget)
    setattr(model, NAME, Placement(module_device(model), budget))


@contextmanager
def streaming(model: nn.Module, on: bool) -> Iterator[None]:
    """Let an offloaded model be computed on its device, or not: then it is a model on the CPU throughout."""
    switch = placement(model).switch or Switch()
    before, switch.on = switch.on, on
    try:
        yield
    finally:
        switch.on = before


def check_budget(budget: int | None) -> None:
    if budget is not None and budget < 1:
        raise InterventionError(f"a memory budget must be more than nothing, not {budget} bytes")
