"""Number formats by the names of compressed-tensors' presets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    calibrated: bool = False
    """Of inputs: whether one scale for all of them (of two levels: the upper one) is found on calibration text."""
    inputs: Scheme | None = None
    """How the inputs of the layer are rounded as the model runs: in groups of a token's channels; None: not."""


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
_INTS = {bits: Scheme(bits) for bits in (4, 8)}
_FP8 = Scheme(8, floats=True)
_MXFP8 = Scheme(8, 32, floats=True, scales="power")


def _with_inputs(name: str, inputs: Scheme) -> Scheme:
    return replace(SCHEMES[name], inputs=inputs)


SCHEMES |= {
    **{f"W{w}A{x}": _with_inputs(f"W{w}A16", _INTS[x]) for w in range(2, 8) for x in (4, 8) if w <= x},
    "W4AFP8": _with_inputs("W4A16", _FP8),
    **dict.fromkeys(("W8A8", "INT8"), Scheme(8, inputs=_INTS[8])),
    "FP8": _with_inputs("FP8A16", replace(_FP8, calibrated=True)),
    "FP8_DYNAMIC": _with_inputs("FP8A16_CHANNEL", _FP8),
    "FP8_BLOCK": _with_inputs("FP8A16_BLOCK", replace(_FP8, group_size=128)),
    "NVFP4": _with_inputs("NVFP4A16", Scheme(4, 16, floats=True, scales="two-level", calibrated=True)),
    "MXFP4": _with_inputs("MXFP4A16", Scheme(4, 32, floats=True, scales="power")),
    "MXFP4XFP8": _with_inputs("MXFP4A16", replace(_FP8, group_size=128)),
    "MXFP6A8": _with_inputs("MXFP6A16", _MXFP8),
    "MXFP8": _with_inputs("MXFP8A16", _MXFP8),
}
"""As in compressed-tensors 0.20, which has FP8A16 and its forms with rounded inputs only."""
CACHES = {"fp8": replace(_FP8, calibrated=True), "int8": replace(_INTS[8], calibrated=True)}
"""How keys and values of attention are rounded."""


def scheme_problem(name: str) -> str | None:
    """Say why a name is no usable scheme, or return None."""
    if name in SCHEMES:
        return None
    near = near_names(name, list(SCHEMES))
    return f"expected one of {', '.join(SCHEMES)}, or null.{near}".removesuffix(".")


def conflicts(scheme: str, settings: dict[str, Any]) -> Iterator[str]:
    """Yield the settings that contradict a scheme."""
    for key, value in settings.items():
        wanted = getattr(SCHEMES[scheme], key)
        if value != wanted:
            yield f"{key}={shown(value)}: scheme={scheme} has {key}={shown(wanted)}; leave one of them out"
