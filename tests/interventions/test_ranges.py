"""What is said beside the fields of settings: read, described, and true of every registered method and section."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions import InterventionError, apply, methods
from interventions.compress.awq import AwqSettings
from interventions.compress.gptq import GptqSettings
from interventions.compress.wanda import WandaSettings
from interventions.edit.lora import LoraSettings
from interventions.edit.memit import MemitSettings
from interventions.ranges import (
    Checked,
    Choice,
    Fractions,
    Items,
    Layers,
    Range,
    SettingError,
    check_settings,
    check_value,
    describe,
    field_name,
    field_types,
    parts_of,
    shown,
)
from interventions.unlearn.gd import GdSettings
from interventions.unlearn.rmu import RmuSettings
from pytest_lmcompose.settings import EvaluateSettings, ModelSettings, SuiteSettings, WorldSettings
from tests.models import tiny_model

SECTIONS = (ModelSettings, WorldSettings, EvaluateSettings, SuiteSettings)
KINDS = (*SECTIONS, *(method.settings_type() for method in methods().values()))


def numeric(kind: type, prefix: str = "") -> Iterator[tuple[str, type, str, Any, Range | None]]:
    """Yield key, dataclass, field, plain type and range of all numbers in settings, those in lists too."""
    for name, hint in field_types(kind).items():
        plain, rules, _ = parts_of(hint)
        if dataclasses.is_dataclass(plain):
            yield from numeric(plain, f"{prefix}{name}.")  # type: ignore[arg-type]
            continue
        if getattr(plain, "__origin__", None) is list:
            plain, rules, _ = parts_of(plain.__args__[0])
        if plain in (int, float):
            found = [rule for rule in rules if isinstance(rule, Range)]
            yield f"{prefix}{name}", kind, name, plain, found[0] if found else None


NUMBERS = [(f"{kind.__name__}.{key}", *rest) for kind in KINDS for key, *rest in numeric(kind)]


@pytest.mark.parametrize(("key", "kind", "name", "plain", "allowed"), NUMBERS, ids=[row[0] for row in NUMBERS])
def test_every_number_has_a_range_that_holds_its_default_and_ends_where_it_says(
    key: str, kind: type, name: str, plain: type, allowed: Range | None
) -> None:
    assert allowed is not None, f"{key} has no Range beside it"
    hint = field_types(kind)[name]
    check_value(name, hint, getattr(kind(), field_name(name)))
    step = 1 if plain is int else 1e-9
    beyond = [b for b in (allowed.above, allowed.below) if b is not None]
    beyond += [allowed.low - step] if allowed.low is not None else []
    beyond += [allowed.high + step] if allowed.high is not None else []
    assert beyond, f"{key} is open at both ends"
    wrong: list[Any] = [b for b in beyond if b not in allowed.also]
    wrong += [math.nan, math.inf, -math.inf, True, "1", [], {}] + ([1.5] if plain is int else [])
    in_list = getattr(parts_of(hint)[0], "__origin__", None) is list
    for value in wrong:
        given = [value, value] if in_list else value
        with pytest.raises(SettingError, match=rf"^{name}=.*: expected "):
            dataclasses.replace(kind(), **{field_name(name): given})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_takes_only_its_type_and_every_list_says_what_is_in_it(kind: type) -> None:
    for name, hint in field_types(kind).items():
        plain, rules, optional = parts_of(hint)
        if plain is Any:
            continue
        wrong: list[Any] = [object(), 3.5 if plain is not float else "3.5", *([] if optional else [None])]
        if getattr(plain, "__origin__", None) is list:
            assert any(isinstance(rule, Items) for rule in rules), f"{kind.__name__}.{name}"
            default = getattr(kind(), field_name(name)) or ["a"]
            wrong += ["text", [None], [*default, *default, default[0]]]
        for value in wrong:
            with pytest.raises(SettingError, match=rf"^{name}="):
                dataclasses.replace(kind(), **{field_name(name): value})


@given(st.floats(), st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_a_range_holds_what_lies_between_its_ends(value: float, low: float, high: float) -> None:
    assert Range(low, high).holds(value) is (low <= value <= high) or math.isnan(value)
    assert Range(above=low, below=high).holds(value) is (low < value < high) or math.isnan(value)
    assert Range(0, also=(low,)).holds(low)
    with pytest.raises(SettingError):
        check_value("x", Annotated[float, Range()], math.nan)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Annotated[int, Range(2, 8)], "a whole number from 2 to 8"),
        (Annotated[int, Range(1, also=(-1,))], "a whole number from 1 up, or -1"),
        (Annotated[int, Range(4, 4)], "a whole number 4"),
        (Annotated[float, Range(above=0)] | None, "a number above 0, or null"),
        (Annotated[float, Range(above=0, high=1)], "a number above 0 to 1"),
        (Annotated[float, Range(0, below=1)], "a number from 0 to less than 1"),
        (Annotated[float, Range(high=1)], "a number up to 1"),
        (Annotated[str, Choice("layer", "row")], "one of layer, row"),
        (Layers | None, "a list (at least 1, in rising order), each a whole number from 0 up, or null"),
        (Fractions, "a list (2, in rising order), each a number from 0 to less than 1"),
        (
            dict[str, Annotated[list[str], Items()]],
            "a mapping, each value a list (at least 1, none twice), each a text",
        ),
        (bool, "true or false"),
    ],
)
def test_what_a_type_takes_is_said_in_words(hint: Any, words: str) -> None:
    assert describe(hint) == words


def test_values_are_shown_on_one_short_line() -> None:
    assert [shown(value) for value in (None, True, 0.5, "a b")] == ["null", "true", "0.5", "a b"]
    assert shown("a\n\x1b[31mb") == r"'a\n\x1b[31mb'"
    assert len(shown("x" * 1000)) < 110


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AwqSettings(bits=33), "bits=33: expected a whole number from 2 to 8"),
        (lambda: AwqSettings(engine="autoawqq"), "engine=autoawqq: awq has no engine 'autoawqq'. Did you mean autoawq"),
        (lambda: AwqSettings(engine="autoawq", bits=3), "bits=3: the engine autoawq takes 4 only"),
        (lambda: AwqSettings(engine="autoawq", group_size=-1), "group_size=-1: the engine autoawq takes from 1 up"),
        (lambda: GptqSettings(engine="auto_gptq", bits=5), "bits=5: the engine auto_gptq takes from 2 to 4, or 8 only"),
        (lambda: GptqSettings(engine="gptqmodel", damping=0), "damping=0: the engine gptqmodel takes above 0"),
        (lambda: GptqSettings(engine="gptqmodel", sequential=False), "sequential=false: the engine gptqmodel cannot"),
        (lambda: WandaSettings(pattern="2:4:8"), "pattern=2:4:8: expected n:m"),
        (lambda: WandaSettings(pattern="4:4"), "pattern=4:4: expected n:m with 0 < n < m"),
        (lambda: WandaSettings(pattern="1:4"), "pattern=1:4: a sparsity of 0.75, not of 0.5; set sparsity=0.75"),
        (lambda: LoraSettings(rank=12), "initial_rank=12: expected more than rank=12"),
        (lambda: LoraSettings(warmup=0.6, final=0.4), "steps=70: with warmup=0.6 and final=0.4 no step is left"),
        (lambda: LoraSettings(targets=["querry"]), r"targets=['querry']: expected a list"),
        (lambda: RmuSettings(layer=3, train_layers=[2, 4]), "train_layers=[2, 4]: expected none above layer=3"),
        (lambda: GdSettings(forget_weight=0, retain_weight=0), "forget_weight=0: expected a number above 0"),
        (lambda: MemitSettings(z={"lr": 1.0}), "z={'lr': 1.0}: expected ValueSettings"),  # type: ignore[arg-type]
        (lambda: ModelSettings(device_map={"": -1}), "device_map={'': -1}: expected a mapping"),
        (lambda: ModelSettings(device_map="autoo"), "device_map=autoo: expected one of auto"),
        (lambda: WorldSettings(ask_as="Q:"), "ask_as=Q:: expected a text with {}"),
        (lambda: WorldSettings(hazardous=["x"]), "hazardous=x: no such pool. Known: none"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused_when_they_are_made(make: Any, message: str) -> None:
    with pytest.raises(SettingError) as error:
        make()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_lora_without_adalora_needs_no_phases() -> None:
    assert LoraSettings(adaptive=False, rank=16, warmup=0.9, final=0.9).rank == 16


def test_apply_names_the_method_and_leaves_the_model_alone() -> None:
    model = tiny_model()
    for settings, message in (
        ({"bits": 33}, r"rtn\.bits=33: expected a whole number from 2 to 8"),
        ({"bits": True}, r"rtn\.bits=true"),
        ({"group_size": 2.0}, r"rtn\.group_size=2\.0"),
    ):
        with pytest.raises(InterventionError, match=message):
            apply(model, None, "rtn", **settings)


@dataclass(frozen=True)
class Unchecked:
    """Settings of a package that says its ranges, and makes no check of its own."""

    share: Annotated[float, Range(0, 1)] = 0.5


@dataclass(frozen=True)
class Outer(Checked):
    inner: Unchecked = dataclasses.field(default_factory=Unchecked)


def test_settings_that_check_nothing_themselves_are_checked_where_they_are_used() -> None:
    with pytest.raises(SettingError, match="share=2: expected a number from 0 to 1"):
        check_settings(Unchecked(share=2))
    with pytest.raises(SettingError, match=r"inner\.share=2: expected a number from 0 to 1"):
        check_value("inner", Unchecked, {"share": 2})
    with pytest.raises(SettingError, match=r"unknown key 'shar'\. Did you mean share"):
        check_value("inner", Unchecked, {"shar": 2})
    with pytest.raises(SettingError, match=r"inner\.share=2"):
        Outer(inner=Unchecked(share=2))
