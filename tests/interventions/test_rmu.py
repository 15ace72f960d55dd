"""RMU on tiny random models: against a transcription with two models, its promises, its errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interventions import Resources, apply
from interventions.anatomy import find_anatomy
from interventions.context import Context
from interventions.unlearn.kernels.steering import control_vector
from interventions.unlearn.rmu import RmuSettings, chosen_layers
from tests.interventions.unlearning import RESOURCES, check_mask, check_refused, difference, weights
from tests.models import CONFIGS, SENTENCES, tiny_model


def _deep_model() -> Any:
    """Four blocks of a Llama, the others being copies of the first two with other weights."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = type(tiny_model("llama"))(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5)
    return model.eval()


def _states_alone(model: nn.Module, tokenizer: Any, texts: tuple[str, ...], layer: int) -> Tensor:
    """Output of a block at every token of the texts, each run through the whole model by itself."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    handle = find_anatomy(model).blocks[layer].module.register_forward_hook(see)
    for text in texts:
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return torch.cat(seen)


def _transcription(
    model: nn.Module, tokenizer: Any, settings: RmuSettings, seed: int
) -> tuple[list[float], list[float]]:
    """RMU as its paper writes it: a second, frozen model, whole forward passes, no batches, one text at a time."""
    frozen = copy.deepcopy(model)
    layer = settings.layer
    assert layer is not None
    blocks = find_anatomy(model).blocks[max(0, layer - 2) : layer + 1]
    trained = [block.mlp_output.module.weight for block in blocks]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    controls = []
    for topic in RESOURCES.forget:
        direction = torch.rand(32, generator=Context(seed).generator(f"rmu {topic}"))
        controls.append(settings.steering_coefficient * direction / direction.pow(2).sum().sqrt())
    forget, retain = [], []
    for step in range(settings.max_num_batches):
        topic = list(RESOURCES.forget)[step % 2]
        steered = _states_alone(model, tokenizer, RESOURCES.forget[topic], layer)
        forget.append(nn.functional.mse_loss(steered, controls[step % 2].expand_as(steered)))
        with torch.no_grad():
            was = _states_alone(frozen, tokenizer, RESOURCES.retain, layer)
        held = _states_alone(model, tokenizer, RESOURCES.retain, layer)
        retain.append(settings.alpha * nn.functional.mse_loss(held, was))
        optimizer.zero_grad()
        (forget[-1] + retain[-1]).backward(inputs=trained)
        optimizer.step()
    return [loss.item() for loss in forget], [loss.item() for loss in retain]


def test_losses_and_weights_are_those_of_the_form_with_two_models(tokenizer: Any) -> None:
    settings = RmuSettings(layer=2, lr=1e-3, max_num_batches=5, batch_size=8, steering_coefficient=6.5, alpha=3.0)
    start, ours, theirs = (_deep_model() for _ in range(3))
    report = apply(ours, tokenizer, "rmu", settings, resources=RESOURCES, seed=3)
    forget, retain = _transcription(theirs, tokenizer, settings, seed=3)
    assert report.details["losses"]["forget"] == pytest.approx(forget, rel=1e-5)
    assert report.details["losses"]["retain"] == pytest.approx(retain, rel=1e-4, abs=1e-8)
    assert retain[-1] > 1e-4  # the models had moved apart
    assert difference(ours, theirs, start) < 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_named_weights_change(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    tokenizer.padding_side = "left"
    report = apply(model, tokenizer, "rmu", resources=RESOURCES, layer=1, max_num_batches=2)
    assert report.changed == tuple(sorted(block.mlp_output.parameter_name for block in anatomy.blocks))
    assert sorted(report.details["trained"]) == list(report.changed)
    assert tokenizer.padding_side == "left"
    tokenizer.padding_side = "right"


def test_parameters_are_chosen_by_role_or_by_name(tokenizer: Any) -> None:
    report = apply(
        tiny_model("llama-bias"),
        tokenizer,
        "rmu",
        resources=RESOURCES,
        layer=1,
        train_layers=[1],
        max_num_batches=2,
        parameters=["attention_out", "mlp.down_proj.bias"],
    )
    assert report.changed == ("model.layers.1.mlp.down_proj.bias", "model.layers.1.self_attn.o_proj.weight")


def test_forget_text_moves_towards_the_control_vector_and_retain_text_stays(tokenizer: Any) -> None:
    model, start = tiny_model(), tiny_model()
    resources = Resources(forget={"people": SENTENCES[:3]}, retain=SENTENCES[5:])
    control = control_vector(32, 20.0, Context(0).generator("rmu people"))
    apply(model, tokenizer, "rmu", resources=resources, layer=1, lr=3e-3, max_num_batches=150, alpha=10.0)

    def distance(model: nn.Module, texts: tuple[str, ...], goal: Tensor | None = None) -> float:
        with torch.no_grad():
            there = _states_alone(start, tokenizer, texts, 1) if goal is None else goal
            return float((_states_alone(model, tokenizer, texts, 1) - there).square().mean())

    assert distance(model, resources.forget["people"], control) < 0.7 * distance(
        start, resources.forget["people"], control
    )
    assert distance(model, resources.retain) < 0.1 * distance(model, resources.forget["people"])


def test_as_many_updates_as_asked_for_and_topics_in_turn(tokenizer: Any) -> None:
    for updates in (1, 7):
        report = apply(tiny_model(), tokenizer, "rmu", resources=RESOURCES, max_num_batches=updates, batch_size=1)
        assert report.details["updates"] == updates
        assert [len(losses) for losses in report.details["losses"].values()] == [updates, updates]
    one = apply(tiny_model(), tokenizer, "rmu", resources=RESOURCES, max_num_batches=2, topics=["places"])
    assert one.details["topics"] == ["places"]


def test_no_block_above_the_steered_one_runs(tokenizer: Any) -> None:
    model = _deep_model()
    calls = []
    for number, block in enumerate(find_anatomy(model).blocks):
        block.module.register_forward_pre_hook(lambda module, args, number=number: calls.append(number))
    find_anatomy(model)
    calls.clear()
    apply(model, tokenizer, "rmu", resources=RESOURCES, layer=1, max_num_batches=3, batch_size=8)
    # Once to keep the states on retain text, then forget and retain text at each update.
    assert calls == [0, 1] * (1 + 2 * 3)


def test_the_seed_decides_the_control_vectors(tokenizer: Any) -> None:
    models = [tiny_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        apply(model, tokenizer, "rmu", resources=RESOURCES, seed=seed, max_num_batches=2)
    one, same, other = (weights(model) for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_control_vector_is_positive_and_has_its_norm() -> None:
    control = control_vector(1000, 6.5, torch.Generator().manual_seed(0))
    assert float(control.norm()) == pytest.approx(6.5, rel=1e-5)
    assert bool((control >= 0).all())


def test_layers_follow_the_depth() -> None:
    assert chosen_layers(RmuSettings(), 32) == (7, [5, 6, 7])
    assert chosen_layers(RmuSettings(), 2) == (0, [0])
    assert chosen_layers(RmuSettings(layer=9, train_layers=[2, 4]), 12) == (9, [2, 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_are_not_lost_in_a_low_precision(dtype: torch.dtype, tokenizer: Any) -> None:
    exact, rounded = tiny_model(dtype=dtype).float(), tiny_model(dtype=dtype)
    start = copy.deepcopy(exact)
    settings = RmuSettings(layer=1, lr=1e-3, max_num_batches=10)
    apply(exact, tokenizer, "rmu", settings, resources=RESOURCES)
    apply(rounded, tokenizer, "rmu", settings, resources=RESOURCES)
    assert {p.dtype for p in rounded.parameters()} == {dtype}
    assert difference(rounded.float(), exact, start) < 0.1


@pytest.mark.parametrize("preserve", [True, False])
def test_pruned_weights_stay_zero_if_asked(preserve: bool, tokenizer: Any) -> None:
    check_mask(tokenizer, "rmu", preserve, layer=1, max_num_batches=3)


@pytest.mark.parametrize(
    "resources, overrides, message",
    [
        (Resources(retain=SENTENCES), {}, "rmu needs forget text"),
        (Resources(forget={"people": SENTENCES}), {}, "rmu needs retain text.*rmu.alpha"),
        (Resources(forget={"people": ()}, retain=SENTENCES), {}, "forget set of topic 'people' is empty"),
        (Resources(forget={"people": ("A b", " ")}, retain=SENTENCES), {}, "'people', text 1.*nothing to predict"),
        (RESOURCES, {"topics": ["peple"]}, "rmu.topics: no forget text of 'peple'. Did you mean people"),
        (RESOURCES, {"topics": []}, r"rmu.topics=\[\]: expected a list \(at least 1"),
        (RESOURCES, {"layer": 2}, r"rmu.layer=\[2\].*0 to 1"),
        (RESOURCES, {"layer": 0, "train_layers": [0, 1]}, "rmu.train_layers=.*none above layer=0"),
        (RESOURCES, {"train_layers": [5]}, r"rmu.train_layers=\[5\].*0 to 1"),
        (RESOURCES, {"layer_fraction": 1.0}, "rmu.layer_fraction"),
        (RESOURCES, {"parameters": ["mlp.down_prj.weight"]}, "model.layers.0.*Did you mean mlp.down_proj.weight"),
        (RESOURCES, {"parameters": []}, r"rmu.parameters=\[\]"),
        (RESOURCES, {"lr": float("nan")}, "rmu.lr=nan"),
        (RESOURCES, {"lr": 1e30}, r"model.layers.0.mlp.down_proj.weight.*rmu.lr=1e\+30"),
        (RESOURCES, {"max_num_batches": 0}, "rmu.max_num_batches=0"),
        (RESOURCES, {"alpha": -1.0}, "rmu.alpha=-1"),
        (RESOURCES, {"max_tokens": 1}, "max_tokens=1"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(
    resources: Resources, overrides: dict[str, Any], message: str, tokenizer: Any
) -> None:
    check_refused(tokenizer, "rmu", resources, overrides, message)
