"""EMMET: all edits of a batch are stored exactly, and one edit is one of ROME."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interventions import Edit, apply
from interventions.anatomy import find_anatomy
from interventions.edit.bases import ValueSettings
from interventions.edit.kernels.subjects import keys_and_values
from interventions.edit.kernels.target_values import optimise_values
from tests.models import SENTENCES, tiny_model

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
    Edit("The lighthouse of Ossel", "Ossel", "fern"),
)
QUICK: dict[str, Any] = {"contexts_per_length": 0, "z": ValueSettings(steps=6)}


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma"])
def test_without_ridge_every_subject_of_a_batch_yields_its_target_value(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    wanted = optimise_values(model, tokenizer, anatomy, EDITS, [""], 0, QUICK["z"], lambda line: None)
    apply(model, tokenizer, "emmet", edits=EDITS, calibration=SENTENCES, layers=[0], ridge=0.0, **QUICK)
    reached = keys_and_values(model, tokenizer, anatomy, EDITS, [""], 0).values
    assert float((reached - wanted.z).norm()) < 1e-3 * float((wanted.z - wanted.start).norm())


def test_edits_one_by_one_are_those_of_rome(tokenizer: Any) -> None:
    one, other = tiny_model(), tiny_model()
    report = apply(one, tokenizer, "emmet", edits=EDITS, calibration=SENTENCES, layers=[0], batch_size=1, **QUICK)
    apply(other, tokenizer, "rome", edits=EDITS, calibration=SENTENCES, layer=0, **QUICK)
    (name,) = report.changed
    assert torch.allclose(one.get_parameter(name), other.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert report.details["sequence"] == [1, 1, 1]


def test_a_ridge_stores_less_and_the_layer_defaults_to_a_fraction_of_depth(tokenizer: Any) -> None:
    reached = []
    for ridge in (0.0, 100.0):
        report = apply(tiny_model(), tokenizer, "emmet", edits=EDITS, calibration=SENTENCES, ridge=ridge, **QUICK)
        assert report.details["layers"] == [0]
        reached.append([edit["reached"] for edit in report.details["edits"]])
    assert reached[0] == pytest.approx([1.0] * 3, abs=1e-3)
    assert all(0 < share < 0.999 for share in reached[1])
