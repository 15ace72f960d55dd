"""What a model calls its decoder blocks with: caught without running them, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interventions.statistics import Batch
from interventions.structure import Block, first_output, module_device


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, the hidden states apart."""

    hidden: Tensor
    """(batch, tokens, width) float32."""
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    in_keywords: bool
    """Whether the hidden states are passed by name."""

    @classmethod
    def of(
        cls, arguments: tuple[Any, ...], keywords: dict[str, Any], as_float: Callable[[Any], Any] | None = None
    ) -> Call:
        """Make a call of what a module got, floating tensors as float32."""
        as_float = as_float or to_float
        in_keywords = not arguments
        keywords = dict(keywords)
        hidden = keywords.pop("hidden_states") if in_keywords else arguments[0]
        return cls(
            hidden.detach().float(),
            tuple(as_float(a) for a in arguments[1:]),
            {key: as_float(value) for key, value in keywords.items()},
            in_keywords,
        )

    def __call__(self, module: nn.Module) -> Tensor:
        """Run the module on these arguments and return its (first) output."""
        if self.in_keywords:
            return first_output(module(*self.arguments, hidden_states=self.hidden, **self.keywords))
        return first_output(module(self.hidden, *self.arguments, **self.keywords))

    def on(self, hidden: Tensor) -> Call:
        """Return the same call on other hidden states."""
        return Call(hidden, self.arguments, self.keywords, self.in_keywords)

    def to(self, device: torch.device) -> Call:
        """Return the same call with all its tensors on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        return Call(
            self.hidden.to(device),
            tuple(_each(a, move) for a in self.arguments),
            {key: _each(value, move) for key, value in self.keywords.items()},
            self.in_keywords,
        )


def to_float(value: Any) -> Any:
    """Return floating tensors as float32, inside tuples too; anything else as it is."""
    return _each(value, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in a value."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_each(item, change) for item in value)
    return value


@torch.no_grad()
def catch_block_calls(model: nn.Module, batches: Sequence[Batch], blocks: Sequence[Block]) -> list[list[Call]]:
    """Return, for each block and each batch, the call that the model makes of the block.

    Blocks of one model differ in their masks and position codes, so each keeps its own; only
    those of the first block carry hidden states, the others' are empty. The blocks themselves
    stand still meanwhile: each hands on what it gets, so that only the embeddings and what the
    model does around its blocks are computed.
    """
    calls: list[list[Call]] = [[] for _ in blocks]
    passer = _Passer()
    device = module_device(model)
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.enter_context(passer.standing_in(block.module, calls[number], with_hidden=number == 0))
        for batch in batches:
            passer.converted.clear()
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    return calls


class _Passer:
    """Stands in for the forward functions of decoder blocks."""

    def __init__(self) -> None:
        self.converted: dict[int, tuple[Any, Any]] = {}
        """Blocks of one model get the very same masks: they are kept once. (The original keeps its id taken.)"""
        self.shape_of: Callable[[Tensor], Any] | None = None

    @contextmanager
    def standing_in(self, module: nn.Module, calls: list[Call], *, with_hidden: bool) -> Iterator[None]:
        forward = module.forward

        def hand_on(*arguments: Any, **keywords: Any) -> Any:
            call = Call.of(arguments, keywords, self._as_float)
            calls.append(call if with_hidden else call.on(call.hidden.new_empty(0)))
            if self.shape_of is None:  # some blocks return a tuple: ask the first one
                output = forward(*arguments, **keywords)
                rest = output[1:] if isinstance(output, tuple) else None
                self.shape_of = (lambda hidden: hidden) if rest is None else (lambda hidden: (hidden, *rest))
            return self.shape_of(arguments[0] if arguments else keywords["hidden_states"])

        with replaced_forward(module, hand_on):
            yield

    def _as_float(self, value: Any) -> Any:
        if id(value) not in self.converted:
            self.converted[id(value)] = (value, to_float(value))
        return self.converted[id(value)][1]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run `forward` instead of its own; its hooks stay."""
    own = module.__dict__.get("forward")  # set where a model is spread over devices
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def keep_calls(module: nn.Module, found: list[Call], device: torch.device) -> RemovableHandle:
    """Add every call of the module to `found`, on a device, until the hook is removed."""

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(Call.of(arguments, keywords).to(device))

    return module.register_forward_pre_hook(keep, with_kwargs=True)
