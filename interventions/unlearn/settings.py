"""Settings of the unlearning methods (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RmuSettings:
    """RMU (Li et al., 2024); defaults as published for 32 blocks, layers as a fraction of depth."""

    topics: list[str] | None = None
    """Topics to forget; None: all that there is forget text of."""
    layer: int | None = None
    """Block whose output is steered; None: that of `layer_fraction`."""
    layer_fraction: float = 0.22
    """The steered block as a fraction of depth (7 of 32 blocks as published)."""
    train_layers: list[int] | None = None
    """Blocks whose weights are trained; None: three, the last of them the steered one."""
    parameters: list[str] = field(default_factory=lambda: ["mlp_out"])
    """What is trained in those blocks: attention_in, attention_out, mlp_in or mlp_out for the weights of such linear
    layers, or names of parameters as they are inside a block, such as `mlp.down_proj.weight`."""
    steering_coefficient: float = 20.0
    """Norm of the control vectors."""
    alpha: float = 100.0
    """Weight of the loss on retain text."""
    lr: float = 5e-5
    max_num_batches: int = 80
    """Updates over all topics; texts are gone through again where they are fewer."""
    batch_size: int = 4
    """Texts of a batch; each update takes one of forget and one of retain text."""
    max_tokens: int = 512
    """Longest text, in tokens; the rest is cut off."""
    preserve_mask: bool = False
    """Keep pruned weights at zero: matrices with at least 5 % exact zeros are trained without them."""


@dataclass(frozen=True)
class TrainingSettings:
    """What the methods share that train on the likelihood of texts."""

    topics: list[str] | None = None
    """Topics of the forget text; None: all."""
    samples: int | None = None
    """Texts of each topic, from the first on; None: all."""
    layers: list[int] | None = None
    """Blocks that are trained; None: the last `layer_fraction` of them."""
    layer_fraction: float = 0.5
    parameters: list[str] | None = None
    """What is trained in those blocks: attention_in, attention_out, mlp_in or mlp_out for the weights of such linear
    layers, or names of parameters as they are inside a block; None: all."""
    train_head: bool = True
    """Train the final norm and the output head too; a head that shares its weights with the embeddings is not."""
    lr: float = 5e-5
    decay: bool = False
    """Let the rate fall in a line, to nothing after the last update."""
    epochs: int = 1
    """Passes over the forget text."""
    batch_size: int = 4
    """Texts that run through the model together."""
    retain_batch_size: int | None = None
    """Retain texts beside each batch of forget text; None: as many."""
    accumulation: int = 1
    """Batches of an update; the last update takes what is left."""
    max_updates: int | None = None
    max_grad_norm: float | None = None
    """Gradients of a larger norm are scaled down to it; None: left as they are."""
    weight_decay: float = 0.0
    max_tokens: int = 512
    """Longest text, in tokens; the rest is cut off."""
    preserve_mask: bool = False
    """Keep pruned weights at zero: matrices with at least 5 % exact zeros are trained without them."""


@dataclass(frozen=True)
class GaSettings(TrainingSettings):
    """Gradient ascent on forget text (Jang et al., 2023)."""

    samples: int | None = 25
    accumulation: int = 2


@dataclass(frozen=True)
class GdSettings(TrainingSettings):
    """Gradient difference: ascent on forget text, descent on retain text (Liu et al., 2022)."""

    forget_weight: float = 1.0
    retain_weight: float = 1.0


@dataclass(frozen=True)
class NpoSettings(TrainingSettings):
    """NPO (Zhang et al., 2024) with a loss on retain text; defaults as published."""

    layer_fraction: float = 1.0
    lr: float = 1e-5
    epochs: int = 10
    accumulation: int = 8
    weight_decay: float = 0.01
    beta: float = 0.1
    """Inverse temperature: the smaller, the nearer to gradient ascent."""
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    """Weight of the loss on retain text; 0: NPO alone."""


@dataclass(frozen=True)
class SimNpoSettings(TrainingSettings):
    """SimNPO (Fan et al., 2024) with a loss on retain text; defaults as published."""

    layer_fraction: float = 1.0
    lr: float = 1e-5
    epochs: int = 10
    accumulation: int = 8
    weight_decay: float = 0.01
    beta: float = 2.5
    gamma: float = 0.0
    """Margin: the larger, the less likely a text has to be until it is left alone."""
    forget_weight: float = 0.1375
    retain_weight: float = 1.0
    """Weight of the loss on retain text; 0: SimNPO alone."""


@dataclass(frozen=True)
class RelearnSettings(TrainingSettings):
    """The attack on unlearning: a short fine-tuning on a few of the texts that were to be forgotten."""

    samples: int | None = 10
    layer_fraction: float = 1.0
    epochs: int = 3
