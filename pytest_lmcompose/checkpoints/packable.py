"""Find out before any work that nothing of a composition can be packed. Imports torch only to look at weights."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from interventions.compress.bases import GridQuantiser
from interventions.intervention import promised
from interventions.registry import find_method
from pytest_lmcompose.checkpoints.options import PLAIN
from pytest_lmcompose.composition import Composition, Step

if TYPE_CHECKING:
    from pytest_lmcompose.run import Run

_ROWS = 8
"""Rows of a weight that are looked at; `evaluators.grids.find_grid` begins with as many."""


def why_not(run: Run, composition: Composition, format: str) -> str | None:
    """Return why nothing of a composition can be packed, None if that is not certain before it is built."""
    if format == PLAIN or any(_may_quantise(run, step) for step in composition.steps):
        return None
    if _may_lie_on_grids(run.location, run.recipe.model.dtype):
        return None
    return (
        f"{format}: nothing of {composition} can be packed: none of its steps quantises, and the weights of "
        f"{run.location} lie on no grid; add a step such as rtn, gptq or awq, or export in full precision"
    )


def _may_quantise(run: Run, step: Step) -> bool:
    """Return whether a step may put weights on a grid; what checkpoints and methods of other packages do is unknown."""
    method = find_method(step.method)
    known = all(module.startswith("interventions.") for module in method.modules) and method.category != "checkpoint"
    settings = run.settings(step)  # with exceptions, a quantiser promises nothing before it sees the model
    return not known or isinstance(settings, GridQuantiser) or "average_bits" in promised(settings)


@lru_cache(maxsize=4)
def _may_lie_on_grids(location: str, dtype: str) -> bool:
    """Return whether a weight of a model may lie on a grid: one does, or the model is not a folder of plain weights."""
    from interventions.checkpoint.reading import read_kind

    folder = Path(location)
    if not folder.is_dir() or read_kind(folder) is not None:
        return True
    import torch

    from evaluators.grids import find_grid
    from interventions.checkpoint.reading.stored import Shards

    shards = Shards(folder)
    for name in shards:
        shape = shards.shape(name)
        if len(shape) != 2:
            continue
        rows = torch.linspace(0, shape[0] - 1, min(shape[0], _ROWS)).long().tolist()
        sample = torch.cat([shards[name][row : row + 1] for row in rows])
        loaded = sample if dtype == "auto" else sample.to(getattr(torch, dtype))
        if any(tensor.is_floating_point() and find_grid(tensor) is not None for tensor in (sample, loaded)):
            return True
    return False
