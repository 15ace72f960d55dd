"""Content addresses of the states of a run. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from interventions.intervention import identity
from interventions.registry import find_method
from interventions.types import Resources
from pytest_lmcompose.cache.address import METHOD_LIBRARIES, address, method_code, versions
from pytest_lmcompose.composition import Composition, Step


class Addresses:
    """Content addresses of states, with the data and seed of one repeat."""

    def __init__(
        self,
        base: str,
        settings: Callable[[Step], Any],
        resources: Resources,
        seed: int,
        folder: Path,
        others: Callable[[Step], Mapping[str, Composition]],
    ) -> None:
        """Take the address of the base model; `settings` returns a step's settings, `others` the states it reads."""
        self._settings, self._seed, self._folder, self._others = settings, seed, folder, others
        self._data = address(resources=resources, libraries=versions(METHOD_LIBRARIES))  # what all steps depend on
        self._known = {Composition(): base}
        self._code: dict[str, str] = {}
        """Hash of the source of each method."""

    def of(self, composition: Composition) -> str:
        """Return the content address of a state: the hash of everything it depends on.

        That is the base model, and for each step its settings and what they name (see `identity`), the states that it
        reads, seed, data, code, and versions of libraries.
        """
        for prefix in composition.prefixes():
            if prefix not in self._known:
                self._known[prefix] = address(**self.parts(prefix))
        return self._known[composition]

    def parts(self, composition: Composition) -> dict[str, Any]:
        """Return everything that a state of one or more steps depends on, by name."""
        *before, step = composition.steps
        if step.method not in self._code:
            self._code[step.method] = method_code(find_method(step.method))
        others = [self.of(other) for other in self._others(step).values()]
        return {
            **({"others": others} if others else {}),
            "before": self.of(Composition(tuple(before))),
            "method": step.method,
            "settings": identity(self._settings(step), self._folder),
            "seed": step_seed(self._seed, composition),
            "data": self._data,
            "code": self._code[step.method],
        }


def step_seed(seed: int, prefix: Composition) -> int:
    """Return the seed of the last step of `prefix`; equal prefixes have equal seeds."""
    digest = hashlib.sha256(f"{seed}\n{prefix}\n{len(prefix.steps)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
