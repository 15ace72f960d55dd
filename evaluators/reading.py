"""Find out in which ways a model may read several texts at once, by reading a few of them in each way.

Padding, a shared batch or a KV cache should change no logits, but on many architectures they do:
recurrent layers read padding, positions that a model counts itself move with it, a cache of states
has no rows to select. Names tell nothing of that. So three short texts are read alone, without
padding or cache; a way of reading that gives other logits is not used on that model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from evaluators.passes import arguments, read, read_contexts, read_on

CACHED = frozenset({"position_ids", "past_key_values", "logits_to_keep"})
"""What a forward must take for contexts to be read once."""
_LENGTHS = (48, 31, 9)
_CONTEXTS = (40, 27, 3)
"""Tokens of each text, and of its part that is read first; fewer where a model has fewer places."""
_NOISE = 1e-5
_STEPS = 8
"""How far logits may be off: by this share of their spread, or by so many roundings of their dtype."""


class Reading(NamedTuple):
    """Which ways of reading leave a model's logits as they are."""

    together: bool
    """Texts of one length in one batch."""
    padded: bool
    """Texts of any length in one batch, padded on the right."""
    cached: bool
    """Contexts once, padded on the left, and what follows them from selected rows of the KV cache."""


_found: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()
"""By model, and by the properties that the answer depends on."""


def reading(model: Any, fill: int, longest: int = 0) -> Reading:
    """Say how `model` may read texts of up to `longest` tokens; `fill` is the id to pad with.

    Found out once for a model object, whatever weights it holds later. The model must be in eval
    mode, without gradients; no random number is drawn and nothing is left behind.
    """
    if longest > _length_of_one_rope(model):  # the angles of all rows depend on the longest one
        return Reading(together=True, padded=False, cached=False)
    found: Reading = _once(model, "reading", lambda: _try_reading(model, fill)) or Reading(True, False, False)
    return found


Generate = Callable[[Sequence[Sequence[int]], int], tuple[Tensor, Tensor]]
"""Of rows of ids and a number of tokens: the new ids, (rows, tokens), and the logits, (rows, tokens, vocabulary)."""


def generates(model: Any, fill: int, generate: Generate) -> bool:
    """Say whether `generate` continues texts of differing length at once as full passes over each would."""
    return bool(_once(model, "generates", lambda: _try_generating(model, fill, generate)))


def _once(model: Any, what: str, find: Callable[[], Any]) -> Any:
    """Return what `find` finds, kept with the model; None, which is not kept, where nothing can be said."""
    known = _found.setdefault(model, {})
    kind = getattr(model.config.get_text_config(), "_attn_implementation", None)
    key = (what, arguments(model), model.dtype, str(model.device), kind)
    if key not in known:
        try:
            found = find()
        except _Broken:
            return None
        known[key] = found
    return known[key]


class _Broken(Exception):
    """Logits that are NaN or infinite, or none at all: nothing can be said of the model."""


def _try_reading(model: Any, fill: int) -> Reading:
    texts, parts = _texts(model, fill)
    alone = _alone(model, texts, fill)
    same = _Same(model)
    # Nothing but the batch is different here, so what differs is rounding, and may be as much elsewhere.
    together = _attempt(lambda: same.off(read(model, [texts[0], texts[0]], fill), [alone[0], alone[0]]))
    if not together <= max(10 * _NOISE, same.limit):
        return Reading(together=False, padded=False, cached=False)
    same.limit = max(same.limit, 4 * together)
    padded = _attempt(lambda: same.off(read(model, texts, fill), alone)) <= same.limit
    cached = (
        arguments(model) >= CACHED
        and _attempt(lambda: _off_cached(model, texts, parts, alone, fill, same)) <= same.limit
    )
    return Reading(together=True, padded=padded, cached=cached)


def _off_cached(
    model: Any,
    texts: Sequence[list[int]],
    parts: Sequence[int],
    alone: Sequence[Tensor],
    fill: int,
    same: _Same,
) -> float:
    """Return how far off logits are that are read from a cache, of which rows are taken twice and in turn."""
    before = read_contexts(model, [text[:n] for text, n in zip(texts, parts, strict=True)], fill)

    def off(owners: Sequence[int]) -> float:
        after = read_on(model, before, owners, [texts[i][parts[i] :] for i in owners], fill)
        return same.off(after, [alone[i][parts[i] - 1 :] for i in owners])

    return max(off((2, 0, 2)), off((1, 2, 1)))


def _try_generating(model: Any, fill: int, generate: Generate) -> bool:
    texts, parts = _texts(model, fill)
    contexts = [text[:n] for text, n in zip(texts, parts, strict=True)]
    same = _Same(model)

    def off() -> float:
        new, logits = generate(contexts, 3)
        whole = [[*context, *ids[:-1]] for context, ids in zip(contexts, new.tolist(), strict=True)]
        alone = _alone(model, whole, fill)
        return same.off(logits, [row[len(context) - 1 :] for context, row in zip(contexts, alone, strict=True)])

    return _attempt(off) <= same.limit


def _alone(model: Any, texts: Sequence[list[int]], fill: int) -> list[Tensor]:
    """Return the logits of each text, read alone."""
    logits = [read(model, [text], fill)[0] for text in texts]
    if not all(bool(torch.isfinite(row).all()) for row in logits):
        raise _Broken
    return logits


class _Same:
    """Compares logits with those that were read alone."""

    def __init__(self, model: Any) -> None:
        precision = {"high": 2.0**-10, "medium": 2.0**-7}.get(torch.get_float32_matmul_precision(), 0.0)
        self.limit = max(_NOISE, _STEPS * torch.finfo(model.dtype).eps, _STEPS * precision)

    @staticmethod
    def off(rows: Tensor, alone: Sequence[Tensor]) -> float:
        """Return how far the beginnings of `rows` are off from `alone`, as a share of the spread of these."""
        worst = 0.0
        for row, expected in zip(rows.double(), alone, strict=True):
            expected = expected.double()
            spread = (expected - expected.mean(dim=-1, keepdim=True)).norm()
            worst = max(worst, float((row[: len(expected)] - expected).norm() / spread.clamp(min=1e-30)))
            if worst != worst:  # a NaN is not the same
                return float("inf")
        return worst


def _attempt(off: Callable[[], float]) -> float:
    """Return what `off` returns; a way of reading that a model's code cannot go is infinitely far off."""
    try:
        return off()
    except _Broken:
        raise
    except Exception:
        # Each architecture fails in another way where it lacks something: whatever it raises, another way is used.
        return float("inf")


def _texts(model: Any, fill: int) -> tuple[list[list[int]], list[int]]:
    """Return the texts to read, and how many ids of each are its context.

    Their ids are none that the configuration gives a meaning. Raises _Broken for a model with hardly any places.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "context_length")]
    most = min([n for n in limits if n is not None and n > 0] + [_LENGTHS[0]])
    if most < _LENGTHS[-1]:
        raise _Broken
    lengths, parts = ([max(1, n * most // _LENGTHS[0]) for n in group] for group in (_LENGTHS, _CONTEXTS))
    size = model.get_input_embeddings().num_embeddings
    special = {fill, *_special_ids(model.config.to_dict())}
    plain = [i for i in range(min(size, 4096)) if i not in special] or [0]
    texts = [[plain[(7 + 31 * place + 101 * row) % len(plain)] for place in range(n)] for row, n in enumerate(lengths)]
    return texts, parts


def _special_ids(config: Any) -> set[int]:
    """Return every id of a token that a configuration names."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif "token" in str(key):
            found.update(i for i in (value if isinstance(value, list) else [value]) if type(i) is int)
    return found


def _length_of_one_rope(model: Any) -> float:
    """Return up to how many tokens rotary angles do not depend on the length of the text."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if not any(part.get("rope_type") in ("dynamic", "longrope") for part in parts):
        return float("inf")
    limits = [part.get("original_max_position_embeddings") for part in parts]
    limits += [getattr(config, name, None) for name in ("original_max_position_embeddings", "max_position_embeddings")]
    return min((n for n in limits if n is not None), default=float("inf"))
