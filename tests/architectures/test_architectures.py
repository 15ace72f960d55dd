"""Every architecture passes, or is refused with a reason; none is silently wrong (python -m tests.architectures)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.architectures.check import CHECKS, GOAL, INVARIANTS, METHODS, PASSED, Result, check
from tests.architectures.page import page, share
from tests.architectures.tiny import ARCHITECTURES, SMALL, Size

ROOT = Path(__file__).parents[2]
# Models of other code raise warnings of theirs.
pytestmark = pytest.mark.filterwarnings("ignore")
FEW = {
    "falcon": ("rtn", "awq", "memit", "tail", "folds"),
    "mamba2": ("gptq", "memit", "rmu", "tail", "eight bits"),
    "qwen3_5_text": ("awq", "wanda", "lora", "folds", "unchanged"),
    "minicpm3": ("gptq", "awq", "folds", "tail"),
    "olmoe": ("rtn", "gptq", "batch size", "unchanged"),
    "openai-gpt": ("memit", "gd", "perplexity", "efficiency", "recall"),
    "rwkv": ("rtn", "perplexity", "editing", "batch size"),
}
"""One architecture of every kind, and the checks that it is most likely to fail."""


@pytest.mark.parametrize("name", sorted(FEW))
def test_a_few_architectures_pass(name: str) -> None:
    found = check(name, checks=FEW[name])
    assert not {key: result for key, result in found.items() if result.state != PASSED}
    assert set(FEW[name]) <= found.keys()


def test_what_is_no_language_model_of_text_is_refused() -> None:
    found = check("musicgen")
    assert found["built"].state == PASSED and found["reads text"].state != PASSED and "rtn" not in found


def test_the_page_names_each_architecture_once_with_its_reason() -> None:
    passed = dict.fromkeys(("built", "reads text", *CHECKS), Result(PASSED))
    refused = passed | {"memit": Result("refused", "no MLP | here. Describe the architecture with a Layout")}
    text = page({"one": passed, "two": refused}, SMALL, 3)
    assert "1 of 2 architectures (50%) pass" in text and "seed 3" in text
    assert "| `one` | passes |" in text
    assert "| `two` | refused (memit): no MLP \\| here. |" in text
    assert "| `memit` | 1 of 2 | 50.0% |" in text
    assert share({"one": passed, "two": refused}, GOAL) == 0.5


def test_the_documentation_has_every_architecture() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text()
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row not in METHODS] == list(ARCHITECTURES)
    assert "wrong (" not in text


@pytest.mark.slow
def test_nine_in_ten_architectures_pass_and_none_is_wrong() -> None:
    from tests.architectures.__main__ import check_all

    size = Size(int(os.environ.get("LMCOMPOSE_HIDDEN", SMALL.hidden)), int(os.environ.get("LMCOMPOSE_LAYERS", 2)))
    results = check_all(ARCHITECTURES, size, int(os.environ.get("LMCOMPOSE_SEED", 0)), CHECKS, 2)
    wrong = {name: key for name, found in results.items() for key, result in found.items() if result.state == "wrong"}
    assert not wrong
    assert share(results, GOAL) >= 0.9
    assert share(results, ("unchanged",)) >= share(results, GOAL) and set(INVARIANTS) < set(CHECKS)
