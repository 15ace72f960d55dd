"""How much faster the quantisation kernels are than plain forms that give the same, timed in one run.

    OMP_WAIT_POLICY=passive pytest tests/benchmarks/test_quantise_speed.py -s

One layer of 2048 x 2048, 4 bits, groups of 128, float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interventions.compress.kernels.formats import grid_of
from interventions.compress.kernels.gptq_kernel import gptq_quantise
from interventions.compress.kernels.grid import fake_quantise
from interventions.compress.kernels.integers import Integers
from interventions.compress.schemes import SCHEMES

pytestmark = pytest.mark.benchmark
SIZE, BITS, GROUP = 2048, 4, 128


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """Return weights and inputs of correlated channels."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(SIZE) + 0.5 * torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    return torch.randn(SIZE, SIZE, generator=generator), torch.randn(8 * SIZE, SIZE, generator=generator) @ mixing


def compare(benchmark: Any, ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> float:
    """Return how many times longer the plain form takes, best against best, in turn.

    CPU seconds of the process: on a busy machine the clock on the wall tells of the neighbours.
    """
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for name, run in (("plain", plain), ("ours", ours)):
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    benchmark.pedantic(ours, rounds=1)
    ratio = min(seconds["plain"]) / min(seconds["ours"])
    benchmark.extra_info.update(plain=min(seconds["plain"]), ours=min(seconds["ours"]), ratio=ratio)
    return ratio


def column_loop(W: Tensor, H: Tensor, block: int) -> Tensor:
    """Return the weights of the published algorithm; a column's error reaches its block at once, the rest later."""
    W = W.clone()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(SIZE)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    rounded = torch.empty_like(W)
    for start in range(0, SIZE, block):
        end = start + block
        part = W[:, start:end].clone()
        errors = torch.empty_like(part)
        for i in range(block):
            if (start + i) % GROUP == 0:
                group = (part[:, i:] if block > GROUP else W[:, start:])[:, :GROUP]
                low, high = group.min(dim=1).values.clamp(max=0), group.max(dim=1).values.clamp(min=0)
                scale = (high - low) / (2**BITS - 1)
                zero = torch.round(-low / scale)
            levels = (torch.round(part[:, i] / scale) + zero).clamp(0, 2**BITS - 1)
            rounded[:, start + i] = (levels - zero) * scale
            errors[:, i] = (part[:, i] - rounded[:, start + i]) / U[start + i, start + i]
            part[:, i:] -= torch.outer(errors[:, i], U[start + i, start + i : end])
        W[:, end:] -= errors @ U[start:end, end:]
    return rounded


@pytest.mark.parametrize(("block", "at_least"), [(SIZE, 5.0), (GROUP, 2.0)], ids=["plain", "in-blocks"])
def test_gptq_against_a_column_loop(benchmark: Any, layer: tuple[Tensor, Tensor], block: int, at_least: float) -> None:
    """The loop as it stands, each column followed by all others, and with updates put off in blocks of 128.

    Of our own time half are a factorisation and products of matrices that the blocked loop has as well.
    """
    W, X = layer
    H = X.t() @ X / len(X)

    def ours() -> Tensor:
        result = gptq_quantise(W, H, Integers(BITS, GROUP))
        assert result is not None
        return result.weight

    assert float(torch.isclose(ours(), column_loop(W, H, block)).float().mean()) > 0.999
    assert compare(benchmark, ours, lambda: column_loop(W, H, block), rounds=2) >= at_least


def test_awqs_grid_against_outputs_computed_again(benchmark: Any, layer: tuple[Tensor, Tensor]) -> None:
    """20 scales, judged by the output of the one linear that reads them; the Gram matrix is computed once."""
    W, X = layer
    rounded = [
        fake_quantise(W * s, Integers(BITS, GROUP)) / s for s in (X.abs().mean(dim=0) ** (r / 20) for r in range(20))
    ]

    def plain() -> list[float]:
        wanted = X @ W.t()
        return [float((X @ Q.t() - wanted).pow(2).sum()) for Q in rounded]

    def ours() -> list[float]:
        gram = X.t() @ X
        deltas = (Q - W for Q in rounded)
        return [float(((delta @ gram) * delta).sum()) for delta in deltas]

    assert ours() == pytest.approx(plain(), rel=1e-3)
    assert compare(benchmark, ours, plain, rounds=1) >= 5  # grows with the tokens: here 8 a column


@pytest.mark.parametrize(("width", "channels", "at_least"), [(128, 64, 5.0), (256, 128, 2.0), (512, 256, 1.2)])
def test_gptq_of_experts_against_a_loop(benchmark: Any, width: int, channels: int, at_least: float) -> None:
    """One layer of 64 experts, `width` wide with `channels` between: each stage in one call, or expert by expert.

    What is saved is the time of calls; from a width of 1024 on, only products of matrices count.
    """
    generator = torch.Generator().manual_seed(0)
    stages = []
    for rows, cols in ((2 * channels, width), (width, channels)):
        X = torch.randn(64, 2 * cols, cols, generator=generator)
        stages.append((torch.randn(64 * rows, cols, generator=generator), X.mT @ X))
    grid = Integers(BITS, 32)

    def at_once() -> list[Tensor]:
        return [gptq_quantise(W, H, grid, parts=[len(W) // 64] * 64).weight for W, H in stages]  # type: ignore[union-attr]

    def loop() -> list[Tensor]:
        return [
            torch.cat([gptq_quantise(w, h, grid).weight for w, h in zip(W.chunk(64), H, strict=True)])  # type: ignore[union-attr]
            for W, H in stages
        ]

    found, wanted = at_once(), loop()
    assert all(float((one == other).float().mean()) > 0.999 for one, other in zip(found, wanted, strict=True))
    assert compare(benchmark, at_once, loop, 3) >= at_least


@pytest.mark.parametrize("scheme", ["FP8A16", "FP8A16_CHANNEL", "FP8A16_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_floating_point_numbers_against_integers(benchmark: Any, scheme: str) -> None:
    """A matrix of 4096 x 4096: at most twice the time of integers of 4 bits in groups of 128."""
    W = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    grid, integers = (grid_of(SCHEMES[name], W.dtype) for name in (scheme, "W4A16_ASYM"))
    assert compare(benchmark, lambda: fake_quantise(W, grid), lambda: fake_quantise(W, integers), rounds=3) >= 0.5
