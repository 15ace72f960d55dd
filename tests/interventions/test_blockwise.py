"""The walk through the blocks: what each group of linears sees, and what is left of it in the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.gptq import GptqSettings
from interventions.compress.kernels.blockwise import affordable_tokens, walk_blocks
from interventions.compress.kernels.working_memory import working_memory
from interventions.context import Context
from interventions.statistics import InputStatistics, collect_statistics, window_batches
from interventions.structure import LinearGroup, placement
from interventions.types import Resources
from tests.models import CONFIGS, SENTENCES, tiny_model

METHODS = ["gptq", "awq", "wanda", "sparsegpt"]
FAMILIES = ["llama-gqa", "gemma3", "phi3", "gpt_neox", "gptj", "opt", "gpt2"]


def walk(model: nn.Module, tokenizer: Any, work: Any, **options: Any) -> list[dict[str, Any]]:
    texts = Resources(calibration=options.pop("texts", SENTENCES))
    sums = options.pop("sums", InputStatistics)
    settings = GptqSettings(**{"samples": 9, "max_tokens": 60} | options)
    return walk_blocks(model, tokenizer, settings, texts, Context(), work, sums)


def plain_statistics(model: nn.Module, tokenizer: Any) -> dict[str, InputStatistics]:
    """What forward passes of the whole model in float32 give."""
    model = copy.deepcopy(model).float()
    linears = [linear for block in find_anatomy(model).blocks for linear in block.linears]
    return collect_statistics(model, window_batches(tokenizer, SENTENCES, samples=9, max_tokens=60), linears)


def halve(seen: dict[str, InputStatistics]) -> Any:
    """Return work that keeps what it saw and changes every weight."""

    def work(group: LinearGroup, statistics: InputStatistics) -> list[dict[str, Any]]:
        for linear in group.linears:
            seen[linear.name] = statistics
            assert linear.weight.dtype is torch.float32
            linear.set_weight_(linear.weight.round(decimals=1))
        return [{"linear": linear.name} for linear in group.linears]

    return work


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


@pytest.mark.parametrize("true_sequential", [False, True])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_without_propagation_each_group_sees_what_the_whole_model_shows(
    family: str, true_sequential: bool, tokenizer: Any
) -> None:
    model = tiny_model(family)
    wanted = plain_statistics(model, tokenizer)
    seen: dict[str, InputStatistics] = {}

    def look(group: LinearGroup, statistics: InputStatistics) -> list[dict[str, Any]]:
        seen.update((linear.name, statistics) for linear in group.linears)
        return []

    walk(model, tokenizer, look, sequential=False, true_sequential=true_sequential)
    assert seen.keys() == wanted.keys()
    for name, statistics in seen.items():
        assert same(statistics.gram, wanted[name].gram)
        assert same(statistics.abs_sum, wanted[name].abs_sum)
        assert statistics.count == wanted[name].count


@pytest.mark.parametrize("family", FAMILIES)
def test_fully_sequential_groups_see_the_changed_model(family: str, tokenizer: Any) -> None:
    """Whatever stands before a group was changed before the group was seen."""
    model = tiny_model(family)
    seen: dict[str, InputStatistics] = {}
    walk(model, tokenizer, halve(seen))
    after = plain_statistics(model, tokenizer)
    assert all(same(seen[name].gram, after[name].gram) for name in after)


@pytest.mark.parametrize("family", FAMILIES)
def test_propagation_between_blocks_alone(family: str, tokenizer: Any) -> None:
    """A block's groups see it as it was, behind blocks that have changed already."""
    before = tiny_model(family)
    model = copy.deepcopy(before)
    seen: dict[str, InputStatistics] = {}
    walk(model, tokenizer, halve(seen), true_sequential=False)
    between = copy.deepcopy(model)
    blocks, old = find_anatomy(between).blocks, find_anatomy(before).blocks
    blocks[1].module.load_state_dict(old[1].module.state_dict())
    first, second = plain_statistics(before, tokenizer), plain_statistics(between, tokenizer)
    assert all(same(seen[linear.name].gram, first[linear.name].gram) for linear in blocks[0].linears)
    assert all(same(seen[linear.name].gram, second[linear.name].gram) for linear in blocks[1].linears)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_outputs_of_the_unchanged_blocks_are_handed_on(true_sequential: bool, tokenizer: Any) -> None:
    model = tiny_model("llama-gqa")
    wanted = plain_statistics(model, tokenizer)
    seen: dict[str, InputStatistics] = {}
    walk(model, tokenizer, halve(seen), sequential=False, true_sequential=true_sequential)
    last = find_anatomy(model).blocks[1].group("attention_in").linears[0].name
    assert same(seen[last].gram, wanted[last].gram)


def test_weights_are_rounded_once_and_later_blocks_see_them_rounded(tokenizer: Any) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    seen: dict[str, InputStatistics] = {}

    def work(group: LinearGroup, statistics: InputStatistics) -> list[dict[str, Any]]:
        for linear in group.linears:
            seen[linear.name] = statistics
            linear.weight.mul_(1.003)  # less than bfloat16 tells apart, where it is a power of two
        return []

    walk(model, tokenizer, work, true_sequential=False)
    first = find_anatomy(model).blocks[1].group("attention_in").linears[0].name
    assert model.dtype is torch.bfloat16
    assert same(seen[first].gram, plain_statistics(model, tokenizer)[first].gram, 1e-2)


def test_texts_in_one_batch_or_many_are_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (64 << 20, 1 << 16):
        monkeypatch.setattr("interventions.compress.kernels.working_memory.CPU_BATCH", size)
        monkeypatch.setattr("interventions.compress.kernels.working_memory.LEAST_TOKENS", 1)
        seen: dict[str, InputStatistics] = {}
        model = tiny_model("gemma2")
        blocks = find_anatomy(model).blocks
        memory = working_memory(blocks, placement(model), "test")
        found.append((affordable_tokens(blocks[0], memory), seen))
        walk(model, tokenizer, halve(seen))
    (many, one), (few, other) = found
    assert few < 60 < many
    assert all(same(one[name].gram, other[name].gram) for name in one)


def test_a_model_spread_by_accelerate(tokenizer: Any) -> None:
    plain, spread = tiny_model("llama"), tiny_model("llama")
    for block in find_anatomy(spread).blocks:
        add_hook_to_module(block.module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    forwards = [block.module.forward for block in find_anatomy(spread).blocks]
    for model in (plain, spread):
        walk(model, tokenizer, halve({}))
    for one, other in zip(plain.parameters(), spread.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [block.module.forward for block in find_anatomy(spread).blocks] == forwards


def test_nothing_is_left_behind(tokenizer: Any) -> None:
    model = tiny_model("gptj")
    walk(model, tokenizer, halve({}))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())

    def fail(group: LinearGroup, statistics: InputStatistics) -> list[dict[str, Any]]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        walk(model, tokenizer, fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_windows_are_no_longer_than_the_models_context(tokenizer: Any) -> None:
    counts: list[int] = []

    def count(group: LinearGroup, statistics: InputStatistics) -> list[dict[str, Any]]:
        counts.append(statistics.count)
        return []

    walk(tiny_model("opt"), tokenizer, count, texts=(" ".join(SENTENCES) * 3,), max_tokens=4096, samples=1)
    assert set(counts) == {128}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ()}, "gptq needs calibration texts"),
        ({"texts": ("fine", " ")}, "text 1 is empty"),
        ({"samples": 1, "max_tokens": 20}, "20 calibration tokens are too few for the 32 columns of .*q_proj"),
    ],
)
def test_text_that_will_not_do_is_named(options: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=message):
        walk(tiny_model("llama"), tokenizer, halve({}), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_and_inputs_are_named(value: float, tokenizer: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(InterventionError, match=r"model.layers.1.mlp.up_proj.weight has NaN or infinite"):
        walk(model, tokenizer, halve({}))
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[2] = value
    with pytest.raises(InterventionError, match=r"inputs of model.layers.1.self_attn.q_proj .* are NaN or infinite"):
        walk(model, tokenizer, halve({}))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_bad_input_and_leaves_the_model(method: str, tokenizer: Any) -> None:
    def refused(model: nn.Module, texts: tuple[str, ...], message: str) -> None:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with pytest.raises(InterventionError, match=f"{method}: .*{message}" if texts else message):
            apply(model, tokenizer, method, calibration=texts)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())

    refused(tiny_model(), (), f"{method} needs calibration texts: give `calibration`")
    refused(tiny_model(), (SENTENCES[0],), r"too few for the 32 columns of model.layers.0.self_attn.q_proj.* samples")
    for value in (float("nan"), float("inf")):
        broken = tiny_model()
        with torch.no_grad():
            broken.model.layers[1].mlp.up_proj.weight[3, 4] = value
        refused(broken, SENTENCES, r"model.layers.1.mlp.up_proj.weight has NaN or infinite")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_final_is_not_run_again(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that start at the last linears give the very weights that full passes give."""
    found, runs = [], []
    for kept in (1 << 30, 0):
        monkeypatch.setattr("interventions.compress.kernels.working_memory.CPU_KEPT", kept)
        monkeypatch.setattr("interventions.compress.kernels.working_memory.CPU_BATCH", 1)
        monkeypatch.setattr("interventions.compress.kernels.working_memory.LEAST_TOKENS", 40)  # several batches
        model = tiny_model(family)
        first = find_anatomy(model).blocks[0].linears[0].module
        calls: list[int] = []
        kind = type(first)

        def counted(self: Any, x: Tensor, forward: Any = kind.forward, calls: list[int] = calls) -> Any:
            calls.append(1)
            return forward(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", counted)
            apply(model, tokenizer, "gptq", calibration=SENTENCES, max_tokens=40)
        found.append(model)
        runs.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True))
    assert runs[0] < runs[1]
