"""SparseGPT against Optimal Brain Surgeon with explicit inverses, and the promises of the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions import InterventionError, apply
from interventions.compress.kernels.gram_factor import gram_factor
from interventions.compress.kernels.masks import Pattern
from interventions.compress.kernels.sparsegpt_kernel import Pruned, invert_triangle, sparsegpt_prune
from tests.models import CONFIGS, SENTENCES, tiny_model

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]
RECORDED = Path(__file__).with_name("sparsegpt_reference.json")


def layer(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return weights, and the Gram matrix of inputs whose channels hang together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(cols) + 0.7 * torch.randn(cols, cols, generator=generator) / cols**0.5
    X = torch.randn(4 * cols, cols, generator=generator) @ mixing * (0.1 + torch.rand(cols, generator=generator))
    return torch.randn(rows, cols, generator=generator), X.t() @ X


def recorded_layer(rows: int, cols: int, seed: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Return the weights and inputs (tokens, cols) on which the reference implementation was run."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(cols) + 0.5 * torch.randn(cols, cols, generator=generator) / cols**0.5
    sizes = torch.exp(0.7 * torch.randn(cols, generator=generator))
    X = (torch.randn(4 * cols, cols, generator=generator) @ mixing) * sizes
    return (0.02 * torch.randn(rows, cols, generator=generator)).to(getattr(torch, dtype)), X


def prune(W: Tensor, H: Tensor, sparsity: float = 0.5, **settings: Any) -> Pruned:
    pruned = sparsegpt_prune(W, H, sparsity=sparsity, **settings)
    assert pruned is not None
    return pruned


def output_error(W: Tensor, new: Tensor, H: Tensor) -> float:
    delta = new.double() - W.double()
    return float(((delta @ H.double()) * delta).sum())


def surgeon(
    W: Tensor, H: Tensor, sparsity: float, block: int, damping: float, pattern: Pattern | None = None
) -> tuple[Tensor, Tensor]:
    """Prune column by column with the inverse of H over the columns still free; float64, no factorisation."""
    W, H = W.double().clone(), H.double().clone()
    rows, cols = W.shape
    H += damping * H.diagonal().mean() * torch.eye(cols)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(cols)]
    saliency = torch.stack([inverse[0, 0] for inverse in inverses])
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for j in range(cols):
        if pattern is None and j % block == 0:
            end = min(j + block, cols)
            costs = (W[:, j:end] ** 2 / saliency[j:end]).flatten()
            cheapest = costs.argsort()[: int(sparsity * rows * end) - int(sparsity * rows * j)]
            mask[:, j:end] = torch.zeros_like(costs).scatter(0, cheapest, 1).view(rows, -1).bool()
        if pattern is not None and j % pattern.of == 0:
            costs = W[:, j : j + pattern.of] ** 2 / saliency[j : j + pattern.of]
            cheapest = costs.argsort(dim=1)[:, : pattern.of - pattern.kept]
            mask[:, j : j + pattern.of] = torch.zeros_like(costs).scatter(1, cheapest, 1).bool()
        moved = torch.where(mask[:, j], W[:, j], 0.0)
        W[:, j:] -= moved.unsqueeze(1) * inverses[j][0] / saliency[j]
    return W.masked_fill(mask, 0), mask


@pytest.mark.parametrize(
    ("rows", "cols", "sparsity", "block", "pattern"),
    [
        (24, 40, 0.5, 16, None),
        (24, 70, 0.3, 128, None),
        (10, 100, 0.8, 40, None),
        (24, 48, 0.5, 16, Pattern(2, 4)),
        (8, 80, 0.5, 128, Pattern(4, 8)),
        (8, 90, 2 / 3, 20, Pattern(1, 3)),
    ],
)
def test_equals_the_surgeon_with_explicit_inverses(
    rows: int, cols: int, sparsity: float, block: int, pattern: Pattern | None
) -> None:
    W, H = layer(rows, cols)
    pruned = prune(W, H, sparsity, block_size=block, pattern=pattern, damping=0.02)
    wanted, mask = surgeon(W, H, sparsity, block, 0.02, pattern)
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.weight.double(), wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(
    st.integers(1, 20), st.integers(1, 60), st.floats(0, 1, exclude_max=True), st.integers(1, 50), st.integers(0, 99)
)
def test_counts_are_exact(rows: int, cols: int, sparsity: float, block: int, seed: int) -> None:
    W, H = layer(rows, cols, seed)
    pruned = prune(W, H, sparsity, block_size=block)
    assert int(pruned.mask.sum()) == int(sparsity * rows * cols)
    assert torch.equal(pruned.weight == 0, pruned.mask)


def test_ties_are_not_pruned_beyond_the_share() -> None:
    pruned = prune(torch.ones(16, 64), torch.eye(64), 0.25)
    assert int(pruned.mask.sum()) == 256


def test_the_losses_are_those_of_the_damped_output() -> None:
    W, H = layer(12, 80)
    pruned = prune(W, H, damping=0.05)
    delta = (pruned.weight - W).double()
    damped = H.double() + 0.05 * H.diagonal().mean() * torch.eye(80)
    torch.testing.assert_close(pruned.losses.double(), ((delta @ damped) * delta).sum(dim=1), rtol=1e-3, atol=1e-6)
    assert pruned.damping == 0.05


def test_compensation_beats_the_same_mask_without() -> None:
    W, H = layer(64, 256)
    pruned = prune(W, H)
    assert output_error(W, pruned.weight, H) < output_error(W, W.masked_fill(pruned.mask, 0), H)


def test_matrices_on_top_of_each_other_are_pruned_as_if_alone() -> None:
    W, H = layer(30, 64)
    W[:10] *= 5
    together = prune(W, H, 0.4, parts=[10, 20])
    for rows in (slice(0, 10), slice(10, 30)):
        alone = prune(W[rows], H, 0.4)
        assert torch.equal(together.mask[rows], alone.mask)
        torch.testing.assert_close(together.weight[rows], alone.weight)
    assert not torch.equal(together.mask, prune(W, H, 0.4).mask)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_kept_zeros_stay_and_count(pattern: Pattern | None) -> None:
    W, H = layer(20, 64)
    kept = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.25
    W = W.masked_fill(kept, 0)
    pruned = prune(W, H, 0.5, pattern=pattern, kept=kept, block_size=16)
    assert bool((pruned.weight[kept] == 0).all())
    if pattern is None:
        assert int(pruned.mask.sum()) == W.numel() // 2
    else:
        by_group = pruned.mask.view(20, -1, 4).sum(dim=2)
        assert torch.equal(by_group, kept.view(20, -1, 4).sum(dim=2).clamp(min=2))
        filled = prune(W, H, 0.5, pattern=pattern).weight[kept]  # as published
        assert bool((filled != 0).any())


def test_dead_columns_become_zero_and_do_not_disturb_the_others() -> None:
    W, H = layer(16, 40)
    H[[3, 30]] = 0
    H[:, [3, 30]] = 0
    pruned = prune(W, H, block_size=40)
    assert bool((pruned.weight[:, [3, 30]] == 0).all())
    live = [j for j in range(40) if j not in (3, 30)]
    live_H = H[live][:, live]
    mean = (live_H.diagonal().sum() + 2) / 40  # as published, a dead column counts as 1 in the damping
    damping = float(0.01 * mean / live_H.diagonal().mean())
    rest = prune(W[:, live], live_H, (0.5 * 40 - 2) / 38, block_size=40, damping=damping)
    torch.testing.assert_close(pruned.weight[:, live], rest.weight)


def test_a_pattern_must_divide_the_columns() -> None:
    W, H = layer(4, 30)
    with pytest.raises(InterventionError, match="2:4 does not divide the 30 columns"):
        prune(W, H, pattern=Pattern(2, 4))


def test_inputs_stay_as_they_are() -> None:
    W, H = layer(8, 32)
    before = W.clone(), H.clone()
    prune(W, H, kept=W < 0)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_damping_grows_where_it_does_not_suffice() -> None:
    X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    pruned = prune(torch.ones(4, 32), X.t() @ X, damping=0.0)
    assert pruned.damping > 0
    assert bool(torch.isfinite(pruned.weight).all())
    assert sparsegpt_prune(torch.ones(4, 32), -torch.eye(32), sparsity=0.5) is None


def test_the_triangle_is_inverted() -> None:
    _, H = layer(1, 300)
    factor = gram_factor(H, 0.01)
    assert factor is not None
    torch.testing.assert_close(invert_triangle(factor.R) @ factor.R, torch.eye(300), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", json.loads(RECORDED.read_text()), ids=lambda case: "-".join(map(str, case.values())))
def test_no_worse_than_the_reference_implementation_was(case: dict[str, Any]) -> None:
    """The recorded numbers are what the authors' code left of the output, as a share of it, and its zeros."""
    W, X = recorded_layer(case["rows"], case["cols"], case["seed"], case["dtype"])
    pattern = None if case["pattern"] is None else Pattern(*map(int, case["pattern"].split(":")))
    new = prune(W.float(), X.t() @ X, case["sparsity"], pattern=pattern).weight.to(W.dtype)
    H = X.double().t() @ X.double()
    error = output_error(W, new, H) / output_error(W, torch.zeros_like(W), H)
    assert error <= 1.01 * case["error"]
    # There a share's threshold is itself pruned: one weight more in each block of 128 columns, and ties.
    assert 0 <= case["zeros"] - int((new == 0).sum()) <= (0 if pattern else 10)


# The step


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(tokenizer: Any, family: str) -> None:
    model = tiny_model(family)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 1 or "emb" in n or "wte" in n}
    report = apply(model, tokenizer, "sparsegpt", calibration=TEXTS, max_tokens=64)
    linears = report.details["linears"]
    assert sorted(f"{linear['linear']}.weight" for linear in linears) == list(report.changed)
    assert all(linear["sparsity"] == 0.5 for linear in linears)
    assert all(linear["loss"] > 0 for linear in linears)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


def output_shift(tokenizer: Any, method: str, **settings: Any) -> float:
    """Return the mean squared change of the logits."""
    model = tiny_model()
    ids = torch.tensor([tokenizer(text)["input_ids"][:40] for text in TEXTS])
    with torch.no_grad():
        before = model(ids).logits
        apply(model, tokenizer, method, calibration=TEXTS, **settings)
        return float((model(ids).logits - before).pow(2).mean())


def test_sparsegpt_changes_the_outputs_less_than_wanda_and_that_less_than_magnitude(tokenizer: Any) -> None:
    shifts = [output_shift(tokenizer, method) for method in ("sparsegpt", "wanda", "magnitude")]
    assert shifts == sorted(shifts)


def test_propagation_is_by_choice(tokenizer: Any) -> None:
    weights = {}
    settings_by_name: dict[str, dict[str, Any]] = {
        "published": {},
        "true_sequential": {"true_sequential": True},
        "dense inputs": {"sequential": False},
    }
    for name, chosen in settings_by_name.items():
        model = tiny_model()
        apply(model, tokenizer, "sparsegpt", calibration=TEXTS, **chosen)
        weights[name] = [layer.mlp.down_proj.weight.detach() for layer in model.model.layers]
    assert not torch.equal(weights["published"][0], weights["true_sequential"][0])
    assert torch.equal(weights["published"][0], weights["dense inputs"][0])
    assert not torch.equal(weights["published"][1], weights["dense inputs"][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsegpt.sparsity=1\.0: expected a number from 0 to less than 1"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"pattern": "2:4", "sparsity": 0.3}, r"sparsity of 0\.5, not of 0\.3"),
        ({"pattern": "5:4"}, "pattern=5:4: expected n:m with 0 < n < m"),
        ({"pattern": "0:4"}, "pattern=0:4"),
        ({"pattern": "124"}, "pattern=124: expected n:m"),
        ({"pattern": "5:10"}, r"does not divide the 32 columns of model\.layers\.0\.self_attn\.q_proj"),
        ({"block_size": 0}, "block_size"),
        ({"damping": -1.0}, "damping"),
        ({"samples": 0}, "sparsegpt.samples=0"),
        ({"max_tokens": 3, "samples": 4}, "tokens are too few for the 32 columns"),
    ],
)
def test_bad_settings_are_named_and_the_model_unchanged(tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(InterventionError, match=message):
        apply(model, tokenizer, "sparsegpt", calibration=TEXTS, **settings)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_raised_damping_is_a_warning(tokenizer: Any) -> None:
    model = tiny_model()
    with torch.no_grad():  # channels that say the same: the Gram matrix is singular
        model.model.layers[0].mlp.up_proj.weight[1:] = model.model.layers[0].mlp.up_proj.weight[0]
        model.model.layers[0].mlp.gate_proj.weight[1:] = model.model.layers[0].mlp.gate_proj.weight[0]
    report = apply(model, tokenizer, "sparsegpt", calibration=TEXTS, damping=0.0)
    assert any("damping raised to" in w and "layers.0.mlp.down_proj" in w for w in report.warnings)
