"""Use a model for a measurement and restore its state afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Attributes of a tokenizer that libraries change as a side effect.
_TOKENIZER_STATE = ("padding_side", "truncation_side", "pad_token")


@contextmanager
def borrowed(model: Any, tokenizer: Any) -> Iterator[None]:
    """Put `model` into eval mode without gradients; restore it and `tokenizer` (or None) at the end.

    Restores the training flag of every module, the generation config, and the tokenizer's pad token
    and sides. Uses `no_grad` instead of inference mode, because buffers created in inference mode
    cannot be used in later backward passes.
    """
    training = [(module, module.training) for module in model.modules()]
    generation_config = getattr(model, "generation_config", None)
    tokenizer_state = {} if tokenizer is None else {name: getattr(tokenizer, name) for name in _TOKENIZER_STATE}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        if generation_config is not None:
            model.generation_config = generation_config
        for name, value in tokenizer_state.items():
            if getattr(tokenizer, name) != value:
                setattr(tokenizer, name, value)
