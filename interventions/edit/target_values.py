"""MEMIT's target values z: the hidden states at the subject that make the model say the new targets.

Section 4.2.1 of Meng et al. (2023), for all edits at once: an edit's rows depend on no other
edit, and Adam acts element by element, so the batch takes the very steps of separate runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.anatomy import Anatomy, module_device
from interventions.edit.prompts import pad_right, padding_id, tokenise
from interventions.edit.settings import ValueSettings
from interventions.edit.tail import Tail
from interventions.types import Edit, InterventionError


@dataclass(frozen=True)
class TargetValues:
    """What the optimisation found, a row per edit."""

    z: Tensor
    """(edits, hidden) float32."""
    loss: Tensor
    """(edits,) the loss at which each edit stopped: NLL + KL + weight decay, in nats."""
    nll: Tensor
    """(edits,) its first part: mean negative log-likelihood of the target tokens over the contexts."""
    steps: Tensor
    """(edits,) updates taken."""
    moved: Tensor
    """(edits,) the norm of the change of the hidden state over the norm of the state."""


def optimise_values(
    model: nn.Module,
    tokenizer: Any,
    anatomy: Anatomy,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    layer: int,
    settings: ValueSettings,
    progress: Callable[[str], None],
) -> TargetValues:
    """Find z for every edit: the output of block `layer` at the subject's last token.

    Minimises, per edit, NLL of the target over `contexts` (the first one empty), plus the
    KL divergence at the subject in "{subject} is a" from what the model says now, plus weight decay
    on the change. Raises InterventionError naming the edit whose loss is not finite.
    """
    if not settings.lr > 0 or settings.steps < 1:
        raise InterventionError(f"z.lr={settings.lr}, z.steps={settings.steps}: need a rate above 0 and a step")
    device = module_device(model)
    rows = [tokenise(tokenizer, edit, context, with_target=True) for edit in edits for context in contexts]
    essence = [tokenise(tokenizer, Edit(f"{edit.subject} is a", edit.subject, "")) for edit in edits]
    ids, mask = pad_right([row.ids for row in rows + essence], padding_id(tokenizer), device)
    tail = Tail(model, anatomy, layer, ids, mask)

    count, per_edit = len(edits), len(contexts)
    owner = torch.tensor([n // per_edit for n in range(len(rows))] + list(range(count)), device=device)
    subject = torch.tensor([row.subject_end for row in rows + essence], device=device)
    every_row = torch.arange(len(owner), device=device)
    # Logits are needed before each target token, and at the subject of the essence prompts.
    wanted = [(n, p) for n, row in enumerate(rows) for p in range(len(row.ids) - row.target_length, len(row.ids))]
    target_rows = torch.tensor([n for n, _ in wanted], device=device)
    target_places = torch.tensor([p for _, p in wanted], device=device)
    target_ids = ids[target_rows, target_places]
    # Mean over a row's target tokens, then over an edit's rows.
    weight = torch.tensor([1.0 / rows[n].target_length / per_edit for n, _ in wanted], device=device)
    asked_rows = torch.cat([target_rows, every_row[len(rows) :]])
    asked_places = torch.cat([target_places - 1, subject[len(rows) :]])

    bare = torch.arange(count, device=device) * per_edit  # each edit's first context is the empty one
    start = tail.hidden[bare, subject[bare]].float()  # h, (edits, hidden)
    start_norm = start.norm(dim=1)
    delta = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.lr)
    said_before: Tensor | None = None
    active = torch.ones(count, dtype=torch.bool, device=device)
    loss = nll = torch.zeros(count, device=device)
    steps = torch.zeros(count, dtype=torch.int64, device=device)

    for step in range(settings.steps):
        hidden = tail.hidden.clone()
        hidden[every_row, subject] += delta[owner].to(hidden.dtype)
        logits = tail.logits(hidden, asked_rows, asked_places)
        log_p = logits[: len(target_ids)].log_softmax(dim=1).gather(1, target_ids[:, None])[:, 0]
        new_nll = torch.zeros(count, device=device).index_add(0, owner[target_rows], -log_p * weight)
        says = logits[len(target_ids) :].log_softmax(dim=1)
        if said_before is None:
            said_before = says.detach()
        divergence = (said_before.exp() * (said_before - says)).sum(dim=1)
        decay = settings.weight_decay * delta.norm(dim=1) / start_norm**2
        new_loss = new_nll + settings.kl_factor * divergence + decay
        _check_finite(new_loss, edits)
        loss = torch.where(active, new_loss.detach(), loss)
        nll = torch.where(active, new_nll.detach(), nll)
        active = active & (new_loss.detach() >= settings.stop_loss)
        if not bool(active.any()) or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        new_loss.sum().backward(inputs=[delta])
        before = delta.detach().clone()
        optimizer.step()
        with torch.no_grad():
            largest = settings.clamp_norm_factor * start_norm
            delta *= (largest / delta.norm(dim=1).clamp_min(1e-12)).clamp(max=1.0)[:, None]
            delta[~active] = before[~active]  # an edit that has arrived stays where it is
        steps += active
        if step % 10 == 0:
            progress(f"z: step {step}, mean loss {float(loss.mean()):.3f}, {int(active.sum())} of {count} edits left")
    moved = delta.detach().norm(dim=1) / start_norm
    return TargetValues(start + delta.detach(), loss, nll, steps, moved)


def _check_finite(loss: Tensor, edits: Sequence[Edit]) -> None:
    bad = (~loss.isfinite()).nonzero()
    if len(bad):
        number = int(bad[0])
        raise InterventionError(
            f"edit {number} ({edits[number].prompt!r}): the loss of its target value became {float(loss[number])}; "
            "lower z.lr, or look for NaN in the model's weights"
        )
