"""The loss of fine-tuning on edits: the negative log-likelihood of the target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import find_anatomy
from interventions.edit.kernels.prompts import tokenise
from interventions.logits import logits_at
from interventions.padding import pad_right, padding_id
from interventions.structure import module_device
from interventions.types import Edit, InterventionError

_LARGEST_CHANGE = 100.0


@dataclass(frozen=True)
class TargetBatch:
    """A batch of edits: prompts with targets, padded on the right."""

    which: range
    """Indices of the edits."""
    ids: Tensor
    """(edits, longest) int64."""
    rows: Tensor
    """(tokens,) the row of each target token."""
    places: Tensor
    """(tokens,) the position that predicts it."""
    targets: Tensor
    """(tokens,) its id."""


def target_batches(
    tokenizer: Any, edits: Sequence[Edit], batch_size: int, device: torch.device, *, chat_template: bool = False
) -> list[TargetBatch]:
    """Tokenise the edits, in order, in batches of `batch_size`."""
    batches = []
    for start in range(0, len(edits), batch_size):
        which = range(start, min(start + batch_size, len(edits)))
        texts = [tokenise(tokenizer, edits[n], with_target=True, chat_template=chat_template) for n in which]
        ids, _ = pad_right([text.ids for text in texts], padding_id(tokenizer), device)
        wanted = [(row, place) for row, text in enumerate(texts) for place in text.target_places]
        rows, places = torch.tensor(wanted, device=device).t()
        batches.append(TargetBatch(which, ids, rows, places - 1, ids[rows, places]))
    return batches


def target_nll(model: nn.Module, head: nn.Module, batch: TargetBatch) -> Tensor:
    """Return each edit's mean negative log-likelihood of its target tokens, (edits,) float32.

    The output head runs only at those tokens. No token sees the padding, which is on the right: no mask is needed.
    """
    arguments = {"input_ids": batch.ids, "use_cache": False}
    logits = logits_at(model, head, arguments, batch.rows, batch.places)
    log_p = logits.log_softmax(dim=-1).gather(1, batch.targets[:, None])[:, 0]
    total = torch.zeros(len(batch.which), device=log_p.device).index_add(0, batch.rows, -log_p)
    return total / torch.bincount(batch.rows, minlength=len(batch.which))


def all_nll(model: nn.Module, head: nn.Module, batches: Sequence[TargetBatch]) -> Tensor:
    """Return the negative log-likelihoods of all edits, (edits,), without gradients."""
    with torch.no_grad():
        return torch.cat([target_nll(model, head, batch) for batch in batches])


def nll_of(
    model: nn.Module, tokenizer: Any, edits: Sequence[Edit], batch_size: int, *, chat_template: bool = False
) -> Tensor:
    """Return the negative log-likelihood of each edit's target, (edits,) float32."""
    device = module_device(model)
    batches = target_batches(tokenizer, edits, batch_size, device, chat_template=chat_template)
    return all_nll(model, find_anatomy(model).head, batches)


def edit_report(edits: Sequence[Edit], before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """Return prompt, target and likelihoods of each edit as plain data."""
    numbers = zip(edits, before.tolist(), after.tolist(), strict=True)
    return [{"prompt": e.prompt, "target": e.target, "nll_before": old, "nll": new} for e, old, new in numbers]


@dataclass(frozen=True)
class Watch:
    """Checks that training does not diverge; errors name the edit, the layers and the setting."""

    method: str
    lr: float
    layers: Sequence[int]
    edits: Sequence[Edit]
    first: int = 0
    """Number of the first edit."""

    def finite(self, nll: Tensor, which: range, updates: int) -> None:
        """Raise InterventionError if the loss of one of the edits `which` is not finite."""
        bad = (~nll.isfinite()).nonzero()
        if len(bad):
            number = which[int(bad[0])]
            raise InterventionError(
                f"{self.method}: the loss of edit {self.first + number} ({self.edits[number].prompt!r}) became "
                f"{float(nll.detach()[bad[0]])} after {updates} updates of {self._where()}; "
                f"lower {self.method}.lr, or look for NaN in the model's weights"
            )

    def learned(self, before: Tensor, after: Tensor) -> None:
        """Raise InterventionError if the targets are less likely than before the training."""
        if float(after.mean()) > float(before.mean()):
            raise InterventionError(
                f"{self.method}: the training of {self._where()} diverged, the mean loss of the targets rose from "
                f"{float(before.mean()):.3g} to {float(after.mean()):.3g}; lower {self.method}.lr"
            )

    def change(self, name: str, start: Tensor, update: Tensor) -> float:
        """Return the norm of an update relative to that of its weight.

        Raises InterventionError if it is 100 or more: norm layers hide that from the loss.
        """
        ratio = float(update.float().norm() / start.float().norm())
        if not ratio < _LARGEST_CHANGE:
            raise InterventionError(
                f"{self.method}: the training of {self._where()} diverged, it changed {name} by {ratio:.3g} times its "
                f"norm; lower {self.method}.lr"
            )
        return ratio

    def _where(self) -> str:
        return f"layers {list(self.layers)} with {self.method}.lr={self.lr}"
