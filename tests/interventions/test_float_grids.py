"""Number formats give the values of compressed-tensors' own quantiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interventions.compress.kernels.formats import grid_of
from interventions.compress.kernels.gptq_kernel import gptq_quantise
from interventions.compress.kernels.grid import fake_quantise
from interventions.compress.schemes import SCHEMES
from interventions.floats import E2M1, E2M3, E4M3, FloatFormat

pytest.importorskip("compressed_tensors")
PRESETS = {"FP8A16": "FP8", "FP8A16_CHANNEL": "FP8_DYNAMIC", "FP8A16_BLOCK": "FP8_BLOCK"}
"""The presets with the weights of schemes that compressed-tensors does not name."""


def noise(rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * (0.01 + 0.2 * torch.rand(rows, 1, generator=generator))


def arguments(scheme: str) -> Any:
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    return preset_name_to_scheme(PRESETS.get(scheme, scheme), ["Linear"]).weights


def theirs(W: Tensor, scheme: str) -> Tensor:
    """Return what compressed-tensors makes of a weight: scales from the extremes, then its own rounding."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = arguments(scheme)
    if args.strategy == "tensor":
        low, high = W.amin().reshape(1), W.amax().reshape(1)
    elif args.strategy == "channel":
        low, high = W.amin(dim=1, keepdim=True), W.amax(dim=1, keepdim=True)
    elif args.strategy == "block":
        height, width = args.block_structure
        blocks = torch.nn.functional.pad(W, (0, -W.shape[1] % width, 0, -W.shape[0] % height))
        blocks = blocks.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        low, high = blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))
    else:
        groups = W.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(dim=2), groups.amax(dim=2)
    whole = generate_gparam(W.amin(), W.amax()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    return fake_quantize(W, scale, zero, args, global_scale=whole)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_those_of_compressed_tensors(scheme: str) -> None:
    for seed, (rows, cols) in enumerate([(64, 256), (200, 384), (3, 128)]):
        W = noise(rows, cols, seed)
        W[1] = 0  # groups of zeros
        W[2] *= 1e-6  # and of small weights beside large ones
        assert torch.equal(fake_quantise(W, grid_of(SCHEMES[scheme], W.dtype), refit=True), theirs(W, scheme)), cols


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_block_formats_of_half_precision_too(scheme: str, dtype: torch.dtype) -> None:
    W = noise(64, 256).to(dtype)
    assert torch.equal(fake_quantise(W, grid_of(SCHEMES[scheme], dtype)).to(dtype), theirs(W, scheme))


def test_every_preset_is_known() -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    assert set(PRESET_SCHEMES) - {"UNQUANTIZED"} <= set(SCHEMES)
    for name, scheme in SCHEMES.items():
        assert arguments(name).num_bits == scheme.bits


@pytest.mark.parametrize("format", [E2M1, E2M3, E4M3])
def test_rounding_goes_to_the_nearest_number_ties_to_even(format: FloatFormat) -> None:
    steps = 2**format.mantissa
    numbers = [0.0]
    while numbers[-1] < format.greatest:
        numbers.append(numbers[-1] + format.step * 2.0 ** max(0, (len(numbers) - 1) // steps - 1))
    exact = torch.tensor(numbers)
    between = (exact[1:] + exact[:-1]) / 2
    for sign in (1, -1):
        assert torch.equal(format.round(sign * exact), sign * exact)
        assert torch.equal(format.round(sign * between * (1 + 1e-6)), sign * exact[1:])
        assert torch.equal(format.round(sign * between * (1 - 1e-6)), sign * exact[:-1])
        even = torch.where(torch.arange(len(between)) % 2 == 0, exact[:-1], exact[1:])
        assert torch.equal(format.round(sign * between), sign * even)
    assert float(format.round(torch.tensor(1e9))) == format.greatest


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_again_changes_nothing(scheme: str) -> None:
    W = noise(64, 256)
    grid = grid_of(SCHEMES[scheme], W.dtype)
    once = fake_quantise(W, grid)
    torch.testing.assert_close(fake_quantise(once, grid), once, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_is_better_than_rounding_on_every_grid(scheme: str) -> None:
    """On two matrices on top of each other, whose scales are their own."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(512, 128, generator=generator) @ (torch.eye(128) + 0.1 * torch.randn(128, 128, generator=generator))
    H = X.t() @ X / len(X)
    one, two = noise(40, 128, 3), 5 * noise(24, 128, 4)
    grid = grid_of(SCHEMES[scheme], torch.float32)
    result = gptq_quantise(torch.cat([one, two]), H, grid, parts=[40, 24])
    assert result is not None
    for W, found in zip((one, two), torch.split(result.weight, [40, 24]), strict=True):
        rounded = fake_quantise(W, grid)
        error, plain = (float((((Q - W) @ H) * (Q - W)).sum()) for Q in (found, rounded))
        assert error < 0.95 * plain
        alone = gptq_quantise(W, H, grid)
        assert alone is not None
        torch.testing.assert_close(alone.weight, found, rtol=1e-4, atol=1e-6)
