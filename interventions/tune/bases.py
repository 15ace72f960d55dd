"""Settings that all tuning methods share. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from interventions.adapters import Target, chosen_linears
from interventions.intervention import Intervention, Model
from interventions.layouts import ROLES
from interventions.ranges import (
    Choice,
    Count,
    Items,
    Layers,
    LearningRate,
    Positive,
    Preserve,
    Range,
    Share,
    Updates,
    Weight,
)

if TYPE_CHECKING:
    from interventions.structure import Linear

MISSING = 'TRL is not installed: pip install "pytest-lmcompose[tune]"'


@dataclass(frozen=True)
class Tuned(Intervention):
    """Settings of methods that train with a trainer of TRL: all weights, some blocks, or LoRA adapters."""

    category = "tune"

    rank: Count | None = None
    """Rank of LoRA adapters, which are merged into the weights at the end; None: train the weights themselves."""
    alpha: Positive = 16.0
    """LoRA only: the update is scaled by alpha / rank."""
    targets: Annotated[list[Target], Items()] = field(default_factory=lambda: ["query", "key", "value", *ROLES[1:]])
    """LoRA only: linear layers with adapters: query, key, value (all three if fused), attention_in, attention_out,
    mlp_in, mlp_out. Every expert has its own."""
    layers: Layers | None = None
    """Decoder blocks to train; None: all, and without LoRA also the embeddings, the final norm and the head."""
    lr: LearningRate = 2e-5
    schedule: Annotated[str, Choice("linear", "cosine", "constant")] = "linear"
    """How the learning rate falls after the warm-up: to zero, or not at all."""
    warmup: Share = 0.0
    """Share of the updates in which the learning rate rises."""
    epochs: Updates = 3
    max_updates: Count | None = None
    """Maximum number of updates; None: as many as `epochs` has."""
    batch_size: Count = 8
    """Rows per forward pass."""
    accumulation: Count = 1
    """Forward passes per update."""
    weight_decay: Weight = 0.0
    max_grad_norm: Positive | None = 1.0
    """Clip gradients to this norm; None: no clipping."""
    max_tokens: Annotated[int, Range(2)] = 1024
    """Maximum tokens per row; longer ones are truncated."""
    chat_template: bool = False
    """Put plain prompts into the tokenizer's chat template; conversations always are."""
    preserve_mask: Preserve = False
    """Keep pruned weights at zero in matrices with at least 5 % exact zeros."""

    def may_change(self, model: Model) -> Collection[str] | None:
        """Return the weights with adapters, or the parameters of the chosen blocks; None: any."""
        if self.rank is not None:
            return list(dict.fromkeys(linear.parameter_name for linear in self.adapted(model)))
        if self.layers is None:
            return None
        from interventions.anatomy import find_anatomy
        from interventions.structure import check_layers

        blocks = find_anatomy(model).blocks
        chosen = tuple(f"{blocks[i].name}." for i in check_layers(f"{self.name}.layers", self.layers, len(blocks)))
        return [name for name, _ in model.named_parameters() if name.startswith(chosen)]

    def adapted(self, model: Model) -> list[Linear]:
        """Return the linear layers that take adapters."""
        from interventions.anatomy import find_anatomy

        return chosen_linears(self.name, find_anatomy(model), self.targets, self.layers)

    def unready(self, folder: Path) -> Iterator[str]:
        """Yield that TRL is not installed."""
        if find_spec("trl") is None:
            yield MISSING
