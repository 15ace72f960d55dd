"""Score given continuations of contexts; all likelihoods come from here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from evaluators.encoding import Pair
from evaluators.passes import LENGTH, read, read_trees
from evaluators.reading import Reading, reading
from evaluators.trees import grow


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


@torch.no_grad()
def score(model: Any, pairs: Sequence[Pair], *, fill: int, rows: int = 32) -> list[Scored]:
    """Score the target of each pair after its prompt, up to `rows` sequences at a time.

    What several texts begin with is read once (see `evaluators.trees`), with equal results up to float32 rounding
    (1e-5). If that changes the model's logits (see `evaluators.reading`), every pair is read in full, in batches of
    equal length where padding changes them too. `fill` is the padding id. The model must be in eval mode; log-softmax
    is computed in float32.
    """
    distinct = list(dict.fromkeys((tuple(pair.prompt), tuple(pair.target)) for pair in pairs))
    chosen = [Pair(list(prompt), list(target)) for prompt, target in distinct]
    longest = max(map(_length, chosen), default=0)
    how = reading(model, fill, longest)
    found = _read_as_trees(model, chosen, longest, min(how.trees, max(LENGTH, 2 * longest)), fill, rows)
    rest = sorted((i for i in range(len(chosen)) if i not in found), key=lambda i: -_length(chosen[i]))
    for batch in _batches(chosen, rest, how, rows):
        found |= zip(batch, _read_in_full(model, [chosen[i] for i in batch], fill), strict=True)
    place = {key: i for i, key in enumerate(distinct)}
    return [found[place[tuple(pair.prompt), tuple(pair.target)]] for pair in pairs]


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
    texts = [_text(pair) for pair in pairs]
    first = min(len(pair.prompt) for pair in pairs) - 1  # first position with a scored logit
    logits = read(model, texts, fill, max(map(len, texts)) - first)
    starts = [len(pair.prompt) - 1 - first for pair in pairs]
    return [
        _scored(torch.log_softmax(row[start : start + len(pair.target)].float(), dim=-1), pair.target)
        for row, start, pair in zip(logits, starts, pairs, strict=True)
    ]


def _read_as_trees(
    model: Any, pairs: Sequence[Pair], longest: int, width: int, fill: int, rows: int
) -> dict[int, Scored]:
    """Score pairs in trees of `width` tokens; none if one is longer.

    NaN spreads to other texts of a tree, so the pairs of a pass with NaN are left out.
    """
    found: dict[int, Scored] = {}
    if longest > width:
        return found
    trees = grow([_text(pair) for pair in pairs], width)
    for batch in _slices(trees, max(1, rows * max(LENGTH, longest) // width)):
        places = {i: path[len(pairs[i].prompt) - 1 :] for tree in batch for i, path in tree.paths.items()}
        wanted = [sorted({place for i in tree.paths for place in places[i]}) for tree in batch]
        logits = read_trees(model, batch, wanted, fill)
        if bool(logits.isnan().any()):
            continue
        scores, first = torch.log_softmax(logits, dim=-1), 0
        for tree, own in zip(batch, wanted, strict=True):
            row = {place: first + n for n, place in enumerate(own)}
            found |= {i: _scored(scores[[row[place] for place in places[i]]], pairs[i].target) for i in tree.paths}
            first += len(own)
    return found


def _text(pair: Pair) -> list[int]:
    """Return the ids to read: the last one predicts nothing."""
    return pair.prompt + pair.target[:-1]


def _scored(scores: torch.Tensor, target: Sequence[int]) -> Scored:
    """Score `target` under log-probabilities (its length, vocabulary)."""
    wanted = torch.tensor(target, device=scores.device).unsqueeze(1)
    logs = scores.gather(1, wanted).double().flatten()
    return Scored(logs.sum().item(), tuple(scores.argmax(dim=-1).tolist()), tuple(logs.tolist()))
