"""AWQ against a dense formulation, and the promises of the step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.kernels.awq_search import clip_weight, mean_relative_magnitude, scales_of
from interventions.compress.kernels.folding import gain_offset
from interventions.compress.kernels.integers import Integers
from interventions.compress.schemes import Scheme
from interventions.statistics import token_batches, window_batches
from interventions.structure import Block
from tests.engines.states import TEXTS as LONG_TEXTS
from tests.engines.states import TOKENS, packable_model
from tests.interventions.awq_dense import dense_clip, dense_losses, dense_round, dense_scales
from tests.models import CONFIGS, SENTENCES, tiny_model

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]
SAMPLES, CUT = 8, 24
REFERENCE = json.loads(Path(__file__).with_name("awq_reference.json").read_text())
"""What AutoAWQ left: by block, the last with the final norm, the squared error of its output over that output."""


def run(model: Any, tokenizer: Any, **settings: Any) -> Any:
    """Apply AWQ to windows that are all full, so that the dense formulation needs no mask."""
    defaults: dict[str, Any] = {"group_size": 16, "samples": SAMPLES, "max_tokens": CUT, "search_tokens": None}
    return apply(model, tokenizer, "awq", calibration=TEXTS, **defaults | settings)


def ids_of(tokenizer: Any) -> Tensor:
    (batch,) = window_batches(tokenizer, TEXTS, samples=SAMPLES, max_tokens=CUT)
    return batch["input_ids"]


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    return model(ids_of(tokenizer)).logits.float()  # type: ignore[no-any-return]


def block_of(model: Any, index: int) -> Block:
    return find_anatomy(model).blocks[index]


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "llama-odd", "llama-bias", "gemma2", "opt", "gpt2"])
def test_the_scale_chosen_is_the_best_of_all_twenty(family: str, duo: bool, tokenizer: Any) -> None:
    model = tiny_model(family)
    report = run(copied := copy.deepcopy(model), tokenizer, bits=3, duo_scaling=duo)
    assert copied is not model
    chosen = iter(report.details["groups"])
    for block in find_anatomy(model).blocks:
        for group in block.linear_groups:
            found = next(chosen)
            assert found["linears"] == [linear.name for linear in group.linears]
            if group.previous is None:
                assert found["ratio"] is None
                continue
            losses = dense_losses(model, ids_of(tokenizer), group, 3, 16, duo)
            assert found["loss"] == pytest.approx(min(losses), rel=1e-3)
            assert losses[round(found["ratio"] * 20)] == pytest.approx(min(losses), rel=1e-3)


def errors_by_group(delta: Tensor, x: Tensor) -> Tensor:
    parts = [x[:, i : i + 16] @ delta[:, i : i + 16].t() for i in range(0, delta.shape[1], 16)]
    return torch.stack(parts).pow(2).mean(dim=1)


@pytest.mark.parametrize("clip", [False, True])
def test_scales_clipping_and_grids_reach_the_weights(clip: bool, tokenizer: Any) -> None:
    """The written weights are round(clip(W s)) with s of the reported exponent, and nothing else."""
    before = tiny_model("llama")
    after = copy.deepcopy(before)
    report = run(after, tokenizer, bits=3, clip=clip)
    ratios = [group["ratio"] for group in report.details["groups"][:4]]
    old, new = block_of(before, 0), block_of(after, 0)
    inputs: dict[str, Tensor] = {}
    for group in old.linear_groups:
        group.linears[0].module.register_forward_pre_hook(
            lambda module, args, role=group.role: inputs.update({role: args[0].reshape(-1, args[0].shape[-1])})
        )
    logits(before, tokenizer)
    scales = {}
    for group, ratio in zip(old.linear_groups, ratios, strict=True):
        weights = [linear.weight for linear in group.linears]
        scales[group.role] = dense_scales(ratio, inputs[group.role], weights, 16, True)
    rows = {"v_proj": scales["attention_out"], "up_proj": scales["mlp_out"]}
    close: list[Tensor] = []
    for group, new_group in zip(old.linear_groups, new.linear_groups, strict=True):
        for linear, new_linear in zip(group.linears, new_group.linears, strict=True):
            leaf = linear.name.rpartition(".")[2]
            W = linear.weight * scales[group.role]
            if leaf in rows:
                W = W / rows[leaf].unsqueeze(1)
            x = inputs[group.role] / scales[group.role]
            clipped = dense_clip(W, x, 3, 16)[0] if clip and leaf not in ("q_proj", "k_proj") else W
            expected = dense_round(clipped, 3, 16)
            if clipped is W:
                torch.testing.assert_close(new_linear.weight, expected, rtol=1e-3, atol=1e-4)
            left, least = (errors_by_group(w - W, x) for w in (new_linear.weight, expected))
            close.append(torch.isclose(left, least, rtol=1e-3, atol=1e-6).flatten())
    # A group clipped on both sides has its zero point half-way between two levels, where the last bit of a
    # weight decides: a rare group may leave another error.
    assert float(torch.cat(close).float().mean()) > 0.97
    norm = before.model.layers[0].input_layernorm.weight / scales["attention_in"]
    torch.testing.assert_close(after.model.layers[0].input_layernorm.weight, norm)


def test_the_gain_of_a_norm_is_found_by_running_it() -> None:
    assert gain_offset(tiny_model("gemma").model.layers[0].input_layernorm) == 1
    assert gain_offset(tiny_model("llama").model.layers[0].input_layernorm) == 0
    assert gain_offset(tiny_model("gpt2", dtype=torch.bfloat16).transformer.h[0].ln_1) == 0
    strange = nn.LayerNorm(8)
    strange.register_forward_hook(lambda module, args, output: output**2)
    with pytest.raises(InterventionError, match="LayerNorm"):
        gain_offset(strange)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_architecture_at_four_bits(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    wanted = logits(model, tokenizer)
    report = run(model, tokenizer, bits=4)
    for block in find_anatomy(model).blocks:
        for linear in block.linears:
            assert linear.parameter_name in report.changed
            for start in range(0, linear.in_features, 16):
                for row in linear.weight[:, start : start + 16]:
                    assert len(row.unique()) <= 16
    error = relative_error(logits(model, tokenizer), wanted)
    assert 0 < error < 0.5
    untouched = {"embeddings", "final_norm", "head"}
    anatomy = find_anatomy(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for part in untouched:
        for parameter in getattr(anatomy, part).parameters():
            assert names[id(parameter)] not in report.changed


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_fewer_bits_do_more_harm(tokenizer: Any) -> None:
    wanted = logits(tiny_model("llama"), tokenizer)
    errors = []
    for bits in (8, 6, 4, 3, 2):
        model = tiny_model("llama")
        run(model, tokenizer, bits=bits)
        errors.append(relative_error(logits(model, tokenizer), wanted))
    assert errors == sorted(errors)
    assert errors[0] < 0.02
    assert errors[-1] > 0.3


def test_scales_and_clipping_help_where_a_channel_stands_out(tokenizer: Any) -> None:
    """By a tenth at least on each of several models; how much on one of them, the last bit of a level decides."""

    def skewed(seed: int) -> Any:
        model = tiny_model("llama", seed=seed)
        with torch.no_grad():
            for block in model.model.layers:
                block.input_layernorm.weight[::7] *= 20
                block.post_attention_layernorm.weight[::7] *= 20
        return model

    ratios = []
    for seed in range(4):
        wanted = logits(skewed(seed), tokenizer)
        awq, plain = skewed(seed), skewed(seed)
        run(awq, tokenizer, bits=3)
        with torch.no_grad():
            for block in find_anatomy(plain).blocks:
                for linear in block.linears:
                    linear.set_weight_(dense_round(linear.weight, 3, 16))
        ratios.append(relative_error(logits(awq, tokenizer), wanted) / relative_error(logits(plain, tokenizer), wanted))
    assert max(ratios) < 0.9, ratios


def test_levels_and_dtype_hold_in_half_precision(tokenizer: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = tiny_model("llama-gqa", dtype=dtype)
        report = run(model, tokenizer, bits=2)
        assert all(parameter.dtype is dtype for parameter in model.parameters())
        for linear in block_of(model, 1).linears:
            assert linear.parameter_name in report.changed
            assert max(len(row.unique()) for row in linear.weight[:, 16:32]) <= 4


@pytest.mark.parametrize("group_size", [-1, 7, 32, 1000])
def test_group_sizes(group_size: int, tokenizer: Any) -> None:
    model = tiny_model("llama-odd")
    run(model, tokenizer, bits=3, group_size=group_size)
    for linear in block_of(model, 0).linears:
        width = linear.in_features if group_size == -1 else group_size
        for start in range(0, linear.in_features, width):
            assert max(len(row.unique()) for row in linear.weight[:, start : start + width]) <= 8


def test_clipping_takes_the_best_threshold_of_each_group() -> None:
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(6, 20, generator=generator) ** 3
    x = torch.randn(50, 20, generator=generator) * torch.rand(20, generator=generator)
    clipped, share = clip_weight(W, x.t() @ x, Integers(3, 8, scales=torch.float16))
    expected, shrunk = dense_clip(W, x, 3, 8)
    torch.testing.assert_close(clipped, expected)
    assert share == pytest.approx(shrunk / 18)
    assert shrunk > 0


def test_queries_and_keys_are_not_clipped(tokenizer: Any) -> None:
    def without(text: str, clip: bool) -> dict[str, Tensor]:
        model = tiny_model("llama")
        run(model, tokenizer, bits=3, clip=clip)
        return {name: p for name, p in model.named_parameters() if text in name and ".0." in name}

    for leaf, same in (("q_proj", True), ("k_proj", True), ("v_proj", False), ("down_proj", False)):
        pairs = zip(without(leaf, True).values(), without(leaf, False).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is same


def test_padding_changes_nothing(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of different lengths in one batch give what the same windows give one at a time."""
    together, alone = tiny_model("opt"), tiny_model("opt")
    settings: dict[str, Any] = {"bits": 3, "group_size": 16, "search_tokens": None, "max_tokens": 100}
    a = apply(together, tokenizer, "awq", calibration=TEXTS[:2], **settings)
    monkeypatch.setattr("interventions.compress.awq.BATCH_TOKENS", 1)
    b = apply(alone, tokenizer, "awq", calibration=TEXTS[:2], **settings)
    text = tokenizer("\n\n".join(TEXTS[:2]), add_special_tokens=False)["input_ids"]
    assert len(text) % 99  # the last window is shorter
    assert a.details["calibration_tokens"] == len(text) + -(-len(text) // 99)
    for one, other in zip(a.details["groups"], b.details["groups"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["ratio"] == other["ratio"]


def test_searching_on_fewer_tokens_still_reads_some_of_the_whole(tokenizer: Any) -> None:
    model = tiny_model("llama")
    all_tokens = run(copy.deepcopy(model), tokenizer, bits=3).details["groups"]
    few = run(copy.deepcopy(model), tokenizer, bits=3, search_tokens=40).details["groups"]
    losses = [(a["rounding_loss"], b["rounding_loss"]) for a, b in zip(all_tokens, few, strict=True)]
    by_scope, by_linear = losses[2], losses[1]
    assert by_scope[0] != by_scope[1]
    assert by_scope[0] == pytest.approx(by_scope[1], rel=0.5)
    assert by_linear[0] == pytest.approx(by_linear[1])


def test_quantised_inputs_change_the_blocks_after_the_first(tokenizer: Any) -> None:
    published = run(tiny_model("llama"), tokenizer, bits=2).details["groups"]
    following = run(tiny_model("llama"), tokenizer, bits=2, quantised_inputs=True).details["groups"]
    assert published[:4] == following[:4]
    assert published[4:] != following[4:]


def test_nothing_but_weights_changes(tokenizer: Any) -> None:
    model = tiny_model("gemma2").train()
    model.lm_head.weight.requires_grad_(False)
    run(model, tokenizer, bits=4)
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is True
    assert not model.lm_head.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == "<pad>"


def test_the_same_step_twice_gives_the_same_weights(tokenizer: Any) -> None:
    models = [tiny_model("qwen2"), tiny_model("qwen2")]
    for model in models:
        run(model, tokenizer, bits=3)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_embeddings_stay_tied_and_untouched(tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    before = model.transformer.wte.weight.clone()
    run(model, tokenizer, bits=4)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.wte.weight, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits=1: expected a whole number from 2 to 8"),
        ({"bits": 9}, "bits=9: expected a whole number from 2 to 8"),
        ({"group_size": 0}, "group_size"),
        ({"grid": 0}, "grid"),
        ({"samples": 0}, "samples"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"search_tokens": 0}, "search_tokens"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, int], message: str, tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=message):
        run(tiny_model("llama"), tokenizer, **settings)


def test_calibration_text_is_needed(tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match="awq needs calibration texts"):
        apply(tiny_model("llama"), tokenizer, "awq")


def test_dead_channels_do_no_harm() -> None:
    x_mean = torch.tensor([0.0, 1.0, 4.0])
    for ratio in (0.0, 0.5, 0.95):
        for w_mean in (None, torch.tensor([0.0, 0.5, 0.1])):
            scales = scales_of(ratio, x_mean, w_mean)
            assert bool(torch.isfinite(scales).all()) and bool((scales > 0).all())
            assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)
    assert torch.equal(mean_relative_magnitude([torch.zeros(3, 5)], 2), torch.zeros(5))


@pytest.mark.parametrize("recorded", REFERENCE, ids=lambda recorded: f"seed {recorded['seed']}")
def test_blocks_err_no_more_than_those_of_autoawq(
    recorded: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(
        tokenizer: Any, texts: Any, *, samples: int, padded: bool, **options: Any
    ) -> Any:  # what AutoAWQ was given: a row a text
        return token_batches(tokenizer, texts[:samples], **options)

    def grid(scheme: Scheme, weights: torch.dtype) -> Integers:  # AutoAWQ searched with float32 scales
        return Integers(scheme.bits, scheme.group_size, scheme.symmetric)

    monkeypatch.setattr("interventions.compress.kernels.blockwise.window_batches", read)
    monkeypatch.setattr("interventions.compress.kernels.chosen.grid_of", grid)
    before, after = packable_model(recorded["seed"]), packable_model(recorded["seed"])
    settings = {key: recorded[key] for key in ("bits", "group_size")}
    apply(after, tokenizer, "awq", calibration=LONG_TEXTS, max_tokens=TOKENS, **settings)
    ids = torch.tensor([tokenizer(text)["input_ids"][:TOKENS] for text in LONG_TEXTS])
    with torch.no_grad():
        says, said = (model(ids, output_hidden_states=True).hidden_states[1:] for model in (after, before))
    for block, theirs in enumerate(recorded["errors"]):
        error = float((says[block] - said[block]).square().sum() / said[block].square().sum())
        assert 0 < error <= 1.01 * theirs
