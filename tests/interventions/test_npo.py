"""NPO and SimNPO on tiny models: their losses as the papers write them, their promises, their errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from interventions import Resources, apply
from interventions.anatomy import find_anatomy
from interventions.unlearn.kernels.preference import npo_losses, simnpo_losses
from tests.interventions.unlearning import RESOURCES, check_refused, difference, mean_nll, nll_alone, weights
from tests.models import CONFIGS, SENTENCES, tiny_model

FORGET = SENTENCES[:5]
ONE_BATCH: dict[str, Any] = {"batch_size": 8, "accumulation": 1, "lr": 1e-3}


@given(st.floats(-60, -1), st.floats(-60, -1), st.floats(0.01, 3), st.integers(1, 30), st.floats(-1, 1))
def test_losses_are_those_of_the_papers(log_p: float, before: float, beta: float, tokens: int, gamma: float) -> None:
    ratio = math.exp(log_p) / math.exp(before)
    expected = 2 / beta * math.log(1 + ratio**beta)
    assert float(npo_losses(-_one(log_p), -_one(before), beta)) == pytest.approx(expected, rel=1e-6)
    mean = -beta / tokens * log_p - gamma
    expected = -2 / beta * math.log(1 / (1 + math.exp(-mean)))
    assert float(simnpo_losses(-_one(log_p), _one(tokens), beta, gamma)) == pytest.approx(expected, rel=1e-6)


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@given(st.floats(1, 60), st.floats(1, 60))
def test_a_small_beta_is_gradient_ascent(nll: float, before: float) -> None:
    now = _one(nll).requires_grad_()
    npo_losses(now, _one(before), 1e-6).sum().backward()
    assert now.grad is not None
    assert float(now.grad) == pytest.approx(-1.0, abs=1e-4)


def _transcription(
    method: str, model: nn.Module, tokenizer: Any, updates: int, beta: float, gamma: float, weight: float
) -> tuple[list[float], list[float]]:
    """The published losses with a second model as reference and AdamW, one text at a time."""
    reference = copy.deepcopy(model)
    anatomy = find_anatomy(model)
    parts = [*(block.module for block in anatomy.blocks), anatomy.final_norm, anatomy.head]
    trained = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    forget, retain = [], []
    for _ in range(updates):
        losses = []
        for text in FORGET:
            nll, tokens = nll_alone(model, tokenizer, text)
            if method == "npo":
                with torch.no_grad():
                    was, _ = nll_alone(reference, tokenizer, text)
                losses.append(2 / beta * torch.log(1 + torch.exp(-nll + was) ** beta))
            else:
                losses.append(-2 / beta * torch.log(torch.sigmoid(beta * nll / tokens - gamma)))
        forget.append(torch.stack(losses).mean())
        retain.append(weight * mean_nll(model, tokenizer, RESOURCES.retain))
        optimizer.zero_grad()
        (forget[-1] + retain[-1]).backward(inputs=trained)
        optimizer.step()
    return [loss.item() for loss in forget], [loss.item() for loss in retain]


@pytest.mark.parametrize(
    "method, family, beta, gamma", [("npo", "llama-gqa", 0.1, 0.0), ("simnpo", "mistral", 0.3, 1.5)]
)
def test_losses_and_weights_are_those_of_a_transcription(
    method: str, family: str, beta: float, gamma: float, tokenizer: Any
) -> None:
    start, ours, theirs = (tiny_model(family) for _ in range(3))
    own = {"gamma": gamma} if method == "simnpo" else {}
    common = {"retain_weight": 2.0, "forget_weight": 1.0, "epochs": 4}
    report = apply(ours, tokenizer, method, resources=RESOURCES, beta=beta, **own, **common, **ONE_BATCH)
    forget, retain = _transcription(method, theirs, tokenizer, 4, beta, gamma, 2.0)
    assert report.details["losses"]["forget"] == pytest.approx(forget, rel=1e-5)
    assert report.details["losses"]["retain"] == pytest.approx(retain, rel=1e-5)
    assert abs(forget[-1] - forget[0]) > 0.01
    assert difference(ours, theirs, start) < 1e-3


def test_the_model_before_is_asked_once(tokenizer: Any) -> None:
    model = tiny_model()
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    find_anatomy(model)
    calls.clear()
    apply(model, tokenizer, "npo", resources=RESOURCES, retain_weight=0.0, epochs=5, **ONE_BATCH)
    assert len(calls) == 1 + 5


@pytest.mark.parametrize("method", ["npo", "simnpo"])
@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_and_head_change_and_nothing_else(method: str, family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    report = apply(model, tokenizer, method, resources=RESOURCES, epochs=1, **ONE_BATCH)
    embedded = {id(p) for p in anatomy.embeddings.parameters()}
    modules = [*(block.module for block in anatomy.blocks), anatomy.final_norm, anatomy.head]
    allowed = {id(p) for module in modules for p in module.parameters()} - embedded
    assert set(report.changed) <= {name for name, p in model.named_parameters() if id(p) in allowed}
    assert set(report.changed) <= set(report.details["trained"])
    assert all(block.mlp_output.parameter_name in report.changed for block in anatomy.blocks)


@pytest.mark.parametrize("method", ["npo", "simnpo"])
def test_forget_text_becomes_unlikely_and_retain_text_does_not(method: str, tokenizer: Any) -> None:
    model, start = tiny_model(), tiny_model()
    apply(model, tokenizer, method, resources=RESOURCES, epochs=25, **{**ONE_BATCH, "forget_weight": 1.0})
    with torch.no_grad():
        forget = [float(mean_nll(m, tokenizer, FORGET)) for m in (start, model)]
        retain = [float(mean_nll(m, tokenizer, RESOURCES.retain)) for m in (start, model)]
    assert retain[1] < retain[0]
    assert forget[1] - retain[1] > forget[0] - retain[0] + 1


def test_only_the_named_topic_is_read(tokenizer: Any) -> None:
    models = [tiny_model() for _ in range(2)]
    alone = Resources(forget={"places": RESOURCES.forget["places"]}, retain=RESOURCES.retain)
    apply(models[0], tokenizer, "npo", resources=RESOURCES, topics=["places"], **ONE_BATCH)
    apply(models[1], tokenizer, "npo", resources=alone, **ONE_BATCH)
    one, other = (weights(model) for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["npo", "simnpo"])
@pytest.mark.parametrize(
    "resources, overrides, message",
    [
        (Resources(retain=SENTENCES), {}, "needs forget text"),
        (Resources(forget=RESOURCES.forget), {}, "needs retain text.*retain_weight=0"),
        (Resources(forget={"people": ()}, retain=SENTENCES), {}, "forget set of topic 'people' is empty"),
        (RESOURCES, {"topics": ["peopel"]}, "no forget text of 'peopel'. Did you mean people"),
        (RESOURCES, {"layers": [2]}, r"layers=\[2\].*0 to 1"),
        (RESOURCES, {"beta": 0.0}, "beta=0.0"),
        (RESOURCES, {"forget_weight": -1.0}, "forget_weight=-1.0"),
        (RESOURCES, {"retain_weight": float("nan")}, "retain_weight=nan"),
        (RESOURCES, {"lr": 1e30}, r"model.layers.*lr=1e\+30"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(
    method: str, resources: Resources, overrides: dict[str, Any], message: str, tokenizer: Any
) -> None:
    check_refused(tokenizer, method, resources, overrides, f"^{method}.*{message}")
