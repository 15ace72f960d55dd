"""Few grids for all layers of a folder, and what does not fit."""

from __future__ import annotations

import pytest

from pytest_lmcompose.checkpoints.pack_awq import Awq
from pytest_lmcompose.checkpoints.pack_compressed_tensors import CompressedTensors
from pytest_lmcompose.checkpoints.pack_gptq import Gptq
from pytest_lmcompose.checkpoints.schemes import Format, Found, Scheme, choose_schemes, fitting_size


def layer(bits: int = 4, size: int = 64, cols: int = 128, low: int = -9, high: int = 6, rows: int = 64) -> Found:
    return Found(rows, cols, bits, size, low, high)


@pytest.mark.parametrize(
    ("size", "cols", "expected"),
    [
        (128, 576, (64, 64, 64)),  # 4.5 groups: nine of half the size
        (128, 1536, (128, 128, 128)),
        (256, 1024, (256, 256, 128)),
        (32, 48, (16, 16, 16)),
        (32, 45, (None, None, None)),
        (128, 128, (-1, -1, -1)),
    ],
)
def test_groups_divide_a_row_evenly(size: int, cols: int, expected: tuple[int | None, ...]) -> None:
    assert tuple(fitting_size(size, cols, form) for form in (CompressedTensors(), Gptq(), Awq())) == expected


def test_the_last_group_does_not_make_layers_of_other_widths_finer_in_compressed_tensors() -> None:
    found = {"q": layer(size=64, cols=576), "down": layer(size=128, cols=1536)}
    chosen, left = choose_schemes(found, CompressedTensors())
    assert not left and {name: scheme.group_size for name, scheme in chosen.items()} == {"q": 64, "down": 128}
    for form in (Gptq(), Awq()):
        chosen, left = choose_schemes(found, form)
        assert not left and {scheme.group_size for scheme in chosen.values()} == {64}


@pytest.mark.parametrize("form", [CompressedTensors(), Gptq(), Awq()])
def test_layers_of_one_width_share_a_grid_where_they_can(form: Format) -> None:
    found = {"q": layer(size=32), "k": layer(size=-1, low=-8, high=7), "v": layer(size=64)}
    chosen, left = choose_schemes(found, form)
    assert not left and set(chosen.values()) == {Scheme(4, 32, False)}


@pytest.mark.parametrize("form", [CompressedTensors(), Gptq(), Awq()])
def test_zero_is_in_the_middle_if_it_can_be_for_all(form: Format) -> None:
    found = {"q": layer(low=-8, high=7), "k": layer(low=-2, high=0)}
    assert {scheme.symmetric for scheme in choose_schemes(found, form)[0].values()} == {True}
    assert not choose_schemes(found | {"v": layer(low=-2, high=8)}, form)[0]["q"].symmetric


def test_layers_of_other_bits_have_their_own_grid_where_the_format_can() -> None:
    found = {"a": layer(rows=96), "b": layer(bits=8, low=-100), "c": layer(bits=5)}
    chosen, left = choose_schemes(found, CompressedTensors())
    assert not left and [chosen[name].bits for name in "abc"] == [4, 8, 5]
    chosen, left = choose_schemes(found, Gptq())
    assert [chosen[name].bits for name in "ab"] == [4, 8]
    assert left == {"c": "5 bits, which compressed-tensors stores"}
    chosen, left = choose_schemes(found, Awq())
    assert list(chosen) == ["a"]
    assert left["b"] == "8 bits, which compressed-tensors and gptq store"


def test_awq_holds_fewer_bits_beside_four() -> None:
    found = {"a": layer(), "b": layer(bits=3, low=-4, high=3)}
    assert [scheme.bits for scheme in choose_schemes(found, Awq())[0].values()] == [4, 4]
    assert choose_schemes({"b": found["b"]}, Awq()) == ({}, {"b": "3 bits, which compressed-tensors and gptq store"})


def test_awq_leaves_out_what_its_one_group_size_does_not_hold() -> None:
    found = {"a": layer(size=-1, cols=40, rows=960), "b": layer(size=32, cols=64)}
    chosen, left = choose_schemes(found, Awq())
    assert chosen == {"a": Scheme(4, -1, False)}
    assert left == {"b": "groups of 32, while awq stores one size for all layers"}


def test_whole_rows_are_stored_in_groups_if_that_holds_more() -> None:
    found = {"q": layer(size=-1, cols=32, rows=96), "down": layer(size=32, cols=64)}
    chosen, left = choose_schemes(found, Awq())
    assert not left and {scheme.group_size for scheme in chosen.values()} == {32}
