"""Ids of compositions: what can be written, what it means, and how errors point at the place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lmcompose.composition import (
    Composition,
    CompositionError,
    Step,
    parse,
    permutations,
)

names = st.from_regex(r"[a-z][a-z0-9_-]{0,6}", fullmatch=True).filter(lambda name: name != "base")
keys = st.from_regex(r"[a-z_][a-z0-9_]{0,4}(\.[a-z0-9]{1,3})?", fullmatch=True)
plain = st.from_regex(r"[A-Za-z0-9_.:/-]{1,8}", fullmatch=True)
quoted = st.text("ab,]+[=' \\", max_size=6).map(lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'")
values = st.recursive(
    plain | quoted,
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    max_leaves=4,
)
steps = st.builds(
    lambda name, settings: Step(name, tuple(settings.items())),
    names,
    st.dictionaries(keys, values, max_size=3),
)
compositions = st.lists(steps, max_size=4).map(lambda items: Composition(tuple(items)))


@given(compositions)
def test_parse_reads_back_every_id(composition: Composition) -> None:
    assert parse(composition.id) == composition


@given(compositions)
def test_prefixes_grow_by_one_step_up_to_the_whole(composition: Composition) -> None:
    prefixes = composition.prefixes()
    assert [len(prefix.steps) for prefix in prefixes] == list(range(1, len(composition.steps) + 1))
    assert all(composition.steps[: len(p.steps)] == p.steps for p in prefixes)


def test_settings_are_read_with_nested_and_quoted_values() -> None:
    step = parse("memit[layers=[2, 3],note='a],b', z.lr=0.5]+awq").steps[0]
    assert step.settings == (("layers", "[2, 3]"), ("note", "'a],b'"), ("z.lr", "0.5"))


def test_base_is_the_composition_without_steps() -> None:
    assert parse("base") == Composition()
    assert Composition().id == "base"


def test_one_state_has_one_id_whatever_the_order_of_settings() -> None:
    assert parse(" awq[bits=3, clip=false] + memit ").id == parse("awq[clip=false,bits=3]+memit").id


@pytest.mark.parametrize(
    ("text", "character", "problem"),
    [
        ("", 1, "name of a method"),
        ("awq+", 5, "name of a method"),
        ("+awq", 1, "name of a method"),
        ("awq memit", 5, "expected '+'"),
        ("awq]", 4, "expected '+'"),
        ("awq[bits=3", 4, "never closed"),
        ("awq[bits=[3]", 4, "never closed"),
        ("awq[a='x]", 4, "never closed"),
        ("awq[]", 5, "expected a setting"),
        ("awq[bits]", 9, "expected '='"),
        ("awq[bits=]", 10, "has no value"),
        ("awq[bits=3,4]", 12, "expected a setting"),
        ("awq[a={]}]", 8, "has no opening bracket"),
        ("base+awq", 1, "takes no steps"),
        ("awq[bits=3,bits=4]", 18, "set twice"),
    ],
)
def test_errors_name_the_place(text: str, character: int, problem: str) -> None:
    with pytest.raises(CompositionError, match=rf"\(character {character}\)") as error:
        parse(text)
    assert problem in str(error.value)
    mark = str(error.value).splitlines()[-1]
    assert mark.index("^") == 4 + character - 1


def test_permutations_are_every_ordered_choice() -> None:
    steps = [Step(name) for name in "abc"]
    ids = [c.id for c in permutations(steps, max_steps=2)]
    assert ids == ["a", "b", "c", "a+b", "a+c", "b+a", "b+c", "c+a", "c+b"]
    assert len(permutations(steps)) == 3 + 6 + 6


def test_permutations_across_categories_take_one_step_of_each() -> None:
    steps = [Step(name) for name in ("a1", "a2", "b1", "c1")]
    ids = [c.id for c in permutations(steps, 2, category=lambda step: step.method[0])]
    assert ids[:4] == ["a1", "a2", "b1", "c1"]
    assert set(ids[4:]) == {
        *("a1+b1", "a1+c1", "a2+b1", "a2+c1", "b1+a1", "b1+a2", "b1+c1", "c1+a1", "c1+a2", "c1+b1"),
    }
    assert len(permutations(steps, category=lambda step: step.method[0])) == 4 + 10 + 2 * 6
