"""Measure what steps promise on a few prompts and texts of the run's data, in one short pass. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from evaluators.continuations import score
from evaluators.encoding import Pair, encode, encode_pairs, padding_id
from pytest_lmcompose.data.run_data import RunData

Promise = Literal["edit", "unlearn", "perplexity", "recall"]
PROMISES: tuple[Promise, ...] = ("edit", "unlearn", "perplexity", "recall")
EDITS, FORGET, TEXTS, FACTS = 20, 8, 6, 8
"""Samples of each promise."""
TOKENS = 24
"""Of a text."""
_ROWS = 8  # little padding


class Probes(NamedTuple):
    """Encoded samples of each promise: a continuation to score, and one to compare it with."""

    pairs: Mapping[Promise, Sequence[tuple[Pair, Pair | None]]]
    fill: int

    @classmethod
    def of(cls, tokenizer: Any, data: RunData) -> Probes:
        """Choose the first samples of each kind of data."""

        def texts(found: Sequence[str]) -> list[tuple[Pair, Pair | None]]:
            rows = [ids[: TOKENS + 1] for ids in encode(tokenizer, [text for text in found if text.strip()])]
            return [(Pair(ids[:1], ids[1:]), None) for ids in rows if len(ids) > 1]

        cases, facts = data.edits[:EDITS], data.facts[:FACTS]
        wanted = encode_pairs(tokenizer, [(case.prompt, case.target) for case in cases])
        former = encode_pairs(tokenizer, [(case.prompt, case.truth or case.target) for case in cases])
        rivals = [pair if case.truth else None for case, pair in zip(cases, former, strict=True)]
        forget = [text for row in zip_longest(*data.resources.forget.values()) for text in row if text]
        known = encode_pairs(tokenizer, [(fact.prompt, fact.answer) for fact in facts])
        return cls(
            {
                "edit": list(zip(wanted, rivals, strict=True)),
                "unlearn": texts(forget[:FORGET]),
                "perplexity": texts(data.resources.calibration[:TEXTS]),
                "recall": [(pair, None) for pair in known],
            },
            padding_id(tokenizer),
        )

    def measure(self, model: Any, promises: Sequence[Promise]) -> dict[Promise, Tensor]:
        """Return a value of each sample, more is better.

        An edit counts by the probability per token of the new answer minus that of the old one, a fact by that of its
        answer, and text by its log-probability per token in nats, with the opposite sign if it is to be forgotten.
        """
        samples = [(promise, pair) for promise in promises for pair in self.pairs[promise]]
        wanted = [pair for _, both in samples for pair in both if pair is not None]
        scored = iter(score(model, wanted, fill=self.fill, rows=_ROWS))
        found: dict[Promise, list[float]] = {promise: [] for promise in promises}
        for promise, (_, rival) in samples:
            own = next(scored)
            log = own.total / own.tokens
            if promise in ("perplexity", "unlearn"):
                found[promise].append(log if promise == "perplexity" else -log)
                continue
            value = math.exp(log)
            if rival is not None:
                other = next(scored)
                value -= math.exp(other.total / other.tokens)
            found[promise].append(value)
        return {promise: torch.tensor(values, dtype=torch.float64) for promise, values in found.items()}


def input_norms(model: Any, probes: Probes, layers: Collection[str]) -> dict[str, Tensor]:
    """Return the root mean square of each input of the linear weights `layers`, on the texts of the probes."""
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            squares[name] = squares.get(name, 0) + rows.square().sum(dim=0).cpu()
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    owners = {name: name.removesuffix(".weight") for name in layers}
    modules = {name: model.get_submodule(owner) for name, owner in owners.items() if name.endswith(".weight")}
    hooks = [module.register_forward_pre_hook(see(name)) for name, module in modules.items()]
    try:
        probes.measure(model, ["perplexity"])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).sqrt() for name, total in squares.items()}


@contextmanager
def having(model: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model have other weights for a while."""
    parameters = dict(chain(model.named_parameters(), model.named_buffers()))
    before = {name: parameters[name].data for name in weights}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight.to(before[name].device)
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data
