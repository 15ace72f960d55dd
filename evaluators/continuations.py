"""Score given continuations of contexts: the one forward pass that all likelihoods here come from."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from evaluators.encoding import Pair, pad


class Scored(NamedTuple):
    """How a model takes a continuation."""

    total: float
    """Log-probability in nats, summed over its tokens; NaN where the logits are broken."""
    said: tuple[int, ...]
    """The likeliest id at each of its places, after the context and the continuation up to there."""

    @property
    def tokens(self) -> int:
        return len(self.said)


class _Group(NamedTuple):
    """A context and the pairs, by index, that continue it."""

    context: list[int]
    members: list[int]


@torch.no_grad()
def score(model: Any, pairs: Sequence[Pair], *, fill: int, rows: int = 32) -> list[Scored]:
    """Score the target of each pair after its prompt, `rows` sequences at a time.

    A context with several targets is read once, and they read it from the KV cache: four choices
    of a few tokens take about a third of the time of four full passes, with the same numbers up to
    rounding in float32 (1e-5). A model whose forward lacks the arguments for that reads every pair
    in full. `fill` is the id to pad with. The model must be in eval mode; computes in float32.
    """
    known = set(inspect.signature(model.forward).parameters)
    distinct = list(dict.fromkeys((tuple(pair.prompt), tuple(pair.target)) for pair in pairs))
    chosen = [Pair(list(prompt), list(target)) for prompt, target in distinct]
    single, shared = _by_context(chosen, {"position_ids", "past_key_values", "logits_to_keep"} <= known)
    found: dict[int, Scored] = {}
    for batch in _slices(single, rows):
        found |= zip(batch, _read_in_full(model, [chosen[i] for i in batch], fill, known), strict=True)
    for groups in _slices(shared, rows):
        found |= _read_contexts_once(model, chosen, groups, fill, rows)
    place = {key: i for i, key in enumerate(distinct)}
    return [found[place[tuple(pair.prompt), tuple(pair.target)]] for pair in pairs]


def _by_context(pairs: Sequence[Pair], shares: bool) -> tuple[list[int], list[_Group]]:
    """Return the pairs to read alone and the groups that share a context, both longest first."""
    members: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        members[tuple(pair.prompt) if shares else (i,)].append(i)
    single = [own[0] for own in members.values() if len(own) == 1]
    single.sort(key=lambda i: -len(pairs[i].prompt) - len(pairs[i].target))
    groups = [_Group(list(context), own) for context, own in members.items() if len(own) > 1]
    groups.sort(key=lambda group: -len(group.context))
    return single, groups


def _slices(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _read_in_full(model: Any, pairs: Sequence[Pair], fill: int, known: set[str]) -> list[Scored]:
    """Score pairs in one pass, padded on the right: so every architecture's positions are its own."""
    texts = [pair.prompt + pair.target[:-1] for pair in pairs]  # the last id predicts nothing that is scored
    batch = pad(texts, "right", fill, model.device)
    first = min(len(pair.prompt) for pair in pairs) - 1  # nothing before is scored, so no logits there
    options = {
        "attention_mask": batch.attention_mask,
        "use_cache": False,
        "logits_to_keep": batch.input_ids.shape[1] - first,
    }
    logits = model(batch.input_ids, **{key: value for key, value in options.items() if key in known}).logits
    if "logits_to_keep" not in known:
        logits = logits[:, first:]
    starts = [len(pair.prompt) - 1 - first for pair in pairs]
    return [_scored(row[start:], pair.target) for row, start, pair in zip(logits, starts, pairs, strict=True)]


def _read_contexts_once(
    model: Any, pairs: Sequence[Pair], groups: Sequence[_Group], fill: int, rows: int
) -> dict[int, Scored]:
    """Score all targets of a few contexts: the first id from the contexts' pass, the rest from their own."""
    contexts = pad([group.context for group in groups], "left", fill, model.device)
    seen = contexts.attention_mask
    before = model(
        **contexts._asdict(),
        position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    owners = {i: row for row, group in enumerate(groups) for i in group.members}
    order = sorted(owners, key=lambda i: -len(pairs[i].target))
    found = {i: _scored(before.logits[owners[i]], pairs[i].target) for i in order if len(pairs[i].target) == 1}
    for members in _slices([i for i in order if i not in found], rows):
        owner = torch.tensor([owners[i] for i in members], device=model.device)
        targets = pad([pairs[i].target[:-1] for i in members], "right", fill, model.device)
        start = seen.sum(dim=1)[owner].unsqueeze(1)
        after = model(
            input_ids=targets.input_ids,
            attention_mask=torch.cat([seen[owner], targets.attention_mask], dim=1),
            position_ids=start + torch.arange(targets.input_ids.shape[1], device=model.device),
            past_key_values=_rows_of(before.past_key_values, owner),
            use_cache=True,
        )
        logits = torch.cat([before.logits[owner], after.logits], dim=1)  # (members, longest target, vocabulary)
        found |= {i: _scored(row, pairs[i].target) for i, row in zip(members, logits, strict=True)}
    return found


def _rows_of(cache: Any, rows: torch.Tensor) -> Any:
    """Return a KV cache of some rows of `cache`, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _scored(logits: torch.Tensor, target: Sequence[int]) -> Scored:
    """Score `target` under the first rows of `logits` (length, vocabulary)."""
    scores = torch.log_softmax(logits[: len(target)].float(), dim=-1)
    wanted = torch.tensor(target, device=scores.device).unsqueeze(1)
    total = scores.gather(1, wanted).double().sum().item()
    return Scored(total, tuple(scores.argmax(dim=-1).tolist()))
