"""Score given continuations of contexts; all likelihoods come from here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from evaluators.encoding import Pair
from evaluators.passes import read, read_contexts, read_on
from evaluators.reading import Reading, reading


class Scored(NamedTuple):
    """Likelihood of a continuation."""

    total: float
    """Log-probability in nats, summed over its tokens; NaN if the logits are broken."""
    greedy_ids: tuple[int, ...]
    """The most likely id at each position, given the context and the continuation before it."""
    logs: tuple[float, ...] = ()
    """Log-probability in nats of each token."""

    @property
    def tokens(self) -> int:
        return len(self.greedy_ids)


class _Group(NamedTuple):
    """A context and the indices of the pairs that continue it."""

    context: list[int]
    members: list[int]


@torch.no_grad()
def score(model: Any, pairs: Sequence[Pair], *, fill: int, rows: int = 32) -> list[Scored]:
    """Score the target of each pair after its prompt, `rows` sequences at a time.

    A context with several targets is read once into the KV cache. For four short choices this takes
    about a third of the time of full passes, with equal results up to float32 rounding (1e-5). If the
    cache or padding changes the model's logits (see `evaluators.reading`), every pair is read in full,
    in batches of equal length. `fill` is the padding id. The model must be in eval mode; log-softmax is
    computed in float32.
    """
    distinct = list(dict.fromkeys((tuple(pair.prompt), tuple(pair.target)) for pair in pairs))
    chosen = [Pair(list(prompt), list(target)) for prompt, target in distinct]
    how = reading(model, fill, max((len(pair.prompt) + len(pair.target) for pair in chosen), default=0))
    single, shared = _by_context(chosen, how.cached)
    found: dict[int, Scored] = {}
    for batch in _batches(chosen, single, how, rows):
        found |= zip(batch, _read_in_full(model, [chosen[i] for i in batch], fill), strict=True)
    for groups in _slices(shared, rows):
        found |= _read_contexts_once(model, chosen, groups, fill, rows)
    place = {key: i for i, key in enumerate(distinct)}
    return [found[place[tuple(pair.prompt), tuple(pair.target)]] for pair in pairs]


def _by_context(pairs: Sequence[Pair], shares: bool) -> tuple[list[int], list[_Group]]:
    """Return the pairs with their own context and the groups that share one, both longest first."""
    members: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        members[tuple(pair.prompt) if shares else (i,)].append(i)
    single = [own[0] for own in members.values() if len(own) == 1]
    single.sort(key=lambda i: -_length(pairs[i]))
    groups = [_Group(list(context), own) for context, own in members.items() if len(own) > 1]
    groups.sort(key=lambda group: -len(group.context))
    return single, groups


def _length(pair: Pair) -> int:
    return len(pair.prompt) + len(pair.target)


def _batches(pairs: Sequence[Pair], chosen: Sequence[int], how: Reading, rows: int) -> Iterator[Sequence[int]]:
    """Yield batches of pairs to read in full, longest first, as `how` permits."""
    groups = [chosen] if how.padded else (list(same) for _, same in groupby(chosen, key=lambda i: _length(pairs[i])))
    for group in groups:
        yield from _slices(group, rows if how.together else 1)


def _slices(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _read_in_full(model: Any, pairs: Sequence[Pair], fill: int) -> list[Scored]:
    """Score pairs in one pass, padded on the right, which keeps the positions of every architecture."""
    texts = [pair.prompt + pair.target[:-1] for pair in pairs]  # the last id predicts nothing
    first = min(len(pair.prompt) for pair in pairs) - 1  # first position with a scored logit
    logits = read(model, texts, fill, max(map(len, texts)) - first)
    starts = [len(pair.prompt) - 1 - first for pair in pairs]
    return [_scored(row[start:], pair.target) for row, start, pair in zip(logits, starts, pairs, strict=True)]


def _read_contexts_once(
    model: Any, pairs: Sequence[Pair], groups: Sequence[_Group], fill: int, rows: int
) -> dict[int, Scored]:
    """Score all targets of some contexts: the first ids from the pass over the contexts, the rest from a second one."""
    contexts = read_contexts(model, [group.context for group in groups], fill)
    owners = {i: row for row, group in enumerate(groups) for i in group.members}
    order = sorted(owners, key=lambda i: -len(pairs[i].target))
    found = {i: _scored(contexts.logits[owners[i]], pairs[i].target) for i in order if len(pairs[i].target) == 1}
    for members in _slices([i for i in order if i not in found], rows):
        targets = [pairs[i].target[:-1] for i in members]
        logits = read_on(model, contexts, [owners[i] for i in members], targets, fill)
        found |= {i: _scored(row, pairs[i].target) for i, row in zip(members, logits, strict=True)}
    return found


def _scored(logits: torch.Tensor, target: Sequence[int]) -> Scored:
    """Score `target` under the first rows of `logits` (length, vocabulary)."""
    scores = torch.log_softmax(logits[: len(target)].float(), dim=-1)
    wanted = torch.tensor(target, device=scores.device).unsqueeze(1)
    logs = scores.gather(1, wanted).double().flatten()
    return Scored(logs.sum().item(), tuple(scores.argmax(dim=-1).tolist()), tuple(logs.tolist()))
