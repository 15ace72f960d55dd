"""Run a model with the arguments it accepts, end a pass early, or replace the forward function of a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def accepted(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments that the model's forward accepts."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


class StopForward(Exception):
    """Raised by a hook that has what it needs, to end the forward pass."""


def run_until_seen(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Run `model` on `batch` without KV cache; return whether a hook raised StopForward."""
    try:
        model(**accepted(model, {**batch, "use_cache": False}))
    except StopForward:
        return True
    return False


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make a module run `forward` instead of its own; its hooks still run."""
    own = module.__dict__.get("forward")  # set when a model is spread over devices
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def head_on_one_token(head: nn.Module) -> Iterator[None]:
    """Let the output head run on the first token of each row only, in passes whose logits are not needed."""

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][..., :1, :], *args[1:])

    with head.register_forward_pre_hook(cut):
        yield
