"""Attention that rounds keys and values: transformers' `sdpa`, for modules that hold a rounding.

A KV cache of fewer bits changes what every later token reads, also in passes that score a whole text at once, so keys
and values are rounded where attention reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interventions.rounded_bits import HELD
from interventions.types import InterventionError

Watch = Callable[[nn.Module, Tensor, Tensor], None]
_SDPA = "sdpa"
_watches: list[Watch] = []


def let_attention_round(model: nn.Module) -> None:
    """Prepare transformers' attention; raises InterventionError for a model that does not use it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "_attn_implementation", None)
    if found != _SDPA:
        raise InterventionError(
            f"kv_cache: keys and values can be rounded in attention of the implementation 'sdpa', but the model's is "
            f"{found!r}: load it with attn_implementation=sdpa, or leave kv_cache out"
        )
    own = ALL_ATTENTION_FUNCTIONS[_SDPA]
    if not isinstance(own, _Rounding):
        ALL_ATTENTION_FUNCTIONS.register(_SDPA, _Rounding(own))


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Call `watch` with the module, its keys and its values (batch, heads, tokens, channels) whenever one attends."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


class _Rounding:
    """The attention function `own`, with keys and values as the module that calls it rounds them."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self._own = own

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
    ) -> Any:
        for watch in _watches:
            watch(module, key, value)
        cached = module.__dict__.get(HELD)
        if cached is not None:
            key, value = cached.keys(key), cached.values(value)
        return self._own(module, query, key, value, *arguments, **options)
