"""Borrow a model for a measurement and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The token attributes and sides that libraries set on a tokenizer in passing.
_TOKENIZER_STATE = ("padding_side", "truncation_side", "pad_token")


@contextmanager
def borrowed(model: Any, tokenizer: Any) -> Iterator[None]:
    """Put `model` into eval mode without gradients; restore it and `tokenizer` at the end.

    Restores every module's train flag, the generation config, and the tokenizer's pad token and
    sides (None: no tokenizer takes part). Weights are never touched, and the cache flag of the
    config is not used: evaluators say in each call whether they want a KV cache. `no_grad` and not
    inference mode: a buffer that the model makes and keeps inside would otherwise refuse later
    backward passes.
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
