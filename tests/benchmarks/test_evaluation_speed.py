"""Editing metrics in batches against one prompt at a time, in the same run on the embedded model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluators import EditCase, measure_editing
from evaluators.answers import score_tokens
from evaluators.encoding import encode_pairs, meaningless_ids
from pytest_lmcompose.data.readers import read_edits
from pytest_lmcompose.data.records import select_edits

TINYWORLD = Path(__file__).parents[2] / "compositions" / "tinyworld"
PUBLISHED_LENGTH = 30
"""Tokens of prompt and continuation that published evaluation scripts generate, to cut the rest off afterwards."""


def one_at_a_time(model: Any, tokenizer: Any, cases: list[EditCase], *, to_length: int | None) -> list[float]:
    """Return F1 of each prompt, generating for one after the other: `to_length`, or just what the answer needs."""
    ignored = meaningless_ids(tokenizer)
    scores = []
    for case in cases:
        asked = [(case.prompt, case.target), *((text, case.target) for text in case.paraphrases)]
        for prompt, answer in [*asked, *((probe.prompt, probe.answer) for probe in case.locality)]:
            target = encode_pairs(tokenizer, [(prompt, answer)])[0].target
            encoded = tokenizer(prompt, return_tensors="pt")
            output = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                **({"max_new_tokens": len(target)} if to_length is None else {"max_length": to_length}),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            said = output[0, encoded["input_ids"].shape[1] :].tolist()
            scores.append(score_tokens(said, target, ignored).f1)
    return scores


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("to_length", "factor"),
    [
        pytest.param(PUBLISHED_LENGTH, 8, id="as published"),
        # Most answers are one token, so this is one pass a prompt; arithmetic alone allows a factor of about 5.
        pytest.param(None, 2, id="as short as can be"),
    ],
)
def test_editing_metrics_in_batches(to_length: int | None, factor: float) -> None:
    """Twenty edits with three prompts each; margins, which the slow way lacks, are part of the fast one's time."""
    model = AutoModelForCausalLM.from_pretrained(TINYWORLD / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINYWORLD / "model")
    cases = select_edits(read_edits(TINYWORLD / "data" / "zsre.json", "zsre"), 20, seed=0)
    assert all(len(case.paraphrases) + len(case.locality) == 2 for case in cases)

    measure_editing(model, tokenizer, cases[:1])  # what the first call loads counts for neither
    slow, expected = timed(lambda: one_at_a_time(model, tokenizer, cases, to_length=to_length), 1)
    fast, found = timed(lambda: measure_editing(model, tokenizer, cases), 3)
    by_metric = {m.metric: m.samples for m in found}
    assert list(by_metric["edit_success_f1"]) == expected[0::3]
    assert list(by_metric["edit_paraphrase_f1"]) == expected[1::3]
    assert list(by_metric["edit_locality_f1"]) == expected[2::3]
    assert slow / fast >= factor, (
        f"{slow:.2f} s one at a time, {fast:.2f} s in batches: {slow / fast:.1f} times as fast"
    )


def timed(work: Callable[[], Any], times: int) -> tuple[float, Any]:
    """Return the least processor time that `work` took, which a busy machine does not stretch, and its result."""
    least = float("inf")
    for _ in range(times):
        start = time.process_time()
        result = work()
        least = min(least, time.process_time() - start)
    return least, result
