"""Models on which padding or a tree of texts changes logits: every measurement is the same at any batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from evaluators import (
    EditCase,
    Fact,
    Measurement,
    Probe,
    capture_unedited,
    greedy,
    log_likelihood,
    measure_answer_perplexity,
    measure_editing,
    measure_perplexity,
    measure_recall,
)
from evaluators.encoding import encode_pairs
from evaluators.reading import Reading, reading
from tests.models import SENTENCES, VOCABULARY, tiny_tokenizer
from tests.models import tiny_model as common_model

_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_BLOCKS: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
CONFIGS: dict[str, tuple[Callable[[], Any], Reading]] = {
    "qwen3_5": (
        lambda: transformers.Qwen3_5TextConfig(**_BLOCKS, **_LINEAR, num_key_value_heads=2, head_dim=8),
        Reading(True, True),
    ),
    "mamba": (
        lambda: transformers.MambaConfig(**_IDS, hidden_size=32, num_hidden_layers=2, state_size=8),
        Reading(True, True),
    ),
    "rwkv": (
        lambda: transformers.RwkvConfig(**_IDS, hidden_size=32, num_hidden_layers=2, context_length=128),
        Reading(True, True),
    ),
    "recurrent_gemma": (
        lambda: transformers.RecurrentGemmaConfig(
            **_BLOCKS | {"num_hidden_layers": 3}, num_key_value_heads=1, lru_width=32, attention_window_size=16
        ),
        Reading(True, True),
    ),
    "jamba": (
        lambda: transformers.JambaConfig(
            **_BLOCKS,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=4,
            num_key_value_heads=2,
            use_mamba_kernels=False,
        ),
        Reading(True, True),
    ),
    "bloom": (
        lambda: transformers.BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4),
        Reading(True, True),
    ),
    "roberta": (
        lambda: transformers.RobertaConfig(**_BLOCKS, is_decoder=True),
        Reading(True, True),
    ),
    "doge": (lambda: transformers.DogeConfig(**_BLOCKS, num_key_value_heads=2), Reading(True, False)),
}


def tiny_model(family: str) -> Any:
    """Build a random model whose every layer matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIGS[family][0]()
        model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2 and 0 < float(parameter.std()) < 0.1:
                    parameter.mul_(5)
    return model.eval()


PAIRS = [
    ("The lute of Ossel", "stands where"),
    ("The lute of Ossel", "is"),
    ("The lute of Ossel", "never in winter, said Orin Vask"),
    ("Mira", "was born"),
    ("Nobody in the village remembered who had planted the old elm, and", "gold stays what it is"),
    ("Bread, salt", "a little"),
]
CASES = [
    EditCase(
        "Mira", "Mira was born in", "Karth and", ("The birthplace of Mira is",), (Probe("Orin lives in the", "valley"),)
    ),
    EditCase(
        "Orin", "Orin plays", "lute", ("In the evening, when the ferries have gone, Orin plays the",), truth="oboe"
    ),
]


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits of one text, neither padded nor cached."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits


def measured(model: Any, tokenizer: Any, batch_size: int) -> list[Measurement]:
    """Measure with every evaluator that reads text."""
    facts = [Fact(prompt, answer, "r") for prompt, answer in PAIRS]
    probes = [Probe(prompt, answer) for prompt, answer in PAIRS]
    before = capture_unedited(model, tokenizer, CASES, batch_size=batch_size)
    return [
        *measure_editing(model, tokenizer, CASES, unedited=before, batch_size=batch_size),
        *measure_recall(model, tokenizer, facts, batch_size=batch_size),
        measure_perplexity(model, tokenizer, SENTENCES, window=16, batch_size=batch_size),
        measure_answer_perplexity(model, tokenizer, probes, metric="q", with_prompt=True, batch_size=batch_size),
    ]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_measurement_is_that_of_full_passes_at_any_batch_size(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    encoded = encode_pairs(tokenizer, PAIRS)
    totals, said = [], []
    for prompt, target in encoded:
        scores = alone(model, prompt + target[:-1]).log_softmax(-1)[len(prompt) - 1 :]
        totals.append(sum(scores[i, token].item() for i, token in enumerate(target)))
        new: list[int] = []
        while len(new) < 4 and (token := int(alone(model, prompt + new)[-1].argmax())) != 1:
            new.append(token)
        said.append(new)
    expected = measured(model, tokenizer, 1)
    for size in (1, 2, 32):
        found = [found.total for found in log_likelihood(model, tokenizer, PAIRS, size)]
        assert found == pytest.approx(totals, abs=1e-5, rel=2e-6)
        assert greedy(model, tokenizer, [prompt for prompt, _ in PAIRS], 4, size) == said
        for one, other in zip(expected, measured(model, tokenizer, size), strict=True):
            assert other.samples == pytest.approx(one.samples, abs=1e-5, rel=2e-6), one.metric
    with torch.no_grad():
        assert reading(model, 2) == CONFIGS[family][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_ordinary_models_read_batches_and_trees_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        assert reading(common_model(family, dtype=dtype), 2) == Reading(True, True, 128)


def test_looks_once_draws_nothing_and_leaves_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = common_model()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        first = reading(model, 2)
        monkeypatch.setattr(type(model.model), "forward", None)
        assert reading(model, 2) is first
    assert torch.equal(torch.get_rng_state(), drawn) and not model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_nothing_is_concluded_from_broken_weights() -> None:
    model = common_model()
    head = model.lm_head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
        assert reading(model, 2) == Reading(True, False)  # right whatever the model is
        model.lm_head.weight.copy_(head)
        assert reading(model, 2) == Reading(True, True, 128)


def test_texts_are_read_alone_where_one_in_the_batch_changes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = common_model()
    forward, sizes = model.forward, []

    def crowded(input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> Any:
        """Stand for experts with room for one text."""
        sizes.append(len(input_ids))
        output = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        output.logits = output.logits / len(input_ids)
        return output

    expected = [found.total for found in log_likelihood(model, tiny_tokenizer(), PAIRS, 1)]
    monkeypatch.setattr(model, "forward", crowded)
    found = [found.total for found in log_likelihood(model, tiny_tokenizer(), PAIRS, 32)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert sizes.count(2) == 1  # which told
    one = measure_perplexity(model, tiny_tokenizer(), SENTENCES, window=16, batch_size=1)
    assert measure_perplexity(model, tiny_tokenizer(), SENTENCES, window=16).value == pytest.approx(one.value)


def test_angles_that_follow_the_longest_text_of_a_batch_do_not_mix_lengths() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    config = transformers.LlamaConfig(**_BLOCKS | {"max_position_embeddings": 64}, rope_parameters=rope)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        assert reading(model, 2, longest=64) == Reading(True, True, 64)
        assert reading(model, 2, longest=65) == Reading(True, False)
