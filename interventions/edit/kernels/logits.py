"""Compute a model's logits at selected positions of a batch only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from interventions.early_exit import accepted


def logits_at(model: nn.Module, head: nn.Module, arguments: Mapping[str, Any], rows: Tensor, places: Tensor) -> Tensor:
    """Run `model` on `arguments`; return its logits (n, vocabulary) float32 at n pairs of a row and a position.

    The output head runs only at those tokens.
    """
    count = len(arguments["input_ids"])
    picked = False

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal picked
        picked = True
        return (args[0].reshape(count, -1, args[0].shape[-1])[rows, places][None], *args[1:])

    with head.register_forward_pre_hook(pick):
        logits: Tensor = model(**accepted(model, arguments)).logits
    # Some models use the head's weights without calling it.
    return (logits[0] if picked else logits[rows, places]).float()
