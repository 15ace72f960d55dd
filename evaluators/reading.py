"""Test whether batches, padding and trees of texts preserve a model's logits.

They should, but on many architectures they do not: recurrent layers read padding, and know no tree; internal position
counters move with either. Class names do not tell. So three short texts are read on their own; a way of reading that
gives different logits is not used with that model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from evaluators.passes import arguments, read, read_trees
from evaluators.trees import grow

_LENGTHS = (48, 31, 9)
_CONTEXTS = (40, 27, 3)
"""Tokens of each text and of its first part; scaled down for models with fewer positions."""
_LONGEST_WINDOW = 512
"""Texts are made longer than a sliding window of up to so many tokens."""
_NOISE = 1e-5
_STEPS = 8
"""Tolerance of logits: this share of their spread, or this many roundings of their dtype."""


class Reading(NamedTuple):
    """Ways of reading that preserve a model's logits."""

    together: bool
    """Texts of equal length in a batch."""
    padded: bool
    """Texts of different lengths in a batch, padded on the right."""
    trees: int = 0
    """Tokens in a tree of texts (`evaluators.trees`), at most; 0: the model reads no trees."""


_found: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()
"""Results by model and the properties that they depend on."""


def reading(model: Any, fill: int, longest: int = 0) -> Reading:
    """Return how `model` may read texts of up to `longest` tokens; `fill` is the padding id.

    Tested once per model object, even if its weights change. The model must be in eval mode without
    gradients. No random numbers are drawn and the model is not changed.
    """
    if longest > _length_of_one_rope(model):  # the longest row determines the angles of all
        return Reading(together=True, padded=False)
    found: Reading = _once(model, "reading", lambda: _try_reading(model, fill)) or Reading(True, False)
    return found


Generate = Callable[[Sequence[Sequence[int]], int], tuple[Tensor, Tensor]]
"""From rows of ids and a number of tokens to new ids (rows, tokens) and logits (rows, tokens, vocabulary)."""


def generates(model: Any, fill: int, generate: Generate) -> bool:
    """Return whether `generate` on texts of different lengths gives the logits of full passes over each."""
    return bool(_once(model, "generates", lambda: _try_generating(model, fill, generate)))


def _once(model: Any, what: str, find: Callable[[], Any]) -> Any:
    """Return the result of `find`, cached per model; None, not cached, for broken logits."""
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
    """The model gives NaN or infinite logits, or has too few positions, so it cannot be tested."""


def _try_reading(model: Any, fill: int) -> Reading:
    texts, parts = _texts(model, fill)
    alone = _alone(model, texts, fill)
    same = _Same(model)
    # Only the batch size differs here, so the difference is rounding, and also sets the tolerance below.
    together = _attempt(lambda: same.off(read(model, [texts[0], texts[0]], fill), [alone[0], alone[0]]))
    if not together <= max(10 * _NOISE, same.limit):
        return Reading(together=False, padded=False)
    same.limit = max(same.limit, 4 * together)
    padded = _attempt(lambda: same.off(read(model, texts, fill), alone)) <= same.limit
    trees = _attempt(lambda: _off_trees(model, texts, parts, alone, fill, same)) <= same.limit
    return Reading(True, padded, _widest(model) if trees else 0)


def _off_trees(
    model: Any, texts: Sequence[list[int]], parts: Sequence[int], alone: Sequence[Tensor], fill: int, same: _Same
) -> float:
    """Return the error of logits read from two trees, in which texts begin alike and stand side by side."""
    branch = texts[0][: parts[1]] + texts[1][: parts[2]]
    every = [*texts, branch]
    logits = [*alone, *_alone(model, [branch], fill)]
    trees = grow(every, len(texts[0]) + len(texts[1]))
    wanted = [range(len(tree.ids)) for tree in trees]
    rows = torch.split(read_trees(model, trees, wanted, fill), [len(own) for own in wanted])
    return max(
        same.off(row[path].unsqueeze(0), [logits[i]])
        for tree, row in zip(trees, rows, strict=True)
        for i, path in tree.paths.items()
    )


def _widest(model: Any) -> int:
    """Return how many tokens a tree may have: no more than positions, or than attention was seen to reach back."""
    config = model.config.get_text_config()
    names = {key for key in config.to_dict() if key.endswith(("window", "window_size", "chunk_size"))}
    if _window(config):
        names.discard("sliding_window")
    reach = (value for key in names if type(value := getattr(config, key, None)) is int and value > 0)
    return min([*_positions(config), *reach], default=sys.maxsize)


def _window(config: Any) -> int:
    """Return the model's sliding window if it is short enough to be tested; otherwise 0."""
    window = getattr(config, "sliding_window", None) or 0
    return window if window <= _LONGEST_WINDOW else 0


def _positions(config: Any) -> list[int]:
    """Return the limits of the length of a text."""
    names = ("max_position_embeddings", "max_seq_len", "context_length")
    return [n for name in names if (n := getattr(config, name, None)) is not None and n > 0]


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
    """Return the logits of each text, read on its own."""
    logits = [read(model, [text], fill)[0] for text in texts]
    if not all(bool(torch.isfinite(row).all()) for row in logits):
        raise _Broken
    return logits


class _Same:
    """Compares logits with those of texts read on their own."""

    def __init__(self, model: Any) -> None:
        precision = {"high": 2.0**-10, "medium": 2.0**-7}.get(torch.get_float32_matmul_precision(), 0.0)
        self.limit = max(_NOISE, _STEPS * torch.finfo(model.dtype).eps, _STEPS * precision)

    @staticmethod
    def off(rows: Tensor, alone: Sequence[Tensor]) -> float:
        """Return the largest error of the starts of `rows` relative to the spread of `alone`."""
        worst = 0.0
        for row, expected in zip(rows.double(), alone, strict=True):
            expected = expected.double()
            spread = (expected - expected.mean(dim=-1, keepdim=True)).norm()
            worst = max(worst, float((row[: len(expected)] - expected).norm() / spread.clamp(min=1e-30)))
            if worst != worst:  # NaN
                return float("inf")
        return worst


def _attempt(off: Callable[[], float]) -> float:
    """Return the error from `off`, infinite if the model's code does not support this way of reading."""
    try:
        return off()
    except _Broken:
        raise
    except Exception:
        # Architectures raise different errors for unsupported inputs; any of them means another way is used.
        return float("inf")


def _texts(model: Any, fill: int) -> tuple[list[list[int]], list[int]]:
    """Return test texts of non-special ids, and the number of context ids of each.

    Raises _Broken for a model with too few positions.
    """
    config = model.config.get_text_config()
    most = min([*_positions(config), max(_LENGTHS[0], _window(config) * 5 // 4)])
    if most < _LENGTHS[-1]:
        raise _Broken
    lengths, parts = ([max(1, n * most // _LENGTHS[0]) for n in group] for group in (_LENGTHS, _CONTEXTS))
    size = model.get_input_embeddings().num_embeddings
    special = {fill, *_special_ids(model.config.to_dict())}
    plain = [i for i in range(min(size, 4096)) if i not in special] or [0]
    texts = [[plain[(7 + 31 * place + 101 * row) % len(plain)] for place in range(n)] for row, n in enumerate(lengths)]
    return texts, parts


def _special_ids(config: Any) -> set[int]:
    """Return all token ids in a configuration."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif "token" in str(key):
            found.update(i for i in (value if isinstance(value, list) else [value]) if type(i) is int)
    return found


def _length_of_one_rope(model: Any) -> float:
    """Return the maximum length up to which rotary angles do not depend on the length of the text."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if not any(part.get("rope_type") in ("dynamic", "longrope") for part in parts):
        return float("inf")
    limits = [part.get("original_max_position_embeddings") for part in parts]
    limits += [getattr(config, name, None) for name in ("original_max_position_embeddings", "max_position_embeddings")]
    return min((n for n in limits if n is not None), default=float("inf"))
