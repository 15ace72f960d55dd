"""Tensors as the cache stores them: the same bits back, and a quantised weight near its packed size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from evaluators.efficiency import decoder_linears, read_layers
from interventions import apply
from interventions.compress.kernels.grid import fake_quantise
from interventions.compress.kernels.integers import Integers
from pytest_lmcompose.cache.codec import decode, encode
from pytest_lmcompose.locate import SUITE_FOLDER
from tests.models import SENTENCES, VOCABULARY, tiny_model, tiny_tokenizer

MODEL = SUITE_FOLDER / "tinyworld" / "model"

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


@settings(deadline=None, max_examples=20)
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
    torch.manual_seed(0)
    weight = fake_quantise(torch.randn(96, 320), Integers(bits, group, symmetric)).to(dtype)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pruned_first", [True, False])
def test_pruned_and_quantised_weight_takes_its_packed_size(dtype: torch.dtype, pruned_first: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    small = weight.abs() < 0.7
    if pruned_first:
        weight[small] = 0
    weight = fake_quantise(weight, Integers(4, 128)).to(dtype).masked_fill(small, 0)
    stored = check_round_trip({"w": weight})
    assert size(stored) <= 1.2 * read_layers({"w": weight})[0].packed_bits / 8


def test_groups_on_no_grid_are_stored_as_they_are() -> None:
    torch.manual_seed(0)
    weight = fake_quantise(torch.randn(64, 256), Integers(4, 128))
    packed = read_layers({"w": weight})[0].packed_bits / 8
    weight[3] = torch.randn(256)
    weight[40, 7] = math.nan
    weight[41, 200] = -math.inf
    stored = check_round_trip({"w": weight})
    assert size(stored) <= 1.2 * packed + 4 * 128 * weight.element_size()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 32])
def test_signs_of_zeros_take_a_bit_of_each(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    weight = (fake_quantise(weight, Integers(4, 128)) if bits == 4 else weight).to(dtype)
    masked = weight * (torch.rand(256, 256) > 0.5)
    assert bool((masked.signbit() & (masked == 0)).any())
    packed = read_layers({"w": masked})[0].packed_bits / 8
    assert size(check_round_trip({"w": masked})) <= packed + 1.1 * int((masked == 0).sum()) / 8


def test_stack_of_quantised_matrices_takes_its_packed_size() -> None:
    torch.manual_seed(0)
    weight = fake_quantise(torch.randn(96, 128), Integers(4, 64)).reshape(3, 32, 128)
    for stack in (weight, weight.mT.contiguous()):
        assert size(check_round_trip({"w": stack})) <= 1.2 * weight.numel() * (4 + 32 / 64) / 8


CALIBRATION = {"calibration": [" ".join(SENTENCES * 8)] * 16, "samples": 16, "max_tokens": 48}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 256, "n_positions": 64}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, -1)])
def test_state_of_a_quantised_and_edited_gpt2(method: str, bits: int, group: int) -> None:
    model = tiny_model(GPT2Config(**GPT2))
    texts: dict[str, Any] = {} if method == "rtn" else CALIBRATION
    apply(model, tiny_tokenizer(), method, bits=bits, group_size=group, **texts)
    linears = decoder_linears(model)
    packed = sum(layer.packed_bits for layer in read_layers(linears)) / 8
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    others = size({name: tensor for name, tensor in state.items() if name not in linears})
    assert size(check_round_trip(state)) <= 1.2 * packed + others
    edited = next(iter(linears))
    before = size(state)
    state[edited] = state[edited] + torch.randn(len(state[edited]), 1) * torch.randn(state[edited].shape[1])
    stored = check_round_trip(state)
    assert edited in stored and not stored.keys() & linears.keys() - {edited}
    assert size(stored) < before


def test_state_of_the_quantised_embedded_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    apply(model, AutoTokenizer.from_pretrained(MODEL), "rtn", bits=4, group_size=128)
    linears = decoder_linears(model)
    packed = sum(layer.packed_bits for layer in read_layers(linears)) / 8
    assert size(check_round_trip({name: weight.detach() for name, weight in linears.items()})) <= 1.2 * packed
