"""Adding a direction to the residual stream by a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interventions import InterventionError, apply
from interventions.steer.steer import SteerSettings
from tests.architectures.tiny import tiny
from tests.interventions.test_abliterate import PROMPTS, direction_of, states
from tests.tokenizers import tiny_tokenizer

TEXT = "A text that no prompt has."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "bloom", "gpt_neox"])
def test_every_token_moves_by_the_direction(family: str, tokenizer: Any) -> None:
    model = tiny(family)
    before, wanted = states(model, tokenizer, TEXT)[0], -2.0 * direction_of(model, tokenizer, 0)
    report = apply(model, tokenizer, "steer", refusal=PROMPTS, layers=[0], strength=-2.0)
    moved = states(model, tokenizer, TEXT)[0] - before
    torch.testing.assert_close(moved, wanted.expand_as(moved), rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert list(report.changed) == report.details["biases"] and len(report.changed) == 1


def test_a_scaled_residual_is_made_up_for(tokenizer: Any) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GraniteConfig(**sizes, vocab_size=320, num_key_value_heads=2, mlp_bias=True, residual_multiplier=0.25)
    model = GraniteForCausalLM(config).eval()
    before, wanted = states(model, tokenizer, TEXT)[1], direction_of(model, tokenizer, 1)
    apply(model, tokenizer, "steer", refusal=PROMPTS, layers=[1])
    moved = states(model, tokenizer, TEXT)[1] - before
    torch.testing.assert_close(moved, wanted.expand_as(moved), rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_the_bias_of_attention_can_hold_it(tokenizer: Any) -> None:
    report = apply(tiny("gpt_oss"), tokenizer, "steer", refusal=PROMPTS, layers=[1], where="attention")
    assert report.changed == ("model.layers.1.self_attn.o_proj.bias",)


@pytest.mark.parametrize("where", ["mlp", "attention"])
def test_without_a_bias_it_says_what_to_do(where: str, tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match=f"the {where} of model.layers.1 has no output bias .*mlp_bias"):
        apply(tiny("llama"), tokenizer, "steer", refusal=PROMPTS, layers=[1], where=where)


def test_a_norm_after_the_mlp_has_no_bias_in_gemma_2(tokenizer: Any) -> None:
    with pytest.raises(InterventionError, match="no output bias"):
        apply(tiny("gemma2"), tokenizer, "steer", refusal=PROMPTS, layers=[1])


def test_adding_refusal_promises_nothing_and_attacks_its_removal() -> None:
    assert SteerSettings(strength=1.0).undoes == ("steer",) and SteerSettings(strength=-1.0).undoes == ()
    with pytest.raises(InterventionError, match="strength=0"):
        SteerSettings(strength=0.0)
