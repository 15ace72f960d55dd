"""Settings that unlearning methods share. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from interventions.intervention import Intervention, Model
from interventions.ranges import (
    Count,
    Items,
    Layers,
    LearningRate,
    Positive,
    Preserve,
    Range,
    Restraint,
    Strength,
    Updates,
    Weight,
)

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
    """Number of texts per topic, from the start; None: all."""
    layers: Layers | None = None
    """Blocks to train; None: the last `layer_fraction` of them."""
    layer_fraction: PartOfDepth = 0.5
    parameters: Names | None = None
    """Parameters to train in those blocks: attention_in, attention_out, mlp_in or mlp_out for the weights of these
    linear layers, or parameter names relative to a block; None: all."""
    train_head: bool = True
    """Also train the final norm and the output head, unless the head is tied to the embeddings."""
    lr: LearningRate = 5e-5
    decay: bool = False
    """Decay the learning rate linearly to zero."""
    epochs: Updates = 1
    """Passes over the forget text."""
    batch_size: Count = 4
    """Texts per forward pass."""
    retain_batch_size: Count | None = None
    """Retain texts per batch of forget text; None: `batch_size`."""
    accumulation: Count = 1
    """Batches per update; the last update takes the remaining ones."""
    max_updates: Count | None = None
    max_grad_norm: Positive | None = None
    """Clip gradients to this norm; None: no clipping."""
    weight_decay: Weight = 0.0
    max_tokens: Tokens = 512
    """Maximum tokens per text; longer texts are truncated."""
    preserve_mask: Preserve = False
    """Keep pruned weights at zero in matrices with at least 5 % exact zeros."""

    def may_change(self, model: Model) -> list[str]:
        """Return the parameters to train."""
        from interventions.anatomy import find_anatomy
        from interventions.unlearn.kernels.choice import last_layers, trained_parameters

        anatomy = find_anatomy(model)
        layers = last_layers(self.name, self, len(anatomy.blocks))
        return list(trained_parameters(self.name, model, anatomy, layers, self))


@dataclass(frozen=True)
class TwoTerms(Trained):
    """Settings of methods with a loss on forget text and one on retain text."""

    forget_weight: Strength = 1.0
    retain_weight: Restraint = 1.0
    """Weight of the loss on retain text; 0: train on forget text only."""

    def problems(self) -> Iterator[str]:
        """Yield weights that leave nothing to train on."""
        if self.forget_weight == self.retain_weight == 0:
            yield "forget_weight=0: expected a number above 0, or a retain_weight above 0"
