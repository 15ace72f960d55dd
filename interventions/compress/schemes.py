"""Number formats by the names of compressed-tensors' presets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from interventions.names import near_names
from interventions.ranges import shown


@dataclass(frozen=True)
class Scheme:
    """How weights are stored."""

    bits: int
    group_size: int = -1
    """Columns that share a scale; -1: all."""
    symmetric: bool = True
    floats: bool = False
    """Floating-point numbers instead of whole ones."""
    scales: Literal["sixteen", "number", "power", "two-level"] = "number"
    """16-bit numbers, numbers of the model's dtype, powers of two, or FP8 numbers over a float32 one of the layer."""
    rows: int = 1
    """Rows that share a scale; -1: all."""


_INTEGERS = {f"W{bits}A16": Scheme(bits, 128) for bits in range(2, 9)}
SCHEMES = _INTEGERS | {
    "W4A16_ASYM": Scheme(4, 128, symmetric=False),
    "FP8A16": Scheme(8, floats=True, rows=-1),
    "FP8A16_CHANNEL": Scheme(8, floats=True),
    "FP8A16_BLOCK": Scheme(8, 128, floats=True, rows=128),
    "NVFP4A16": Scheme(4, 16, floats=True, scales="two-level"),
    "MXFP4A16": Scheme(4, 32, floats=True, scales="power"),
    "MXFP6A16": Scheme(6, 32, floats=True, scales="power"),
    "MXFP8A16": Scheme(8, 32, floats=True, scales="power"),
}
"""As in compressed-tensors 0.20, but for FP8A16 and its forms, which it has with rounded activations only."""
ACTIVATIONS = {
    **{f"W{bits}A{also}": f"scheme=W{bits}A16" for bits in range(2, 8) for also in (4, 8) if bits <= also},
    **dict.fromkeys(("W8A8", "INT8"), "bits=8,group_size=-1,symmetric=true"),
    "W4AFP8": "scheme=W4A16",
    "FP8": "scheme=FP8A16",
    "FP8_DYNAMIC": "scheme=FP8A16_CHANNEL",
    "FP8_BLOCK": "scheme=FP8A16_BLOCK",
    "NVFP4": "scheme=NVFP4A16",
    **dict.fromkeys(("MXFP4", "MXFP4XFP8"), "scheme=MXFP4A16"),
    "MXFP6A8": "scheme=MXFP6A16",
    "MXFP8": "scheme=MXFP8A16",
}
"""Presets that also round the inputs of layers, and the settings that round the weights alone in the same way."""


def scheme_problem(name: str) -> str | None:
    """Say why a name is no usable scheme, or return None."""
    if name in SCHEMES:
        return None
    if name in ACTIVATIONS:
        return (
            f"it also rounds the inputs of layers, which is not supported; {ACTIVATIONS[name]} rounds the weights alone"
        )
    near = near_names(name, [*SCHEMES, *ACTIVATIONS])
    return f"expected one of {', '.join(SCHEMES)}, or null.{near}".removesuffix(".")


def conflicts(scheme: str, settings: dict[str, Any]) -> Iterator[str]:
    """Yield the settings that contradict a scheme."""
    for key, value in settings.items():
        wanted = getattr(SCHEMES[scheme], key)
        if value != wanted:
            yield f"{key}={shown(value)}: scheme={scheme} has {key}={shown(wanted)}; leave one of them out"
