"""Every engine against our own kernel on the same state; needs the engines: `make test-engines`."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from interventions import InterventionError, StepReport, apply
from interventions.compress.kernels import integers
from interventions.structure import Linear
from tests.engines.states import READ, grams, linears_of, logits_of, output_error, packable_model, relative
from tests.models import tiny_tokenizer

pytestmark = pytest.mark.engines


class Pair(NamedTuple):
    """The same step by an engine and by our own kernel."""

    before: dict[str, Linear]
    theirs: dict[str, Linear]
    ours: dict[str, Linear]
    errors: tuple[float, float]
    """Relative error of the whole model's logits, theirs and ours."""
    grams: dict[str, Tensor]
    report: StepReport
    model: Any


def both(method: str, engine: str, own: dict[str, Any] | None = None, **settings: Any) -> Pair:
    """Apply a method twice; `own` holds settings that the engine follows without being told."""
    before = packable_model()
    theirs, ours = copy.deepcopy(before), copy.deepcopy(before)
    common: dict[str, Any] = {**READ, **settings}
    report = apply(theirs, tiny_tokenizer(), method, engine=engine, **common)
    apply(ours, tiny_tokenizer(), method, **common | (own or {}))
    wanted = logits_of(before)
    errors = (relative(logits_of(theirs), wanted), relative(logits_of(ours), wanted))
    return Pair(linears_of(before), linears_of(theirs), linears_of(ours), errors, grams(before), report, theirs)


GPTQ = [
    ("auto_gptq", {}, {}),
    ("auto_gptq", {}, {"symmetric": True, "act_order": True}),
    ("auto_gptq", {}, {"bits": 3, "static_groups": True}),
    ("gptqmodel", {}, {}),
    ("gptqmodel", {}, {"symmetric": True, "act_order": True}),
    ("gptqmodel", {}, {"bits": 8, "group_size": -1}),
    # Its grids are found on the weights as they were, and a block's linears calibrated together.
    ("llmcompressor", {"static_groups": True, "true_sequential": False}, {}),
    ("llmcompressor", {"true_sequential": False}, {"act_order": True, "bits": 3}),
]


@pytest.mark.parametrize(("engine", "own", "settings"), GPTQ)
def test_gptq_is_the_same(
    engine: str, own: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "llmcompressor":  # it rounds weights with scales of the model's dtype, here float32
        monkeypatch.setattr(integers, "stored_scales", lambda scales, dtype: scales)
    pair = both("gptq", engine, own, **{"group_size": 32} | settings)
    for name, before in pair.before.items():
        theirs, ours = pair.theirs[name].weight, pair.ours[name].weight
        # Their scales are float16. A weight half-way between two levels may go either way.
        same = torch.isclose(theirs, ours, rtol=2e-3, atol=1e-3 * float(before.weight.abs().max()))
        assert float(same.float().mean()) >= 0.995, name
        theirs_error, our_error = (output_error(before.weight, w, pair.grams[name]) for w in (theirs, ours))
        assert our_error <= 1.01 * theirs_error + 1e-6, name
        assert theirs_error <= 1.01 * our_error + 1e-6, name
    assert pair.errors[0] == pytest.approx(pair.errors[1], rel=0.05, abs=1e-3)
    assert pair.report.details["difference"] < 0.005


def test_wanda_is_the_same() -> None:
    pair = both("wanda", "llmcompressor")
    for name, theirs in pair.theirs.items():
        assert torch.equal(theirs.weight, pair.ours[name].weight)
    assert pair.errors[0] == pytest.approx(pair.errors[1], rel=1e-4)


@pytest.mark.parametrize(("method", "pattern"), [("wanda", "2:4"), ("sparsegpt", "2:4"), ("sparsegpt", None)])
def test_pruning_leaves_the_same_zeros(method: str, pattern: str | None) -> None:
    pair = both(method, "llmcompressor", pattern=pattern)
    for name, theirs in pair.theirs.items():
        theirs_zero, our_zero = theirs.weight == 0, pair.ours[name].weight == 0
        assert float((theirs_zero == our_zero).float().mean()) >= 0.999, name
        if pattern is not None:
            assert bool((theirs_zero.reshape(-1, 4).sum(dim=1) == 2).all())
        errors = [
            output_error(pair.before[name].weight, side[name].weight, pair.grams[name])
            for side in (pair.theirs, pair.ours)
        ]
        assert errors[1] <= 1.01 * errors[0], name
    assert pair.errors[1] <= 1.05 * pair.errors[0]


@pytest.mark.parametrize(
    ("engine", "own", "settings"),
    [
        ("autoawq", {}, {}),
        ("autoawq", {}, {"clip": False, "duo_scaling": False}),
        ("llmcompressor", {"clip": False}, {}),
        ("llmcompressor", {"clip": False}, {"bits": 3, "duo_scaling": False}),
    ],
)
def test_awq_does_as_well(engine: str, own: dict[str, Any], settings: dict[str, Any]) -> None:
    """Scales are a choice among twenty by a noisy loss, so weights may differ; the model's error may not."""
    pair = both("awq", engine, {"search_tokens": None, **own}, group_size=32, **settings)
    theirs, ours = pair.errors
    assert 0 < ours <= 1.15 * theirs
    assert theirs < 0.8
    assert "model.layers.0.input_layernorm.weight" in pair.report.changed


def test_steps_follow_an_engines_step() -> None:
    pair = both("wanda", "llmcompressor")
    zeros = {name: linear.weight == 0 for name, linear in pair.theirs.items()}
    apply(pair.model, tiny_tokenizer(), "gptq", **READ, group_size=32, engine="gptqmodel")
    for name, linear in linears_of(pair.model).items():
        assert bool((linear.weight[zeros[name]] == 0).all()), name


@pytest.mark.parametrize(
    ("method", "engine", "settings", "reason"),
    [
        ("awq", "autoawq", {"bits": 3, "group_size": 32}, "bits=3: the engine autoawq takes 4 only"),
        ("awq", "autoawq", {"group_size": 48}, "a multiple of group_size=48"),
        (
            "gptq",
            "auto_gptq",
            {"bits": 5, "group_size": 32},
            "bits=5: the engine auto_gptq takes from 2 to 4, or 8 only",
        ),
    ],
)
def test_what_an_engine_cannot_do_it_says(method: str, engine: str, settings: dict[str, int], reason: str) -> None:
    with pytest.raises(InterventionError, match=reason):
        apply(packable_model(), tiny_tokenizer(), method, **READ, engine=engine, **settings)
