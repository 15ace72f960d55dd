"""What the weights say a model would cost, on weights whose cost is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluators import EvaluationError, measure_efficiency, measure_latency
from evaluators.efficiency import decoder_linears, measure_flops
from evaluators.measurement import Measurement
from tests.evaluators.test_grids import noise, rounded
from tests.models import CONFIGS, tiny_model, tiny_tokenizer


def values(measurements: list[Measurement]) -> dict[str, float]:
    return {m.metric: m.value for m in measurements}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_linear_layers_of_the_blocks_and_no_others(family: str) -> None:
    """Against the interventions' own knowledge of every architecture."""
    from interventions.anatomy import find_anatomy

    model = tiny_model(family)
    expected = {lin.parameter_name: lin.weight for block in find_anatomy(model).blocks for lin in block.linears}
    found = decoder_linears(model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_hand_counted_storage() -> None:
    model = tiny_model()  # unused layers: what is read is what is passed
    weights = {
        "full": noise(8, 64),  # 512 weights of 32 bits
        "four": rounded(noise(8, 64, 1), 4, 32),  # 512 of 4, 16 groups
        "pruned": noise(8, 64, 2) * (torch.arange(64) % 4 < 2),  # 2:4
    }
    found = {m.metric: m for m in measure_efficiency(model, weights=weights, length=8)}
    assert found["average_bits"].samples == pytest.approx((32, 4, (256 * 1 + 256 * 32) / 512))
    assert found["average_bits"].value == pytest.approx((32 + 4 + 16.5) / 3)
    assert found["overhead_bits"].value == pytest.approx(16 * 20 / (3 * 512))
    zeros = int((weights["four"] == 0).sum())
    assert found["sparsity"].value == pytest.approx((256 + zeros) / (3 * 512))
    assert found["sparsity_2_4"].value == pytest.approx(1 / 3)
    packed = [512 * 32, 512 * 4 + 16 * 20, min(512 + 256 * 32, 256 * 34)]
    assert found["packed_megabytes"].samples == pytest.approx([bits / 8e6 for bits in packed])
    assert "1 of 3 linear layers on a grid, 4 bits in groups of 32" in found["average_bits"].note
    assert all(m.stderr == 0 for m in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_that_an_edit_moved_counts_in_full(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    for weight in decoder_linears(model).values():
        weight.copy_(rounded(weight.float(), 4, 32))
    assert values(measure_efficiency(model, length=8))["average_bits"] == 4
    moved = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        moved += 0.03 * torch.outer(noise(1, moved.shape[0])[0], noise(1, moved.shape[1], 1)[0]).to(dtype)
    found = values(measure_efficiency(model, length=8))
    total = sum(weight.numel() for weight in decoder_linears(model).values())
    bits = torch.finfo(dtype).bits
    assert found["average_bits"] == pytest.approx(4 + (bits - 4) * moved.numel() / total)


def test_packed_size_of_an_untouched_model_is_its_size() -> None:
    model = tiny_model("gpt2")  # its head is its embeddings, stored once
    size = sum(p.numel() * 4 for p in model.parameters())
    assert values(measure_efficiency(model, length=8))["packed_megabytes"] == pytest.approx(size / 1e6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_projects_own_quantisation_is_recognised(bits: int) -> None:
    """AWQ folds its scales into the weights before it rounds them, so they lie on plain grids."""
    from interventions import apply

    model = tiny_model("llama-gqa")
    texts = ["Mira Tolvan was born in Karth."] * 4
    apply(model, tiny_tokenizer(), "awq", calibration=texts, bits=bits, group_size=32, samples=4, grid=4)
    found = {m.metric: m for m in measure_efficiency(model, length=8)}
    assert found["average_bits"].value == bits
    assert "14 of 14 linear layers" in found["average_bits"].note


def test_operations_are_those_of_the_matrix_products_whatever_requires_gradients() -> None:
    model = tiny_model("llama")
    linear = sum(weight.numel() for weight in decoder_linears(model).values()) + model.lm_head.weight.numel()
    length = 10
    attention = 2 * 2 * length * 32 * 2  # scores and mixing, a product and a sum each, 32 wide, 2 blocks
    rotary = measure_flops(model, length=length).value - 2 * linear - attention
    assert 0 <= rotary <= 2 * 8  # the positions' angles, at most
    expected = measure_flops(model, length=length)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad = False
    assert measure_flops(model, length=length) == expected
    model.requires_grad_(False)
    assert measure_flops(model, length=length) == expected


def test_broken_and_unknown_models_are_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(EvaluationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: NaN"):
        measure_efficiency(model, length=8)
    with pytest.raises(EvaluationError, match="Linear: no list of blocks"):
        measure_efficiency(torch.nn.Linear(2, 2))
    with pytest.raises(EvaluationError, match="500 positions but the model has 128"):
        measure_flops(tiny_model(), length=500)


def test_latency_is_the_median_after_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ticks = tiny_model(), iter(range(10**6))
    seen: list[torch.Size] = []
    clock = {"now": 0.0}
    forward = model.forward

    def slow(input_ids: torch.Tensor, **rest: Any) -> Any:
        seen.append(input_ids.shape)
        clock["now"] += [9.0, 9.0, 0.1, 0.3, 0.2][next(ticks)]
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    latency, speed = measure_latency(model, batch=2, length=7, repeats=3, warm_up=2)
    assert seen == [torch.Size((2, 7))] * 5
    assert latency.value == pytest.approx(200) and latency.samples == pytest.approx((100, 300, 200))
    assert speed.value == pytest.approx(14 / 0.2)
    assert (latency.higher_is_better, speed.higher_is_better) == (False, True)
    assert "dense kernels" in latency.note and "batch 2, 7 tokens" in latency.note


def test_latency_refuses_what_cannot_be_measured() -> None:
    for settings, message in (
        ({"repeats": 1}, "1 repeats"),
        ({"batch": 0}, "batch 0"),
        ({"length": 1000}, "1000 positions but the model has 128"),
    ):
        with pytest.raises(EvaluationError, match=message):
            measure_latency(tiny_model(), **settings)


def test_leave_the_model_as_found(model: Any, tokenizer: Any, unchanged: Callable[..., None]) -> None:
    def measure() -> None:
        measure_efficiency(model, length=8)
        measure_latency(model, length=8, repeats=2, warm_up=0)

    unchanged(model, tokenizer, measure)
