"""Run a model once on a few tokens, and record which modules it calls with which tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interventions.early_exit import accepted
from interventions.modes import keep_modes
from interventions.structure import is_linear, module_device, within_context
from interventions.types import InterventionError

TOKENS = 8


@dataclass
class ModuleCall:
    """One call of a module. The tensors are kept, so that they can be told apart by identity."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any = None

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return list(tensors((*self.arguments, *self.keywords.values())))

    @property
    def outputs(self) -> list[Tensor]:
        """All tensors in the output."""
        return list(tensors(self.output))


@dataclass
class Trace:
    """A forward pass over one text of `tokens` tokens."""

    tokens: int
    calls: list[ModuleCall] = field(default_factory=list)
    """In the order in which the modules began."""
    logits: Tensor | None = None

    def of(self, module: nn.Module) -> list[ModuleCall]:
        """Return the calls of a module."""
        return [call for call in self.calls if call.module is module]


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value: in tuples, lists, mappings and model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same, or have the same values."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point() or one.dim() < 2:
        return False
    return torch.allclose(one.to(other.device), other, rtol=0, atol=0, equal_nan=True)


def trace(model: nn.Module) -> Trace:
    """Run the model on a few tokens, in eval mode; weights, modes, hooks and random numbers are as before.

    Raises InterventionError for a model that cannot be run on token ids alone.
    """
    ids = _ids(model)
    found = Trace(ids.shape[1])
    running: list[ModuleCall] = []

    def begin(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        call = ModuleCall(module, arguments, dict(keywords))
        found.calls.append(call)
        running.append(call)

    def end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        call = running.pop()
        while call.module is not module:  # calls that ended with an exception
            call = running.pop()
        # Some models add to the output of a layer in place.
        call.output = output.clone() if is_linear(module) and isinstance(output, Tensor) else output

    handles = []
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end))
        with keep_modes(model), torch.no_grad(), torch.random.fork_rng(list(devices)):
            arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            output = model(**accepted(model, arguments))
    except InterventionError:
        raise
    except Exception as error:  # a model's code can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InterventionError(f"{type(model).__name__} cannot be run on token ids alone: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    found.logits = getattr(output, "logits", None)
    return found


def _ids(model: nn.Module) -> Tensor:
    """Return token ids (1, tokens) without special meaning."""
    config: Any = getattr(model, "config", None)
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if config is None or embeddings is None:
        raise InterventionError(f"{type(model).__name__}: no input embeddings found; is it a causal language model?")
    special = set(_numbers(config.to_dict()))
    size = next(embeddings.parameters()).shape[0]
    plain = [i for i in range(min(size, 4096)) if i not in special] or [0]
    length = within_context(model, TOKENS)
    return torch.tensor([[plain[(5 + 13 * i) % len(plain)] for i in range(length)]], device=module_device(model))


def _numbers(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield all token ids in a config."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif "token" in str(key):
            yield from (i for i in (value if isinstance(value, list) else [value]) if type(i) is int)
