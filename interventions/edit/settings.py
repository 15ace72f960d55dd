"""Settings of the editing methods (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ValueSettings:
    """How the target values z of MEMIT, ROME and AlphaEdit are optimised; defaults as published."""

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
class RewriteSettings:
    """What MEMIT, ROME and AlphaEdit share."""

    batch_size: int | None = None
    """Edits made at once; each batch starts from the model that the one before left. None: all in one batch."""
    chat_template: bool = False
    """Put prompts as a user's words into the tokenizer's chat template; the targets open the answers."""
    covariance_tokens: int | None = None
    """Tokens of calibration text behind the second moment of the keys; None: 10 per key dimension."""
    covariance_window: int = 512
    """Tokens read of a text, as published each in a row of its own; as many as the model reads at most."""
    context_lengths: list[int] = field(default_factory=lambda: [10])
    """Lengths, in tokens, of the contexts that the model writes before the prompts."""
    contexts_per_length: int = 5
    z: ValueSettings = field(default_factory=ValueSettings)
    preserve_mask: bool = False
    """Keep pruned weights at zero: in linears with at least 5 % exact zeros the change is made without them."""


@dataclass(frozen=True)
class MemitSettings(RewriteSettings):
    """MEMIT (Meng et al., 2023); defaults as published, layers as fractions of depth."""

    layers: list[int] | None = None
    """Decoder blocks whose MLP output projection is rewritten; None: those of `layer_fractions`."""
    layer_fractions: list[float] = field(default_factory=lambda: [0.125, 0.25])
    """First and last edited block as fractions of depth (4 to 8 of 32 blocks as published)."""
    covariance_weight: float = 15000.0
    """How much what is stored weighs against the edits."""


@dataclass(frozen=True)
class RomeSettings(RewriteSettings):
    """ROME (Meng et al., 2022); defaults as published, the layer as a fraction of depth."""

    batch_size: int | None = 1
    """Edits whose target values are found together; the rank-one updates follow one another in any case."""
    layer: int | None = None
    """Decoder block whose MLP output projection is rewritten; None: that of `layer_fraction`."""
    layer_fraction: float = 0.16
    """The edited block as a fraction of depth (5 of 32 blocks as published)."""
    context_lengths: list[int] = field(default_factory=lambda: [5, 10])
    """Lengths, in tokens, of the contexts that the model writes before the prompts."""
    contexts_per_length: int = 10


@dataclass(frozen=True)
class AlphaEditSettings(RewriteSettings):
    """AlphaEdit (Fang et al., 2025); defaults as published, layers as fractions of depth."""

    layers: list[int] | None = None
    """Decoder blocks whose MLP output projection is rewritten; None: those of `layer_fractions`."""
    layer_fractions: list[float] = field(default_factory=lambda: [0.125, 0.25])
    """First and last edited block as fractions of depth (4 to 8 of 32 blocks as published)."""
    nullspace_threshold: float = 0.02
    """Directions in which the second moment of the keys is below this are free for edits."""
    nullspace_relative: bool = False
    """Take the threshold as a multiple of the mean eigenvalue: for models whose keys are of another scale."""
    ridge: float = 10.0
    """Weight of the update's own size (called L2 by the authors)."""


@dataclass(frozen=True)
class FtSettings:
    """Fine-tuning of some MLP output projections on the targets; defaults as in Kolbeinsson et al. (2025)."""

    layers: list[int] | None = None
    """Decoder blocks whose MLP output projection is trained; None: those of `layer_fractions`."""
    layer_fractions: list[float] = field(default_factory=lambda: [0.125, 0.25])
    """First and last trained block as fractions of depth."""
    lr: float = 5e-5
    steps: int = 25
    """Passes over the edits, at most."""
    batch_size: int = 50
    """Edits of an update."""
    stop_loss: float = 0.01
    """A batch whose loss (nats) is below this is not trained on; training ends when all are."""
    weight_decay: float = 0.0
    norm_constraint: float | None = None
    """Largest change of a single weight, the L-infinity norm of Zhu et al. (2020); None: no bound."""
    chat_template: bool = False
    """Put prompts as a user's words into the tokenizer's chat template; the targets open the answers."""
    preserve_mask: bool = False
    """Keep pruned weights at zero: in linears with at least 5 % exact zeros the change is made without them."""


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al., 2022) or AdaLoRA (Zhang et al., 2023) on the targets, merged into the weights at the end.

    Defaults as in Kolbeinsson et al. (2025), who used AdaLoRA.
    """

    adaptive: bool = True
    """AdaLoRA: ranks of `initial_rank`, cut down to `rank` on average by what matters; else LoRA."""
    rank: int = 8
    initial_rank: int = 12
    """Of AdaLoRA: the rank of every layer until the warm-up ends."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["query", "value"])
    """Linear layers adapted: query, key, value (all three where they are fused), attention_in, attention_out,
    mlp_in, mlp_out."""
    layers: list[int] | None = None
    """Decoder blocks adapted; None: all."""
    lr: float = 5e-3
    steps: int = 70
    """Passes over the edits, at most."""
    batch_size: int = 50
    """Edits of an update."""
    stop_loss: float = 0.0
    """Training ends when the loss (nats) of every batch is below this, with AdaLoRA once the ranks are cut down."""
    warmup: float = 0.1
    """Of AdaLoRA: share of the steps before ranks are cut."""
    final: float = 0.3
    """Of AdaLoRA: share of the steps after the last cut."""
    orthogonality: float = 0.5
    """Of AdaLoRA: weight of the penalty that keeps singular vectors orthonormal."""
    chat_template: bool = False
    """Put prompts as a user's words into the tokenizer's chat template; the targets open the answers."""
    preserve_mask: bool = False
    """Keep pruned weights at zero: in linears with at least 5 % exact zeros the change is made without them."""
