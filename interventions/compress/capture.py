"""Run a model block by block: each block's inputs are caught or computed once, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interventions.anatomy import Block, LinearGroup, module_device
from interventions.statistics import Batch, InputStatistics


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
    def of(cls, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
        in_keywords = not arguments
        keywords = dict(keywords)
        hidden = keywords.pop("hidden_states") if in_keywords else arguments[0]
        return cls(
            _float(hidden.detach()),
            tuple(_float(a) for a in arguments[1:]),
            {key: _float(value) for key, value in keywords.items()},
            in_keywords,
        )

    def __call__(self, module: nn.Module) -> Tensor:
        """Run the module on these arguments and return its (first) output."""
        if self.in_keywords:
            return first(module(*self.arguments, hidden_states=self.hidden, **self.keywords))
        return first(module(self.hidden, *self.arguments, **self.keywords))

    def on(self, hidden: Tensor) -> Call:
        """Return the same call on other hidden states."""
        return Call(hidden, self.arguments, self.keywords, self.in_keywords)


def first(output: Any) -> Tensor:
    """Return a module's output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _float(value: Any) -> Any:
    """Return floating tensors as float32, inside tuples too; anything else as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_float(item) for item in value)
    return value


class _AllCaught(Exception):
    """Ends a forward pass at the last block."""


@torch.no_grad()
def catch_block_calls(model: nn.Module, batches: Sequence[Batch], blocks: Sequence[Block]) -> list[list[Call]]:
    """Return, for each block and each batch, the call that the model makes of the block.

    Blocks of one model differ in their masks and position codes, so each keeps its own; only
    those of the first block carry hidden states that are used, the others' are empty.
    """
    calls: list[list[Call]] = [[] for _ in blocks]

    def hook(number: int) -> Callable[..., None]:
        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            call = Call.of(arguments, keywords)
            calls[number].append(call if number == 0 else call.on(call.hidden.new_empty(0)))
            if number == len(blocks) - 1:
                raise _AllCaught

        return see

    handles = [
        block.module.register_forward_pre_hook(hook(number), with_kwargs=True) for number, block in enumerate(blocks)
    ]
    device = module_device(model)
    try:
        for batch in batches:
            try:
                model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
            except _AllCaught:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return calls


@dataclass
class Observed:
    """What a float block did on the calibration text, batch by batch."""

    calls: list[Call]
    masks: list[Tensor]
    """(batch, tokens) bool each: true where there is no padding."""
    outputs: list[Tensor] = field(default_factory=list)
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    """By role: the input of each group of linears."""
    scope_calls: dict[str, list[Call]] = field(default_factory=dict)
    """By role: the calls of the module that the group stands in."""


@torch.no_grad()
def observe(block: Block, calls: Sequence[Call], masks: Sequence[Tensor]) -> Observed:
    """Run the block on all batches and keep what a search over its weights needs."""
    seen = Observed(list(calls), list(masks))
    handles = [handle for group in block.linear_groups for handle in _watch(group, seen)]
    try:
        for call in calls:
            seen.outputs.append(call(block.module))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _watch(group: LinearGroup, seen: Observed) -> Iterator[RemovableHandle]:
    seen.statistics[group.role] = InputStatistics.zeros(group.in_features, seen.masks[0].device)

    def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        mask = seen.masks[len(seen.outputs)]  # as many batches are done as there are outputs
        seen.statistics[group.role].add_(x.reshape(-1, x.shape[-1])[mask.reshape(-1)])

    yield group.linears[0].module.register_forward_pre_hook(add)
    if group.scope is None:
        return
    found = seen.scope_calls.setdefault(group.role, [])

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(Call.of(arguments, keywords))

    yield group.scope.register_forward_pre_hook(keep, with_kwargs=True)
