"""The parameters of the models to merge, wherever they come from. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.checkpoint.kernels.sameness import check_same_model, check_same_tokenizer
from interventions.checkpoint.load import read_other
from interventions.contents import checkpoint_content, fetched
from interventions.context import Context, OtherState
from interventions.merge.names import is_composition, split_revision
from interventions.tying import tied_head, untie_head_
from interventions.types import InterventionError


@dataclass(frozen=True, eq=False)
class Other:
    """The parameters of another model, which are read one at a time."""

    name: str
    """As in the settings."""
    content: str
    """Hash of the weights, or the hub's commit."""
    parameters: Mapping[str, Tensor]
    owned: bool
    """Whether the values can be freed."""

    def free(self, name: str) -> None:
        """Free the values of a parameter, which is not read again."""
        if self.owned:
            self.parameters[name].data = torch.empty(0)


class _Checkpoint:
    """A model that was read from a checkpoint."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, context: Context) -> None:
        """Read the checkpoint called `name`; raises InterventionError."""
        place, revision = fetched(*split_revision(name), context.folder)
        widest = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
        self.model, _, theirs = read_other(place, f"merge: {name}", widest)
        if theirs is not None:
            check_same_tokenizer(tokenizer, theirs, f"merge: {name}", context.warn)
        self.content = checkpoint_content(split_revision(name)[0], revision, context.folder)


def read_others(model: nn.Module, tokenizer: Any, names: Sequence[str], context: Context) -> list[Other]:
    """Return the models called `names`; if one of them has a head of its own, `model` gets one as well.

    Raises InterventionError for a model that cannot be read or is another one, and for a composition outside of a run.
    """
    read = [
        _state(name, context) if is_composition(name) else _Checkpoint(model, tokenizer, name, context)
        for name in names
    ]
    if (head := tied_head(model)) is not None and any(_has(one, head) for one in read):
        untie_head_(model)
    return [_other(model, name, one) for name, one in zip(names, read, strict=True)]


def _state(name: str, context: Context) -> OtherState:
    if name not in context.states:
        raise InterventionError(
            f"merge: {name} is a composition, which only a run builds: name a folder or a hub id (also as base)"
        )
    return context.states[name]


def _has(one: OtherState | _Checkpoint, head: str) -> bool:
    """Return whether a model has its own weight of the head."""
    if isinstance(one, OtherState):
        return head in one.parameters
    return head in dict(one.model.named_parameters())


def _other(model: nn.Module, name: str, one: OtherState | _Checkpoint) -> Other:
    """Return the parameters of a model under the names of `model`; raises InterventionError if it is another one."""
    ours = dict(model.named_parameters())
    if isinstance(one, _Checkpoint):
        if tied_head(model) is None and tied_head(one.model) is not None:
            untie_head_(one.model)
        check_same_model(model, one.model, f"merge: {name}")
        return Other(name, one.content, dict(one.model.named_parameters()), owned=True)
    found = dict(one.parameters)
    embeddings = next((key for key, value in ours.items() if value is _embeddings(model)), "")
    for key, value in ours.items():
        found.setdefault(key, found[embeddings])  # a head that is tied there
        if found[key].shape != value.shape:
            raise InterventionError(
                f"merge: {name} has {key} of shape {tuple(found[key].shape)}, but the model's is {tuple(value.shape)}"
            )
    return Other(name, one.state_hash, found, owned=False)


def _embeddings(model: Any) -> Any:
    return model.get_input_embeddings().weight
