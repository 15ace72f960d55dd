"""Settings that unlearning methods share. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from interventions.intervention import Intervention
from interventions.ranges import Count, Items, Layers, Positive, Range, Weight

Names = Annotated[list[str], Items()]
Tokens = Annotated[int, Range(2)]
PartOfDepth = Annotated[float, Range(above=0, high=1)]


@dataclass(frozen=True)
class Trained(Intervention):
    """Settings of methods that train on the likelihood of texts."""

    category = "unlearn"

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
class TwoTerms(Trained):
    """Settings of methods with a loss on forget text and one on retain text."""

    forget_weight: Weight = 1.0
    retain_weight: Weight = 1.0
    """Weight of the loss on retain text; 0: the one on forget text alone."""

    def problems(self) -> Iterator[str]:
        """Yield weights that leave nothing to train on."""
        if self.forget_weight == self.retain_weight == 0:
            yield "forget_weight=0: expected a number above 0, or a retain_weight above 0"
