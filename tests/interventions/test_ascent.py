"""Gradient ascent and difference on tiny models: gradients and whole runs against plain autograd, promises, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from interventions import InterventionError, Resources, apply
from interventions.anatomy import find_anatomy
from interventions.training import Trainer
from interventions.unlearn.gd import GdSettings
from interventions.unlearn.kernels.choice import trained_parameters
from interventions.unlearn.kernels.likelihood import add_gradients, nll_by_token
from interventions.unlearn.kernels.predictions import predict
from interventions.unlearn.kernels.texts import make_batches, tokenise
from tests.interventions.unlearning import (
    RESOURCES,
    check_mask,
    check_refused,
    difference,
    mean_nll,
    nll_alone,
    weights,
)
from tests.models import CONFIGS, SENTENCES, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
FORGET = SENTENCES[:5]


@hypothesis_settings(max_examples=20)
@given(st.lists(st.lists(st.integers(3, 319), min_size=2, max_size=12), min_size=1, max_size=5), st.integers(1, 3))
def test_a_text_is_as_likely_in_a_padded_batch_as_alone(rows: list[list[int]], batch_size: int) -> None:
    model = tiny_model("gpt2")
    seen = set()
    for batch in make_batches(rows, batch_size, tiny_tokenizer(), CPU):
        with torch.no_grad():
            found = predict(model, batch).text_nll
        for number, nll in zip(batch.which.tolist(), found, strict=True):
            with torch.no_grad():
                says = model(input_ids=torch.tensor([rows[number]])).logits[0, :-1].log_softmax(dim=-1)
            alone = -says.gather(1, torch.tensor(rows[number][1:])[:, None]).sum()
            assert float(nll) == pytest.approx(float(alone), rel=1e-4)
            seen.add(number)
    assert seen == set(range(len(rows)))


@pytest.mark.parametrize("family", ["llama-gqa", "gpt_neox", "gemma2", "opt"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_the_gradient_is_that_of_the_mean_over_all_tokens_without_padding(
    family: str, batch_size: int, tokenizer: Any
) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    parameters = trained_parameters("gd", model, find_anatomy(model), [1], GdSettings())
    trainer = Trainer("gd", model, parameters, lr=1e-3)
    forget, retain = (
        make_batches(tokenise(model, tokenizer, texts, 512, "texts"), batch_size, tokenizer, CPU)
        for texts in (FORGET, RESOURCES.retain)
    )
    ours = add_gradients(trainer, model, forget, lambda said: -nll_by_token(said), True, 1.0)
    ours += add_gradients(trainer, model, retain, nll_by_token, True, 40.0)
    theirs = 40.0 * mean_nll(plain, tokenizer, RESOURCES.retain) - mean_nll(plain, tokenizer, FORGET)
    theirs.backward()
    assert ours == pytest.approx(theirs.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in parameters:
            expected = plain.get_parameter(name).grad
            assert torch.allclose(parameter.grad, expected, rtol=1e-3, atol=1e-5 * float(theirs.detach())), name
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_a_run_takes_the_very_steps_of_a_plain_loop(max_grad_norm: float | None, decay: bool, tokenizer: Any) -> None:
    start, ours, theirs = (tiny_model() for _ in range(3))
    report = apply(
        ours,
        tokenizer,
        "gd",
        resources=RESOURCES,
        batch_size=8,
        epochs=4,
        lr=1e-3,
        retain_weight=3.0,
        max_grad_norm=max_grad_norm,
        decay=decay,
        weight_decay=0.1,
    )
    trained = list(trained_parameters("gd", theirs, find_anatomy(theirs), [1], GdSettings()).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    losses = []
    for share in (1.0, 0.75, 0.5, 0.25) if decay else (1.0,) * 4:
        optimizer.param_groups[0]["lr"] = 1e-3 * share
        loss = 3.0 * mean_nll(theirs, tokenizer, RESOURCES.retain) - mean_nll(theirs, tokenizer, FORGET)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward(inputs=trained)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
    said = report.details["losses"]
    assert [a + b for a, b in zip(said["forget"], said["retain"], strict=True)] == pytest.approx(losses, rel=1e-4)
    assert difference(ours, theirs, start) < 1e-3


@pytest.mark.parametrize("method", ["ga", "gd"])
@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_last_half_and_the_head_change(method: str, family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    report = apply(model, tokenizer, method, resources=RESOURCES, lr=1e-3)
    embedded = {id(p) for p in anatomy.embeddings.parameters()}
    modules = [anatomy.blocks[1].module, anatomy.final_norm, anatomy.head]
    allowed = {id(p) for module in modules for p in module.parameters()} - embedded
    expected = {name for name, p in model.named_parameters() if id(p) in allowed}
    assert set(report.details["trained"]) == expected
    assert set(report.changed) <= expected
    assert anatomy.blocks[1].mlp_output.parameter_name in report.changed
    assert report.details["layers"] == [1]


def test_named_layers_alone_change(tokenizer: Any) -> None:
    model = tiny_model()
    report = apply(model, tokenizer, "gd", resources=RESOURCES, layers=[0], train_head=False, lr=1e-3)
    assert report.changed
    assert all(name.startswith("model.layers.0.") for name in report.changed)


@pytest.mark.parametrize("method", ["ga", "gd", "npo", "simnpo", "relearn"])
def test_named_parameters_of_the_layers_alone_change(method: str, tokenizer: Any) -> None:
    model = tiny_model()
    settings = {"layers": [1], "parameters": ["attention_in", "mlp.down_proj.weight"], "train_head": False}
    report = apply(model, tokenizer, method, resources=RESOURCES, lr=1e-3, **settings)
    (attention,) = [g for g in find_anatomy(model).blocks[1].linear_groups if g.role == "attention_in"]
    expected = {linear.parameter_name for linear in attention.linears} | {"model.layers.1.mlp.down_proj.weight"}
    assert set(report.details["trained"]) == set(report.changed) == expected
    check_refused(tokenizer, method, RESOURCES, {"parameters": ["mlp_uot"]}, rf"{method}.parameters: .* mean .*mlp_out")


def test_retain_texts_beside_a_batch_are_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    from interventions.unlearn.kernels import likelihood

    made: list[tuple[int, int]] = []

    def make(rows: list[list[int]], size: int, *rest: Any) -> Any:
        made.append((len(rows), size))
        return make_batches(rows, size, *rest)

    monkeypatch.setattr(likelihood, "make_batches", make)
    forget, retain = 5, len(RESOURCES.retain)
    for asked, found in ((None, 2), (3, 3)):
        apply(tiny_model(), tokenizer, "gd", resources=RESOURCES, batch_size=2, retain_batch_size=asked, lr=1e-3)
        assert made[-2:] == [(forget, 2), (retain, found)]


def test_the_last_update_takes_what_is_left(tokenizer: Any) -> None:
    forget = {"people": SENTENCES[:5]}
    models = [tiny_model() for _ in range(2)]
    whole, cut = (
        apply(
            model,
            tokenizer,
            "ga",
            resources=Resources(forget=forget),
            batch_size=1,
            accumulation=2,
            lr=1e-3,
            max_updates=limit,
        )
        for model, limit in zip(models, (None, 2), strict=True)
    )
    assert (whole.details["updates"], cut.details["updates"]) == (3, 2)
    assert difference(models[0], models[1], tiny_model()) > 0.01


def test_ascent_forgets_and_the_difference_keeps_more(tokenizer: Any) -> None:
    start, ascended, differed = (tiny_model() for _ in range(3))
    common = {"resources": RESOURCES, "lr": 1e-3, "epochs": 15, "samples": None, "accumulation": 1}
    apply(ascended, tokenizer, "ga", **common)
    apply(differed, tokenizer, "gd", **common, retain_weight=1.0)
    with torch.no_grad():
        forget = [float(mean_nll(model, tokenizer, FORGET)) for model in (start, ascended, differed)]
        retain = [float(mean_nll(model, tokenizer, RESOURCES.retain)) for model in (start, ascended, differed)]
    assert min(forget[1:]) > forget[0] + 1
    assert retain[2] < retain[0] < retain[1]


def test_samples_are_the_first_texts_of_each_topic(tokenizer: Any) -> None:
    forget = {"people": SENTENCES[:4], "places": SENTENCES[4:8]}
    first = {topic: texts[:2] for topic, texts in forget.items()}
    models = [tiny_model() for _ in range(2)]
    reports = [
        apply(model, tokenizer, "ga", resources=Resources(forget=texts), samples=samples, lr=1e-3)
        for model, texts, samples in zip(models, (forget, first), (2, None), strict=True)
    ]
    assert [report.details["texts"] for report in reports] == [4, 4]
    one, other = (weights(model) for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_texts_are_cut(tokenizer: Any) -> None:
    long = Resources(forget={"people": (" ".join(SENTENCES * 20),)})  # longer than the model reads
    apply(tiny_model("gpt2"), tokenizer, "ga", resources=long)
    assert [len(row) for row in tokenise(tiny_model(), tokenizer, SENTENCES[:2], 7, "texts")] == [7, 7]


def test_masters_keep_what_bfloat16_would_lose(tokenizer: Any) -> None:
    exact, rounded = tiny_model(dtype=torch.bfloat16).float(), tiny_model(dtype=torch.bfloat16)
    start = copy.deepcopy(exact)
    settings = {"lr": 3e-4, "epochs": 10, "retain_weight": 1.0, "samples": None}
    apply(exact, tokenizer, "gd", resources=RESOURCES, **settings)
    apply(rounded, tokenizer, "gd", resources=RESOURCES, **settings)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert difference(rounded.float(), exact, start) < 0.5


def test_a_copy_in_float32_is_trained_where_the_weights_stay_in_bfloat16() -> None:
    layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    trainer = Trainer("ga", layer, {"weight": layer.weight}, lr=1e-4)
    for _ in range(100):
        trainer.backward(layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum())
        trainer.update()
    # Each step alone is less than half the distance to the next bfloat16 number.
    assert layer.weight.tolist() == [[pytest.approx(0.99, abs=0.002)] * 2]


@pytest.mark.parametrize("preserve", [True, False])
def test_pruned_weights_stay_zero_if_asked(preserve: bool, tokenizer: Any) -> None:
    check_mask(tokenizer, "gd", preserve, lr=1e-3)


@pytest.mark.parametrize("method", ["ga", "gd"])
@pytest.mark.parametrize(
    "resources, overrides, message",
    [
        (Resources(retain=SENTENCES), {}, "needs forget text"),
        (Resources(forget={"people": ()}, retain=SENTENCES), {}, "forget set of topic 'people' is empty"),
        (Resources(forget={"people": ("A b", "")}, retain=SENTENCES), {}, "'people', text 1.*nothing to predict"),
        (RESOURCES, {"topics": ["place"]}, "topics: no forget text of 'place'. Did you mean places"),
        (RESOURCES, {"layers": [0, 2]}, r"layers=\[0, 2\].*0 to 1"),
        (RESOURCES, {"layer_fraction": 0.0}, "layer_fraction=0.0"),
        (RESOURCES, {"lr": -1.0}, "lr=-1.0"),
        (RESOURCES, {"lr": 1e30, "epochs": 3}, r"(model.layers.1|lm_head).*lr=1e\+30"),
        (RESOURCES, {"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        (RESOURCES, {"accumulation": 0}, "accumulation=0"),
        (RESOURCES, {"samples": 0}, "samples=0"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(
    method: str, resources: Resources, overrides: dict[str, Any], message: str, tokenizer: Any
) -> None:
    check_refused(tokenizer, method, resources, overrides, f"^{method}.*{message}")


def test_the_difference_needs_retain_text(tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=r"gd needs retain text.*gd.retain_weight=0"):
        apply(tiny_model(), tokenizer, "gd", resources=Resources(forget=RESOURCES.forget))


def test_one_text_alone_agrees_with_the_batch_helper(tokenizer: Any) -> None:
    nll, tokens = nll_alone(tiny_model(), tokenizer, SENTENCES[0])
    (batch,) = make_batches([tokenizer(SENTENCES[0])["input_ids"]], 1, tokenizer, CPU)
    assert predict(tiny_model(), batch).text_nll[0].item() == pytest.approx(nll.item(), rel=1e-5)
    assert int(batch.scored[0]) == tokens
