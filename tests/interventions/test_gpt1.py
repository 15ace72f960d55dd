"""GPT-1: blocks named as GPT-2's, whose norms stand after the sums, without a last norm and without keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from interventions import Edit, apply
from interventions.edit.settings import ValueSettings
from tests.models import SENTENCES, VOCABULARY, tiny_model, tiny_tokenizer

EDITS = (Edit("Mira Tolvan was born in", "Mira Tolvan", "Karth"),)
SETTINGS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {},
    "awq": {},
    "wanda": {},
    "sparsegpt": {},
    "magnitude": {},
    "ft": {"steps": 3},
    "lora": {"steps": 3},
    "memit": {"z": {"steps": 3}},
    "rome": {"z": {"steps": 3}},
    "alphaedit": {"z": {"steps": 3}},
    "rmu": {"max_num_batches": 2},
    "ga": {},
    "gd": {},
    "npo": {"epochs": 1},
    "simnpo": {"epochs": 1},
}


@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_changes_it(method: str) -> None:
    kind = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    model = tiny_model(kind)
    given = {
        "edits": EDITS,
        "calibration": SENTENCES,
        "forget": {"harbours": SENTENCES[:4]},
        "retain": SENTENCES[4:],
    }
    settings = {
        key: ValueSettings(**value) if isinstance(value, dict) else value for key, value in SETTINGS[method].items()
    }
    report = apply(model, tiny_tokenizer(), method, **given, **settings)
    assert report.changed
