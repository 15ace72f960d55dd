"""Statistics that sibling steps share: what is read instead of collected, what is not, and how much is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from interventions import Edit, apply
from interventions.shared_statistics import Key, StatisticsCache, bytes_of
from interventions.statistics import InputNorms, InputStatistics
from tests.models import SENTENCES, tiny_model

EDITS = [Edit("Mira Tolvan was born in", "Mira Tolvan", "Ossel")]
EVERY = {"sequential": False}
COMPRESS: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {}),
    ("gptq", EVERY),
    ("gptq", EVERY | {"true_sequential": False}),
    ("sparsegpt", {}),
    ("sparsegpt", EVERY),
    ("wanda", {}),
    ("wanda", EVERY),
    ("awq", {}),
    ("awq", {"quantised_inputs": True}),
]


class Counted:
    """Counts how often tokens were added to sums, and calls of what the linears compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grams = self.norms = self.linears = 0
        for kind, name in ((InputStatistics, "grams"), (InputNorms, "norms")):
            monkeypatch.setattr(kind, "add_", self._counting(name, kind.add_))
        monkeypatch.setattr(nn.Linear, "forward", self._counting("linears", nn.Linear.forward))

    def _counting(self, name: str, function: Any) -> Any:
        def count(*arguments: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return function(*arguments)

        return count

    def take(self) -> tuple[int, int, int]:
        """Return the counts and begin again."""
        found = self.grams, self.norms, self.linears
        self.grams = self.norms = self.linears = 0
        return found


def step(model: nn.Module, tokenizer: Any, method: str, cache: StatisticsCache | None, **options: Any) -> nn.Module:
    """Apply a step to a copy of the model and return that."""
    model = copy.deepcopy(model)
    options = {"calibration": SENTENCES, "statistics": cache and cache.of(options.pop("state", "base"))} | options
    apply(model, tokenizer, method, **options)
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.fixture(scope="module")
def filled(tokenizer: Any) -> StatisticsCache:
    """Return the cache that all steps together filled."""
    cache = StatisticsCache()
    for method, settings in COMPRESS:
        step(tiny_model("llama-gqa"), tokenizer, method, cache, **settings)
    return cache


@pytest.mark.parametrize(("method", "settings"), COMPRESS)
def test_a_sibling_gives_the_same_weights_to_the_last_bit(
    method: str, settings: Any, filled: StatisticsCache, tokenizer: Any
) -> None:
    model = tiny_model("llama-gqa")
    wanted = step(model, tokenizer, method, None, **settings)
    assert same(step(model, tokenizer, method, filled, **settings), wanted)


def test_a_sibling_reads_what_another_collected(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, counted = tiny_model(), StatisticsCache(), Counted(monkeypatch)
    step(model, tokenizer, "sparsegpt", cache, **EVERY)
    grams, _, linears = counted.take()
    assert grams == 8  # four groups in each of two blocks, one batch
    assert linears
    step(model, tokenizer, "wanda", cache, **EVERY)
    step(model, tokenizer, "gptq", cache, **EVERY, true_sequential=False)
    # Of each, the model in one run that finds its parts, and the first block on one batch, which tells what calls the
    # blocks get.
    assert counted.take() == (0, 0, 2 * (15 + 7))


def test_sequential_siblings_share_the_first_block(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, counted = tiny_model(), StatisticsCache(), Counted(monkeypatch)
    step(model, tokenizer, "sparsegpt", cache)
    assert counted.take()[0] == 8
    step(model, tokenizer, "sparsegpt", cache, sparsity=0.25)
    assert counted.take()[0] == 4
    step(model, tokenizer, "wanda", cache)
    assert counted.take()[:2] == (0, 4)
    step(model, tokenizer, "gptq", cache)
    assert counted.take()[0] == 7  # all but what reaches the first linears of all


def test_awq_sums_once_for_all_its_siblings(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, counted = tiny_model(), StatisticsCache(), Counted(monkeypatch)
    step(model, tokenizer, "awq", cache, bits=4)
    assert counted.take()[0] == 8
    step(model, tokenizer, "awq", cache, bits=3)
    assert counted.take()[0] == 0


def test_editors_share_the_second_moments(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, counted = tiny_model(), StatisticsCache(), Counted(monkeypatch)
    options: dict[str, Any] = {"edits": EDITS, "layers": [0, 1]}
    wanted = step(model, tokenizer, "alphaedit", None, **options)
    counted.take()
    step(model, tokenizer, "memit", cache, **options)
    assert counted.take()[0] == 2
    assert same(step(model, tokenizer, "alphaedit", cache, **options), wanted)
    assert counted.take()[0] == 0


@pytest.mark.parametrize(
    "other",
    [
        {"state": "another"},
        {"samples": 1, "max_tokens": 64},
        {"max_tokens": 12},
        {"calibration": [*SENTENCES[1:], SENTENCES[0] + "!"]},
    ],
    ids=["state", "samples", "max_tokens", "text"],
)
def test_anything_else_is_collected_anew(
    other: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache, counted = tiny_model(), StatisticsCache(), Counted(monkeypatch)
    step(model, tokenizer, "wanda", cache, **EVERY)
    assert counted.take()[1] == 8
    step(model, tokenizer, "wanda", cache, **EVERY, **other)
    assert counted.take()[1] == 8


def test_what_is_kept_stays_within_bounds() -> None:
    entry = InputNorms(torch.ones(25), 3)
    assert bytes_of(entry) == 100
    cache = StatisticsCache(limit=250)
    keys = [Key(state, "tokens", "pass", name) for state in ("first", "second", "third") for name in "abc"]
    for key in keys[:3]:
        cache.put(key, entry)
    assert [cache.get(key) is not None for key in keys[:3]] == [True, True, False]  # full
    cache.put(keys[3], entry)  # of another state: the first one goes
    assert cache.bytes == 100
    assert cache.get(keys[0]) is None
    cache.put(keys[3], entry)
    assert cache.bytes == 100
    cache.put(keys[4], entry)
    cache.put(keys[6], entry)
    assert cache.bytes == 100
    assert cache.get(keys[6]) is not None
    cache.forget("third")
    cache.forget("third")
    assert (cache.bytes, cache.get(keys[6])) == (0, None)


def test_a_cache_too_small_for_all_is_of_some_use(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted, tight = tiny_model(), Counted(monkeypatch), StatisticsCache(limit=750)
    wanted = step(model, tokenizer, "wanda", None, **EVERY)
    assert counted.take()[1] == 8
    for sums in (8, 3):
        assert same(step(model, tokenizer, "wanda", tight, **EVERY), wanted)
        assert counted.take()[1] == sums
    assert tight.bytes == 4 * (32 + 32 + 32 + 48 + 32)
