"""Choose the block and token whose difference of means mediates refusal best, as Arditi et al. (2024), section C."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interventions.steer.kernels.prompts import Change, Prompts, changed_input, changed_outputs
from interventions.steer.kernels.writers import Writer
from interventions.structure import Anatomy
from interventions.unlearn.kernels.texts import Rows

_LEAST = 1e-8
"""Added to probabilities before their logarithm, as in the reference."""


@dataclass(frozen=True)
class Candidate:
    """A direction, where it was measured, and what it does to the validation prompts."""

    block: int
    token: int
    """Counted from the end: -1 is the last one."""
    refusal: float
    """Mean refusal score (nats) of harmful prompts without the direction."""
    induced: float
    """That of harmless prompts with the direction added."""
    divergence: float
    """Mean KL divergence (nats) of the next token after harmless prompts without the direction from that with it."""

    def plain(self) -> dict[str, Any]:
        """Return the values as plain data."""
        return {**vars(self)}


def refusal_scores(logs: Tensor, starts: Sequence[int]) -> Tensor:
    """Return the log-odds (nats) of the tokens `starts` as next token, from log-probabilities (prompts, vocabulary)."""
    refused = logs[:, list(starts)].exp().sum(dim=1)
    return torch.log(refused + _LEAST) - torch.log(1 - refused.clamp(max=1) + _LEAST)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return the KL divergence (prompts,) of `after` from `before`, log-probabilities (prompts, vocabulary)."""
    return (before.exp() * (before - after)).nan_to_num(0.0).sum(dim=1)


def evaluate_candidates(
    prompts: Prompts,
    anatomy: Anatomy,
    writers: Sequence[Sequence[Writer]],
    directions: Tensor,
    places: Sequence[tuple[int, int]],
    starts: Sequence[int],
    harmful: Rows,
    harmless: Rows,
) -> Iterator[Candidate]:
    """Yield what each direction of `directions` (blocks, tokens, width) at `places` does."""
    before = prompts.next_logs(anatomy.head, harmless)
    tokens = directions.shape[1]
    for block, token in places:
        vector = directions[block, token]
        with removed(anatomy, writers, vector / vector.norm()):
            refusal = refusal_scores(prompts.next_logs(anatomy.head, harmful), starts)
            after = prompts.next_logs(anatomy.head, harmless)
        with changed_outputs([anatomy.blocks[block].module], lambda x, v=vector: x + v.to(x)):  # type: ignore[misc]
            induced = refusal_scores(prompts.next_logs(anatomy.head, harmless), starts)
        scores = (refusal.mean(), induced.mean(), divergence(before, after).mean())
        yield Candidate(block, token - tokens, *(float(score) for score in scores))


def best(candidates: Sequence[Candidate], most_divergence: float) -> tuple[Candidate, bool]:
    """Return the candidate that leaves the least refusal, and whether it meets the bounds of the reference.

    Those are: adding it to harmless prompts makes the model refuse them (a score above 0), and removing it changes
    harmless prompts by at most `most_divergence`. If none meets both, only the second counts, and then neither.
    """
    gentle = [one for one in candidates if one.divergence <= most_divergence]
    both = [one for one in gentle if one.induced >= 0]
    return min(both or gentle or candidates, key=lambda one: one.refusal), bool(both)


@contextmanager
def removed(anatomy: Anatomy, writers: Sequence[Sequence[Writer]], direction: Tensor) -> Iterator[None]:
    """Run the model without a unit direction in its residual stream."""

    def without(r: Tensor) -> Change:
        return lambda x: x - (x @ r.to(x)).unsqueeze(-1) * r.to(x)

    before_norms: dict[nn.Module, Change] = {}
    with ExitStack() as stack:
        for writer in (writer for own in writers for writer in own):
            change = without(writer.direction(direction))
            if writer.norms:
                before_norms[writer.norms[0]] = change
            elif writer.linear is not None and writer.linear.part is None:
                stack.enter_context(changed_outputs([writer.module], change))
        for norm, change in before_norms.items():
            stack.enter_context(changed_input(norm, change))
        stack.enter_context(changed_input(anatomy.blocks[0].module, without(direction)))
        stack.enter_context(changed_outputs([block.module for block in anatomy.blocks], without(direction)))
        yield
