"""Gradient training of some of a model's weights, for fine-tuning and unlearning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interventions.types import InterventionError
from interventions.zeros import zero_mask


@contextmanager
def workable_precision(model: nn.Module) -> Iterator[None]:
    """Keep weights in float32 inside the block where their dtype cannot be trained, then round them back.

    Gradients in float16 overflow, and most CPUs multiply bfloat16 matrices many times slower than float32.
    """
    chosen = [
        tensor
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype == torch.float16 or (tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu")
    ]
    stored = [tensor.data for tensor in chosen]
    for tensor in chosen:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(chosen, stored, strict=True):
            data.copy_(tensor.data)
            tensor.grad = None
            tensor.data = data


class Trainer:
    """AdamW on some parameters of a model; the others get no gradient.

    Weights below float32 are updated in a float32 copy and rounded from it.
    """

    def __init__(
        self,
        method: str,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        preserve_mask: bool = False,
    ) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._method = method
        self._lr = lr
        self._max_grad_norm = max_grad_norm
        self._parameters = dict(parameters)
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters.values()]
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, weight_decay=weight_decay, fused=True)
        pruned = {name: zero_mask(p) if preserve_mask and p.dim() == 2 else None for name, p in parameters.items()}
        self._masks = [(master, pruned[name]) for name, master in zip(parameters, self._masters, strict=True)]
        self.updates = 0

    @property
    def names(self) -> list[str]:
        """The names of the trained parameters."""
        return list(self._parameters)

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of the next updates."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> float:
        """Add the loss's gradients and return its value; InterventionError if that is not finite."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InterventionError(
                f"{self._method}: the loss became {value} at update {self.updates + 1}, training {self._span()} "
                f"with {self._method}.lr={self._lr}; lower {self._method}.lr, or look for NaN in the model's weights"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    @torch.no_grad()
    def update(self) -> None:
        """Take one step with the accumulated gradients and clear them."""
        for parameter, master in zip(self._parameters.values(), self._masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for master, mask in self._masks:
            if mask is not None:
                master.masked_fill_(mask, 0)
        for parameter, master in zip(self._parameters.values(), self._masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
        self.updates += 1

    def finish(self) -> None:
        """Check the trained weights; InterventionError, naming layer and setting, if one is not finite."""
        for name, parameter in self._parameters.items():
            if not bool(parameter.isfinite().all()):
                raise InterventionError(
                    f"{self._method}: {name} became NaN or infinite within {self.updates} updates with "
                    f"{self._method}.lr={self._lr}; lower {self._method}.lr"
                )

    def _span(self) -> str:
        first, last = self.names[0], self.names[-1]
        return first if first == last else f"{first} to {last}"


class BoundedTrainer(Trainer):
    """A trainer with an optional bound on the change of each weight."""

    def __init__(self, *arguments: Any, bound: float | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._bound = bound
        self._starts = [master.detach().clone() for master in self._masters]

    def changes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the start and the change of each parameter."""
        pairs = zip(self._parameters, self._masters, self._starts, strict=True)
        return {name: (start, master.detach() - start) for name, master, start in pairs}

    @torch.no_grad()
    def update(self) -> None:
        super().update()
        if self._bound is None:
            return
        for parameter, master, start in zip(self._parameters.values(), self._masters, self._starts, strict=True):
            master.clamp_(start - self._bound, start + self._bound)
            if master is not parameter:
                parameter.copy_(master)
