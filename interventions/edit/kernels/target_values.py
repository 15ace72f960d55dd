"""Optimise target values z: the hidden states at the subject that make the model predict the new targets.

Section 4.2.1 of Meng et al. (2023), for all edits at once: edits do not depend on each other and Adam works per
element, so the batch takes the same steps as separate runs.

Edits of one subject share a key, and a layer has one output per key, so they share one change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.edit.bases import ValueSettings
from interventions.edit.kernels.arrival import ADDED, Arrival, Gain
from interventions.edit.kernels.prompts import tokenise
from interventions.edit.kernels.tail import Tail, open_tail
from interventions.padding import padding_id
from interventions.structure import Anatomy, module_device
from interventions.types import Edit, InterventionError


@dataclass(frozen=True)
class TargetValues:
    """The result of the optimisation, with one row per edit."""

    z: Tensor
    """(edits, hidden) float32."""
    start: Tensor
    """(edits, hidden) float32: the states before the edit."""
    change: Tensor
    """(edits, width) float32: the change of the MLP's output that gives z in the bare prompt."""
    loss: Tensor
    """(edits,) the loss at which each edit stopped: NLL + KL + weight decay, in nats."""
    nll: Tensor
    """(edits,) its first part: mean negative log-likelihood of the target tokens over the contexts."""
    steps: Tensor
    """(edits,) updates taken."""
    cached: bool
    """Whether a `Tail` of this model may be cached."""


def optimise_values(
    model: nn.Module,
    tokenizer: Any,
    anatomy: Anatomy,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    layer: int,
    settings: ValueSettings,
    progress: Callable[[str], None],
    *,
    chat_template: bool = False,
    first: int = 0,
    gain: Gain = ADDED,
    cached: bool | None = None,
) -> TargetValues:
    """Find z for every edit: the output of block `layer` at the subject's last token.

    If the block's `gain` is linear, z is optimised directly. Otherwise the change of the MLP's output is optimised, and
    z is the block's resulting output.

    Minimises, per edit, the NLL of the target over `contexts` (the first one empty), plus the KL divergence from the
    unedited model at the subject in "{subject} is a", plus weight decay on the change; edits of one subject are
    summed. Raises InterventionError, naming the edit, if a loss is not finite; `first` is the index of the first edit
    in such errors. `cached` is the value from an earlier call; None: find out.
    """
    prompts = [tokenise(tokenizer, edit, chat_template=chat_template) for edit in edits]
    arrival = None if gain.linear else Arrival(model, anatomy.blocks[layer], prompts, padding_id(tokenizer))

    def make_batch(which: list[int]) -> _Batch:
        texts = _Texts(tokenizer, edits, contexts, which, chat_template)
        return _Batch(model, anatomy, layer, texts, gain, padding_id(tokenizer), cached)

    batch = make_batch(list(range(len(edits))))
    cached = batch.cached
    start = batch.start if arrival is None else arrival.outputs(torch.zeros_like(batch.start))  # h, (edits, hidden)
    start_norm = start.norm(dim=1)
    subjects = {subject: number for number, subject in enumerate(dict.fromkeys(edit.subject for edit in edits))}
    owner = torch.tensor([subjects[edit.subject] for edit in edits], device=start.device)
    smallest = torch.full((len(subjects),), torch.inf, device=start.device)
    largest = settings.clamp_norm_factor * smallest.scatter_reduce(0, owner, start_norm, "amin")
    delta = torch.zeros(len(subjects), start.shape[1], device=start.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.lr)
    said_before: Tensor | None = None
    active = torch.ones(len(edits), dtype=torch.bool, device=start.device)
    loss, nll = torch.zeros_like(start_norm), torch.zeros_like(start_norm)
    steps = torch.zeros_like(active, dtype=torch.int64)

    for step in range(settings.steps):
        changes = delta[owner]  # (edits, hidden)
        new_nll, says = batch(changes)
        said_before = says.detach() if said_before is None else said_before
        which = batch.which
        divergence = (said_before[which].exp() * (said_before[which] - says)).sum(dim=1)
        decay = settings.weight_decay * changes[which].norm(dim=1) / start_norm[which] ** 2
        new_loss = new_nll + settings.kl_factor * divergence + decay
        _check_finite(new_loss, which, edits, first)
        running = active[which]
        loss[which] = torch.where(running, new_loss.detach(), loss[which])
        nll[which] = torch.where(running, new_nll.detach(), nll[which])
        wanting = torch.zeros(len(subjects), dtype=torch.bool, device=start.device)
        wanting.index_fill_(0, owner[active & (loss >= settings.stop_loss)], True)
        active = wanting[owner]
        if not bool(active.any()) or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        new_loss.sum().backward(inputs=[delta])
        before = delta.detach().clone()
        optimizer.step()
        with torch.no_grad():
            delta *= (largest / delta.norm(dim=1).clamp_min(1e-12)).clamp(max=1.0)[:, None]
            delta[~wanting] = before[~wanting]  # finished edits do not change
        steps += active
        left = int(active.sum())
        if step % 10 == 0:
            progress(f"z: step {step}, mean loss {float(loss.mean()):.3f}, {left} of {len(edits)} edits left")
        if left <= len(which) // 2:  # worth a pass through the model to drop finished edits
            batch = make_batch(active.nonzero()[:, 0].tolist())
    found = delta.detach()[owner]
    z = start + found if arrival is None else arrival.outputs(found / gain.factor)
    return TargetValues(z, start, found / gain.factor, loss, nll, steps, cached)


class _Texts:
    """The texts of some edits: every context with prompt and target, then the prompts "{subject} is a"."""

    def __init__(
        self, tokenizer: Any, edits: Sequence[Edit], contexts: Sequence[str], which: list[int], chat_template: bool
    ) -> None:
        chosen = [edits[number] for number in which]
        self.which = which
        self.per_edit = len(contexts)
        self.rows = [
            tokenise(tokenizer, edit, context, with_target=True, chat_template=chat_template)
            for edit in chosen
            for context in contexts
        ]
        for number, row in enumerate(self.rows):
            if row.subject_end >= row.target_places.start:
                edit = chosen[number // len(contexts)]
                raise InterventionError(
                    f"edit {edit.prompt!r}: the tokenizer ends the subject {edit.subject!r} in a token of the target "
                    f"{edit.target!r}; put words between the two"
                )
        self.essence = [
            tokenise(tokenizer, Edit(f"{edit.subject} is a", edit.subject, ""), chat_template=chat_template)
            for edit in chosen
        ]


class _Batch:
    """Runs the texts of some edits with changes at their subjects."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        layer: int,
        texts: _Texts,
        gain: Gain,
        pad: int,
        cached: bool | None,
    ) -> None:
        device = module_device(model)
        rows, per_edit, count = texts.rows, texts.per_edit, len(texts.which)
        # What follows the last token whose logits are needed is not run.
        ids = [row.ids[:-1] for row in rows] + [row.ids[: row.subject_end + 1] for row in texts.essence]
        subjects = [row.subject_end for row in rows + texts.essence]
        inside = not gain.linear
        if cached is None:
            cached = open_tail(model, anatomy, layer, ids, subjects, pad, inside=inside)
        self.cached = cached
        # In the tail's suffixes, the subject's last token is the first.
        self._tail = Tail(model, anatomy, layer, ids, subjects, pad, inside=inside, cached=cached)
        self._unit = gain.factor if inside else 1.0
        self.which = torch.tensor(texts.which, device=device)
        """Indices of the edits in the batch."""
        self._owner = torch.tensor([n // per_edit for n in range(len(rows))] + list(range(count)), device=device)
        # Logits are needed before each target token, and at the subject of the essence prompts.
        wanted = [(n, place) for n, row in enumerate(rows) for place in row.target_places]
        target_rows, before_targets = torch.tensor([(n, p - 1 - rows[n].subject_end) for n, p in wanted]).t().to(device)
        self._target_ids = torch.tensor([rows[n].ids[place] for n, place in wanted], device=device)
        self._target_owner = self._owner[target_rows]
        # Mean over a row's target tokens, then over an edit's rows.
        self._weight = torch.tensor([1.0 / rows[n].target_length / per_edit for n, _ in wanted], device=device)
        essences = torch.arange(len(rows), len(rows) + count, device=device)
        self._logit_rows = torch.cat([target_rows, essences])
        self._logit_places = torch.cat([before_targets, torch.zeros_like(essences)])
        bare = torch.arange(count, device=device) * per_edit  # each edit's first context is the empty one
        self.start = self._tail.hidden[bare, 0].float()
        """Values to change, at the subjects of the bare prompts, (edits of the batch, hidden)."""

    def __call__(self, changes: Tensor) -> tuple[Tensor, Tensor]:
        """Return each edit's NLL and log-probabilities at the subject, with `changes` (all edits, hidden) added."""
        hidden = self._tail.hidden.clone()
        hidden[:, 0] += (changes[self.which[self._owner]] / self._unit).to(hidden.dtype)
        logits = self._tail.logits(hidden, self._logit_rows, self._logit_places)
        targets = len(self._target_ids)
        log_p = logits[:targets].log_softmax(dim=1).gather(1, self._target_ids[:, None])[:, 0]
        nll = torch.zeros(len(self.which), device=changes.device)
        nll = nll.index_add(0, self._target_owner, -log_p * self._weight)
        return nll, logits[targets:].log_softmax(dim=1)


def _check_finite(loss: Tensor, which: Tensor, edits: Sequence[Edit], first: int) -> None:
    bad = (~loss.isfinite()).nonzero()
    if len(bad):
        place = int(bad[0])
        number = int(which[place])
        raise InterventionError(
            f"edit {first + number} ({edits[number].prompt!r}): the loss of its target value became "
            f"{float(loss.detach()[place])}; lower z.lr, or look for NaN in the model's weights"
        )
