"""End a forward pass as soon as a hook has seen what it wanted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a hook: the layers above need not run."""


def run_until_seen(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Run `model` on `batch` without KV cache; tell whether a hook ended the pass by StopForward."""
    try:
        model(**batch, use_cache=False)
    except StopForward:
        return True
    return False
