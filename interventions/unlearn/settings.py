"""Settings of the unlearning methods (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from interventions.ranges import Checked, Count, Items, Layer, Layers, Positive, Range, Share, Weight

Names = Annotated[list[str], Items()]
Tokens = Annotated[int, Range(2)]
PartOfDepth = Annotated[float, Range(above=0, high=1)]


@dataclass(frozen=True)
class RmuSettings(Checked):
    """RMU (Li et al., 2024); defaults as published for Zephyr-7B, layers as a fraction of depth."""

    topics: Names | None = None
    """Topics to forget; None: all that there is forget text of."""
    layer: Layer | None = None
    """Block whose output is steered; None: that of `layer_fraction`."""
    layer_fraction: Share = 0.22
    """The steered block as a fraction of depth (7 of 32 blocks as published)."""
    train_layers: Layers | None = None
    """Blocks whose weights are trained; None: three, the last of them the steered one."""
    parameters: Names = field(default_factory=lambda: ["mlp_out"])
    """What is trained in those blocks: attention_in, attention_out, mlp_in or mlp_out for the weights of such linear
    layers, or names of parameters as they are inside a block, such as `mlp.down_proj.weight`."""
    steering_coefficient: Positive = 6.5
    """Norm of the control vectors."""
    alpha: Weight = 1200.0
    """Weight of the loss on retain text."""
    lr: Positive = 5e-5
    max_num_batches: Count = 150
    """Updates over all topics; texts are gone through again where they are fewer."""
    batch_size: Count = 4
    """Texts of a batch; each update takes one of forget and one of retain text."""
    max_tokens: Tokens = 512
    """Longest text, in tokens; the rest is cut off."""
    preserve_mask: bool = False
    """Keep pruned weights at zero: matrices with at least 5 % exact zeros are trained without them."""

    def problems(self) -> Iterator[str]:
        """Yield a trained block that the loss does not reach."""
        if self.layer is not None and self.train_layers is not None and self.train_layers[-1] > self.layer:
            yield f"train_layers={self.train_layers}: expected none above layer={self.layer}, whose output is steered"


@dataclass(frozen=True)
class TrainingSettings(Checked):
    """What the methods share that train on the likelihood of texts."""

    topics: Names | None = None
    """Topics of the forget text; None: all."""
    samples: Count | None = None
    """Texts of each topic, from the first on; None: all."""
    layers: Layers | None = None
    """Blocks that are trained; None: the last `layer_fraction` of them."""
    layer_fraction: PartOfDepth = 0.5
    parameters: Names | None = None
    """What is trained in those blocks: attention_in, attention_out, mlp_in or mlp_out for the weights of such linear
    layers, or names of parameters as they are inside a block; None: all."""
    train_head: bool = True
    """Train the final norm and the output head too; a head that shares its weights with the embeddings is not."""
    lr: Positive = 5e-5
    decay: bool = False
    """Let the rate fall in a line, to nothing after the last update."""
    epochs: Count = 1
    """Passes over the forget text."""
    batch_size: Count = 4
    """Texts that run through the model together."""
    retain_batch_size: Count | None = None
    """Retain texts beside each batch of forget text; None: as many."""
    accumulation: Count = 1
    """Batches of an update; the last update takes what is left."""
    max_updates: Count | None = None
    max_grad_norm: Positive | None = None
    """Gradients of a larger norm are scaled down to it; None: left as they are."""
    weight_decay: Weight = 0.0
    max_tokens: Tokens = 512
    """Longest text, in tokens; the rest is cut off."""
    preserve_mask: bool = False
    """Keep pruned weights at zero: matrices with at least 5 % exact zeros are trained without them."""


@dataclass(frozen=True)
class GaSettings(TrainingSettings):
    """Gradient ascent on forget text (Jang et al., 2023); defaults as in Kolbeinsson et al. (2025)."""

    samples: Count | None = 25
    accumulation: Count = 2


@dataclass(frozen=True)
class TwoTermSettings(TrainingSettings):
    """What the methods share that weigh forget text against retain text."""

    forget_weight: Weight = 1.0
    retain_weight: Weight = 1.0
    """Weight of the loss on retain text; 0: the one on forget text alone."""

    def problems(self) -> Iterator[str]:
        """Yield weights that leave nothing to train on."""
        if self.forget_weight == self.retain_weight == 0:
            yield "forget_weight=0: expected a number above 0, or a retain_weight above 0"


@dataclass(frozen=True)
class GdSettings(TwoTermSettings):
    """Gradient difference: ascent on forget text, descent on retain text (Liu et al., 2022).

    Defaults with the retain weight of Kolbeinsson et al. (2025).
    """

    retain_weight: Weight = 40.0
    """Weight of the loss on retain text; 0: gradient ascent alone."""


@dataclass(frozen=True)
class NpoSettings(TwoTermSettings):
    """NPO (Zhang et al., 2024) with a loss on retain text; defaults as published."""

    layer_fraction: PartOfDepth = 1.0
    lr: Positive = 1e-5
    epochs: Count = 10
    accumulation: Count = 8
    weight_decay: Weight = 0.01
    beta: Positive = 0.1
    """Inverse temperature: the smaller, the nearer to gradient ascent."""


@dataclass(frozen=True)
class SimNpoSettings(TwoTermSettings):
    """SimNPO (Fan et al., 2024) with a loss on retain text; defaults as published."""

    layer_fraction: PartOfDepth = 1.0
    lr: Positive = 1e-5
    epochs: Count = 10
    accumulation: Count = 8
    weight_decay: Weight = 0.01
    beta: Positive = 2.5
    gamma: Weight = 0.0
    """Margin: the larger, the less likely a text has to be until it is left alone."""
    forget_weight: Weight = 0.1375


@dataclass(frozen=True)
class RelearnSettings(TrainingSettings):
    """The attack on unlearning: a short fine-tuning on a few of the texts that were to be forgotten."""

    samples: Count | None = 10
    layer_fraction: PartOfDepth = 1.0
    epochs: Count = 3
