"""Settings of the compression methods (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RtnSettings:
    """Rounding each weight to the nearest level of its grid; reads no text."""

    bits: int = 4
    """2 to 8."""
    group_size: int = 128
    """Weights of a row that share a scale and zero point, the last ones of a row maybe fewer; -1: the whole row."""
    symmetric: bool = False
    """Zero in the middle of the grid, instead of a grid from the least to the greatest weight."""


@dataclass(frozen=True)
class GptqSettings:
    """GPTQ (Frantar et al., 2023); defaults as published, but for `true_sequential` and `preserve_mask`."""

    bits: int = 4
    """2 to 8."""
    group_size: int = 128
    """Weights of a row that share a scale and zero point, the last ones of a row maybe fewer; -1: the whole row."""
    symmetric: bool = False
    """Zero in the middle of the grid, instead of a grid from the least to the greatest weight."""
    act_order: bool = False
    """Round the columns with the largest inputs first. Groups stay those of neighbouring columns: implies
    `static_groups`."""
    static_groups: bool = False
    """Find the grids of all groups on the weights as they were, not when the rounding reaches them."""
    damping: float = 0.01
    """Added to the diagonal of the Gram matrix, as a share of its mean; raised tenfold, with a warning, where it
    leaves the matrix singular."""
    samples: int = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: int = 2048
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    sequential: bool = True
    """Calibrate each block on what the already quantised blocks put out."""
    true_sequential: bool = True
    """The same within a block: calibrate each group of linears on the quantised ones before it. More forward passes."""
    preserve_mask: bool = True
    """Keep weights at zero that are zero already, in a linear with at least 5 % of them. As published,
    compensation would fill them again."""
    engine: str = "own"
    """Whose implementation: `own`, or `gptqmodel`, `llmcompressor`, `auto_gptq`; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""


@dataclass(frozen=True)
class AwqSettings:
    """AWQ (Lin et al., 2024). Defaults are those of the reference implementations."""

    bits: int = 4
    """2 to 8."""
    group_size: int = 128
    """Weights of a row that share a scale and zero point; -1: the whole row."""
    grid: int = 20
    """Scale exponents tried, evenly in [0, 1)."""
    duo_scaling: bool = True
    """Weigh activations against weights, x^r / w^(1-r), instead of x^r alone."""
    clip: bool = True
    """Search a clipping threshold for each group of weights before rounding."""
    samples: int = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: int = 512
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    search_tokens: int | None = 512
    """Tokens, spread over the calibration text, on which a scale's effect on the outputs of
    attention (in whole batches) and MLP is compared; None: all, as published and much slower.
    Means, losses of single linears and clipping read all tokens in any case."""
    quantised_inputs: bool = False
    """Calibrate each block on what the already quantised blocks put out. Off as published: the
    blocks before it are at full precision."""
    engine: str = "own"
    """Whose implementation: `own`, or `autoawq`, `llmcompressor`; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""


@dataclass(frozen=True)
class MagnitudeSettings:
    """Magnitude pruning, uniform over layers."""

    sparsity: float = 0.5
    """Share of each linear's weights that become zero, in [0, 1); the number is rounded down."""
    pattern: str | None = None
    """n:m, as "2:4": n of every m weights next to each other in a row are kept. `sparsity` must say the same."""
    among: str = "layer"
    """What a weight is compared with: those of its `layer`, as a rule, or of its `row` (its output) alone."""


@dataclass(frozen=True)
class WandaSettings:
    """Wanda (Sun et al., 2024); defaults as published."""

    sparsity: float = 0.5
    """Share of each row's (output's) weights that become zero, in [0, 1); the number is rounded down."""
    pattern: str | None = None
    """n:m, as "2:4": n of every m weights next to each other in a row are kept. `sparsity` must say the same."""
    samples: int = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: int = 2048
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    sequential: bool = True
    """Calibrate each block on what the already pruned blocks put out."""
    engine: str = "own"
    """Whose implementation: `own`, or `llmcompressor`; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""


@dataclass(frozen=True)
class SparseGptSettings:
    """SparseGPT (Frantar & Alistarh, 2023); defaults as published, but for `preserve_mask`."""

    sparsity: float = 0.5
    """Share of weights that become zero, in [0, 1), in each block of columns over all rows."""
    pattern: str | None = None
    """n:m, as "2:4": n of every m weights next to each other in a row are kept. `sparsity` must say the same."""
    block_size: int = 128
    """Columns whose masks are chosen at a time; a pattern must fit in, else the next smaller multiple is taken."""
    damping: float = 0.01
    """Added to the diagonal of the Gram matrix, as a share of its mean; raised tenfold, with a warning, where it
    leaves the matrix singular."""
    samples: int = 128
    """Windows of calibration text read, the first ones."""
    max_tokens: int = 2048
    """Tokens of a window, as many as the model reads at most: calibration texts run on, a blank line between them."""
    sequential: bool = True
    """Calibrate each block on what the already pruned blocks put out."""
    true_sequential: bool = False
    """The same within a block: calibrate each group of linears on the pruned ones before it. More forward passes."""
    preserve_mask: bool = True
    """Keep weights at zero that are zero already, and count them, in a linear with at least 5 % of them. As
    published, compensation would fill them again."""
    engine: str = "own"
    """Whose implementation: `own`, or `llmcompressor`; see docs/engines.md."""
    engine_python: str | None = None
    """The interpreter to run another engine with; None: the one its environment variable names, or this one."""
