"""The blocks above one layer, run again and again from changed hidden states.

Optimising a vector at one layer needs no gradient, and no computation, below it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import Anatomy


class Tail:
    """A model's blocks above `layer`, its final norm and its head, for one fixed batch.

    The batch runs through the model once; what the blocks are called with besides the hidden
    states (masks, rotary embeddings) is kept, as it does not depend on them.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, layer: int, ids: Tensor, mask: Tensor) -> None:
        self._blocks = [block.module for block in anatomy.blocks[layer + 1 :]]
        self._norm = anatomy.final_norm
        self._head = anatomy.head
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden: list[Tensor] = []

        def keep_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self._arguments.append((args[1:], others))

        def keep_hidden(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden.append(_first(output).detach())

        handles = [block.register_forward_pre_hook(keep_arguments, with_kwargs=True) for block in self._blocks]
        handles.append(anatomy.blocks[layer].module.register_forward_hook(keep_hidden))
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.hidden = hidden[0]
        """Output of block `layer`, (rows, tokens, hidden)."""

    def logits(self, hidden: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Return the logits (n, vocabulary) float32 at the n (row, place) pairs, given block `layer`'s output."""
        for block, (args, kwargs) in zip(self._blocks, self._arguments, strict=True):
            hidden = _first(block(hidden, *args, **kwargs))
        logits: Tensor = self._head(self._norm(hidden[rows, places])).float()
        return logits


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
