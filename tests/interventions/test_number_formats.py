"""The settings `scheme` and `keep` of quantisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluators.efficiency import decoder_linears, measure_efficiency
from interventions import InterventionError, apply
from interventions.compress.awq import AwqSettings
from interventions.compress.gptq import GptqSettings
from interventions.compress.rtn import RtnSettings
from interventions.compress.schemes import SCHEMES
from interventions.ranges import SettingError
from tests.engines.states import READ, packable_model
from tests.models import tiny_tokenizer

KINDS = (RtnSettings, GptqSettings, AwqSettings)


def done(method: str, **settings: Any) -> tuple[Any, Any, Any]:
    """Return the model before and after a step, and its report."""
    before, after = packable_model(), packable_model()
    read = {} if method == "rtn" else READ
    return before, after, apply(after, tiny_tokenizer(), method, **read, **settings)


def bits_of(model: Any) -> float:
    return next(m.value for m in measure_efficiency(model, length=8) if m.metric == "average_bits")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "W4A61"}, r"scheme=W4A61: expected one of W2A16, .* Did you mean W4A16"),
        ({"scheme": "NVFP4A16", "bits": 8}, r"bits=8: scheme=NVFP4A16 has bits=4; leave one of them out"),
        ({"scheme": "W8A16", "group_size": 64}, r"group_size=64: scheme=W8A16 has group_size=128"),
        ({"scheme": "W4A16_ASYM", "symmetric": True}, r"symmetric=true: scheme=W4A16_ASYM has symmetric=false"),
        ({"keep": ["first"]}, r"keep=first: expected layers:bits, such as first:16"),
        ({"keep": [":8"]}, r"keep=:8: expected layers:bits"),
        ({"keep": ["last:9"]}, r"keep=last:9: expected 2, 3, 4, 5, 6, 7, 8, 16 bits or a scheme after the colon"),
        ({"kv_cache": "fp4"}, r"kv_cache='?fp4'?: expected one of fp8, int8"),
        ({"keep": []}, r"keep=\[\]"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    for kind in KINDS:
        with pytest.raises(SettingError, match=message):
            kind(**settings)


def test_an_explicit_default_contradicts_a_scheme_too() -> None:
    with pytest.raises(InterventionError, match=r"rtn\.bits=4: scheme=W8A16 has bits=8"):
        apply(packable_model(), None, "rtn", scheme="W8A16", bits=4)
    assert RtnSettings(scheme="W8A16", bits=8, symmetric=True)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_average_bits_are_those_of_the_scheme(method: str) -> None:
    schemes = ("W4A16", "FP8A16_CHANNEL", "MXFP4A16") if method == "rtn" else ("NVFP4A16",)
    for scheme in schemes:
        _, model, report = done(method, scheme=scheme)
        assert report.promises == {"average_bits": SCHEMES[scheme].bits}
        assert bits_of(model) == SCHEMES[scheme].bits


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_kept_layers_have_their_own_bits(method: str) -> None:
    before, model, report = done(method, bits=3, group_size=32, keep=["*.mlp_out:8", "first:16", "*1.*.q_proj:FP8A16"])
    old, new = decoder_linears(before), decoder_linears(model)
    assert {name for name in new if torch.equal(old[name], new[name])} == {name for name in new if ".0." in name}
    bits = {name: 32 if ".0." in name else 8 if "down" in name or "q_proj" in name else 3 for name in new}
    expected = sum(bits[name] * weight.numel() for name, weight in new.items()) / sum(w.numel() for w in new.values())
    assert report.promises["average_bits"] == pytest.approx(expected)
    assert bits_of(model) == pytest.approx(expected)


def test_awq_scales_no_layer_that_is_kept() -> None:
    for pattern in ("*.v_proj", "mlp_out", "*.up_proj.weight"):
        before, model, _ = done("awq", group_size=32, grid=4, keep=[f"{pattern}:16"])
        same = [torch.equal(w, decoder_linears(before)[name]) for name, w in decoder_linears(model).items()]
        assert sum(same) == 2


def test_positions_count_blocks() -> None:
    before, model, _ = done("rtn", group_size=32, keep=["first-2:8", "last:16"])
    changed = {n for n, w in decoder_linears(model).items() if not torch.equal(w, decoder_linears(before)[n])}
    assert changed == {name for name in decoder_linears(model) if ".0." in name}


def test_an_exception_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InterventionError, match=r"rtn\.keep=\*\.mlp_uot:8: no layer matches; names are like model\.la"):
        apply(packable_model(), None, "rtn", keep=["*.mlp_uot:8"])
