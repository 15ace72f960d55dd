"""WGA, SatImp, UNDIAL, JensUn and QUAIL: their losses against plain formulations, token by token, and whole runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interventions import Resources, apply
from interventions.anatomy import find_anatomy
from interventions.unlearn.jensun import divergence, divergence_from_token
from interventions.unlearn.kernels.predictions import Predictions, predict
from interventions.unlearn.kernels.texts import TextBatch, make_batches
from interventions.unlearn.quail import quail_losses
from interventions.unlearn.satimp import satimp_losses
from interventions.unlearn.undial import undial_losses
from interventions.unlearn.wga import wga_losses
from tests.architectures.tiny import tiny
from tests.interventions.unlearning import RESOURCES, check_mask, check_refused, difference, mean_nll
from tests.models import SENTENCES, tiny_model, tiny_tokenizer

METHODS = ("wga", "satimp", "undial", "jensun", "quail")
ONE_BATCH: dict[str, Any] = {"batch_size": 8, "accumulation": 1, "lr": 1e-3, "weight_decay": 0.0}
ROWS = [[5, 9, 3, 7], [4, 6, 8, 2, 9, 1]]
VOCABULARY = 11
Token = Callable[[Tensor, Tensor, int], Tensor]
"""From the logits of one token, (vocabulary,), those of the original model and the token to its loss."""


def _said(seed: int) -> Predictions:
    (batch,) = make_batches(ROWS, 2, tiny_tokenizer(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(sum(len(row) - 1 for row in ROWS), VOCABULARY, generator=generator, dtype=torch.float64)
    return Predictions(logits.requires_grad_(), batch)


def _wga(now: Tensor, before: Tensor, token: int) -> Tensor:
    p = now.softmax(dim=0)[token]
    return p.detach() ** 0.7 * p.log()


def _satimp(now: Tensor, before: Tensor, token: int) -> Tensor:
    p = now.softmax(dim=0)[token]
    return p.detach() ** 5 * (1 - p.detach()) ** 0.5 * p.log()


def _undial(now: Tensor, before: Tensor, token: int) -> Tensor:
    one = torch.zeros_like(before)
    one[token] = 10.0
    teacher = (before - one).exp() / (before - one).exp().sum()
    return sum((-teacher[k] * now.softmax(dim=0)[k].log() for k in range(len(now))), torch.zeros(()))


def _quail(now: Tensor, before: Tensor, token: int) -> Tensor:
    margin = (float(before.max()) - float(before.min())) / 15 / 2
    fall = (before[token] - before.mean()) - (now[token] - now.mean())
    return 3.0 * torch.clamp(margin - fall, min=0) + now.softmax(dim=0)[token].log()


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (lambda said, before: wga_losses(said, 0.7), _wga),
        (lambda said, before: satimp_losses(said, 5.0, 0.5), _satimp),
        (lambda said, before: undial_losses(said, before, 10.0), _undial),
        (lambda said, before: quail_losses(said, before, 4, 3.0), _quail),
    ],
    ids=["wga", "satimp", "undial", "quail"],
)
def test_losses_and_gradients_are_those_of_single_tokens(
    ours: Callable[[Predictions, Predictions], Tensor], plain: Token
) -> None:
    said, before = _said(0), _said(1)
    found = ours(said, before)
    expected, start = [], 0
    for row in ROWS:
        here = range(start, start + len(row) - 1)
        losses = [plain(said.logits[n], before.logits[n].detach(), row[n - start + 1]) for n in here]
        expected.append(torch.stack(losses).mean())
        start += len(row) - 1
    assert torch.allclose(found, torch.stack(expected), rtol=1e-10)
    gradients = [torch.autograd.grad(loss.sum(), said.logits)[0] for loss in (found, torch.stack(expected))]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12)
    assert bool(gradients[0].any())


def test_a_wga_without_power_is_gradient_ascent() -> None:
    said = _said(2)
    assert torch.equal(wga_losses(said, 0.0), -said.mean(said.nll))


def test_divergences_are_those_of_dense_distributions() -> None:
    one, other = _said(3).logits, _said(4).logits
    p, q = one.softmax(dim=1), other.softmax(dim=1)
    m = (p + q) / 2
    dense = ((p * (p / m).log()).sum(dim=1) + (q * (q / m).log()).sum(dim=1)) / 2
    assert torch.allclose(divergence(one, other), dense, rtol=1e-9)
    assert float(divergence(one, one).detach().abs().max()) < 1e-12
    tokens = torch.arange(len(one)) % VOCABULARY
    q = torch.nn.functional.one_hot(tokens, VOCABULARY).double()
    m = (p + q) / 2
    dense = ((p * (p / m).log()).sum(dim=1) - m.gather(1, tokens[:, None])[:, 0].log()) / 2
    found = divergence_from_token(one, tokens)
    assert torch.allclose(found, dense, rtol=1e-9)
    gradients = [torch.autograd.grad(loss.sum(), one)[0] for loss in (found, dense)]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12)


def test_a_divergence_is_bounded_and_finite_where_the_token_is_impossible() -> None:
    logits = torch.tensor([[0.0, -1e4], [0.0, -200.0], [-1e4, 0.0]], requires_grad=True)
    found = divergence_from_token(logits, torch.tensor([1, 1, 1]))
    assert found.tolist() == pytest.approx([math.log(2), math.log(2), 0.0])
    found.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def _jensun_step(model: nn.Module, reference: nn.Module, batch: TextBatch, refusal: Sequence[int]) -> Tensor:
    """The mean divergence of all tokens from the refusal, again and again from each text's start."""
    losses = []
    for ids, mask in zip(batch.ids, batch.mask, strict=True):
        says = model(input_ids=ids[mask.bool()][None]).logits[0, :-1]
        wanted = [refusal[place % len(refusal)] for place in range(len(says))]
        losses.append(divergence_from_token(says, torch.tensor(wanted)))
    return torch.cat(losses).mean()


def test_jensun_says_the_refusal_and_keeps_to_the_original_model(tokenizer: Any) -> None:
    model, start = tiny_model(), tiny_model()
    report = apply(model, tokenizer, "jensun", resources=RESOURCES, reply="Mira", epochs=3, **ONE_BATCH)
    refusal = tokenizer("Mira", add_special_tokens=False)["input_ids"]
    (batch,) = make_batches([tokenizer(text)["input_ids"] for text in SENTENCES[:5]], 8, tokenizer, torch.device("cpu"))
    assert len(refusal) > 1
    first = report.details["losses"]["forget"][0]
    assert first == pytest.approx(float(_jensun_step(start, start, batch, refusal).detach()), rel=1e-4)
    kept = report.details["losses"]["retain"]
    assert kept[0] == pytest.approx(0.0, abs=1e-6) and kept[1] > 1e-4  # the reference is not what is trained
    assert report.details["losses"]["forget"][-1] < first


def test_undials_teacher_is_the_model_before_the_step(tokenizer: Any) -> None:
    ours, theirs = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    teacher, start = copy.deepcopy(theirs), copy.deepcopy(theirs)
    report = apply(ours, tokenizer, "undial", resources=RESOURCES, retain_weight=2.0, epochs=3, **ONE_BATCH)
    anatomy = find_anatomy(theirs)
    parts = [*(block.module for block in anatomy.blocks), anatomy.final_norm, anatomy.head]
    trained = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    forget = []
    for _ in range(3):
        losses = []
        for text in SENTENCES[:5]:
            ids = torch.tensor(tokenizer(text)["input_ids"])
            with torch.no_grad():
                taught = teacher(input_ids=ids[None]).logits[0, :-1]
            taught[torch.arange(len(ids) - 1), ids[1:]] -= 10.0
            says = theirs(input_ids=ids[None]).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(says, taught.softmax(dim=1), reduction="none"))
        forget.append(torch.cat(losses).mean())
        optimizer.zero_grad()
        (forget[-1] + 2.0 * mean_nll(theirs, tokenizer, RESOURCES.retain)).backward(inputs=trained)
        optimizer.step()
    assert report.details["losses"]["forget"] == pytest.approx([loss.item() for loss in forget], rel=1e-5)
    assert difference(ours, theirs, start) < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "gemma", "mixtral"])
def test_other_architectures_forget_too(method: str, family: str, tokenizer: Any) -> None:
    start, model, once = (tiny(family) if family == "mixtral" else tiny_model(family) for _ in range(3))
    settings = {"retain_weight": 0.0, "epochs": 4, **ONE_BATCH} | ({"saturation": 0.5} if method == "satimp" else {})
    report = apply(model, tokenizer, method, resources=RESOURCES, **settings)
    losses = report.details["losses"]["forget"]
    if method == "jensun":
        assert losses[-1] < losses[0]
    elif method == "undial":  # random models find the text as unlikely as the teacher does
        apply(once, tokenizer, method, resources=RESOURCES, **{**settings, "epochs": 1})
        rows = [tokenizer(text)["input_ids"] for text in SENTENCES[:5]]
        (batch,) = make_batches(rows, 8, tokenizer, torch.device("cpu"))
        with torch.no_grad():
            found = undial_losses(predict(once, batch), predict(start, batch), 10.0)
        assert losses[1] == pytest.approx(float((found * batch.scored).sum() / batch.scored.sum()), rel=1e-5)
    else:
        with torch.no_grad():
            before, after = (float(mean_nll(m, tokenizer, SENTENCES[:5])) for m in (start, model))
        assert after > before + 0.1
    assert not [name for name in report.changed if "embed" in name or "wte" in name]


def test_a_batch_gives_the_predictions_of_single_texts() -> None:
    model = tiny_model("gpt2")
    (batch,) = make_batches(ROWS, 2, tiny_tokenizer(), torch.device("cpu"))
    with torch.no_grad():
        found = predict(model, batch)
        alone = [model(input_ids=torch.tensor([row])).logits[0, :-1] for row in ROWS]
    assert torch.allclose(found.logits, torch.cat(alone), atol=1e-4)
    assert found.targets.tolist() == [token for row in ROWS for token in row[1:]]
    assert found.places.tolist() == [place for row in ROWS for place in range(len(row) - 1)]


@pytest.mark.parametrize("method", ["undial", "quail"])
@pytest.mark.parametrize("preserve", [False, True])
def test_pruned_weights_stay_zero_if_asked(method: str, preserve: bool, tokenizer: Any) -> None:
    check_mask(tokenizer, method, preserve, epochs=1, **ONE_BATCH)


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("wga", {"beta": -1.0}, "beta=-1.0"),
        ("satimp", {"saturation": -1.0}, "saturation=-1.0"),
        ("undial", {"beta": 0.0}, "beta=0.0"),
        ("undial", {"forget_weight": 0.0}, "forget_weight=0"),
        ("jensun", {"reply": " "}, "reply=' '"),
        ("quail", {"bits": 9}, "bits=9"),
        ("quail", {"lr": 1e30}, r"lr=1e\+30"),
    ],
)
def test_bad_settings_are_named_and_leave_the_model_alone(
    method: str, overrides: dict[str, Any], message: str, tokenizer: Any
) -> None:
    check_refused(tokenizer, method, RESOURCES, overrides, f"^{method}.*{message}")


@pytest.mark.parametrize("method", ["jensun", "quail"])
def test_a_missing_retain_set_is_named(method: str, tokenizer: Any) -> None:
    check_refused(tokenizer, method, Resources(forget=RESOURCES.forget), {}, f"^{method} needs retain text")
