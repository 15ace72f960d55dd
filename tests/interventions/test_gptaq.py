"""GPTQ with asymmetric calibration, against a dense formulation and the models that it compares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from interventions import InterventionError, Resources, apply
from interventions.anatomy import find_anatomy
from interventions.compress.gptq import GptqSettings
from interventions.compress.kernels.asymmetric import PairedStatistics, asymmetric_target
from interventions.compress.kernels.blockwise import walk_blocks
from interventions.context import Context
from interventions.offload import offload
from tests.models import SENTENCES, tiny_model

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]


def inputs(seed: int, cols: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, and its inputs in the quantised and the unquantised model, one column a token."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(10, cols, generator=generator)
    X = torch.randn(cols, cols, generator=generator) @ torch.randn(cols, 200, generator=generator)
    return W, X, X + 0.3 * torch.randn(cols, 200, generator=generator) + 0.2 * X.roll(1, 0)


def dense(W: Tensor, X: Tensor, other: Tensor, order: list[int], damping: float) -> Tensor:
    """Make up for w_i (X~ - X)_i by least squares in the columns after i, one column after the other."""
    W, X, other = W.double(), X.double(), other.double()
    found = W.clone()
    ridge = damping * X.square().sum(dim=1).mean() * torch.eye(len(X), dtype=torch.float64)
    for position, i in enumerate(order):
        later = order[position + 1 :]
        missing = torch.outer(W[:, i], other[i] - X[i])  # (rows, tokens)
        H = X[later] @ X[later].t() + ridge[later][:, later]
        found[:, later] += missing @ X[later].t() @ torch.linalg.inv(H)
    return found


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_each_columns_part_is_made_up_for_by_the_columns_after_it(act_order: bool, share: float) -> None:
    W, X, other = inputs(0)
    H, DXt = X @ X.t(), (other - X) @ X.t()
    found = asymmetric_target(W, H, DXt, share=share, damping=0.01, act_order=act_order)
    order = H.diagonal().argsort(descending=True).tolist() if act_order else list(range(len(H)))
    wanted = W + share * (dense(W, X, other, order, 0.01) - W)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-3, atol=1e-3)


def test_outputs_come_nearer_to_those_of_the_unquantised_model() -> None:
    W, X, other = inputs(1)
    target = asymmetric_target(W, X @ X.t(), (other - X) @ X.t(), share=1.0, damping=0.001)
    before, after = (float((matrix @ X - W @ other).norm()) for matrix in (W, target))
    assert after < 0.8 * before


def test_dead_columns_and_matrices_that_cannot_be_factored() -> None:
    W, X, other = inputs(2)
    X[3] = 0
    found = asymmetric_target(W, X @ X.t(), (other - X) @ X.t(), share=1.0, damping=0.01)
    assert bool(torch.isfinite(found).all()) and not torch.equal(found, W)
    torch.testing.assert_close(found[:, 3], W[:, 3])  # it cannot make up for anything
    broken = torch.full((len(X), len(X)), float("nan"))
    assert asymmetric_target(W, broken, broken, share=1.0, damping=0.01) is W


def settings(**options: Any) -> GptqSettings:
    return GptqSettings(max_tokens=48, asymmetric_calibration=True, **options)


@torch.no_grad()
@pytest.mark.parametrize("true_sequential", [False, True])
def test_the_mismatch_is_that_of_the_two_models(true_sequential: bool, tokenizer: Any) -> None:
    model, unchanged = tiny_model("llama"), tiny_model("llama")
    sums: dict[str, PairedStatistics] = {}

    def work(group: Any, statistics: PairedStatistics) -> list[dict[str, Any]]:
        sums[group.linears[0].name] = copy.deepcopy(statistics)
        if group.role in ("attention_in", "mlp_in"):
            for linear in group.linears:
                linear.weight.mul_(0.8)
        return []

    given = Resources(calibration=tuple(TEXTS[:5]))  # the last window is shorter, so that there is padding
    walk_blocks(model, tokenizer, settings(true_sequential=true_sequential), given, Context(), work, PairedStatistics)
    # The changed model as it was when a group was calibrated: the other groups of its block unchanged, or not.
    for block in find_anatomy(model).blocks:
        for group in block.linear_groups:
            state = copy.deepcopy(model)
            for theirs, ours in zip(find_anatomy(unchanged).blocks, find_anatomy(state).blocks, strict=True):
                for one, two in zip(theirs.linear_groups, ours.linear_groups, strict=True):
                    later = block.linear_groups.index(group) <= [g.role for g in block.linear_groups].index(two.role)
                    if ours.index > block.index or (ours.index == block.index and (later or not true_sequential)):
                        for a, b in zip(one.linears, two.linears, strict=True):
                            b.set_weight_(a.weight)
            x, other = (read(m, group.linears[0].name, tokenizer) for m in (state, unchanged))
            found = sums[group.linears[0].name]
            assert found.count == len(x) and found.mismatch is not None
            scale = float((x.t() @ x).abs().max())
            torch.testing.assert_close(found.gram / scale, x.t() @ x / scale, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.mismatch / scale, (other - x).t() @ x / scale, rtol=0, atol=1e-5)


def read(model: Any, name: str, tokenizer: Any) -> Tensor:
    """The inputs of a linear layer on the calibration text, (tokens, width)."""
    from interventions.statistics import window_batches

    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    masks = []
    for batch in window_batches(tokenizer, TEXTS[:5], samples=128, max_tokens=48):
        model(**batch)
        masks.append(batch["attention_mask"].bool())
    handle.remove()
    return torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)])


@torch.no_grad()
def outputs(model: Any, tokenizer: Any) -> Tensor:
    ids = torch.tensor([tokenizer(" ".join(TEXTS))["input_ids"][:100]])
    return model.model(ids).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"true_sequential": False}, {"symmetric": True}])
def test_a_model_comes_nearer_to_the_unquantised_one(options: dict[str, Any], tokenizer: Any) -> None:
    errors: dict[bool, float] = {}
    for asymmetric in (False, True):
        total = 0.0
        for seed in range(3):
            model = tiny_model("llama", seed=seed)
            wanted = outputs(model, tokenizer)
            shared: dict[str, Any] = {"calibration": TEXTS, "bits": 3, "group_size": 16, "max_tokens": 64, **options}
            apply(model, tokenizer, "gptq", **shared, asymmetric_calibration=asymmetric, asymmetry=0.5)
            total += float((outputs(model, tokenizer) - wanted).norm())
        errors[asymmetric] = total
    assert errors[True] < errors[False]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "phi3-gqa"])
def test_other_families_and_offloaded_models(family: str, tokenizer: Any) -> None:
    plain, host = tiny_model(family), tiny_model(family)
    offload(host, torch.device("cpu"))
    for model in (plain, host):
        report = apply(model, tokenizer, "gptq", calibration=TEXTS, bits=3, max_tokens=64, asymmetric_calibration=True)
        assert all(entry["loss"] is not None for entry in report.details["linears"])
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), host.parameters(), strict=True))


def test_it_needs_quantised_inputs(tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=r"gptq.asymmetric_calibration=true: needs sequential=true"):
        apply(tiny_model("llama"), tokenizer, "gptq", sequential=False, asymmetric_calibration=True)
