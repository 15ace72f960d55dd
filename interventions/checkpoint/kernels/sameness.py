"""Check that another model is this one with other weights, and that its tokenizer maps text to the same tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interventions.types import InterventionError

_NO_RESULT = re.compile(
    r"_.*|architectures|dtype|torch_dtype|transformers_version|id2label|label2id|problem_type|return_dict|use_cache"
    r"|output_.*|summary_.*|quantization_config|pretraining_tp|.*token_id|.*drop(out)?(_.*)?|.*initializer.*|.*aux_loss.*"
    r"|router_jitter_noise|max_position_embeddings|n_positions"
)
"""Keys of configs that do not affect what a model of given weights computes, or that shapes of weights follow."""
_SPLITTING = ("model", "normalizer", "pre_tokenizer")
"""Parts of a fast tokenizer that cut text and number the pieces, without special tokens."""


def check_same_model(model: nn.Module, other: nn.Module, who: str) -> None:
    """Raise InterventionError unless `other` has the class, parameters, buffers and computing settings of `model`.

    `who` names the other model at the start of the message.
    """
    if type(other).__name__ != type(model).__name__:
        raise InterventionError(f"{who} is a {type(other).__name__}, but the model is a {type(model).__name__}")
    ours, theirs = _vocabulary(model), _vocabulary(other)
    if ours != theirs:
        raise InterventionError(
            f"{who} has a vocabulary of {theirs} tokens, but the model has one of {ours}: use it as the model instead"
        )
    _check_shapes(dict(model.named_parameters()), dict(other.named_parameters()), who)
    differences = list(_differences(_config(model), _config(other)))
    if differences:
        raise InterventionError(
            f"{who} computes with {', '.join(differences[:3])}, and steps change parameters only: use it as the model "
            "instead"
        )
    held = dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in held or not _close(buffer, held[name]):
            raise InterventionError(
                f"{who} has another buffer {name}, and steps change parameters only: use it as the model instead"
            )


def _vocabulary(model: Any) -> int | None:
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None)


def _check_shapes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], who: str) -> None:
    for name, parameter in ours.items():
        if name not in theirs:
            raise InterventionError(f"{who} lacks {name}, which the model has")
        if theirs[name].shape != parameter.shape:
            raise InterventionError(
                f"{who} has {name} of shape {tuple(theirs[name].shape)}, but the model's is {tuple(parameter.shape)}"
            )
    if extra := [name for name in theirs if name not in ours]:
        raise InterventionError(f"{who} has {extra[0]}, which the model lacks (are its embeddings tied?)")


def _config(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.config.to_dict()
    return found


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], above: str = "") -> Any:
    """Yield `key=theirs instead of ours` for settings that affect results; keys of one config alone do not count."""
    for key in sorted(ours.keys() & theirs.keys()):
        one, other = ours[key], theirs[key]
        if one == other or _NO_RESULT.fullmatch(key):
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{above}{key}.")
        else:
            yield f"{above}{key}={other} instead of {one}"


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    low = one.dtype if one.dtype.itemsize <= other.dtype.itemsize else other.dtype
    one, other = (tensor.detach().to("cpu", low) for tensor in (one, other))
    if not low.is_floating_point:
        return torch.equal(one, other)
    return torch.allclose(one.float(), other.float(), rtol=1e-5, atol=0)


def check_same_tokenizer(ours: Any, theirs: Any, who: str, warn: Callable[[str], None]) -> None:
    """Raise InterventionError if the other tokenizer maps text to other tokens.

    Calls `warn` for differences in special tokens, added tokens and the chat template: the model's own are used.
    """
    one, other = ours.get_vocab(), theirs.get_vocab()
    for token, number in one.items():
        if other.get(token) != number:
            where = "lacks it" if token not in other else f"numbers it {other[token]}"
            raise InterventionError(
                f"{who} has another tokenizer: the model's numbers {token!r} {number}, the other {where}; use it as "
                "the model instead"
            )
    parts, others = _parts(ours), _parts(theirs)
    if any(parts.get(key) != others.get(key) for key in _SPLITTING):
        raise InterventionError(
            f"{who} has another tokenizer: it cuts text in another way than the model's; use it as the model instead"
        )
    added = [token for token in other if token not in one]
    if added:
        warn(f"{who}: its tokenizer has {len(added)} more tokens, such as {added[0]!r}; the model's tokenizer is used")
    if parts.get("post_processor") != others.get("post_processor"):
        warn(f"{who}: its tokenizer puts other special tokens around texts; the model's tokenizer is used")
    elif str(getattr(ours, "chat_template", None)) != str(getattr(theirs, "chat_template", None)):
        warn(f"{who}: its chat template is another one; the model's is used")


def _parts(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    return found
