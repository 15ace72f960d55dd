"""How much faster target values and MEMIT's solve are than the plain forms, both timed in one run."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import transformers

from interventions import Edit
from interventions.anatomy import find_anatomy
from interventions.edit.bases import ValueSettings
from interventions.edit.kernels.closed_form import factorise, memit_update
from interventions.edit.kernels.target_values import optimise_values
from tests.models import VOCABULARY, tiny_tokenizer

pytestmark = pytest.mark.benchmark


def _seconds(run: Callable[[], None], rounds: int = 1) -> float:
    """Return the processor time of the best of some rounds: other work on the machine does not count."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def test_the_values_of_20_edits_together_take_a_quarter_of_one_at_a_time() -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    tokenizer, anatomy = tiny_tokenizer(), find_anatomy(model)
    edits = [Edit(f"Mira {number} was born in", f"Mira {number}", "Dunmere") for number in range(20)]
    settings = ValueSettings(steps=10)

    def together() -> None:
        optimise_values(model, tokenizer, anatomy, edits, [""], 1, settings, lambda line: None)

    def one_at_a_time() -> None:
        for edit in edits:
            optimise_values(model, tokenizer, anatomy, [edit], [""], 1, settings, lambda line: None)

    together()
    assert _seconds(one_at_a_time) >= 4 * _seconds(together, rounds=3)


def test_the_solve_of_50_edits_at_width_4096_takes_an_eighth_of_the_dense_one() -> None:
    """The factor of the second moment is made once for all batches of edits, and not timed."""
    width, weight = 4096, 15000.0
    generator = torch.Generator().manual_seed(0)
    keys, residuals = torch.randn(width, 50, generator=generator), torch.randn(64, 50, generator=generator)
    text = torch.randn(256, width, generator=generator)
    second_moment = text.t() @ text / len(text) + 0.1 * torch.eye(width)
    stored = factorise(second_moment)
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        found["ours"] = memit_update(keys, residuals, stored, weight)

    def dense() -> None:
        K = keys.double()
        found["dense"] = residuals.double() @ torch.linalg.solve(weight * second_moment.double() + K @ K.t(), K).t()

    assert _seconds(dense) >= 8 * _seconds(ours, rounds=3)
    assert float((found["ours"] - found["dense"]).norm()) <= 1e-8 * float(found["dense"].norm())
