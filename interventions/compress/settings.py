"""Settings of the compression methods (no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from interventions.compress.engines.table import OWN, engine_problems
from interventions.ranges import Checked, Choice, Count, Range, Share, shown

Bits = Annotated[int, Range(2, 8)]
GroupSize = Annotated[int, Range(1, also=(-1,))]
Damping = Annotated[float, Range(0, 1)]
_PATTERN = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")


@dataclass(frozen=True)
class PruningSettings(Checked):
    """What the pruning methods share."""

    sparsity: Share = 0.5
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


@dataclass(frozen=True)
class RtnSettings(Checked):
    """Rounding each weight to the nearest level of its grid; reads no text."""

    bits: Bits = 4
    group_size: GroupSize = 128
    """Weights of a row that share a scale and zero point, the last ones of a row maybe fewer; -1: the whole row."""
    symmetric: bool = False
    """Zero in the middle of the grid, instead of a grid from the least to the greatest weight."""


@dataclass(frozen=True)
class GptqSettings(Checked):
    """GPTQ (Frantar et al., 2023); defaults as published, but for `true_sequential` and `preserve_mask`."""

    bits: Bits = 4
    group_size: GroupSize = 128
    """Weights of a row that share a scale and zero point, the last ones of a row maybe fewer; -1: the whole row."""
    symmetric: bool = False
    """Zero in the middle of the grid, instead of a grid from the least to the greatest weight."""
    act_order: bool = False
    """Round the columns with the largest inputs first. Groups stay those of neighbouring columns: implies
    `static_groups`."""
    static_groups: bool = False
    """Find the grids of all groups on the weights as they were, not when the rounding reaches them."""
    damping: Damping = 0.01
    """Added to the diagonal of the Gram matrix, as a share of its mean; raised tenfold, with a warning, where it
    leaves the matrix singular."""
    samples: Count = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: Count = 2048
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    sequential: bool = True
    """Calibrate each block on what the already quantised blocks put out."""
    true_sequential: bool = True
    """The same within a block: calibrate each group of linears on the quantised ones before it. More forward passes."""
    preserve_mask: bool = True
    """Keep weights at zero that are zero already, in a linear with at least 5 % of them. As published,
    compensation would fill them again."""
    engine: str = OWN
    """Whose implementation: `own`, or `gptqmodel`, `llmcompressor`, `auto_gptq`; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""

    def problems(self) -> Iterator[str]:
        """Yield what the engine cannot do."""
        yield from engine_problems("gptq", self)


@dataclass(frozen=True)
class AwqSettings(Checked):
    """AWQ (Lin et al., 2024). Defaults are those of the reference implementations."""

    bits: Bits = 4
    group_size: GroupSize = 128
    """Weights of a row that share a scale and zero point; -1: the whole row."""
    grid: Count = 20
    """Scale exponents tried, evenly in [0, 1)."""
    duo_scaling: bool = True
    """Weigh activations against weights, x^r / w^(1-r), instead of x^r alone."""
    clip: bool = True
    """Search a clipping threshold for each group of weights before rounding."""
    samples: Count = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: Count = 512
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    search_tokens: Count | None = 512
    """Tokens, spread over the calibration text, on which a scale's effect on the outputs of
    attention (in whole batches) and MLP is compared; None: all, as published and much slower.
    Means, losses of single linears and clipping read all tokens in any case."""
    quantised_inputs: bool = False
    """Calibrate each block on what the already quantised blocks put out. Off as published: the
    blocks before it are at full precision."""
    engine: str = OWN
    """Whose implementation: `own`, or `autoawq`, `llmcompressor`; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""

    def problems(self) -> Iterator[str]:
        """Yield what the engine cannot do."""
        yield from engine_problems("awq", self)


@dataclass(frozen=True)
class MagnitudeSettings(PruningSettings):
    """Magnitude pruning, uniform over layers."""

    sparsity: Share = 0.5
    """Share of each linear's weights that become zero; the number is rounded down."""
    among: Annotated[str, Choice("layer", "row")] = "layer"
    """What a weight is compared with: those of its `layer`, as a rule, or of its `row` (its output) alone."""


@dataclass(frozen=True)
class WandaSettings(PruningSettings):
    """Wanda (Sun et al., 2024); defaults as published."""

    sparsity: Share = 0.5
    """Share of each row's (output's) weights that become zero; the number is rounded down."""
    samples: Count = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: Count = 2048
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    sequential: bool = True
    """Calibrate each block on what the already pruned blocks put out."""
    engine: str = OWN
    """Whose implementation: `own`, or `llmcompressor`; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""

    def problems(self) -> Iterator[str]:
        """Yield what the engine cannot do."""
        yield from super().problems()
        yield from engine_problems("wanda", self)


@dataclass(frozen=True)
class SparseGptSettings(PruningSettings):
    """SparseGPT (Frantar & Alistarh, 2023); defaults as published, but for `preserve_mask`."""

    sparsity: Share = 0.5
    """Share of weights that become zero, in each block of columns over all rows."""
    block_size: Count = 128
    """Columns whose masks are chosen at a time; a pattern must fit in, else the next smaller multiple is taken."""
    damping: Damping = 0.01
    """Added to the diagonal of the Gram matrix, as a share of its mean; raised tenfold, with a warning, where it
    leaves the matrix singular."""
    samples: Count = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: Count = 2048
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    sequential: bool = True
    """Calibrate each block on what the already pruned blocks put out."""
    true_sequential: bool = False
    """The same within a block: calibrate each group of linears on the pruned ones before it. More forward passes."""
    preserve_mask: bool = True
    """Keep weights at zero that are zero already, and count them, in a linear with at least 5 % of them. As
    published, compensation would fill them again."""
    engine: str = OWN
    """Whose implementation: `own`, or `llmcompressor`; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""

    def problems(self) -> Iterator[str]:
        """Yield what the engine cannot do."""
        yield from super().problems()
        yield from engine_problems("sparsegpt", self)
