"""Settings that editing methods share. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from interventions.intervention import Intervention, Model
from interventions.ranges import (
    LARGER_IS_MILDER,
    SMALLER_IS_MILDER,
    Checked,
    Count,
    Fractions,
    Items,
    Layers,
    Positive,
    Preserve,
    Range,
    Weight,
)


@dataclass(frozen=True)
class ValueSettings(Checked):
    """Optimisation of the target values z of MEMIT, ROME and AlphaEdit; defaults as published."""

    steps: Annotated[int, Range(2)] = 25
    """Forward passes; the last one only computes the loss."""
    lr: Positive = 0.5
    weight_decay: Weight = 1e-3
    stop_loss: Annotated[Weight, LARGER_IS_MILDER] = 0.05
    """An edit stops when its loss (nats) falls below this."""
    clamp_norm_factor: Annotated[Positive, SMALLER_IS_MILDER] = 4.0
    """Maximum norm of the change of a hidden state, relative to the norm of the state."""
    kl_factor: Weight = 0.0625


class OutputEditor(Intervention):
    """A method that changes the MLP output projections of some blocks."""

    category = "edit"

    def choose_layers(self, depth: int) -> list[int]:
        """Return the blocks that are edited, from the number of blocks."""
        raise NotImplementedError

    def may_change(self, model: Model) -> list[str]:
        """Return the MLP output projections of the edited blocks, or those of all their experts."""
        from interventions.anatomy import find_anatomy

        blocks = find_anatomy(model).blocks
        return [name for layer in self.choose_layers(len(blocks)) for name in blocks[layer].memory.parameter_names]


@dataclass(frozen=True)
class Rewriter(OutputEditor):
    """What MEMIT, ROME and AlphaEdit share."""

    batch_size: Count | None = None
    """Edits made at once; each batch edits the model that the previous one produced. None: all edits in one batch."""
    chat_template: bool = False
    """Apply the tokenizer's chat template: prompts become user messages, targets the start of the answers."""
    covariance_tokens: Count | None = None
    """Calibration tokens for the second moment of the keys; None: 10 per key dimension."""
    covariance_window: Count = 512
    """Maximum tokens read per text, limited by the model's context; as published, each text is a separate row."""
    context_lengths: Annotated[list[Count], Items()] = field(default_factory=lambda: [10])
    """Lengths, in tokens, of the contexts that the model generates before the prompts."""
    contexts_per_length: Annotated[int, Range(0)] = 5
    z: ValueSettings = field(default_factory=ValueSettings)
    preserve_mask: Preserve = False
    """Keep pruned weights at zero: in linears with at least 5 % exact zeros the change is made without them."""


@dataclass(frozen=True)
class LayersRewriter(Rewriter):
    """What MEMIT and AlphaEdit share."""

    layers: Layers | None = None
    """Decoder blocks whose MLP output projection is edited; None: those of `layer_fractions`."""
    layer_fractions: Fractions = field(default_factory=lambda: [0.125, 0.25])
    """First and last edited block as fractions of depth (4 to 8 of 32 blocks as published)."""

    def choose_layers(self, depth: int) -> list[int]:
        """Return the chosen blocks, from `layers` or `layer_fractions`."""
        from interventions.structure import chosen_layers

        return chosen_layers(self.name, self.layers, self.layer_fractions, depth)
