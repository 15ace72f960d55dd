"""`apply` holds every method to its promises and undoes what breaks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import interventions.safety as safety
import interventions.step as step
from interventions import Edit, InterventionError, Method, Resources, UnknownMethod, apply, find_method
from interventions.context import Context
from tests.models import tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class FakeSettings:
    amount: float = 1.0
    layers: int = 1


class FakeMethod(Method):
    """A method made of a function at hand."""

    def __init__(self, function: Callable[..., dict[str, Any]], settings: type) -> None:
        super().__init__("fake", "edit", settings, "")
        object.__setattr__(self, "run", function)

    def load(self) -> Callable[..., dict[str, Any]]:
        return self.run  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make `apply(..., "fake")` call the function given."""

    def install(function: Callable[..., Any], settings: type = FakeSettings) -> None:
        def call(*arguments: Any) -> dict[str, Any]:
            return function(*arguments) or {}

        monkeypatch.setattr(step, "find_method", lambda name: FakeMethod(call, settings))

    yield install


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the parameters that steps copy."""
    names: list[str] = []
    first_names = safety._first_names

    def watched(model: nn.Module, wanted: Any) -> list[str]:
        found = first_names(model, wanted)
        names.extend(found)
        return found

    monkeypatch.setattr(safety, "_first_names", watched)
    return names


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(model: Any, before: dict[str, torch.Tensor]) -> bool:
    now = dict(model.named_parameters())
    return now.keys() == before.keys() and all(
        now[n].dtype == w.dtype and torch.equal(now[n], w) for n, w in before.items()
    )


def nudge(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.1)


def test_the_report_tells_what_changed(use: Any, model: Any, tokenizer: Any) -> None:
    def method(model: Any, tokenizer: Any, settings: Any, resources: Any, context: Context) -> dict[str, Any]:
        context.warn("one layer was left out")
        context.progress("half way")
        nudge(model)
        return {"loss": settings.amount, "edits": len(resources.edits), "texts": list(resources.calibration)}

    use(method)
    lines: list[str] = []
    edits = [Edit("Mira was born in", "Mira", "Karth")]
    report = apply(
        model,
        tokenizer,
        "fake",
        FakeSettings(layers=3),
        resources=Resources(calibration=("old",)),
        edits=edits,
        calibration=["new"],
        progress=lines.append,
        amount=2.5,
    )
    assert report.changed == ("model.layers.1.mlp.down_proj.weight",)
    assert report.settings == {"amount": 2.5, "layers": 3}
    assert report.details == {"loss": 2.5, "edits": 1, "texts": ["new"]}
    assert report.warnings == ("one layer was left out",)
    assert lines == ["half way"]
    assert report.seconds >= 0
    assert report.peak_memory_bytes > 10_000_000


def test_a_step_that_changes_nothing_fails(use: Any, model: Any, tokenizer: Any) -> None:
    use(lambda *_: None)
    with pytest.raises(InterventionError, match="changed no weight"):
        apply(model, tokenizer, "fake")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_weight_fails_and_is_undone(use: Any, model: Any, tokenizer: Any, bad: float) -> None:
    def method(model: Any, *_: Any) -> None:
        nudge(model)
        with torch.no_grad():
            model.lm_head.weight[3, 4] = bad

    use(method)
    before = weights(model)
    with pytest.raises(InterventionError, match=r"NaN or infinity in lm_head\.weight"):
        apply(model, tokenizer, "fake")
    assert same_bits(model, before)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_restores_everything(
    use: Any, model: Any, tokenizer: Any, exception: type[BaseException]
) -> None:
    def method(model: Any, tokenizer: Any, *_: Any) -> None:
        nudge(model)
        model.train()
        model.config.use_cache = False
        tokenizer.padding_side = "left"
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        raise exception("in the middle")

    use(method)
    before = weights(model)
    with pytest.raises(exception, match="in the middle"):
        apply(model, tokenizer, "fake")
    assert same_bits(model, before)
    assert not any(module.training for module in model.modules())
    assert model.config.use_cache is True
    assert tokenizer.padding_side == "right"
    assert all(parameter.requires_grad for parameter in model.parameters())


def halve(model: Any) -> None:
    model.half()


def swap_module(model: Any) -> None:
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj)


def swap_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(3, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (halve, r"float32 into .* torch\.float16"),
        (swap_module, r"which parameters.*down_proj"),
        (swap_parameter, r"lm_head\.weight from \(320, 32\)"),
    ],
)
def test_a_change_of_dtype_shape_or_names_fails_and_is_undone(
    use: Any, model: Any, tokenizer: Any, change: Callable[[Any], None], message: str
) -> None:
    use(lambda model, *_: change(model))
    before, parameters = weights(model), dict(model.named_parameters())
    with pytest.raises(InterventionError, match=message):
        apply(model, tokenizer, "fake")
    assert same_bits(model, before)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_flags_and_tokenizer_are_as_before_and_gradients_dropped(use: Any, model: Any) -> None:
    tokenizer = tiny_tokenizer()
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]

    def method(model: Any, tokenizer: Any, *_: Any) -> None:
        assert not any(module.training for module in model.modules())
        model.requires_grad_(True)
        model.train()
        model.config.use_cache = model.generation_config.use_cache = False
        tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side = "</s>", "left", "left"
        model(torch.tensor([[3, 4]])).logits.sum().backward()
        nudge(model)

    use(method)
    apply(model, tokenizer, "fake")
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert model.config.use_cache is True
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side) == (
        "<pad>",
        "right",
        "right",
    )


def test_details_must_be_plain_data(use: Any, model: Any, tokenizer: Any) -> None:
    def method(model: Any, *_: Any) -> dict[str, Any]:
        nudge(model)
        return {"loss": torch.tensor(1.0)}

    use(method)
    before = weights(model)
    with pytest.raises(InterventionError, match="plain data"):
        apply(model, tokenizer, "fake")
    assert same_bits(model, before)


def test_an_unknown_setting_lists_near_names(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=r"awq has no setting 'bit'. Did you mean bits"):
        apply(model, tokenizer, "awq", bit=4)


def test_settings_of_another_method_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=r"AwqSettings, not FakeSettings"):
        apply(model, tokenizer, "awq", FakeSettings())


def test_an_unknown_method_lists_near_names(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UnknownMethod, match="Did you mean awq"):
        apply(model, tokenizer, "aqw")


def test_one_text_is_not_many(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match="sequence of texts"):
        apply(model, tokenizer, "awq", calibration="a single string")
    with pytest.raises(InterventionError, match=r"forget\['bio'\] must be a sequence of texts"):
        apply(model, tokenizer, "rmu", forget={"bio": "a single string"})


@pytest.mark.parametrize("forget", [["toxins"], {"bio": ["toxins"], "cyber": ["exploits"]}])
def test_texts_by_name_take_the_place_of_resources(use: Any, model: Any, tokenizer: Any, forget: Any) -> None:
    seen = []

    def method(model: Any, tokenizer: Any, settings: Any, resources: Any, context: Context) -> None:
        seen.append(resources)
        nudge(model)

    use(method)
    given = Resources(forget={"old": ("old",)}, retain=("old",), calibration=("kept",))
    apply(model, tokenizer, "fake", resources=given, forget=forget, retain=["weather"])
    topics = {"forget": ("toxins",)} if isinstance(forget, list) else {"bio": ("toxins",), "cyber": ("exploits",)}
    assert seen == [Resources(calibration=("kept",), forget=topics, retain=("weather",))]


def test_generators_depend_on_seed_and_purpose_alone() -> None:
    def draw(seed: int, purpose: str) -> list[float]:
        return torch.rand(4, generator=Context(seed).generator(purpose)).tolist()

    state = torch.random.get_rng_state()
    assert draw(1, "contexts") == draw(1, "contexts")
    assert draw(1, "contexts") != draw(2, "contexts")
    assert draw(1, "contexts") != draw(1, "samples")
    assert torch.equal(torch.random.get_rng_state(), state)


class Says(FakeSettings):
    """Settings that say what the step may change."""

    def may_change(self, model: Any) -> list[str]:
        return ["model.layers.1.mlp.down_proj.weight"]


def test_only_what_a_step_may_change_is_copied(use: Any, model: Any, tokenizer: Any, copied: list[str]) -> None:
    def method(model: Any, *_: Any) -> None:
        nudge(model)
        raise RuntimeError("in the middle")

    use(method, Says)
    before = weights(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        apply(model, tokenizer, "fake")
    assert copied == ["model.layers.1.mlp.down_proj.weight"]
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_change_that_was_not_announced_fails(use: Any, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    def method(model: Any, *_: Any) -> None:
        nudge(model)
        model.model.norm.weight.data.view(torch.int32 if dtype == torch.float32 else torch.int16)[3] ^= 1

    model.to(dtype)
    use(method, Says)
    with pytest.raises(InterventionError, match=r"changed model\.norm\.weight, which its `may_change`"):
        apply(model, tokenizer, "fake")


def test_an_unknown_name_in_may_change_fails(use: Any, tokenizer: Any) -> None:
    use(lambda model, *_: nudge(model), Says)
    with pytest.raises(InterventionError, match=r"names model\.layers\.1\.mlp\.down_proj\.weight, but GPT2LMHeadModel"):
        apply(tiny_model("gpt2"), tokenizer, "fake")


def test_copies_of_the_caller_replace_those_of_the_step(
    use: Any, model: Any, tokenizer: Any, copied: list[str]
) -> None:
    def method(model: Any, *_: Any) -> None:
        nudge(model)
        raise RuntimeError("in the middle")

    use(method)
    before = weights(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        apply(model, tokenizer, "fake", copies=before)
    assert copied == []
    assert same_bits(model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method", ["ft", "lora", "memit", "pmet", "rome", "alphaedit", "rmu", "ga", "gd", "npo", "simnpo"]
)
def test_methods_say_what_they_may_change(method: str, family: str) -> None:
    model = tiny_model(family)
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = set(find_method(method).settings_type()().may_change(model))
    assert names and names < every


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (150, 999)])
def test_a_checksum_sees_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size, width = math.prod(shape), torch.empty(0, dtype=dtype).element_size()
    weight = torch.zeros(size * width, dtype=torch.uint8).random_(256).view(dtype)
    padded = torch.cat([weight[:1].view(torch.uint8), weight.view(torch.uint8)]).view(dtype)
    for tensor in (weight.view(shape), padded[1:]):  # the second may begin in the middle of a word
        before = safety._checksum(tensor)
        for place in {0, size // 2, size - 1}:
            changed = tensor.clone()
            changed.view(-1).view(torch.uint8)[place * width] ^= 1
            assert not torch.equal(before, safety._checksum(changed))
