"""Optimise target values z: the hidden states at the subject that make the model predict the new targets.

Section 4.2.1 of Meng et al. (2023), for all edits at once: edits do not depend on each other and Adam works per
element, so the batch takes the same steps as separate runs.

Edits of one subject share a key, and a layer has one output per key, so they share one change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
class Components:
    """The way of PMET: change the outputs of attention and MLP together; the target values are the MLP's outputs.

    An edit whose target tokens are all the most likely ones of their places is sure.
    """

    sure_weight: float
    """Weight of the NLL of a sure edit in the next step."""
    sure_divergence: float
    """A sure edit stops when its KL term is not above this."""


_PART_TOKENS = 512
"""Tokens, padding included, whose activations are kept for the gradient at once."""


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
    components: Components | None = None,
    cached: bool | None = None,
) -> TargetValues:
    """Find z for every edit: the output of block `layer` at the subject's last token.

    If the block's `gain` is linear, z is optimised directly. Otherwise the change of the MLP's output is optimised, and
    z is the block's resulting output. With `components`, z is the MLP's output, and the attention's output is optimised
    together with it.

    Minimises, per edit, the NLL of the target over `contexts` (the first one empty), plus the KL divergence from the
    unedited model at the subject in "{subject} is a", plus weight decay on the change; edits of one subject are
    summed. Raises InterventionError, naming the edit, if a loss is not finite; `first` is the index of the first edit
    in such errors. `cached` is the value from an earlier call; None: find out.
    """
    prompts = [tokenise(tokenizer, edit, chat_template=chat_template) for edit in edits]
    arrival = None if gain.linear else Arrival(model, anatomy.blocks[layer], prompts, padding_id(tokenizer))

    def make_batch(which: list[int]) -> _Batch:
        texts = _texts(tokenizer, edits, contexts, which, chat_template)
        attention = components is not None
        return _Batch(model, anatomy, layer, which, texts, gain, padding_id(tokenizer), attention, cached)

    batch = make_batch(list(range(len(edits))))
    cached = batch.cached
    start = batch.start  # (edits, sites, hidden), the site of z last
    if arrival is not None:
        start = arrival.outputs(torch.zeros_like(start[:, -1]))[:, None]
    start_norm = start.norm(dim=2)
    subjects = {subject: number for number, subject in enumerate(dict.fromkeys(edit.subject for edit in edits))}
    owner = torch.tensor([subjects[edit.subject] for edit in edits], device=start.device)
    smallest = start_norm.new_full((len(subjects), start.shape[1]), torch.inf)
    owners = owner[:, None].expand_as(start_norm)
    largest = settings.clamp_norm_factor * smallest.scatter_reduce(0, owners, start_norm, "amin")
    delta = torch.zeros(len(subjects), *batch.start.shape[1:], device=start.device)
    optimizer = torch.optim.Adam([delta], lr=settings.lr)
    said_before = batch.says()
    active = torch.ones(len(edits), dtype=torch.bool, device=start.device)
    weight = torch.ones(len(edits), device=start.device)
    loss, nll = torch.zeros_like(weight), torch.zeros_like(weight)
    steps = torch.zeros_like(active, dtype=torch.int64)

    for step in range(settings.steps):
        last = step == settings.steps - 1
        changes = delta[owner].requires_grad_(not last)  # (edits, sites, hidden)
        which = batch.which
        new_nll, divergence, sure = batch(changes, said_before[which], weight[which], settings.kl_factor)
        divergence *= settings.kl_factor
        decay = settings.weight_decay * (changes[which].norm(dim=2) / start_norm[which] ** 2).sum(dim=1)
        new_loss = weight[which] * new_nll + divergence + decay.detach()
        _check_finite(new_loss, which, edits, first)
        running = active[which]
        loss[which] = torch.where(running, new_loss, loss[which])
        nll[which] = torch.where(running, new_nll, nll[which])
        wanting = torch.zeros(len(subjects), dtype=torch.bool, device=start.device)
        unfinished = loss >= settings.stop_loss
        if components is not None:
            weight[which] = torch.where(sure, components.sure_weight, 1.0)
            unfinished[which] &= ~(sure & (divergence <= components.sure_divergence))
        wanting.index_fill_(0, owner[active & unfinished], True)
        active = wanting[owner]
        if last or not bool(active.any()):
            break
        decay.sum().backward(inputs=[changes])
        assert changes.grad is not None
        delta.grad = torch.zeros_like(delta).index_add_(0, owner, changes.grad)
        before = delta.clone()
        optimizer.step()
        delta *= (largest / delta.norm(dim=2).clamp_min(1e-12)).clamp(max=1.0)[:, :, None]
        delta[~wanting] = before[~wanting]  # finished edits do not change
        steps += active
        left = int(active.sum())
        if step % 10 == 0:
            progress(f"z: step {step}, mean loss {float(loss.mean()):.3f}, {left} of {len(edits)} edits left")
        if left <= len(which) // 2:  # worth a pass through the model to drop finished edits
            batch = make_batch(active.nonzero()[:, 0].tolist())
    start, found = start[:, -1], delta[owner, -1]
    z = start + found if arrival is None else arrival.outputs(found / gain.factor)
    return TargetValues(z, start, found / gain.factor, loss, nll, steps, cached)


@dataclass(frozen=True)
class _Text:
    """A text that is run from its subject's last token on."""

    owner: int
    """The edit, as an index into the batch."""
    ids: tuple[int, ...]
    """What follows the last token whose logits are needed is left out."""
    subject_end: int
    targets: tuple[int, ...]
    """Token ids whose likelihood counts, the last one not in the text; none: logits at the subject are wanted."""
    weight: float
    """Weight of the likelihood of one of these tokens."""

    @property
    def length(self) -> int:
        """Tokens that are run."""
        return len(self.ids) - self.subject_end

    @property
    def places(self) -> range:
        """Positions, counted from the subject's last token, whose logits are needed."""
        return range(self.length - max(1, len(self.targets)), self.length)


def _texts(
    tokenizer: Any, edits: Sequence[Edit], contexts: Sequence[str], which: Sequence[int], chat_template: bool
) -> list[_Text]:
    """Return the texts of some edits: in every context the prompt and target, and "{subject} is a"."""
    texts = []
    for owner, edit in enumerate(edits[number] for number in which):
        for context in contexts:
            row = tokenise(tokenizer, edit, context, with_target=True, chat_template=chat_template)
            if row.subject_end >= row.target_places.start:
                raise InterventionError(
                    f"edit {edit.prompt!r}: the tokenizer ends the subject {edit.subject!r} in a token of the target "
                    f"{edit.target!r}; put words between the two"
                )
            # Mean over a row's target tokens, then over an edit's rows.
            weight = 1.0 / row.target_length / len(contexts)
            texts.append(_Text(owner, row.ids[:-1], row.subject_end, row.ids[-row.target_length :], weight))
        essence = Edit(f"{edit.subject} is a", edit.subject, "")
        row = tokenise(tokenizer, essence, chat_template=chat_template)
        texts.append(_Text(owner, row.ids[: row.subject_end + 1], row.subject_end, (), 0.0))
    return texts


class _Batch:
    """Runs the texts of some edits with changes at their subjects, in parts of equal length that fit the memory."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        layer: int,
        which: Sequence[int],
        texts: Sequence[_Text],
        gain: Gain,
        pad: int,
        attention: bool,
        cached: bool | None,
    ) -> None:
        self.which = torch.tensor(which, device=module_device(model))
        """Indices of the edits in the batch."""
        inside = not gain.linear
        if cached is None:
            rows, subjects = [text.ids for text in texts], [text.subject_end for text in texts]
            cached = open_tail(model, anatomy, layer, rows, subjects, pad, inside=inside, attention=attention)
        self.cached = cached
        unit = gain.factor if inside else 1.0
        options = {"inside": inside, "attention": attention, "cached": cached}
        self._parts = [_Part(model, anatomy, layer, part, unit, pad, options) for part in _by_length(texts)]
        bare = {
            text.owner: text for text in reversed(texts) if text.targets
        }  # an edit's first context is the empty one
        starts = {id(text): start for part in self._parts for text, start in zip(part.texts, part.starts, strict=True)}
        self.start = torch.stack([starts[id(bare[owner])] for owner in range(len(which))])
        """Values to change, at the subjects of the bare prompts, (edits of the batch, sites, hidden)."""

    @torch.no_grad()
    def says(self) -> Tensor:
        """Return each edit's log-probabilities at the subject of "{subject} is a", (edits, vocabulary), unchanged."""
        found: dict[int, Tensor] = {}
        for part in self._parts:
            if len(part.essences):
                _, says, _ = part(torch.zeros_like(self.start))
                found |= zip(part.essences.tolist(), says, strict=True)
        return torch.stack([found[owner] for owner in range(len(found))])

    def __call__(
        self, changes: Tensor, said_before: Tensor, weight: Tensor, kl_factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each edit's NLL, its divergence from `said_before`, and whether all target tokens are most likely.

        `changes` (all edits, sites, hidden) are added. The gradient of weight * NLL + kl_factor * divergence is added
        to that of `changes`, if it takes one.
        """
        nll = torch.zeros(len(self.which), device=changes.device)
        divergence, missed = torch.zeros_like(nll), torch.zeros_like(nll)
        for part in self._parts:
            with torch.set_grad_enabled(changes.requires_grad):
                part_nll, says, part_missed = part(changes[self.which])
                before = said_before[part.essences]
                part_divergence = (before.exp() * (before - says)).sum(dim=1)
                objective = (weight * part_nll).sum() + kl_factor * part_divergence.sum()
            if changes.requires_grad:
                objective.backward(inputs=[changes])  # type: ignore[no-untyped-call]
            nll += part_nll.detach()
            missed += part_missed
            divergence.index_add_(0, part.essences, part_divergence.detach())
        return nll, divergence, missed == 0


def _by_length(texts: Sequence[_Text]) -> list[list[_Text]]:
    """Cut the texts, longest first, into parts of at most `_PART_TOKENS` with padding."""
    rest = sorted(texts, key=lambda text: -text.length)
    parts = []
    while rest:
        size = max(1, _PART_TOKENS // rest[0].length)
        parts.append(rest[:size])
        rest = rest[size:]
    return parts


class _Part:
    """Texts of about equal length, which are run together."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        layer: int,
        texts: Sequence[_Text],
        unit: float,
        pad: int,
        options: Mapping[str, bool],
    ) -> None:
        def tensor(values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=module_device(model))

        self.texts = texts
        rows, subjects = [text.ids for text in texts], [text.subject_end for text in texts]
        # In the tail's suffixes, the subject's last token is the first.
        self._tail = Tail(model, anatomy, layer, rows, subjects, pad, **options)
        self.starts = torch.stack([self._tail.hidden[:, 0], *self._tail.also], dim=1).float()
        """Values to change, (texts, sites, hidden)."""
        self._unit = unit
        self._owner = tensor([text.owner for text in texts])
        self.essences = tensor([text.owner for text in texts if not text.targets])
        # Logits are needed before each target token, and at the subject of the essence prompts.
        wanted = [(row, place) for row, text in enumerate(texts) if text.targets for place in text.places]
        wanted += [(row, place) for row, text in enumerate(texts) if not text.targets for place in text.places]
        self._rows, self._places = tensor([row for row, _ in wanted]), tensor([place for _, place in wanted])
        self._targets = tensor([target for text in texts for target in text.targets])
        self._weight = tensor([text.weight for text in texts for _ in text.targets], torch.float32)

    def __call__(self, changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the part's share of each edit's NLL, and log-probabilities at the subjects of its essence prompts.

        Also returns how many target tokens of each edit are not the most likely ones. `changes` (edits of the batch,
        sites, hidden) are added at the subjects.
        """
        hidden = self._tail.hidden.clone()
        own = changes[self._owner] / self._unit
        hidden[:, 0] += own[:, 0].to(hidden.dtype)
        logits = self._tail.logits(hidden, self._rows, self._places, own[:, -1])
        count = len(self._targets)
        log_p = logits[:count].log_softmax(dim=1).gather(1, self._targets[:, None])[:, 0]
        owner = self._owner[self._rows[:count]]
        nll = torch.zeros(len(changes), device=logits.device)
        missed = nll.index_add(0, owner, (logits[:count].argmax(dim=1) != self._targets).float())
        nll = nll.index_add(0, owner, -log_p * self._weight)
        return nll, logits[count:].log_softmax(dim=1), missed


def _check_finite(loss: Tensor, which: Tensor, edits: Sequence[Edit], first: int) -> None:
    bad = (~loss.isfinite()).nonzero()
    if len(bad):
        place = int(bad[0])
        number = int(which[place])
        raise InterventionError(
            f"edit {first + number} ({edits[number].prompt!r}): the loss of its target value became "
            f"{float(loss.detach()[place])}; lower z.lr, or look for NaN in the model's weights"
        )
