"""What the tests of unlearning methods share: texts of two topics, and plain formulations, one text at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interventions import InterventionError, Resources, apply
from interventions.anatomy import find_anatomy
from tests.models import SENTENCES, tiny_model

RESOURCES = Resources(forget={"people": SENTENCES[:3], "places": SENTENCES[3:5]}, retain=SENTENCES[5:])


def nll_alone(model: nn.Module, tokenizer: Any, text: str) -> tuple[Tensor, int]:
    """Return a text's summed negative log-likelihood and its number of predicted tokens, without a batch or padding."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    says = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    return -sum(says[place, token] for place, token in enumerate(ids[0, 1:])), ids.shape[1] - 1


def mean_nll(model: nn.Module, tokenizer: Any, texts: tuple[str, ...]) -> Tensor:
    """Return the mean negative log-likelihood over all tokens of the texts."""
    found = [nll_alone(model, tokenizer, text) for text in texts]
    return torch.stack([nll for nll, _ in found]).sum() / sum(tokens for _, tokens in found)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(one: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """Return how far two models' changes from `start` are apart, as a share of the change."""
    a, b, c = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (one, other, start))
    return float((a - b).norm() / (b - c).norm())


def check_refused(tokenizer: Any, method: str, resources: Resources, overrides: dict[str, Any], message: str) -> None:
    """Check that a step fails with `message`, a pattern, and that the model is as it was before."""
    model = tiny_model()
    before = weights(model)
    with pytest.raises(InterventionError, match=message):
        apply(model, tokenizer, method, resources=resources, **overrides)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def check_mask(tokenizer: Any, method: str, preserve: bool, **overrides: Any) -> None:
    """Check that a step keeps pruned weights of the second block at zero if asked, and trains the others."""
    model = tiny_model()
    with torch.no_grad():
        for linear in find_anatomy(model).blocks[1].linears:
            linear.weight[:, ::2] = 0
    before = weights(model)
    report = apply(model, tokenizer, method, resources=RESOURCES, preserve_mask=preserve, **overrides)
    for linear in find_anatomy(model).blocks[1].linears:
        if linear.parameter_name in report.changed:
            assert bool((linear.weight[:, ::2] == 0).all()) == preserve
            assert not torch.equal(linear.weight[:, 1::2], before[linear.parameter_name][:, 1::2])
    assert find_anatomy(model).blocks[1].mlp_output.parameter_name in report.changed
