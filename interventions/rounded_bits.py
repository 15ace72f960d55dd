"""How many bits the numbers have that a model rounds while it runs. Imports nothing else of the project.

`interventions.rounding` leaves them at the modules that round.
"""

from __future__ import annotations

from torch import nn

HELD = "lmcompose_rounding"
"""The attribute of an attention module that says how it rounds keys and values: an `interventions.rounding.Cached`."""
_INPUT, _CACHE = "lmcompose_input_bits", "lmcompose_cache_bits"


def note_bits_(module: nn.Module, *, inputs: float | None = None, cache: float | None = None) -> None:
    """Say of a module how many bits its inputs, or its keys and values, have; None: they are not rounded."""
    for name, bits in ((_INPUT, inputs), (_CACHE, cache)):
        module.__dict__.pop(name, None)
        if bits is not None:
            module.__dict__[name] = bits


def input_bits(model: nn.Module) -> dict[str, float]:
    """Return the bits of the inputs of linear layers that are rounded, by the layer's name."""
    return {name: module.__dict__[_INPUT] for name, module in model.named_modules() if _INPUT in module.__dict__}


def cache_bits(model: nn.Module) -> dict[str, float]:
    """Return the mean bits of the keys and values that are rounded, by the name of the attention."""
    return {name: module.__dict__[_CACHE] for name, module in model.named_modules() if _CACHE in module.__dict__}
