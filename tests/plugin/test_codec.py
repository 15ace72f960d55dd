"""Tensors as the cache stores them: the same bits back, and a quantised weight near its packed size."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluators.efficiency import read_layers
from interventions.compress.kernels.grid import fake_quantise
from pytest_lmcompose.cache.codec import decode, encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_round_trip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored, metadata = encode(tensors)
    back = decode(stored, metadata)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[name].flatten().view(torch.uint8), tensor.contiguous().flatten().view(torch.uint8))
    return stored


def size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 40), max_size=3),
    st.lists(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, 1.5, -0.25, 3.0]), min_size=1),
)
def test_any_tensor_round_trips(dtype: torch.dtype, shape: list[int], values: list[float]) -> None:
    count = math.prod(shape)
    tensor = torch.tensor((values * count)[:count], dtype=dtype).reshape(shape)
    check_round_trip({"w": tensor})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (3, 128), (2, 64), (8, 64), (4, -1)])
def test_quantised_weight_takes_its_packed_size(
    dtype: torch.dtype, bits: int, group: int, symmetric: bool, transposed: bool
) -> None:
    if bits == 8 and dtype != torch.float32:
        pytest.skip("half precision has too few digits to tell neighbouring 8-bit levels apart")
    torch.manual_seed(0)
    weight = fake_quantise(torch.randn(96, 320), bits, group, symmetric).to(dtype)
    packed = read_layers({"w": weight})[0].packed_bits / 8
    stored = check_round_trip({"w": weight.t().contiguous() if transposed else weight})
    assert size(stored) <= 1.2 * packed


@pytest.mark.parametrize("dtype", DTYPES)
def test_pruned_weight_takes_its_packed_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight = weight.where(weight.abs() > 0.7, torch.zeros(())).to(dtype)
    stored = check_round_trip({"w": weight})
    assert size(stored) <= 1.2 * read_layers({"w": weight})[0].packed_bits / 8


def test_full_precision_weight_is_stored_as_it_is() -> None:
    weight = torch.randn(64, 64)
    stored = check_round_trip({"w": weight})
    assert list(stored) == ["w"]


def test_plain_file_without_metadata_is_read() -> None:
    weight = torch.randn(4, 4)
    assert decode({"w": weight}, None)["w"] is weight
