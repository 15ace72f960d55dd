"""Numbers that are rounded while a model runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from evaluators.efficiency import measure_efficiency
from interventions import InterventionError, apply
from interventions.compress.schemes import CACHES, SCHEMES
from interventions.rounding import Rounded, Rounding, calibrated, read_rounding, rounding_of, set_rounding_, unrounded
from tests.models import SENTENCES, tiny_model

WITH_INPUTS = sorted(name for name, scheme in SCHEMES.items() if scheme.inputs is not None)
TEXTS = [" ".join(SENTENCES)] * 4


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(2, 26)[None]).logits
    return found


def values(metric: str, model: Any) -> float | None:
    return next((m.value for m in measure_efficiency(model) if m.metric == metric), None)


@pytest.mark.parametrize("name", WITH_INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_rounded_as_by_compressed_tensors(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        compute_dynamic_scales_and_zp,
        generate_gparam,
    )

    x = (torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 1, 256)).to(dtype)
    scheme = SCHEMES[name].inputs
    assert scheme is not None
    args: QuantizationArgs = preset_name_to_scheme(name, ["Linear"]).input_activations
    low, high = x.amin(), x.amax()
    whole = generate_gparam(low, high) if scheme.scales == "two-level" else None
    if args.dynamic is False:
        scales, zeros = calculate_qparams(low, high, args)
    else:
        scales, zeros = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), whole)
    # Divided and rounded in float32, as kernels do.
    wanted = fake_quantize(x.float(), scales.float(), zeros.float(), args, global_scale=whole).to(dtype)
    rounded = calibrated(scheme, float(x.abs().max()), dtype) if scheme.calibrated else Rounded(scheme)
    torch.testing.assert_close(rounded(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*CACHES, *WITH_INPUTS])
def test_rounding_gives_numbers_of_the_format_and_passes_gradients(name: str) -> None:
    scheme = CACHES[name] if name in CACHES else SCHEMES[name].inputs
    assert scheme is not None
    x = torch.randn(3, 7, 64, requires_grad=True)
    rounded = calibrated(scheme, 4.0, torch.float32) if scheme.calibrated else Rounded(scheme)
    y = rounded(x)
    assert not torch.equal(y, x)
    assert float((y - x).detach().norm() / x.detach().norm()) < 2.0 ** (1 - scheme.bits / 2)
    (y * torch.arange(64.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(64.0).expand(3, 7, 64))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_scheme_with_inputs_rounds_them_from_then_on(family: str, method: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    report = apply(model, tokenizer, method, calibration=TEXTS, scheme="W8A8")
    assert report.rounding == rounding_of(model).plain()
    assert report.promises["input_bits"] == 8
    assert values("input_bits", model) == 8
    with_inputs = logits(model)
    with unrounded(model):
        without = logits(model)
    assert not torch.equal(with_inputs, without)
    assert torch.equal(logits(model), with_inputs)
    assert float((with_inputs - without).norm() / without.norm()) < 0.1
    later = apply(model, tokenizer, "magnitude", sparsity=0.3)
    assert later.rounding == report.rounding
    assert rounding_of(copy.deepcopy(model)) == rounding_of(model)


@pytest.mark.parametrize("cache", ["fp8", "int8"])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt_neox", "qwen3"])
def test_keys_and_values_are_rounded_with_a_scale_from_the_text(cache: str, family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    before = logits(model)
    with pytest.raises(InterventionError, match="calibration"):
        apply(model, tokenizer, "rtn", bits=8, kv_cache=cache)
    assert torch.equal(logits(model), before)
    assert not rounding_of(model)
    report = apply(model, tokenizer, "rtn", calibration=TEXTS, bits=8, kv_cache=cache)
    assert report.promises["kv_cache_bits"] == values("kv_cache_bits", model) == 8
    caches = rounding_of(model).caches
    assert len(caches) == 2
    assert all(cached.keys.scale and cached.values.scale for cached in caches.values())
    rounded = logits(model)
    with unrounded(model):
        assert not torch.equal(logits(model), rounded)
    # One pass, and token by token with a cache, read the same keys and values.
    out = model(torch.arange(2, 25)[None], use_cache=True)
    step = model(torch.tensor([[25]]), past_key_values=out.past_key_values).logits[0, -1]
    torch.testing.assert_close(step, rounded[0, -1], rtol=1e-4, atol=1e-5)


def test_a_rounding_survives_plain_data_and_comes_off(tokenizer: Any) -> None:
    model = tiny_model("llama-gqa")
    before = logits(model)
    apply(model, tokenizer, "rtn", calibration=TEXTS, scheme="NVFP4", kv_cache="fp8")
    rounding = rounding_of(model)
    assert read_rounding(rounding.plain()) == rounding
    assert read_rounding(None) == Rounding()
    other = tiny_model("llama-gqa")
    set_rounding_(other, rounding)
    assert not torch.equal(logits(other), before)
    set_rounding_(other, Rounding())
    assert torch.equal(logits(other), before)


def test_a_failing_step_leaves_the_rounding_as_it_was(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    apply(model, tokenizer, "rtn", scheme="FP8_DYNAMIC")
    rounding = rounding_of(model)

    def fail(*arguments: Any) -> None:
        set_rounding_(model, Rounding())
        raise RuntimeError("stop")

    monkeypatch.setattr("interventions.compress.kernels.run_time.chosen_schemes", fail)
    with pytest.raises(RuntimeError, match="stop"):
        apply(model, tokenizer, "rtn", bits=3)
    assert rounding_of(model) == rounding
