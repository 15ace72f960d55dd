"""Edits made in a sequence of batches: each edits the model that the one before it produced, and all are reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interventions import Edit, InterventionError, apply
from interventions.edit.bases import ValueSettings
from interventions.edit.kernels.target_loss import Watch
from tests.models import SENTENCES, tiny_model

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
    Edit("The lighthouse of Ossel", "Ossel", "fern"),
)
METHODS: dict[str, dict[str, Any]] = {
    "ft": {"layers": [1], "steps": 3, "lr": 1e-3},
    "lora": {"adaptive": False, "steps": 3, "layers": [1], "targets": ["mlp_out"], "lr": 1e-2},
}


@pytest.mark.parametrize("method", METHODS)
def test_trained_batches_are_those_of_steps_one_after_another(method: str, tokenizer: Any) -> None:
    together, apart = tiny_model(), tiny_model()
    report = apply(together, tokenizer, method, edits=EDITS, edits_at_once=2, **METHODS[method])
    for some in (EDITS[:2], EDITS[2:]):
        last = apply(apart, tokenizer, method, edits=some, **METHODS[method])
    weights = [model.get_parameter(report.changed[0]) for model in (together, apart)]
    assert torch.allclose(*weights, atol=1e-6)
    assert report.details["sequence"] == [2, 1]
    assert report.details["passes"] == 6
    made = report.details["edits"]
    assert [edit["target"] for edit in made] == [edit.target for edit in EDITS]
    assert made[2]["nll_after"] == pytest.approx(last.details["edits"][0]["nll"], rel=1e-4)
    assert made[0]["nll_after"] != pytest.approx(made[0]["nll"], rel=1e-4)  # the second batch was trained since


def test_one_batch_is_measured_once(tokenizer: Any) -> None:
    report = apply(tiny_model(), tokenizer, "ft", edits=EDITS, **METHODS["ft"])
    assert report.details["sequence"] == [3]
    assert all(edit["nll_after"] == edit["nll"] for edit in report.details["edits"])


@pytest.mark.parametrize("method", ["memit", "rome", "emmet"])
def test_rewritten_batches_are_reported(method: str, tokenizer: Any) -> None:
    quick: dict[str, Any] = {"batch_size": 2, "contexts_per_length": 0, "z": ValueSettings(steps=2)}
    report = apply(tiny_model(), tokenizer, method, edits=EDITS, calibration=SENTENCES, **quick)
    assert report.details["sequence"] == [2, 1]


def test_an_error_names_the_edit_by_its_number_in_the_sequence() -> None:
    watch = Watch("ft", 1.0, [1], EDITS[1:], first=1)
    with pytest.raises(InterventionError, match=r"the loss of edit 2 \('The lighthouse"):
        watch.finite(torch.tensor([1.0, torch.nan]), range(2), 3)
