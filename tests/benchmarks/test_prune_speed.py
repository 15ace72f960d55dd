"""How much faster the pruning kernels are than plain forms that give the same, timed in one run.

    OMP_WAIT_POLICY=passive pytest tests/benchmarks/test_prune_speed.py -s

One layer of 2048 x 2048, half of it pruned, float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interventions.compress.kernels.masks import Pattern
from interventions.compress.kernels.sparsegpt_kernel import sparsegpt_prune
from interventions.compress.wanda import wanda_mask

pytestmark = pytest.mark.benchmark
SIZE = 2048
BLOCK = 128


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """Return weights and the Gram matrix of 2 * SIZE inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(SIZE) + 0.5 * torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    X = torch.randn(2 * SIZE, SIZE, generator=generator) @ mixing
    return torch.randn(SIZE, SIZE, generator=generator), X.t() @ X


def compare(benchmark: Any, ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> float:
    """Return how many times longer the plain form takes, best against best, both timed in turn."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for name, run in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    benchmark.pedantic(ours, rounds=rounds)
    ratio = min(seconds["plain"]) / min(seconds["ours"])
    benchmark.extra_info.update(plain_seconds=min(seconds["plain"]), ratio=ratio)
    return ratio


def test_wandas_mask_against_a_stable_sort(benchmark: Any, layer: tuple[Tensor, Tensor]) -> None:
    W, norms = layer[0], layer[1].diagonal().sqrt()

    def plain() -> Tensor:
        order = (W.abs() * norms).sort(dim=1, stable=True).indices[:, : SIZE // 2]
        return torch.zeros_like(W, dtype=torch.bool).scatter_(1, order, True)

    assert torch.equal(plain(), wanda_mask(W, norms, 0.5))
    assert compare(benchmark, lambda: wanda_mask(W, norms, 0.5), plain, rounds=10) >= 4


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)], ids=["unstructured", "2:4"])
def test_sparsegpt_against_the_published_loop(
    benchmark: Any, layer: tuple[Tensor, Tensor], pattern: Pattern | None
) -> None:
    """The published loop puts updates off in blocks of 128 columns too: its products of matrices are the same."""
    W, H = layer

    def plain() -> Tensor:
        damped = H + 0.01 * H.diagonal().mean() * torch.eye(SIZE)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return published_loop(W.clone(), torch.linalg.cholesky(inverse, upper=True), pattern)

    def ours() -> Tensor:
        pruned = sparsegpt_prune(W, H, sparsity=0.5, pattern=pattern, block_size=BLOCK)
        assert pruned is not None
        return pruned.mask

    assert float((ours() == plain()).float().mean()) > 0.999
    assert compare(benchmark, ours, plain, rounds=3) >= 2


def published_loop(W: Tensor, U: Tensor, pattern: Pattern | None) -> Tensor:
    """Return the mask that SparseGPT's algorithm 1 chooses, one column at a time."""
    mask = torch.zeros_like(W, dtype=torch.bool)
    for start in range(0, SIZE, BLOCK):
        end = start + BLOCK
        part, U_part, errors = W[:, start:end].clone(), U[start:end, start:end], torch.zeros(SIZE, BLOCK)
        diagonal = U_part.diagonal()
        if pattern is None:
            costs = (part / diagonal) ** 2
            threshold = costs.flatten().sort().values[costs.numel() // 2 - 1]
            mask[:, start:end] = costs <= threshold
        for j in range(BLOCK):
            if pattern is not None and j % pattern.of == 0:
                costs = (part[:, j : j + pattern.of] / diagonal[j : j + pattern.of]) ** 2
                order = costs.topk(pattern.of - pattern.kept, dim=1, largest=False).indices
                mask[:, start:end].scatter_(1, j + order, True)
            error = torch.where(mask[:, start + j], part[:, j], 0.0) / diagonal[j]
            part[:, j:] -= error.unsqueeze(1) @ U_part[j, j:].unsqueeze(0)
            errors[:, j] = error
        W[:, end:] -= errors @ U[start:end, end:]
    return mask
