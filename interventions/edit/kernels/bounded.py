"""Training in which no single weight goes further than a bound."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from interventions.training import Trainer


class BoundedTrainer(Trainer):
    """Adam with an optional bound on how far each single weight may go."""

    def __init__(
        self,
        method: str,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        bound: float | None,
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        super().__init__(method, model, parameters, lr=lr, weight_decay=weight_decay)
        self._bound = bound
        self._starts = [master.detach().clone() for master in self._masters]

    def changes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what each weight was at first, and what was added to it."""
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
