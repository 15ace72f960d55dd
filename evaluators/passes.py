"""Forward passes from token ids to logits. The model must be in eval mode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluators.encoding import pad


def arguments(model: Any) -> frozenset[str]:
    """Return the argument names of the model's forward."""
    return frozenset(inspect.signature(model.forward).parameters)


def run_once(model: Any, ids: Tensor) -> None:
    """Run the model on `ids` (rows, tokens), without a cache if it has one, for what the pass costs or shows."""
    model(input_ids=ids, **({"use_cache": False} if "use_cache" in arguments(model) else {}))


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


class Contexts(NamedTuple):
    """Texts in a KV cache, ready to be continued."""

    logits: Tensor
    """Logits after the last token of each text, (texts, 1, vocabulary)."""
    mask: Tensor
    cache: Any


def read_contexts(model: Any, rows: Sequence[Sequence[int]], fill: int) -> Contexts:
    """Read `rows` into a KV cache in one left-padded pass."""
    batch = pad(rows, "left", fill, model.device)
    places = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(**batch._asdict(), position_ids=places, use_cache=True, logits_to_keep=1)
    return Contexts(output.logits[:, -1:], batch.attention_mask, output.past_key_values)


def read_on(model: Any, contexts: Contexts, owners: Sequence[int], rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return the logits after each row's context and at all positions of the row.

    `owners` are the indices of the contexts, in any order and repeated as needed; their cache does not change.
    """
    owner = torch.tensor(owners, device=model.device)
    batch = pad(rows, "right", fill, model.device)
    seen = contexts.mask[owner]
    start = seen.sum(dim=1, keepdim=True)
    output = model(
        input_ids=batch.input_ids,
        attention_mask=torch.cat([seen, batch.attention_mask], dim=1),
        position_ids=start + torch.arange(batch.input_ids.shape[1], device=model.device),
        past_key_values=_rows_of(contexts.cache, owner),
        use_cache=True,
    )
    return torch.cat([contexts.logits[owner], output.logits], dim=1)


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """Return a KV cache with some rows of `cache`, which does not change."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
