"""Forward passes from token ids to logits. The model must be in eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evaluators.encoding import pad
from evaluators.trees import Tree, visible
from interventions.logits import logits_at

LENGTH = 128
"""Tokens of a sequence when a number of sequences is meant as a measure of memory."""


def sequences(rows: int, longest: int) -> int:
    """Return how many sequences of up to `longest` tokens may take the place of `rows` sequences of `LENGTH`."""
    return rows * max(1, LENGTH // longest)


def arguments(model: Any) -> frozenset[str]:
    """Return the argument names of the model's forward."""
    return frozenset(inspect.signature(model.forward).parameters)


def run_once(model: Any, ids: Tensor, **given: Any) -> Any:
    """Run the model on `ids` (rows, tokens), without a cache if it has one, and return its output."""
    return model(input_ids=ids, **given, **({"use_cache": False} if "use_cache" in arguments(model) else {}))


def read(model: Any, rows: Sequence[Sequence[int]], fill: int, keep: int | None = None) -> Tensor:
    """Return the logits of `rows` in one right-padded pass, at all positions or the last `keep`."""
    batch = pad(rows, "right", fill, model.device)
    longest = batch.input_ids.shape[1]
    keep = longest if keep is None else keep
    options = {"attention_mask": batch.attention_mask, "use_cache": False, "logits_to_keep": keep}
    if keep == longest:  # not every model takes 0 for all
        del options["logits_to_keep"]
    known = arguments(model)
    logits: Tensor = model(batch.input_ids, **{key: value for key, value in options.items() if key in known}).logits
    return logits[:, -keep:]


def read_trees(model: Any, trees: Sequence[Tree], wanted: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return the logits after the places `wanted` of each tree, (wanted places, vocabulary) float32, in one pass."""
    width = max(len(tree.ids) for tree in trees)
    rows = torch.tensor([row for row, own in enumerate(wanted) for _ in own])
    places = torch.tensor([place for own in wanted for place in own])
    positions = pad([tree.positions for tree in trees], "right", 0, model.device).input_ids
    given = {
        "input_ids": pad([tree.ids for tree in trees], "right", fill, model.device).input_ids,
        "attention_mask": _masks(model, visible(trees, width).to(model.device), positions),
        "position_ids": positions,
        "use_cache": False,
    }
    return logits_at(model, model.get_output_embeddings(), given, rows, places)


def _masks(model: Any, seen: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """Return masks to add to attention scores: for every layer, or by type of layer if there are several."""
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())

    def mask(kind: str) -> Tensor:
        chosen = seen
        if kind == "sliding_attention" and window:
            chosen = seen & (positions.unsqueeze(2) - positions.unsqueeze(1) < window)
        hidden = torch.finfo(model.dtype).min
        return torch.zeros(chosen.shape, dtype=model.dtype, device=seen.device).masked_fill_(~chosen, hidden)[:, None]

    if len(kinds) > 1:
        return {kind: mask(kind) for kind in kinds}
    return mask(next(iter(kinds), "sliding_attention"))
