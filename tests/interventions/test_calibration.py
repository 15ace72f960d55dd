"""Calibration text in full windows, and a warning where there is too little of it."""

from __future__ import annotations

from typing import Any

import pytest

from interventions import Edit, InterventionError, apply
from interventions.statistics import scarce, window_batches
from interventions.tokens import frame
from tests.models import SENTENCES, tiny_model, tiny_tokenizer
from tests.tokenizers import TOKENIZERS

METHODS = ["gptq", "awq", "wanda", "sparsegpt"]
MUCH = SENTENCES * 40


def rows_of(batches: list[dict[str, Any]]) -> list[list[int]]:
    pairs = [pair for batch in batches for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_windows_are_full_start_like_texts_and_leave_nothing_out(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    start = frame(tokenizer).start
    whole = tokenizer("\n\n".join(SENTENCES), add_special_tokens=False)["input_ids"]
    rows = rows_of(window_batches(tokenizer, SENTENCES, samples=1000, max_tokens=16))
    assert [len(row) for row in rows[:-1]] == [16] * (len(rows) - 1)
    assert all(row[: len(start)] == start for row in rows)
    assert [token for row in rows for token in row[len(start) :]] == whole  # the short last one too
    assert rows_of(window_batches(tokenizer, SENTENCES, samples=3, max_tokens=16)) == rows[:3]
    assert rows_of(window_batches(tokenizer, SENTENCES, samples=3, max_tokens=16, batch_tokens=20)) == rows[:3]


@pytest.mark.parametrize(
    ("texts", "max_tokens", "message"),
    [
        ((), 8, "at least one"),
        (("fine", " \n"), 8, "text 1 is empty"),
        ("one string", 8, "not one string"),
        (("fine",), 1, "max_tokens=1 leaves no room for text"),
    ],
)
def test_text_that_cannot_be_read_is_named(texts: Any, max_tokens: int, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        window_batches(tiny_tokenizer(), texts, samples=2, max_tokens=max_tokens)


@pytest.mark.parametrize("method", METHODS)
def test_many_short_texts_are_as_good_as_a_long_one(method: str) -> None:
    settings: dict[str, Any] = {"samples": 4, "max_tokens": 60}
    short, long = tiny_model(), tiny_model()
    apply(short, tiny_tokenizer(), method, calibration=SENTENCES, **settings)
    apply(long, tiny_tokenizer(), method, calibration=["\n\n".join(SENTENCES)], **settings)
    for one, other in zip(short.parameters(), long.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_than_four_tokens_for_a_column_are_a_warning(method: str) -> None:
    """The widest input of the model has 48 columns, the others 32."""

    def warnings(texts: Any, **settings: Any) -> tuple[str, ...]:
        return apply(tiny_model(), tiny_tokenizer(), method, calibration=texts, **settings).warnings

    assert warnings(MUCH, samples=4, max_tokens=48) == ()
    (found,) = warnings(MUCH, samples=3, max_tokens=60)
    assert found == (
        f"{method}: 180 calibration tokens are 3.75 for each of the 48 columns of mlp_out, fewer than 4: "
        f"raise {method}.samples or {method}.max_tokens"
    )
    (found,) = warnings(MUCH, samples=2, max_tokens=60)
    assert "2.50 for each of the 48 columns of attention_in, attention_out, mlp_in, mlp_out" in found
    (found,) = warnings(SENTENCES[:3])
    assert found.endswith("fewer than 4: give more calibration text")


@pytest.mark.parametrize("method", ["memit", "rome", "alphaedit"])
def test_editors_warn_of_few_keys(method: str) -> None:
    def warned(**settings: Any) -> list[str]:
        edit = Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere")
        where: dict[str, Any] = {"layer": 1} if method == "rome" else {"layers": [1]}
        if method == "alphaedit":
            where |= {"nullspace_threshold": 0.5, "nullspace_relative": True}
        report = apply(tiny_model(), tiny_tokenizer(), method, edits=[edit], contexts_per_length=0, **where | settings)
        return [warning for warning in report.warnings if "columns" in warning]

    assert warned(calibration=MUCH) == []
    assert warned(calibration=SENTENCES[:4])[0].endswith("fewer than 4: give more calibration text")
    (found,) = warned(calibration=MUCH, covariance_tokens=60, covariance_window=4)
    assert found.startswith(f"{method}: 60 calibration tokens are 1.25 for each of the 48 columns of ")
    assert found.endswith(f"fewer than 4: raise {method}.covariance_tokens, or give more calibration text")


def test_editors_read_no_more_of_a_text_than_the_model_can() -> None:
    edit = Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere")
    texts = [" ".join(MUCH)] * 2
    report = apply(
        tiny_model("gpt2"), tiny_tokenizer(), "rome", edits=[edit], calibration=texts, layer=1, contexts_per_length=0
    )
    assert report.details["covariance_tokens"] == 2 * 128


def test_what_is_enough_is_no_warning() -> None:
    assert scarce("gptq", 128, {"mlp_out": 32}, "more") is None
    assert scarce("gptq", 127, {"mlp_in": 8, "mlp_out": 32}, "more") == (
        "gptq: 127 calibration tokens are 3.97 for each of the 32 columns of mlp_out, fewer than 4: more"
    )
