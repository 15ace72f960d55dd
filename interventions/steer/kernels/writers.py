"""Find what writes into the residual stream, and which direction of its output becomes a direction of the stream.

Linear layers at the end of attention, mixers, MLPs and experts write, and so do embeddings of tokens and positions.
Where a norm stands between a writer and the stream (Gemma 2, OLMo 2), it has a gain of its own: what it puts out is
free of a direction r if what it reads is free of gain * r, without its mean if the norm subtracts the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.compress.kernels.capture import Call, catch_block_calls
from interventions.compress.kernels.folding import gain_offset
from interventions.compress.kernels.norm_tracing import is_norm, subtracts_mean
from interventions.compress.kernels.trials import float_copy
from interventions.early_exit import StopForward, run_until_seen
from interventions.structure import Anatomy, Block, Linear, first_output, is_linear, module_device, within_context

FAMILIES = (("attention_out", "mixer_out"), ("mlp_out",))
"""Roles of the writers of a block: what mixes tokens, and the MLP."""
_TOKENS = 8


@dataclass(frozen=True)
class Writer:
    """A linear layer, or an embedding, whose outputs are added to the stream, after the norms in `norms`."""

    name: str
    linear: Linear | None
    """None: an embedding."""
    module: nn.Module
    norms: tuple[nn.Module, ...] = ()
    """In the order of the data's way."""

    @property
    def columns(self) -> Tensor:
        """What is written, as a view (width, number): one column for each input channel, or each embedding."""
        return self.linear.weight if self.linear is not None else self.module.weight.detach().t()  # type: ignore[operator]

    @property
    def bias(self) -> Tensor | None:
        """The bias (width,), detached, or None."""
        return None if self.linear is None else self.linear.bias

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold what is written."""
        if self.linear is None or self.linear.part is None:
            names: list[str | None] = ["weight", "bias"]
        else:
            names = [self.linear.part.parameter, self.linear.part.bias]
        found = [getattr(self.module, name, None) for name in names if name is not None]
        return [p for p in found if isinstance(p, nn.Parameter)]

    def direction(self, stream: Tensor) -> Tensor:
        """Return the unit direction (width,) of its own output that becomes the direction `stream` of the stream."""
        own = stream
        for norm in reversed(self.norms):
            gain = getattr(norm, "weight", None)
            if isinstance(gain, Tensor):
                own = own * (gain.detach().to(own) + gain_offset(norm))
            if subtracts_mean(norm, len(own)):
                own = own - own.mean()
        return torch.nn.functional.normalize(own, dim=0)

    @property
    def end(self) -> nn.Module:
        """The module whose output is added to the stream."""
        return self.norms[-1] if self.norms else self.module


def block_writers(model: nn.Module, anatomy: Anatomy) -> list[list[Writer]]:
    """Return the writers of each block, those of attention first."""
    ids = torch.arange(within_context(model, _TOKENS)).remainder(_vocabulary(anatomy)).unsqueeze(0)
    calls = [call for (call,) in catch_block_calls(model, [{"input_ids": ids}], anatomy.blocks)]
    hidden = torch.randn(calls[0].hidden.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for block, call in zip(anatomy.blocks, calls, strict=True):
        chains = _norms_after(model, block, call.on(hidden))
        found.append(
            [
                Writer(linear.name, linear, linear.module, chains.get(linear.name, ()))
                for roles in FAMILIES
                for linear in _linears(block, roles)
            ]
        )
    return found


def outer_writers(model: nn.Module, anatomy: Anatomy) -> list[Writer]:
    """Return the embeddings of tokens and positions, or the linear layers after them, that write into the stream."""
    inside = {module for block in anatomy.blocks for module in block.module.modules()}
    called: list[tuple[str, nn.Module]] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if module not in inside and (isinstance(module, nn.Embedding) or is_linear(module)):

                def seen(module: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
                    if first_output(output).shape[-1] == anatomy.width:
                        called.append((name, module))

                stack.callback(module.register_forward_hook(seen).remove)
        stack.enter_context(_stopping(anatomy.blocks[0].module))
        run_until_seen(model, {"input_ids": _ids(model, anatomy)})
    linears = [one for one in called if is_linear(one[1])]
    chosen = [one for one in called if one[1] is not anatomy.embeddings] if linears else called
    chosen = list(dict.fromkeys(chosen))
    norms = _norms_after_embeddings(model, anatomy, [module for _, module in chosen], inside)
    return [Writer(name, Linear(name, module) if is_linear(module) else None, module, norms) for name, module in chosen]


def _linears(block: Block, roles: Sequence[str]) -> list[Linear]:
    return [linear for group in block.linear_groups if group.role in roles for linear in group.linears]


def _norms_after(model: nn.Module, block: Block, call: Call) -> Mapping[str, tuple[nn.Module, ...]]:
    """Return the norms of a block that read what its writers put out, and nothing else, by name of the writer.

    With the weights of a writer at zero, such a norm reads zeros.
    """
    names = {name: module for name, module in block.module.named_modules()}
    found: dict[str, tuple[nn.Module, ...]] = {}
    with float_copy(model, block) as work:
        call = call.to(module_device(work.module))
        norms = {name: module for name, module in work.module.named_modules() if is_norm(module, call.hidden.shape[-1])}
        if not norms:
            return found
        for roles in FAMILIES:
            sources: dict[str | None, list[Linear]] = {}
            for group in work.linear_groups:
                if group.role in roles:
                    key = None if group.routed else group.key
                    sources.setdefault(key, []).extend(group.linears)
            alone = {key: _silent(work, call, norms, linears) for key, linears in sources.items()}
            together = _silent(work, call, norms, [linear for own in sources.values() for linear in own])
            for key, linears in sources.items():
                others = {name for other, own in alone.items() if other != key for name in own}
                chain = tuple(names[name] for name in together if name in alone[key] or name not in others)
                found |= {linear.name: chain for linear in linears if chain}
    return found


def _silent(work: Block, call: Call, norms: Mapping[str, nn.Module], linears: Sequence[Linear]) -> list[str]:
    """Return the norms, in the order of their calls, that read zeros when these layers put out zeros."""
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
    kept = [tensor.clone() for tensor in tensors]
    silent: list[str] = []
    with ExitStack() as stack:
        for name, norm in norms.items():

            def see(module: nn.Module, arguments: Any, name: str = name) -> None:
                if arguments and not bool(arguments[0].any()):
                    silent.append(name)

            stack.callback(norm.register_forward_pre_hook(see).remove)
        for tensor in tensors:
            tensor.zero_()
        call(work.module)
    for tensor, values in zip(tensors, kept, strict=True):
        tensor.copy_(values)
    return silent


def _norms_after_embeddings(
    model: nn.Module, anatomy: Anatomy, writers: Sequence[nn.Module], inside: set[nn.Module]
) -> tuple[nn.Module, ...]:
    """Return the norms between the embeddings and the first block."""
    norms = [m for m in model.modules() if m not in inside and m not in writers and is_norm(m, anatomy.width)]
    silent: list[nn.Module] = []
    with ExitStack() as stack:
        for norm in norms:

            def see(module: nn.Module, arguments: Any) -> None:
                if arguments and not bool(arguments[0].any()):
                    silent.append(module)

            stack.callback(norm.register_forward_pre_hook(see).remove)
        for module in writers:
            stack.callback(module.register_forward_hook(lambda m, a, output: torch.zeros_like(output)).remove)
        stack.enter_context(_stopping(anatomy.blocks[0].module))
        run_until_seen(model, {"input_ids": _ids(model, anatomy)})
    return tuple(silent)


@contextmanager
def _stopping(module: nn.Module) -> Iterator[None]:
    """End the pass where a module begins."""

    def stop(module: nn.Module, arguments: Any) -> None:
        raise StopForward

    with module.register_forward_pre_hook(stop):
        yield


def _ids(model: nn.Module, anatomy: Anatomy) -> Tensor:
    ids = torch.arange(within_context(model, _TOKENS)).remainder(_vocabulary(anatomy)).unsqueeze(0)
    return ids.to(module_device(model))


def _vocabulary(anatomy: Anatomy) -> int:
    return len(anatomy.embeddings.weight)  # type: ignore[arg-type]
