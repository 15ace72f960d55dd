"""Find the decoder blocks of a model: modules of a list that pass the hidden state on from one to the next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from interventions.structure import is_linear
from interventions.trace import ModuleCall, Trace, same
from interventions.types import InterventionError


@dataclass(frozen=True)
class BlockList:
    """Modules of one list that were called one after another, with their names and calls."""

    name: str
    names: tuple[str, ...]
    calls: tuple[ModuleCall, ...]

    @property
    def size(self) -> int:
        return sum(p.numel() for call in self.calls for p in call.module.parameters())


def find_blocks(model: nn.Module, seen: Trace, how: str) -> BlockList:
    """Return the decoder blocks, in the order of their calls; lists that follow one another are one.

    Raises InterventionError, saying `how` to declare the blocks, if there are none, several, or some that cannot be
    run one by one.
    """
    who = f"{type(model).__name__} (model_type {getattr(getattr(model, 'config', None), 'model_type', None)!r})"
    lists = _outermost(model, [found for found in _lists(model, seen) if _has_linear(found)])
    chains = [found for found in lists if len(found.calls) == 1 or _broken(found.calls) is None]
    if not chains:
        raise InterventionError(f"{who}: {_why_none(lists)}. {how}")
    chains = _joined(sorted(chains, key=lambda found: seen.calls.index(found.calls[0])))
    if any(len(found.calls) > 1 for found in chains):
        chains = [found for found in chains if len(found.calls) > 1]
    largest = max(found.size for found in chains)
    main = [found for found in chains if found.size * 10 > largest]
    if len(main) > 1:
        names = ", ".join(found.name for found in main)
        raise InterventionError(
            f"{who}: several lists of decoder blocks that do not follow one another: {names}. {how}"
        )
    return main[0]


def _lists(model: nn.Module, seen: Trace) -> list[BlockList]:
    """Return what was called of every list of modules."""
    calls: dict[int, list[ModuleCall]] = {}
    for call in seen.calls:
        calls.setdefault(id(call.module), []).append(call)
    order = {id(call): number for number, call in enumerate(seen.calls)}
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        members = [(f"{name}.{i}", call) for i, child in enumerate(module) for call in calls.get(id(child), [])]
        members.sort(key=lambda member: order[id(member[1])])
        if members:
            found.append(BlockList(name, tuple(n for n, _ in members), tuple(call for _, call in members)))
    return found


def _has_linear(found: BlockList) -> bool:
    return any(is_linear(module) for call in found.calls for module in call.module.modules())


def _outermost(model: nn.Module, lists: Sequence[BlockList]) -> list[BlockList]:
    """Return the lists that pass the hidden state on, and stand inside no other such list; or all if there are none."""
    good = [found for found in lists if _broken(found.calls) is None]
    inner = {f"{other.name}." for other in good for outer in good if other.name.startswith(f"{outer.name}.")}
    return [found for found in good if f"{found.name}." not in inner] or [
        found for found in lists if not any(found.name.startswith(f"{outer.name}.") for outer in lists)
    ]


def _broken(calls: Sequence[ModuleCall]) -> str | None:
    """Return why modules do not pass the hidden state on, or None."""
    if len({id(call.module) for call in calls}) < len(calls):
        return "some of them run several times in one pass"
    for number, (one, other) in enumerate(itertools.pairwise(calls)):
        passed = [a for a in one.outputs if any(same(a, b) for b in other.inputs)]
        if len({id(a) for a in passed if a.shape == passed[0].shape}) > 1:
            return f"number {number} passes on {len(passed)} tensors"
        if not passed:
            return f"what number {number} puts out is not what number {number + 1} reads"
    return None


def _joined(chains: Sequence[BlockList]) -> list[BlockList]:
    """Join lists of which one reads what the one before it puts out."""
    found: list[BlockList] = []
    for chain in chains:
        before = found[-1] if found else None
        if before and any(same(a, b) for a in before.calls[-1].outputs for b in chain.calls[0].inputs):
            found[-1] = BlockList(
                f"{before.name} and {chain.name}", before.names + chain.names, before.calls + chain.calls
            )
        else:
            found.append(chain)
    return found


def _why_none(lists: Sequence[BlockList]) -> str:
    if not lists:
        return "no list of decoder blocks found (no nn.ModuleList whose modules run)"
    nearest = max(lists, key=lambda found: found.size)
    return f"no list of decoder blocks found: of {nearest.name}, {_broken(nearest.calls)}"
