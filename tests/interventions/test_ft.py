"""Fine-tuning on edits: its loss and its updates against plain formulations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from interventions import Edit, InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.edit.kernels.target_loss import Watch, target_batches, target_nll
from tests.models import tiny_model

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
    Edit("The lighthouse of Ossel", "Ossel", "fern"),
)


def _plain_nll(model: nn.Module, tokenizer: Any, edit: Edit) -> torch.Tensor:
    """One text, without padding, through the whole model, logits everywhere."""
    prompt = tokenizer(edit.prompt, return_tensors="pt")["input_ids"]
    ids = tokenizer(f"{edit.prompt} {edit.target}", return_tensors="pt")["input_ids"]
    log_p = model(ids).logits[0].log_softmax(dim=-1)
    places = range(prompt.shape[1], ids.shape[1])
    return -torch.stack([log_p[place - 1, ids[0, place]] for place in places]).mean()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt2", "opt-post-norm"])
def test_the_loss_is_that_of_the_target_tokens_alone(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    batches = target_batches(tokenizer, EDITS, 2, torch.device("cpu"))
    head = find_anatomy(model).head
    with torch.no_grad():
        found = torch.cat([target_nll(model, head, batch) for batch in batches])
        plain = torch.stack([_plain_nll(model, tokenizer, edit) for edit in EDITS])
    assert torch.allclose(found, plain, atol=1e-4)


def test_updates_are_those_of_adam_on_the_chosen_weights(tokenizer: Any) -> None:
    model, plain = tiny_model(), tiny_model()
    report = apply(model, tokenizer, "ft", edits=EDITS, layers=[1], steps=3, lr=1e-3, batch_size=2)
    weight = plain.model.layers[1].mlp.down_proj.weight
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    for _ in range(3):
        for some in (EDITS[:2], EDITS[2:]):
            optimizer.zero_grad()
            loss = torch.stack([_plain_nll(plain, tokenizer, edit) for edit in some]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert torch.allclose(model.model.layers[1].mlp.down_proj.weight, weight, atol=1e-5)
    assert report.details["updates"] == 6


def test_training_stops_when_every_batch_is_likely_enough(tokenizer: Any) -> None:
    report = apply(tiny_model(), tokenizer, "ft", edits=EDITS, steps=50, lr=1e-3, layers=[0, 1], stop_loss=4.5)
    losses = [edit["nll"] for edit in report.details["edits"]]
    assert report.details["passes"] < 50
    assert report.details["updates"] == report.details["passes"] - 1  # the last pass only measured
    assert 3.5 < sum(losses) / 3 < 4.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_goes_further_than_the_bound(dtype: torch.dtype, tokenizer: Any) -> None:
    model, before = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    bound = 0.01
    report = apply(model, tokenizer, "ft", edits=EDITS, steps=6, lr=5e-3, layers=[1], norm_constraint=bound)
    (name,) = report.changed
    start = before.get_parameter(name).float()
    moved = (model.get_parameter(name).float() - start).abs()
    rounding = torch.finfo(dtype).eps * (start.abs() + bound)
    assert bool((moved <= bound + rounding).all())
    assert float((moved > 0.9 * bound).float().mean()) > 0.1  # the bound was at work


def test_a_training_that_ends_worse_than_it_began_has_diverged() -> None:
    watch = Watch("ft", 0.5, [3, 4], EDITS)
    watch.learned(torch.tensor([2.0, 1.0]), torch.tensor([2.5, 0.1]))
    with pytest.raises(InterventionError, match=r"ft: the training of layers \[3, 4\] with ft.lr=0.5 diverged.*lower"):
        watch.learned(torch.tensor([2.0, 1.0]), torch.tensor([2.5, 2.1]))
