"""Outputs of a block's attention and MLP once their weights are final: recomputed from their last linear alone.

Where the groups of a block are changed one after the other, later passes need not run what was done
before. Most attentions and MLPs end in a linear layer whose input was just looked at; what it puts
out is what they put out. That is tried on the first batch, and where it is not so, they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import replaced_forward
from interventions.structure import Linear, LinearGroup, first_output

Shapes = dict[type, int | None]
"""By class of a scope: how many values it returns, 0 for a bare tensor; None: it does not end in its last linear."""


class Tail:
    """The last linear of an attention or MLP, and what reached it, batch by batch."""

    def __init__(self, scope: nn.Module, last: Linear, shapes: Shapes) -> None:
        self.scope = scope
        self.last = last
        self.final = False
        """Whether every linear of the scope has its last weights."""
        self._shapes = shapes
        self._inputs: list[Tensor | None] = []
        self._outputs: list[Tensor | None] = []

    def keep(self, x: Tensor) -> None:
        """Take note of the input of the last linear in the next batch."""
        self._inputs.append(x)
        self._outputs.append(None)

    @property
    def usable(self) -> bool:
        return self.final and bool(self._inputs) and self._shapes.get(type(self.scope), 0) is not None

    @contextmanager
    def standing_in(self, batch: int) -> Iterator[None]:
        """Give what the scope puts out on a batch, without running more of it than its last linear."""
        forward = self.scope.forward

        def replay(*arguments: Any, **keywords: Any) -> Any:
            output = self._outputs[batch]
            if output is None:
                output = self._outputs[batch] = self.last.module(self._inputs[batch])
                self._inputs[batch] = None
            kind = type(self.scope)
            if kind not in self._shapes:
                found = forward(*arguments, **keywords)
                self._shapes[kind] = _shape(found, output)
                return found
            size = self._shapes[kind]
            return (output, *[None] * (size - 1)) if size else output

        with replaced_forward(self.scope, replay):
            yield


def _shape(found: Any, output: Tensor) -> int | None:
    """Return how many values `found` has, 0 for a tensor; None where it is more than `output`."""
    values = found[1:] if isinstance(found, tuple) else ()
    if any(value is not None for value in values) or not torch.equal(first_output(found), output):
        return None
    return len(found) if isinstance(found, tuple) else 0


def find_tails(groups: Sequence[LinearGroup], shapes: Shapes) -> dict[str, Tail]:
    """Return, by role of the group of the last linear, the scopes that end in a linear of its own group."""
    tails: dict[str, Tail] = {}
    for scope in dict.fromkeys(group.scope for group in groups if group.scope is not None):
        inside = set(scope.modules())
        within = [group for group in groups if group.linears[0].module in inside]
        if within and len(within[-1].linears) == 1:
            tails[within[-1].role] = Tail(scope, within[-1].linears[0], shapes)
    return tails
