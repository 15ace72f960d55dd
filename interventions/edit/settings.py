"""Settings of the editing methods (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ValueSettings:
    """How the target values z of ROME and MEMIT are optimised; defaults as published."""

    steps: int = 25
    """Forward passes; the last one only measures."""
    lr: float = 0.5
    weight_decay: float = 1e-3
    stop_loss: float = 0.05
    """An edit whose loss (nats) is below this is done."""
    clamp_norm_factor: float = 4.0
    """Largest norm of the change of a hidden state, as a multiple of the state's own."""
    kl_factor: float = 0.0625


@dataclass(frozen=True)
class MemitSettings:
    """MEMIT (Meng et al., 2023); defaults as published, layers as fractions of depth."""

    layers: list[int] | None = None
    """Decoder blocks whose MLP output projection is rewritten; None: those of `layer_fractions`."""
    layer_fractions: list[float] = field(default_factory=lambda: [0.125, 0.25])
    """First and last edited block as fractions of depth (4 to 8 of 32 blocks as published)."""
    covariance_weight: float = 15000.0
    """How much what is stored weighs against the edits."""
    covariance_tokens: int | None = None
    """Tokens of calibration text behind the second moment of the keys; None: 10 per key dimension."""
    covariance_window: int = 512
    """Longest text, in tokens; the rest is cut off."""
    context_lengths: list[int] = field(default_factory=lambda: [10])
    """Lengths, in tokens, of the contexts that the model writes before the prompts."""
    contexts_per_length: int = 5
    z: ValueSettings = field(default_factory=ValueSettings)
