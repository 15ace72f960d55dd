"""Routed experts are found, seen and changed one by one, whatever way a model stores them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxFFN

from interventions import apply
from interventions.compress.gptq import GptqSettings
from interventions.compress.kernels.blockwise import walk_stages
from interventions.compress.kernels.capture import inputs_of
from interventions.context import Context
from interventions.experts import ExpertLayer, every_token, find_experts
from interventions.shared_statistics import StatisticsCache
from interventions.statistics import InputStatistics, window_batches
from interventions.structure import LinearGroup
from interventions.types import InterventionError, Resources
from tests.experts import CONFIGS, tiny_experts
from tests.models import SENTENCES, tiny_tokenizer

TEXTS = [" ".join(SENTENCES)] * 4
LLAMA_LIKE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "phimoe")


def blocks_of(model: Any) -> list[tuple[str, nn.Module]]:
    return [(f"model.layers.{index}", block) for index, block in enumerate(model.model.layers)]


def layers_of(model: Any) -> list[ExpertLayer]:
    return [layer for name, block in blocks_of(model) for layer in find_experts(name, block)]


def by_hand(layer: ExpertLayer, expert: int, x: Tensor, family: str) -> Tensor:
    """Compute an expert from its slices, by the formula of its family."""
    into, out = layer.groups[expert].linears, layer.groups[layer.count + expert].linears[0]
    both = torch.cat([linear(x, part.weight, part.bias) for part in into], dim=1)
    if family == "gpt_oss":
        gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        middle = (up + 1) * gate * torch.sigmoid(gate * 1.702)
    else:
        gate, up = both.chunk(2, dim=1)
        middle = silu(gate) * up
    return linear(middle, out.weight, out.bias)


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in ("llama4", "jetmoe")])
def test_an_expert_computes_what_its_slices_say(family: str) -> None:
    model = tiny_experts(family)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    layers = layers_of(model)
    assert len(layers) == (1 if family in ("glm4_moe", "deepseek_v3") else 2)
    for layer in layers:
        assert layer.count == 8
        assert layer.router is not None
        assert layer.router.weight.shape == (8, 32)
        chosen = torch.full((5, 1), 6)
        wanted = layer.module(x, chosen, torch.ones(5, 1))
        assert torch.allclose(by_hand(layer, 6, x, family), wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
def test_experts_that_choose_inside_of_their_module(family: str) -> None:
    model = tiny_experts(family)
    (layer, _) = layers_of(model)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    if family == "llama4":
        experts = layer.module.experts
        wanted = experts(x.repeat(8, 1)).view(8, 5, 32)[6]
        assert torch.allclose(by_hand(layer, 6, x, family), wanted, atol=1e-5)
    else:
        sizes = [0] * 6 + [5, 0]
        module = layer.module
        both = module.input_linear(x, sizes).chunk(2, dim=1)
        wanted = module.output_linear(module.activation(both[0]) * both[1], sizes)
        assert torch.allclose(by_hand(layer, 6, x, family), wanted, atol=1e-5)


class Listed(nn.Module):
    """A block with experts as modules, as code that comes with models has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, 8)
        best = self.gate(x).argmax(dim=1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if bool((best == number).any()):
                out[best == number] = expert(x[best == number])
        return out.view(hidden.shape)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(silu(self.w1(x)) * self.w3(x))
        return out


def test_a_list_of_modules_beside_a_router() -> None:
    block = nn.ModuleDict({"mlp": Listed(), "others": nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])})
    (layer,) = find_experts("b", block)
    assert layer.router is not None
    assert layer.router.name == "b.mlp.gate"
    assert [linear.name for linear in layer.groups[1].linears] == ["b.mlp.experts.1.w1", "b.mlp.experts.1.w3"]
    assert [linear.name for linear in layer.groups[5].linears] == ["b.mlp.experts.1.w2"]
    assert layer.groups[5].key == "mlp_out mlp.experts.1"
    assert all(group.previous is not None for group in layer.groups[4:])


def test_a_dense_block_has_no_experts() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    assert find_experts("b", block) == []


def test_only_experts_whose_up_projection_is_a_factor_can_be_scaled() -> None:
    scaled = {family: layers_of(tiny_experts(family))[0].groups[-1].previous is not None for family in CONFIGS}
    assert scaled == {family: family != "gpt_oss" for family in CONFIGS}


def seen_statistics(model: Any, texts: list[str], **settings: Any) -> dict[str, InputStatistics]:
    found = {}

    def work(groups: Any, statistics: Any) -> list[dict[str, Any]]:
        found.update({group.linears[0].name: sums for group, sums in zip(groups, statistics, strict=True)})
        return []

    given = {"samples": 3, "max_tokens": 48, "true_sequential": False, "sequential": False} | settings
    resources = Resources(calibration=tuple(texts))
    walk_stages(model, tiny_tokenizer(), GptqSettings(**given), resources, Context(), work, InputStatistics)
    return found


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_statistics_of_an_expert_are_those_of_the_tokens_routed_to_it(family: str) -> None:
    model = tiny_experts(family)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, module in model.named_modules():
        if name.endswith("experts") and "shared" not in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: calls.setdefault(name, []).append((args[0], args[1]))
            )
    texts = [" ".join(SENTENCES)] * 3
    tokenizer = tiny_tokenizer()
    batches = window_batches(tokenizer, texts, samples=3, max_tokens=48, padded=False)
    for batch in batches:
        assert bool(batch["attention_mask"].all())
        model(**batch)
    wanted = {
        f"{name}.gate_up_proj.{expert}": torch.cat([x[(chosen == expert).any(dim=1)] for x, chosen in pairs])
        for name, pairs in calls.items()
        for expert in range(8)
    }
    found = seen_statistics(tiny_experts(family), texts)
    reached = 0
    for name, x in wanted.items():
        if len(x):
            reached += 1
            assert found[name].count == len(x)
            assert torch.allclose(found[name].gram, x.T @ x, rtol=1e-3, atol=1e-3)
    assert reached >= 6


METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3, "group_size": 8},
    "gptq": {"bits": 3, "group_size": 8, "samples": 3, "max_tokens": 48},
    "awq": {"bits": 3, "group_size": 8, "samples": 3, "max_tokens": 48, "grid": 4},
    "wanda": {"samples": 3, "max_tokens": 48},
    "sparsegpt": {"samples": 3, "max_tokens": 48},
    "magnitude": {},
}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_change_every_expert_and_no_router(method: str, family: str) -> None:
    model = tiny_experts(family)
    routers = {name: p.clone() for name, p in model.named_parameters() if ".gate." in name or "router" in name}
    assert routers
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = apply(model, tiny_tokenizer(), method, calibration=TEXTS, **METHODS[method])
    now = dict(model.named_parameters())
    for name, router in routers.items():
        assert torch.equal(router, now[name])
    for layer in layers_of(model):
        for group in layer.groups:
            for part in group.linears:
                weight = part.weight
                assert not torch.equal(weight, part.within(before[part.parameter_name]))
                if "bits" in METHODS[method]:
                    levels = [len(set(values.tolist())) for row in weight for values in row.split(8)]
                    assert max(levels) <= 8
                else:
                    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= set(report.changed)


def test_rounding_at_eight_bits_hardly_moves_the_logits() -> None:
    for family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"):
        model = tiny_experts(family, num_experts_per_tok=8)  # so that no token changes its experts
        logits = model(torch.arange(20).unsqueeze(0)).logits
        apply(model, tiny_tokenizer(), "rtn", bits=8, group_size=8)
        assert (model(torch.arange(20).unsqueeze(0)).logits - logits).norm() < 0.02 * logits.norm()


@pytest.fixture
def lonely() -> Any:
    """Return a model whose router never chooses expert 3."""
    model = tiny_experts("gpt_oss")
    for block in model.model.layers:
        block.mlp.router.bias.data[3] = -1e4
    return model


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_that_no_token_reached_is_rounded_to_nearest(lonely: Any, method: str) -> None:
    rounded = copy.deepcopy(lonely)
    apply(rounded, tiny_tokenizer(), "rtn", bits=3, group_size=8)
    report = apply(lonely, tiny_tokenizer(), method, calibration=TEXTS, **METHODS[method])
    for ours, nearest in zip(layers_of(lonely), layers_of(rounded), strict=True):
        for expert in (3, 8 + 3):
            one, other = ours.groups[expert].linears[0].weight, nearest.groups[expert].linears[0].weight
            assert torch.allclose(one, other, atol=1e-6)
        assert not torch.allclose(ours.groups[2].linears[0].weight, nearest.groups[2].linears[0].weight, atol=1e-3)
    (warning,) = [line for line in report.warnings if "no calibration token" in line]
    assert " of 16 experts (" in warning
    assert "such as model.layers.0.mlp.experts.3: their weights" in warning
    assert f"{method}.calibrate_all_experts=true" in warning


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_that_no_token_reached_is_pruned_by_magnitude(lonely: Any, method: str) -> None:
    before = [layer.groups[3].linears[0].weight.clone() for layer in layers_of(lonely)]
    report = apply(lonely, tiny_tokenizer(), method, calibration=TEXTS, **METHODS[method])
    for layer, old in zip(layers_of(lonely), before, strict=True):
        new = layer.groups[3].linears[0].weight
        kept = new != 0
        assert torch.equal(new[kept], old[kept])
        rows = list(zip(old, kept, strict=True)) if method == "wanda" else [(old.flatten(), kept.flatten())]
        assert all(row[~stays].abs().max() <= row[stays].abs().min() for row, stays in rows)
    assert any("no calibration token" in line for line in report.warnings)


def test_experts_with_few_tokens_are_no_error() -> None:
    report = apply(tiny_experts(), tiny_tokenizer(), "gptq", calibration=TEXTS, bits=4, samples=1, max_tokens=40)
    (warning,) = [line for line in report.warnings if "fewer calibration tokens" in line]
    assert "of 16 experts" in warning


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
def test_every_expert_may_be_calibrated_on_all_tokens(family: str) -> None:
    model = tiny_experts(family)
    routed = seen_statistics(tiny_experts(family), TEXTS)
    every = seen_statistics(model, TEXTS, calibrate_all_experts=True)
    for layer in layers_of(model):
        x = [every[group.linears[0].name] for group in layer.groups]
        assert {sums.count for sums in x} == {3 * 48}
        assert all(torch.allclose(sums.gram, x[0].gram) for sums in x[:8])  # all read the same tokens
    for name, sums in every.items():
        if "experts" not in name:
            assert torch.allclose(sums.gram, routed[name].gram, rtol=1e-4, atol=1e-3)


def test_experts_that_their_module_chooses_cannot_all_be_calibrated() -> None:
    layers = layers_of(tiny_experts("llama4"))
    wanted = pytest.raises(InterventionError, match=r"chooses the experts itself.*calibrate_all_experts=false")
    with wanted, every_token(nn.Module(), layers, "gptq"):
        pass


def inputs_seen(layer: ExpertLayer, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Return all inputs of the groups of a layer while something runs, by name of the first linear."""
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad(), inputs_of(layer.groups, lambda g, x: seen.setdefault(g.linears[0].name, []).append(x)):
        run()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_inputs_of_experts_that_all_get_every_token_weighted() -> None:
    (layer, _) = layers_of(tiny_experts("llama4"))
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(1))
    scores, _ = layer.module.router(x[0])
    found = inputs_seen(layer, lambda: layer.module(x))
    for expert in range(8):
        name = layer.groups[expert].linears[0].name
        wanted = (x[0] * scores[:, expert : expert + 1])[scores[:, expert] > 0]
        assert torch.allclose(found[name], wanted) if len(wanted) else not len(found[name])


def test_inputs_of_experts_of_parallel_layers() -> None:
    (layer, _) = layers_of(tiny_experts("jetmoe"))
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(1))
    chosen = layer.module.router.layer(x[0]).topk(2, dim=1).indices
    found = inputs_seen(layer, lambda: layer.module(x))
    for expert in range(8):
        wanted = x[0][(chosen == expert).any(dim=1)]
        seen = found[layer.groups[expert].linears[0].name]
        assert len(seen) == len(wanted)
        assert torch.allclose(seen.T @ seen, wanted.T @ wanted, atol=1e-4)  # in any order


def test_inputs_of_separate_experts_and_all_tokens_for_each() -> None:
    block = nn.ModuleDict({"mlp": Listed()})
    (layer,) = find_experts("b", block)
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))
    best = block["mlp"].gate(x.view(-1, 8)).argmax(dim=1)
    before = block["mlp"](x)
    found = inputs_seen(layer, lambda: block["mlp"](x))
    for expert in range(4):
        name = layer.groups[expert].linears[0].name
        assert len(found.get(name, ())) == int((best == expert).sum())
    with every_token(block, [layer], "gptq") as extra:
        rows: dict[str, list[Tensor]] = {}

        def see(group: LinearGroup, x: Tensor) -> None:
            if extra():
                rows.setdefault(group.key, []).append(x)

        with inputs_of(layer.groups, see):
            assert torch.equal(block["mlp"](x), before)
    assert {key: sum(len(part) for part in parts) for key, parts in rows.items()} == {g.key: 20 for g in layer.groups}


def test_matrices_stacked_in_two_dimensions() -> None:
    config = DbrxFFNConfig(hidden_size=32, ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2)
    block = nn.ModuleDict({"ffn": DbrxFFN(SimpleNamespace(ffn_config=config))})
    for parameter in block.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    (layer,) = find_experts("b", block)
    assert (layer.count, layer.form) == (4, "routed")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    weights = {linear.name.split(".")[-2]: linear.weight for g in (2, 6) for linear in layer.groups[g].linears}
    wanted = layer.module(x, torch.full((5, 1), 2), torch.ones(5, 1)).view(5, 32)
    made = linear(silu(linear(x, weights["w1"])) * linear(x, weights["v1"]), weights["w2"])
    assert torch.allclose(made, wanted, rtol=1e-4, atol=1e-3)
    assert layer.groups[6].previous is not None


def test_cached_statistics_of_experts_change_nothing() -> None:
    settings = METHODS["gptq"] | {"sequential": False, "true_sequential": False}
    cache, models = StatisticsCache(), [tiny_experts() for _ in range(3)]
    for model, shared in zip(models, (None, cache.of("base"), cache.of("base")), strict=True):
        apply(model, tiny_tokenizer(), "gptq", calibration=TEXTS, statistics=shared, **settings)
    assert cache.bytes > 0
    for other in models[1:]:
        assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_in_half_precision_keep_their_dtype(method: str) -> None:
    model = tiny_experts("gpt_oss", dtype=torch.bfloat16)
    apply(model, tiny_tokenizer(), method, calibration=TEXTS, **METHODS[method])
    for layer in layers_of(model):
        assert all(part.weight.dtype == torch.bfloat16 for group in layer.groups for part in group.linears)
        assert len(set(layer.groups[0].linears[0].weight[0].tolist())) < 32


def test_gptq_errs_less_than_rounding_on_every_expert_that_many_tokens_reach() -> None:
    model = tiny_experts()
    statistics = seen_statistics(copy.deepcopy(model), TEXTS)
    settings = METHODS["gptq"] | {"sequential": False, "true_sequential": False}
    models = {"gptq": copy.deepcopy(model), "rtn": copy.deepcopy(model)}
    apply(models["gptq"], tiny_tokenizer(), "gptq", calibration=TEXTS, **settings)
    apply(models["rtn"], tiny_tokenizer(), "rtn", **METHODS["rtn"])
    better = total = 0
    for layer, ours, nearest in zip(*map(layers_of, (model, models["gptq"], models["rtn"])), strict=True):
        for number, group in enumerate(layer.groups):
            sums = statistics[group.linears[0].name]
            if sums.count >= group.in_features:
                old = group.linears[0].weight
                deltas = [other.groups[number].linears[0].weight - old for other in (ours, nearest)]
                errors = [float(((delta @ sums.gram) * delta).sum()) for delta in deltas]
                total += 1
                better += errors[0] < errors[1]
    assert total >= 8
    assert better == total
