"""Settings that compression methods share. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from interventions.compress.engines.table import OWN, engine_problems
from interventions.compress.keep import Exceptions, keep_problems
from interventions.compress.schemes import CACHES, SCHEMES, Scheme, conflicts, scheme_problem
from interventions.intervention import ZEROS, Intervention, Model
from interventions.ranges import Choice, Count, Range, Search, Share, shown

Damping = Annotated[float, Range(0, 1)]
Bits = Annotated[int, Range(2, 8), Search((2, 3, 4, 5, 6, 7, 8))]
GroupSize = Annotated[int, Range(1, also=(-1,)), Search((256, 128, 64, 32, 16))]
Sparsity = Annotated[Share, Search((0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1))]
_NUMBERS = ("bits", "group_size", "symmetric")
_PATTERN = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")


@dataclass(frozen=True)
class Quantiser(Intervention):
    """Settings of quantisers."""

    category = "compress"

    bits: Bits = 4
    group_size: GroupSize = 128
    """Weights of a row that share a scale and zero point, the last ones of a row maybe fewer; -1: the whole row."""

    def promises(self) -> Mapping[str, float]:
        """Return the bits of a weight."""
        return {"average_bits": self.bits}

    def keeps(self, metric: str) -> bool:
        """Zero is rounded to zero, unless rounding is compensated and `preserve_mask` is off."""
        return metric in ZEROS and getattr(self, "preserve_mask", True)


@dataclass(frozen=True)
class GridQuantiser(Quantiser):
    """Settings of quantisers that take any number format, layer by layer."""

    symmetric: bool = False
    """Zero in the middle of the grid, instead of a grid from the least to the greatest weight."""
    scheme: str | None = None
    """The number format by a name of compressed-tensors, such as NVFP4A16, instead of the three settings above."""
    keep: Annotated[Exceptions | None, Search(layers=("{}:8", "{}:16"))] = None
    """Layers with other bits or another scheme, each as `layers:bits`, 16 to leave them as they are; the last one that
    matches counts. Layers are `first` or `last` (blocks), `first-2`, `last-2`, a role or a glob of names:
    `["*.mlp_out:8", "first:16", "*.q_proj:W8A16"]`."""
    kv_cache: Annotated[str, Choice(*CACHES)] | None = None
    """Round keys and values of attention as the model runs, with one scale a layer from calibration text."""

    @property
    def number_format(self) -> Scheme:
        """The scheme, or what the single settings say."""
        if self.scheme is not None:
            return SCHEMES[self.scheme]
        return Scheme(self.bits, self.group_size, self.symmetric, scales="sixteen")

    def problems(self) -> Iterator[str]:
        """Yield an unknown scheme, settings that contradict it, and exceptions that cannot be read."""
        yield from super().problems()
        if self.scheme is not None:
            problem = scheme_problem(self.scheme)
            if problem is not None:
                yield f"scheme={shown(self.scheme)}: {problem}"
                return
            yield from self.contradictions([key for key in _NUMBERS if getattr(self, key) != getattr(type(self), key)])
        yield from keep_problems(self.keep or [])

    def contradictions(self, given: Collection[str]) -> Iterator[str]:
        """Yield the settings that are not those of the scheme."""
        if self.scheme in SCHEMES:
            yield from conflicts(self.scheme, {key: getattr(self, key) for key in _NUMBERS if key in given})

    def promises(self) -> Mapping[str, float]:
        """Return the bits of weights and inputs, where they are the same in all layers, and of keys and values."""
        found: dict[str, float] = {} if self.kv_cache is None else {"kv_cache_bits": CACHES[self.kv_cache].bits}
        if self.keep:
            return found
        if self.number_format.inputs is not None:
            found["input_bits"] = self.number_format.inputs.bits
        return {"average_bits": self.number_format.bits, **found}

    def promises_on(self, model: Model) -> Mapping[str, float]:
        """Return the mean bits of the model's weights as well."""
        if not self.keep:
            return self.promises()
        from interventions.compress.kernels.chosen import average_bits

        return {"average_bits": average_bits(model, self), **self.promises()}


@dataclass(frozen=True)
class Pruner(Intervention):
    """Settings of pruners."""

    category = "compress"

    sparsity: Sparsity = 0.5
    pattern: str | None = None
    """n:m, as "2:4": n of every m weights next to each other in a row are kept. `sparsity` must say the same."""

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """The pattern as numbers; None for none, or one that cannot be read."""
        match = _PATTERN.fullmatch(self.pattern or "")
        return None if match is None else (int(match[1]), int(match[2]))

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the pattern, by itself or beside the sparsity."""
        if self.pattern is None:
            return
        where, pattern = f"pattern={shown(self.pattern)}", self.n_of_m
        if pattern is None or not 0 < pattern[0] < pattern[1]:
            yield f"{where}: expected n:m with 0 < n < m, such as '2:4' (quoted in YAML) for 2 of every 4, or null"
        elif abs(self.sparsity - (share := 1 - pattern[0] / pattern[1])) > 1e-6:
            yield f"{where}: a sparsity of {share:g}, not of {self.sparsity}; set sparsity={share:g}, or pattern=null"

    def promises(self) -> Mapping[str, float]:
        """Return the share of zeros, and that every layer has the pattern where it is one that is measured."""
        return {"sparsity": self.sparsity} | ({"sparsity_2_4": 1.0} if self.n_of_m == (2, 4) else {})

    def keeps(self, metric: str) -> bool:
        """Zero is a level of every grid."""
        return metric in (*ZEROS, "average_bits")


@dataclass(frozen=True)
class Calibrated(Intervention):
    """Settings of methods that read calibration text and that other engines can run."""

    samples: Count = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: Count = 2048
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    calibrate_all_experts: bool = False
    """In a mixture of experts, collect the statistics of every expert on all tokens, not on those routed to it."""
    engine: str = OWN
    """Whose implementation: `own`, or one that has the method; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""

    def problems(self) -> Iterator[str]:
        """Yield the settings that the engine does not support."""
        yield from super().problems()
        yield from engine_problems(self.name, self)

    def identity(self, folder: Path) -> Any:
        """Return the settings, with the versions of the engine if it is another one."""
        from interventions.compress.engines.identity import engine_identity

        return {"settings": self, "engine": engine_identity(self)}


@dataclass(frozen=True)
class Sequential(Calibrated):
    """Settings of methods that work block by block."""

    sequential: bool = True
    """Calibrate each block on what the already changed blocks put out."""
