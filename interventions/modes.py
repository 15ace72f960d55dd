"""Flags that a method may flip while it works, kept and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; at the end put back what it had before.

    Kept are every module's train flag, every parameter's requires_grad flag and the KV cache flag
    of the config and the generation config.
    """
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    use_cache = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        for config, flag in use_cache:
            config.use_cache = flag
