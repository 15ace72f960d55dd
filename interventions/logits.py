"""Compute a model's logits at selected positions of a batch only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from interventions.early_exit import accepted


def logits_at(
    model: nn.Module,
    head: nn.Module | None,
    arguments: Mapping[str, Any],
    rows: Tensor,
    places: Tensor,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Run `model` on `arguments`; return its logits (n, vocabulary) float32 at n pairs of a row and a position.

    The output head runs only at those tokens. `weights` take the place of the parameters that they name.
    """
    count = len(arguments["input_ids"])
    picked = False

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal picked
        picked = True
        hidden = args[0].reshape(count, -1, args[0].shape[-1])
        chosen = (rows * hidden.shape[1] + places).to(hidden.device)
        return (hidden.flatten(0, 1).index_select(0, chosen)[None], *args[1:])

    with nullcontext() if head is None else head.register_forward_pre_hook(pick):
        passed = accepted(model, arguments)
        output = model(**passed) if weights is None else functional_call(model, dict(weights), (), passed)
    # Some models use the head's weights without calling it.
    logits: Tensor = output.logits
    return (logits[0] if picked else logits[rows, places]).float()
