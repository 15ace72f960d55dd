"""Settings of the editing methods (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from interventions.layouts import ROLES
from interventions.ranges import (
    Checked,
    Choice,
    Count,
    Fractions,
    Items,
    Layer,
    Layers,
    Positive,
    Range,
    Share,
    Weight,
)

IN_ATTENTION = ("query", "key", "value")
Target = Annotated[str, Choice(*IN_ATTENTION, *ROLES)]


@dataclass(frozen=True)
class ValueSettings(Checked):
    """How the target values z of MEMIT, ROME and AlphaEdit are optimised; defaults as published."""

    steps: Annotated[int, Range(2)] = 25
    """Forward passes; the last one only measures."""
    lr: Positive = 0.5
    weight_decay: Weight = 1e-3
    stop_loss: Weight = 0.05
    """An edit whose loss (nats) is below this is done."""
    clamp_norm_factor: Positive = 4.0
    """Largest norm of the change of a hidden state, as a multiple of the state's own."""
    kl_factor: Weight = 0.0625


@dataclass(frozen=True)
class RewriteSettings(Checked):
    """What MEMIT, ROME and AlphaEdit share."""

    batch_size: Count | None = None
    """Edits made at once; each batch starts from the model that the one before left. None: all in one batch."""
    chat_template: bool = False
    """Put prompts as a user's words into the tokenizer's chat template; the targets open the answers."""
    covariance_tokens: Count | None = None
    """Tokens of calibration text behind the second moment of the keys; None: 10 per key dimension."""
    covariance_window: Count = 512
    """Tokens read of a text, as published each in a row of its own; as many as the model reads at most."""
    context_lengths: Annotated[list[Count], Items()] = field(default_factory=lambda: [10])
    """Lengths, in tokens, of the contexts that the model writes before the prompts."""
    contexts_per_length: Annotated[int, Range(0)] = 5
    z: ValueSettings = field(default_factory=ValueSettings)
    preserve_mask: bool = False
    """Keep pruned weights at zero: in linears with at least 5 % exact zeros the change is made without them."""


@dataclass(frozen=True)
class MemitSettings(RewriteSettings):
    """MEMIT (Meng et al., 2023); defaults as published, layers as fractions of depth."""

    layers: Layers | None = None
    """Decoder blocks whose MLP output projection is rewritten; None: those of `layer_fractions`."""
    layer_fractions: Fractions = field(default_factory=lambda: [0.125, 0.25])
    """First and last edited block as fractions of depth (4 to 8 of 32 blocks as published)."""
    covariance_weight: Positive = 15000.0
    """How much what is stored weighs against the edits."""


@dataclass(frozen=True)
class RomeSettings(RewriteSettings):
    """ROME (Meng et al., 2022); defaults as published, the layer as a fraction of depth."""

    batch_size: Count | None = 1
    """Edits whose target values are found together; the rank-one updates follow one another in any case."""
    layer: Layer | None = None
    """Decoder block whose MLP output projection is rewritten; None: that of `layer_fraction`."""
    layer_fraction: Share = 0.16
    """The edited block as a fraction of depth (5 of 32 blocks as published)."""
    context_lengths: Annotated[list[Count], Items()] = field(default_factory=lambda: [5, 10])
    """Lengths, in tokens, of the contexts that the model writes before the prompts."""
    contexts_per_length: Annotated[int, Range(0)] = 10


@dataclass(frozen=True)
class AlphaEditSettings(RewriteSettings):
    """AlphaEdit (Fang et al., 2025); defaults as published, layers as fractions of depth."""

    layers: Layers | None = None
    """Decoder blocks whose MLP output projection is rewritten; None: those of `layer_fractions`."""
    layer_fractions: Fractions = field(default_factory=lambda: [0.125, 0.25])
    """First and last edited block as fractions of depth (4 to 8 of 32 blocks as published)."""
    nullspace_threshold: Positive = 0.02
    """Directions in which the second moment of the keys is below this are free for edits."""
    nullspace_relative: bool = False
    """Take the threshold as a multiple of the mean eigenvalue: for models whose keys are of another scale."""
    ridge: Positive = 10.0
    """Weight of the update's own size (called L2 by the authors)."""


@dataclass(frozen=True)
class FtSettings(Checked):
    """Fine-tuning of some MLP output projections on the targets; defaults as in Kolbeinsson et al. (2025)."""

    layers: Layers | None = None
    """Decoder blocks whose MLP output projection is trained; None: those of `layer_fractions`."""
    layer_fractions: Fractions = field(default_factory=lambda: [0.125, 0.25])
    """First and last trained block as fractions of depth."""
    lr: Positive = 5e-5
    steps: Count = 25
    """Passes over the edits, at most."""
    batch_size: Count = 50
    """Edits of an update."""
    stop_loss: Weight = 0.01
    """A batch whose loss (nats) is below this is not trained on; training ends when all are."""
    weight_decay: Weight = 0.0
    norm_constraint: Positive | None = None
    """Largest change of a single weight, the L-infinity norm of Zhu et al. (2020); None: no bound."""
    chat_template: bool = False
    """Put prompts as a user's words into the tokenizer's chat template; the targets open the answers."""
    preserve_mask: bool = False
    """Keep pruned weights at zero: in linears with at least 5 % exact zeros the change is made without them."""


@dataclass(frozen=True)
class LoraSettings(Checked):
    """LoRA (Hu et al., 2022) or AdaLoRA (Zhang et al., 2023) on the targets, merged into the weights at the end.

    Defaults as in Kolbeinsson et al. (2025), who used AdaLoRA.
    """

    adaptive: bool = True
    """AdaLoRA: ranks of `initial_rank`, cut down to `rank` on average by what matters; else LoRA."""
    rank: Count = 8
    initial_rank: Count = 12
    """Of AdaLoRA: the rank of every layer until the warm-up ends."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[list[Target], Items()] = field(default_factory=lambda: ["query", "value"])
    """Linear layers adapted: query, key, value (all three where they are fused), attention_in, attention_out,
    mlp_in, mlp_out."""
    layers: Layers | None = None
    """Decoder blocks adapted; None: all."""
    lr: Positive = 5e-3
    steps: Count = 70
    """Passes over the edits, at most."""
    batch_size: Count = 50
    """Edits of an update."""
    stop_loss: Weight = 0.0
    """Training ends when the loss (nats) of every batch is below this, with AdaLoRA once the ranks are cut down."""
    warmup: Share = 0.1
    """Of AdaLoRA: share of the steps before ranks are cut."""
    final: Share = 0.3
    """Of AdaLoRA: share of the steps after the last cut."""
    orthogonality: Weight = 0.5
    """Of AdaLoRA: weight of the penalty that keeps singular vectors orthonormal."""
    chat_template: bool = False
    """Put prompts as a user's words into the tokenizer's chat template; the targets open the answers."""
    preserve_mask: bool = False
    """Keep pruned weights at zero: in linears with at least 5 % exact zeros the change is made without them."""

    @property
    def warmup_steps(self) -> int:
        """Steps of AdaLoRA before ranks are cut."""
        return round(self.warmup * self.steps)

    @property
    def final_steps(self) -> int:
        """Steps of AdaLoRA after the last cut."""
        return max(1, round(self.final * self.steps))

    def problems(self) -> Iterator[str]:
        """Yield what leaves AdaLoRA nothing to cut, or no step for it."""
        if not self.adaptive:
            return
        if self.initial_rank <= self.rank:
            yield (
                f"initial_rank={self.initial_rank}: expected more than rank={self.rank}, to which AdaLoRA cuts it; "
                "for LoRA of a fixed rank set adaptive=false"
            )
        if self.warmup_steps + self.final_steps >= self.steps:
            yield (
                f"steps={self.steps}: with warmup={self.warmup} and final={self.final} no step is left in which "
                "AdaLoRA could cut ranks"
            )
