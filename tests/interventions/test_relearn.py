"""The relearning attack on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interventions import Resources, apply
from interventions.anatomy import find_anatomy
from tests.interventions.unlearning import RESOURCES, check_refused, difference, mean_nll
from tests.models import CONFIGS, SENTENCES, tiny_model


def test_what_ascent_made_unlikely_comes_back(tokenizer: Any) -> None:
    model = tiny_model()
    texts = RESOURCES.forget["people"]
    with torch.no_grad():
        before = float(mean_nll(model, tokenizer, texts))
        apply(model, tokenizer, "ga", resources=RESOURCES, lr=1e-3, epochs=20, accumulation=1)
        forgotten = float(mean_nll(model, tokenizer, texts))
        report = apply(model, tokenizer, "relearn", resources=RESOURCES, lr=1e-3, epochs=20, topics=["people"])
        after = float(mean_nll(model, tokenizer, texts))
    assert after < before < forgotten
    assert report.details["losses"]["forget"][-1] < report.details["losses"]["forget"][0]
    assert report.details["losses"]["retain"] == []


def test_it_is_plain_fine_tuning_on_the_slice(tokenizer: Any) -> None:
    start, ours, theirs = (tiny_model() for _ in range(3))
    texts = (SENTENCES[0], SENTENCES[3])  # the first of each topic
    report = apply(ours, tokenizer, "relearn", resources=RESOURCES, samples=1, lr=1e-3, epochs=4)
    anatomy = find_anatomy(theirs)
    parts = [*(block.module for block in anatomy.blocks), anatomy.final_norm, anatomy.head]
    trained = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = mean_nll(theirs, tokenizer, texts)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward(inputs=trained)
        optimizer.step()
    assert report.details["texts"] == 2
    assert report.details["losses"]["forget"] == pytest.approx(losses, rel=1e-5)
    assert difference(ours, theirs, start) < 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_and_head_change_and_nothing_else(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    report = apply(model, tokenizer, "relearn", resources=RESOURCES, samples=1, epochs=1, lr=1e-3)
    assert set(report.changed) <= set(report.details["trained"])
    embeddings = find_anatomy(model).embeddings.weight
    assert model.get_parameter(report.changed[0]) is not embeddings
    assert report.details["layers"] == [0, 1]


@pytest.mark.parametrize(
    "resources, overrides, message",
    [
        (Resources(), {}, "relearn needs forget text"),
        (RESOURCES, {"topics": ["plces"]}, "relearn.topics: no forget text of 'plces'. Did you mean places"),
        (RESOURCES, {"layers": [-1]}, r"relearn.layers=\[-1\].*from 0 up"),
        (RESOURCES, {"lr": 1e30}, r"relearn.*model.layers.*lr=1e\+30"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(
    resources: Resources, overrides: dict[str, Any], message: str, tokenizer: Any
) -> None:
    check_refused(tokenizer, "relearn", resources, overrides, message)
