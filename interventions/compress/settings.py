"""Settings of the compression methods (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Calibration texts read, the first ones."""
    max_tokens: int = 512
    """Length of a calibration sequence."""
    search_tokens: int | None = 512
    """Tokens, spread over the calibration text, on which a scale's effect on the outputs of
    attention (in whole batches) and MLP is compared; None: all, as published and much slower.
    Means, losses of single linears and clipping read all tokens in any case."""
    quantised_inputs: bool = False
    """Calibrate each block on what the already quantised blocks put out. Off as published: the
    blocks before it are at full precision."""
