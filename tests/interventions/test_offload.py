"""Models computed part by part: what is where, that nothing else changes, and budgets that are kept.

The device of these tests is the CPU, too, to which weights are copied nevertheless; what a GPU would
refuse, tensors of two devices together, is seen by counting where weights are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

from interventions import Edit, InterventionError, apply
from interventions import offload as offloading
from interventions.anatomy import find_anatomy
from interventions.compress.kernels.working_memory import bytes_for, working_memory
from interventions.offload import offload
from interventions.statistics import collect_statistics, token_batches
from interventions.structure import Placement, limit_memory, placement, streaming
from tests.models import CONFIGS, SENTENCES, share_of_same_weights, tiny_model

CPU = torch.device("cpu")
METHODS = ["rtn", "magnitude", "gptq", "awq", "wanda", "sparsegpt"]
EDITS = [Edit("Mira Tolvan was born in", "Mira Tolvan", "Ossel")]


class Device:
    """Counts what is on a device that is the CPU in truth."""

    def __init__(self) -> None:
        self.now = self.peak = self.times = 0

    @contextmanager
    def held(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        tensors = [*module.parameters(), *module.buffers()]
        host = [tensor.data for tensor in tensors]
        size = sum(data.numel() * data.element_size() for data in host)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.times += 1
        try:
            for tensor, data in zip(tensors, host, strict=True):
                tensor.data = data.clone()
            yield
        finally:
            for tensor, data in zip(tensors, host, strict=True):
                tensor.data = data
            self.now -= size


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(offloading, "held", found.held)
    return found


def run(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    batch = token_batches(tokenizer, SENTENCES[:4], max_tokens=40)[0]
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_one_part_is_on_the_device_at_a_time(family: str, tokenizer: Any, device: Device) -> None:
    model = tiny_model(family)
    wanted = run(model, tokenizer)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    offload(model, CPU)
    assert torch.equal(run(model, tokenizer), wanted)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    anatomy = find_anatomy(model)
    parts = [*(block.module for block in anatomy.blocks), anatomy.embeddings, anatomy.head]
    sizes = [sum(t.numel() * t.element_size() for t in (*p.parameters(), *p.buffers())) for p in parts]
    assert device.peak == max(sizes)
    assert device.times >= len(anatomy.blocks) + 2


def test_a_pass_that_fails_or_has_gradients_leaves_the_weights_on_the_host(tokenizer: Any, device: Device) -> None:
    model = tiny_model()
    places = [p.data_ptr() for p in model.parameters()]
    offload(model, CPU)
    with pytest.raises(IndexError), torch.no_grad():
        model(input_ids=torch.tensor([[10_000]]))
    assert device.now == 0
    times = device.times
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    with torch.no_grad(), streaming(model, on=False):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert device.times == times
    assert [p.data_ptr() for p in model.parameters()] == places


def test_statistics_are_those_of_the_model(tokenizer: Any, device: Device) -> None:
    model = tiny_model("llama-gqa")
    batches = token_batches(tokenizer, SENTENCES, max_tokens=60, batch_size=4)
    linears = [block.mlp_output for block in find_anatomy(model).blocks]
    wanted = collect_statistics(model, batches, linears)
    offload(model, CPU)
    found = collect_statistics(model, batches, linears)
    assert device.times
    for name, statistics in wanted.items():
        assert torch.equal(found[name].gram, statistics.gram)


@pytest.mark.parametrize("method", [*METHODS, "memit"])
def test_steps_do_the_same_to_an_offloaded_model(method: str, tokenizer: Any, device: Device) -> None:
    plain, other = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    offload(other, CPU)
    other = copy.deepcopy(other)  # a second model in memory is one of its own
    data: dict[str, Any] = {"calibration": SENTENCES}
    if method == "memit":
        data |= {"edits": EDITS, "layers": [0], "covariance_tokens": 64}
    reports = [apply(model, tokenizer, method, **data) for model in (plain, other)]
    assert reports[0].changed == reports[1].changed
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(run(plain, tokenizer), run(other, tokenizer))


def test_a_copy_computes_with_its_own_weights(tokenizer: Any) -> None:
    model = tiny_model()
    offload(model, CPU)
    wanted = run(model, tokenizer)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(other, tokenizer), wanted)
    assert placement(other).streamed
    assert placement(other).switch is not placement(model).switch


def test_generation_knows_the_arguments_of_the_model(tokenizer: Any) -> None:
    plain, model = tiny_model(), tiny_model()
    offload(model, CPU)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("method", ["gptq", "sparsegpt", "wanda", "awq"])
@pytest.mark.parametrize("more", [400, 40_000])
def test_a_memory_budget_makes_batches_small_and_little_else(method: str, more: int, tokenizer: Any) -> None:
    """Sums over smaller batches round otherwise: a weight here and there may fall on the other side."""
    plain, tight = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    needed = max(bytes_for(block) for block in find_anatomy(tight).blocks)
    limit_memory(tight, needed + more)
    for model in (plain, tight):
        apply(model, tokenizer, method, calibration=SENTENCES, **({"search_tokens": None} if method == "awq" else {}))
    assert share_of_same_weights(plain, tight) > 0.99


def test_a_budget_is_divided_up() -> None:
    blocks = find_anatomy(tiny_model()).blocks
    needed = bytes_for(blocks[0])
    memory = working_memory(blocks, Placement(CPU, needed + 4000), "gptq")
    assert (memory.batch, memory.kept, memory.hidden) == (1000, 1000, 2000)
    gpu = torch.device("cuda", 0)
    assert memory.where_to_rest(2000, gpu) == gpu
    assert memory.where_to_rest(2001, gpu) == CPU
    assert working_memory(blocks, Placement(CPU), "gptq").where_to_rest(1 << 60, gpu) == gpu


@pytest.mark.parametrize("method", ["gptq", "sparsegpt", "wanda", "awq"])
def test_a_budget_too_small_for_a_block_is_an_error(method: str, tokenizer: Any) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    limit_memory(model, 4096)
    with pytest.raises(
        InterventionError, match=rf"{method}: the memory budget of 3.81e-06 GiB .* model.layers.0, which"
    ):
        apply(model, tokenizer, method, calibration=SENTENCES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_that_accelerate_offloaded_are_refused(tokenizer: Any) -> None:
    model = cpu_offload(tiny_model(), CPU)
    with pytest.raises(InterventionError, match=r"model.embed_tokens.weight has no values"):
        apply(model, tokenizer, "rtn")


def test_what_cannot_be_offloaded_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(InterventionError, match="more than nothing, not 0 bytes"):
        limit_memory(model, 0)
    offload(model, CPU)
    with pytest.raises(InterventionError, match="part by part already"):
        offload(model, CPU)
    with pytest.raises(InterventionError, match=r"model.embed_tokens.weight is elsewhere"):
        offload(tiny_model().to("meta"), CPU)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_spread_by_device_map(method: str, tokenizer: Any) -> None:
    plain, spread = tiny_model("qwen2"), tiny_model("qwen2")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": torch.device("cpu")}
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = dispatch_model(spread, places | rest, main_device="cpu", force_hooks=True)
    for model in (plain, spread):
        apply(model, tokenizer, method, calibration=SENTENCES)
    for one, two in zip(plain.parameters(), spread.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(run(plain, tokenizer), run(spread, tokenizer))
