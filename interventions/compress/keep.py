"""Layers that a quantiser treats differently: the setting `keep`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

from interventions.compress.schemes import scheme_problem
from interventions.ranges import Items, shown

Exceptions = Annotated[list[str], Items()]
UNTOUCHED = "16"
_POSITION = re.compile(r"(first|last)(?:-([1-9][0-9]{0,3}))?")
_BITS = ("2", "3", "4", "5", "6", "7", "8", UNTOUCHED)


@dataclass(frozen=True)
class Rule:
    """Which layers are stored how."""

    layers: str
    """A position, a role, or a glob of names."""
    format: str
    """Bits, 16 for untouched, or a scheme."""

    def holds(self, block: int, blocks: int, names: Collection[str]) -> bool:
        """Tell whether a layer of a block is meant; `names` are all that it goes by."""
        position = _POSITION.fullmatch(self.layers)
        if position is None:
            return any(fnmatchcase(given, self.layers) for given in names)
        count = int(position[2] or 1)
        return block < count if position[1] == "first" else block >= blocks - count


def rules(keep: Sequence[str] | None) -> list[Rule]:
    """Return the rules of checked settings."""
    return [Rule(*text.rsplit(":", 1)) for text in keep or ()]


def keep_problems(keep: Sequence[str]) -> Iterator[str]:
    """Yield what cannot be read."""
    for text in keep:
        layers, colon, form = text.rpartition(":")
        if not colon or not layers.strip():
            yield f"keep={shown(text)}: expected layers:bits, such as first:16 or *.mlp_out:8"
        elif form not in _BITS and (problem := scheme_problem(form)) is not None:
            bits = f"{', '.join(_BITS)} bits or a scheme"
            yield f"keep={shown(text)}: {problem if 'inputs' in problem else f'expected {bits} after the colon'}"
