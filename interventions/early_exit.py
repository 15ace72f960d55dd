"""End a forward pass as soon as a hook has what it needs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a hook: the layers above need not run."""


def run_until_seen(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Run `model` on `batch` without KV cache; return whether a hook raised StopForward."""
    try:
        model(**batch, use_cache=False)
    except StopForward:
        return True
    return False
