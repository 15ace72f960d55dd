"""Read the keys of a block's MLP output, and write to the weights that it is linear in.

The key of one layer is its input. That of routed experts, [g_1 h_1; ...; g_E h_E] with the router's weights g, is read
off the gradient, whatever way a model computes it: the gradient of output t with respect to the matrix [W_1 ... W_E]
has the key in row t and zeros elsewhere, so one pass back gives the keys of as many tokens as the output has features,
a row each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interventions.early_exit import StopForward, run_until_seen
from interventions.modes import keep_modes
from interventions.parts import plain_experts
from interventions.shared_statistics import SharedStatistics, collect_shared
from interventions.statistics import Batch, InputStatistics
from interventions.structure import Linear, Memory, first_output, module_device
from interventions.trace import tensors
from interventions.types import InterventionError

LONGEST = 8192
"""Length of the keys of all experts together up to which their second moment is computed as a whole."""
ReadKeys = Callable[[Tensor], Tensor]
"""From the numbers of tokens, counted through all rows of a batch, to their keys (tokens, d_k) float32."""


@contextmanager
def reading(memory: Memory, see: Callable[[ReadKeys], object]) -> Iterator[None]:
    """Call `see` with a function that reads keys, whenever the MLP's output is computed."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if memory.routed:
            see(lambda tokens: torch.cat([torch.cat(keys, dim=1) for keys in _by_expert(memory, args, kwargs, tokens)]))
        else:
            see(lambda tokens: args[0].reshape(-1, memory.in_features)[tokens].float())

    with memory.module.register_forward_pre_hook(before, with_kwargs=True):
        yield


def second_moments(
    shared: SharedStatistics | None, model: nn.Module, batches: Sequence[Batch], memories: Sequence[Memory]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return, by name, the second moment of the keys and the number of tokens that reached each layer.

    The moment is (d_k, d_k) float32. Of experts with keys longer than `LONGEST` it is (experts, d, d), the blocks on
    the diagonal. In an expert that no token reached all columns count the same, as much as those of others on average.
    """
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    routed = [memory for memory in memories if memory.routed]

    def collect(
        model: nn.Module, batches: Sequence[Batch], missing: Sequence[Linear | Memory]
    ) -> dict[str, InputStatistics]:
        names = {item.name for item in missing}
        return _collect(model, batches, [m for m in routed if names & {m.name, *(part.name for part in m.linears)}])

    found = collect_shared(shared, model, batches, [memory.linears[0] for memory in memories if not memory.routed])
    items: list[Linear | Memory] = [linear for memory in routed for linear in memory.linears]
    items += [memory for memory in routed if _joint(memory)]
    found |= collect_shared(shared, model, batches, items, collect, "as the model runs, weighted by the router")
    moments, counts = {}, {}
    for memory in memories:
        reached = counts[memory.name] = [found[linear.name].count for linear in memory.linears]
        blocks = [found[memory.name]] if _joint(memory) else [found[linear.name] for linear in memory.linears]
        moment = torch.stack([block.gram for block in blocks]) / tokens
        if memory.routed and any(reached):
            diagonal = moment.diagonal(dim1=1, dim2=2)
            parts = diagonal.reshape(len(reached), -1)
            unseen = torch.tensor([count == 0 for count in reached], device=moment.device)
            diagonal.copy_(torch.where(unseen[:, None], parts[~unseen].mean(), parts).reshape(diagonal.shape))
        moments[memory.name] = moment if len(moment) > 1 else moment[0]
    return moments, counts


def _joint(memory: Memory) -> bool:
    """Return whether the second moment of all experts' keys together is affordable."""
    return memory.routed and len(memory.linears) * memory.in_features <= LONGEST


def _collect(model: nn.Module, batches: Sequence[Batch], memories: Sequence[Memory]) -> dict[str, InputStatistics]:
    """Return the statistics of the keys of every expert, by the name of its layer, and of all by that of the memory."""
    device = module_device(model)
    sizes = {linear.name: linear.in_features for memory in memories for linear in memory.linears}
    sizes |= {memory.name: len(memory.linears) * memory.in_features for memory in memories if _joint(memory)}
    found = {name: InputStatistics.zeros(size, device) for name, size in sizes.items()}
    real = torch.empty(0)
    waiting: set[str] = set()

    def see(memory: Memory, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for keys in _by_expert(memory, args, kwargs, real):
            for linear, own in zip(memory.linears, keys, strict=True):
                reached = own.any(dim=1)
                if bool(reached.any()):
                    found[linear.name].add_(own[reached])
            if memory.name in found:
                found[memory.name].add_(torch.cat(keys, dim=1))
        waiting.discard(memory.name)
        if not waiting:
            raise StopForward

    handles = [
        memory.module.register_forward_pre_hook(
            lambda module, args, kwargs, memory=memory: see(memory, args, kwargs), with_kwargs=True
        )
        for memory in memories
    ]
    try:
        with keep_modes(model), torch.no_grad():
            for batch in batches if memories else ():
                real = batch["attention_mask"].reshape(-1).nonzero()[:, 0].to(device)
                waiting = {memory.name for memory in memories}
                if not run_until_seen(model, {key: value.to(device) for key, value in batch.items()}):
                    raise InterventionError(f"no input reached {', '.join(sorted(waiting))}")
    finally:
        for handle in handles:
            handle.remove()
    return found


def _by_expert(
    memory: Memory, args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: Tensor
) -> Iterator[list[Tensor]]:
    """Yield the keys of some tokens at a time: (tokens, d) float32 of every expert, 0 where the router sends none."""
    weights = {name: _weight(memory, name) for name in memory.parameter_names}
    before = [weight.requires_grad for weight in weights.values()]
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for some in torch.split(tokens, memory.out_features):
            some_args, some_kwargs = _cut(args, kwargs, some)
            with torch.enable_grad(), plain_experts(memory.module):
                output = first_output(memory.module.forward(*some_args, **some_kwargs))
                wanted = output.reshape(len(some), -1).diagonal().sum()
                found = torch.autograd.grad(wanted, list(weights.values()), allow_unused=True)
            gradients = dict(zip(weights, found, strict=True))
            yield [_key(linear, gradients[linear.parameter_name], len(some)) for linear in memory.linears]
    finally:
        for weight, needed in zip(weights.values(), before, strict=True):
            weight.requires_grad_(needed)


def _weight(memory: Memory, name: str) -> nn.Parameter:
    linear = next(linear for linear in memory.linears if linear.parameter_name == name)
    found: nn.Parameter = getattr(linear.module, name.rpartition(".")[2])
    return found


def _key(linear: Linear, gradient: Tensor | None, tokens: int) -> Tensor:
    if gradient is None:
        return linear.weight.new_zeros(tokens, linear.in_features, dtype=torch.float32)
    return linear.within(gradient)[:tokens].float()


def _cut(args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: Tensor) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call for some of its tokens alone."""
    hidden = next(tensors((*args, *kwargs.values())))
    shape = hidden.shape[:-1]
    count = shape.numel()

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape[: len(shape)] == shape:
            rows = value.detach().flatten(0, len(shape) - 1)[tokens]
            return rows.reshape(*[1] * (len(shape) - 1), *rows.shape)
        return value.detach()[tokens] if value.shape[:1] == (count,) else value

    return [cut(value) for value in args], {name: cut(value) for name, value in kwargs.items()}


class EditedMemory:
    """The weights of a memory plus all updates so far, rounded once from the original."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._starts = [linear.weight.clone() for linear in memory.linears]
        self._updates = [torch.zeros_like(start, dtype=torch.float32) for start in self._starts]

    def add_(self, update: Tensor) -> None:
        """Add an update (d_out, d_k)."""
        if not bool(torch.isfinite(update).all()):
            raise InterventionError(
                f"{self._memory.parameter_name}: the update is not finite; look for NaN in the weights or in the text"
            )
        parts = torch.split(update, self._memory.in_features, dim=1)
        for linear, start, total, part in zip(self._memory.linears, self._starts, self._updates, parts, strict=True):
            if bool(part.any()):
                total += part.float()
                linear.set_weight_(start.double() + total)

    def changes(self) -> dict[str, float]:
        """Return, by parameter, the norm of all updates relative to that of the weights."""
        found = {}
        for name in self._memory.parameter_names:
            chosen = [n for n, linear in enumerate(self._memory.linears) if linear.parameter_name == name]
            update, start = (
                torch.stack([values[n].float().norm() for n in chosen]).norm()
                for values in (self._updates, self._starts)
            )
            found[name] = float(update / start)
        return found
