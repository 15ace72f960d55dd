"""GPTQ against the textbook optimal-brain update and the published loop, and the promises of the step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.kernels import gptq_kernel
from interventions.compress.kernels.gptq_kernel import GptqResult, gptq_quantise
from interventions.compress.kernels.grid import fake_quantise
from interventions.compress.kernels.integers import Integers
from tests.models import CONFIGS, SENTENCES, tiny_model

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]


def run(model: Any, tokenizer: Any, **overrides: Any) -> Any:
    defaults: dict[str, Any] = {"calibration": TEXTS, "group_size": 16, "max_tokens": 60}
    return apply(model, tokenizer, "gptq", **defaults | overrides)


def layer(rows: int, cols: int, seed: int = 0, dead: int = 0) -> tuple[Tensor, Tensor]:
    """Return weights and the mean of x x^T over correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator)
    X = torch.randn(3 * cols, cols, generator=generator) @ (
        torch.eye(cols) + 0.7 * torch.randn(cols, cols, generator=generator) / cols**0.5
    )
    X *= 0.2 + 2 * torch.rand(cols, generator=generator)
    X[:, torch.randperm(cols, generator=generator)[:dead]] = 0
    return W, X.t() @ X / len(X)


def quantised(
    W: Tensor, H: Tensor, *, bits: int, group_size: int, symmetric: bool = False, **options: Any
) -> GptqResult:
    result = gptq_quantise(W, H, Integers(bits, group_size, symmetric), **options)
    assert result is not None
    return result


def damped(H: Tensor, damping: float = 0.01) -> Tensor:
    H = H + torch.diag((H.diagonal() == 0).to(H.dtype))
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


# The textbook form: an explicit inverse over the columns that are left, in float64.


def dense_grid(W: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, int, int]:
    low, high = W.min(dim=1).values.clamp(max=0), W.max(dim=1).values.clamp(min=0)
    if symmetric:
        scale = 2 * torch.maximum(-low, high) / (2**bits - 1)
        return scale, torch.zeros_like(scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale), 0, 2**bits - 1


def textbook(
    W: Tensor, H: Tensor, bits: int, group_size: int, *, symmetric: bool, act_order: bool, static: bool, block: int
) -> tuple[Tensor, Tensor]:
    """Round one column after the other; W - Q of each is spread by -delta / [H^-1]_jj [H^-1]_j, H over what is left.

    Return Q and the rows in which no weight fell half-way between two levels: there it may go
    either way, and shifts what comes after it.
    """
    W, H = W.double().clone(), H.double()
    cols = W.shape[1]
    width = cols if group_size == -1 else group_size
    starts = range(0, cols, width)
    grids = {start: dense_grid(W[:, start : start + width], bits, symmetric) for start in starts}
    W[:, H.diagonal() == 0] = 0
    if width < cols:
        grids = {start: dense_grid(W[:, start : start + width], bits, symmetric) for start in starts}
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(cols)
    full = damped(H)
    Q = torch.zeros_like(W)
    clear = torch.ones(len(W), dtype=torch.bool)
    for position, j in enumerate(order.tolist()):
        if position % block == 0 and width < cols and not (static or act_order):
            for start in (start for start in starts if position <= start < position + block):
                grids[start] = dense_grid(W[:, start : start + width], bits, symmetric)
        scale, zero, least, greatest = grids[j // width * width]
        Q[:, j] = ((torch.round(W[:, j] / scale) + zero).clamp(least, greatest) - zero) * scale
        clear &= ((W[:, j] / scale).remainder(1) - 0.5).abs() > 1e-3
        left = order[position:]
        inverse = torch.linalg.inv(full[left][:, left])
        W[:, left] -= torch.outer((W[:, j] - Q[:, j]) / inverse[0, 0], inverse[0])
    return Q, clear


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "act_order", "static"),
    [
        (2, -1, False, False),
        (3, 8, False, False),
        (4, 12, False, False),
        (3, 24, False, False),
        (4, 8, True, False),
        (3, -1, True, False),
        (5, 7, False, True),
        (8, 100, False, False),
    ],
)
def test_columns_follow_the_textbook_update(
    bits: int, group_size: int, act_order: bool, static: bool, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 16 columns, so that a matrix of 44 has several and an odd one."""
    monkeypatch.setattr(gptq_kernel, "BLOCK", 16)
    monkeypatch.setattr(gptq_kernel, "STRIP", 5)
    W, H = layer(30, 44, seed=bits, dead=3)
    options: dict[str, Any] = {"symmetric": symmetric, "act_order": act_order}
    found = quantised(W, H, bits=bits, group_size=group_size, static_groups=static, **options)
    expected, clear = textbook(W, H, bits, group_size, static=static, block=16, **options)
    assert float(clear.float().mean()) > 0.3
    torch.testing.assert_close(found.weight[clear].double(), expected[clear], rtol=1e-4, atol=1e-5)
    dense_error, error = (float(output_error(Q, W, H)) for Q in (expected, found.weight))
    assert error == pytest.approx(dense_error, rel=0.02)


def output_error(Q: Tensor, W: Tensor, H: Tensor) -> Tensor:
    delta = Q.double() - W.double()
    return ((delta @ damped(H).double()) * delta).sum()


def published_loop(W: Tensor, H: Tensor, bits: int, group_size: int) -> Tensor:
    """Return the weights of the published algorithm, in its order of operations, float32."""
    W = W.clone()
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped(H))), upper=True)
    rounded = torch.zeros_like(W)
    for start in range(0, W.shape[1], 128):
        end = min(start + 128, W.shape[1])
        part = W[:, start:end].clone()
        errors = torch.zeros_like(part)
        for i in range(end - start):
            if (start + i) % group_size == 0:
                scale, zero, _, top = dense_grid(W[:, start + i : start + i + group_size], bits, False)
            rounded[:, start + i] = ((torch.round(part[:, i] / scale) + zero).clamp(0, top) - zero) * scale
            error = (part[:, i] - rounded[:, start + i]) / U[start + i, start + i]
            part[:, i:] -= torch.outer(error, U[start + i, start + i : end])
            errors[:, i] = error
        W[:, end:] -= errors @ U[start:end, end:]
    return rounded


@pytest.mark.parametrize(("bits", "group_size", "seed"), [(4, 128, 0), (3, 64, 1), (2, 32, 2), (4, 384, 3)])
def test_levels_are_those_of_the_published_loop(bits: int, group_size: int, seed: int) -> None:
    W, H = layer(200, 384, seed=seed)
    found = quantised(W, H, bits=bits, group_size=group_size)
    assert float(torch.isclose(found.weight, published_loop(W, H, bits, group_size)).float().mean()) > 0.999


REFERENCE = json.loads((Path(__file__).parent / "gptq_reference.json").read_text())


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"seed {case['seed']}")
def test_the_error_is_that_of_its_authors_code(case: dict[str, Any]) -> None:
    """`docs/parity.md` tells how the numbers were made."""
    W, H = layer(case["rows"], case["cols"], case["seed"], case["dead"])
    options = {name: case[name] for name in ("bits", "group_size", "symmetric", "act_order")}
    delta = quantised(W, H, **options).weight.double() - W.double()
    assert float(((delta @ H.double()) * delta).sum()) <= 1.01 * case["error"]


@settings(max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(2, 8),
    st.sampled_from([-1, 1, 5, 16, 128]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
)
def test_weights_lie_on_their_grids_and_the_error_is_told(
    rows: int, cols: int, bits: int, group_size: int, symmetric: bool, act_order: bool, seed: int
) -> None:
    W, H = layer(rows, cols, seed=seed, dead=seed % 3)
    kept = W.clone(), H.clone()
    zeros = W > 1
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    result = quantised(W, H, act_order=act_order, zeros=zeros, **options)
    assert torch.equal(W, kept[0]) and torch.equal(H, kept[1])
    assert result.weight.shape == W.shape
    assert bool((result.weight[zeros] == 0).all())
    assert bool((result.weight[:, H.diagonal() == 0] == 0).all())
    width = cols if group_size == -1 else group_size
    for start in range(0, cols, width):
        for row in result.weight[:, start : start + width]:
            assert len(row.unique()) <= 2**bits
    live = W * (H.diagonal() != 0)
    torch.testing.assert_close(
        float(result.errors.sum()), float(output_error(result.weight, live, H)), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_error_is_below_that_of_rounding(bits: int, symmetric: bool) -> None:
    W, H = layer(64, 96)
    options: dict[str, Any] = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    rounded = fake_quantise(W, Integers(bits, 32, symmetric))
    found, ordered = (quantised(W, H, act_order=order, **options).weight for order in (False, True))
    assert output_error(found, W, H) < 0.8 * output_error(rounded, W, H)
    assert output_error(ordered, W, H) < 0.8 * output_error(rounded, W, H)


def test_a_quantised_matrix_stays_as_it_is() -> None:
    W, H = layer(20, 40)
    for symmetric in (False, True):
        options: dict[str, Any] = {"bits": 3, "group_size": 20, "symmetric": symmetric}
        once = quantised(W, H, **options).weight
        torch.testing.assert_close(quantised(once, H, **options).weight, once, rtol=1e-5, atol=1e-6)


def test_damping_grows_until_the_matrix_can_be_factored() -> None:
    W, _ = layer(8, 32)
    X = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))  # fewer inputs than columns
    assert quantised(W, X.t() @ X, bits=4, group_size=-1, damping=0.0).damping > 0
    assert quantised(W, X.t() @ X, bits=4, group_size=-1, damping=0.02).damping == 0.02
    no_gram = torch.eye(32)
    no_gram[0, 1] = no_gram[1, 0] = 3.0
    assert gptq_quantise(W, no_gram, Integers(4)) is None


# The step.


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    ids = torch.tensor([tokenizer(text)["input_ids"][:40] for text in TEXTS])
    return model(ids).logits.float()  # type: ignore[no-any-return]


def relative_error(model: Any, wanted: Tensor, tokenizer: Any) -> float:
    return float((logits(model, tokenizer) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_architecture(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    rounded = copy.deepcopy(model)
    wanted = logits(model, tokenizer)
    report = run(model, tokenizer, bits=3)
    linears = [linear for block in find_anatomy(model).blocks for linear in block.linears]
    assert sorted(report.changed) == sorted(linear.parameter_name for linear in linears)
    assert [entry["linear"] for entry in report.details["linears"]] == [linear.name for linear in linears]
    for linear in linears:
        for start in range(0, linear.in_features, 16):
            assert max(len(row.unique()) for row in linear.weight[:, start : start + 16]) <= 8
    apply(rounded, tokenizer, "rtn", bits=3, group_size=16)
    assert relative_error(model, wanted, tokenizer) < relative_error(rounded, wanted, tokenizer)


@pytest.mark.parametrize(
    "overrides",
    [
        {"symmetric": True},
        {"act_order": True},
        {"static_groups": True, "group_size": -1},
        {"sequential": False, "true_sequential": False},
        {"sequential": False},
        {"true_sequential": False},
    ],
)
def test_variants_are_better_than_rounding(overrides: dict[str, Any], tokenizer: Any) -> None:
    wanted = logits(tiny_model("qwen2"), tokenizer)
    model, rounded = tiny_model("qwen2"), tiny_model("qwen2")
    run(model, tokenizer, bits=3, **overrides)
    grid = {key: value for key, value in overrides.items() if key in ("symmetric", "group_size")}
    apply(rounded, tokenizer, "rtn", bits=3, **{"group_size": 16} | grid)
    assert relative_error(model, wanted, tokenizer) < relative_error(rounded, wanted, tokenizer)


def test_a_mask_survives_unless_told_otherwise(tokenizer: Any) -> None:
    for preserve in (True, False):
        model = tiny_model("llama-odd")
        linears = [linear for block in find_anatomy(model).blocks for linear in block.linears]
        masks = [linear.weight.abs() < linear.weight.abs().median() for linear in linears]
        for linear, mask in zip(linears, masks, strict=True):
            linear.weight[mask] = 0
        run(model, tokenizer, bits=4, preserve_mask=preserve)
        kept = [bool((linear.weight[mask] == 0).all()) for linear, mask in zip(linears, masks, strict=True)]
        assert all(kept) is preserve


def test_half_precision_is_rounded_once(tokenizer: Any) -> None:
    model = tiny_model("llama-gqa", dtype=torch.bfloat16)
    run(model, tokenizer, bits=2)
    for linear in find_anatomy(model).blocks[1].linears:
        assert linear.weight.dtype is torch.bfloat16
        assert max(len(row.unique()) for row in linear.weight[:, 16:32]) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_time_changes_next_to_nothing(dtype: torch.dtype, tokenizer: Any) -> None:
    model = tiny_model("llama", dtype=dtype)
    first, second = (run(model, tokenizer, bits=3, group_size=-1) for _ in range(2))
    moved = [sum(entry["moved"] for entry in report.details["linears"]) for report in (first, second)]
    assert moved[1] < 0.05 * moved[0]


def test_raised_damping_and_rounding_instead_are_told(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monotone = ["na" * 60] * 3  # the same hidden state nearly everywhere: the Gram matrices are singular
    report = run(model, tokenizer, bits=3, damping=0.0, calibration=monotone, group_size=-1)
    assert any("mlp.down_proj: damping raised to 0.001; set damping" in warning for warning in report.warnings)
    monkeypatch.setattr(gptq_kernel, "gptq_quantise", lambda *args, **options: None)
    model, rounded = tiny_model("llama"), tiny_model("llama")
    report = run(model, tokenizer, bits=3)
    assert len(report.warnings) == 8
    assert "samples" in report.warnings[0] and "layers.0.self_attn.q_proj" in report.warnings[0]
    assert {entry["loss"] for entry in report.details["linears"]} == {None}
    apply(rounded, tokenizer, "rtn", bits=3, group_size=16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rounded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bits": 1}, "bits=1: expected a whole number from 2 to 8"),
        ({"bits": 9}, "bits=9: expected a whole number from 2 to 8"),
        ({"group_size": 0}, "group_size"),
        ({"damping": -0.1}, "damping"),
        ({"samples": 0}, "samples"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"samples": 1, "max_tokens": 40}, "40 calibration tokens are too few for the 48 columns of .*mlp.down_proj"),
    ],
)
def test_settings_that_cannot_be_are_named(overrides: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=message):
        run(tiny_model("llama"), tokenizer, **overrides)
