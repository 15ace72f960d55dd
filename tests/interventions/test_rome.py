"""ROME: one rank-one update an edit, in one layer."""

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
QUICK = {"layer": 0, "contexts_per_length": 0, "z": ValueSettings(steps=6)}


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "opt", "gpt_neox"])
def test_the_subject_yields_its_target_value_exactly(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    wanted = optimise_values(model, tokenizer, anatomy, EDITS[:1], [""], 0, QUICK["z"], lambda line: None)
    apply(model, tokenizer, "rome", edits=EDITS[:1], calibration=SENTENCES, **QUICK)
    _, reached = keys_and_values(model, tokenizer, anatomy, EDITS[:1], [""], 0)
    assert float((reached - wanted.z).norm()) < 1e-3 * float(wanted.z.norm())


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_each_edit_adds_one_rank(batch_size: int | None, tokenizer: Any) -> None:
    model, before = tiny_model(), tiny_model()
    report = apply(model, tokenizer, "rome", edits=EDITS, calibration=SENTENCES, batch_size=batch_size, **QUICK)
    (name,) = report.changed
    change = (model.get_parameter(name) - before.get_parameter(name)).detach().double()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == len(EDITS)
    assert report.details["batches"] == {1: 3, 2: 2, None: 1}[batch_size]
    assert report.details["updates"][name] == pytest.approx(
        float(change.norm() / before.get_parameter(name).detach().norm())
    )


def test_edits_one_by_one_are_those_of_steps_one_by_one(tokenizer: Any) -> None:
    """But for the second moment, which is that of the model before the first edit."""
    together, apart = tiny_model(), tiny_model()
    apply(together, tokenizer, "rome", edits=EDITS, calibration=SENTENCES, **QUICK)
    for edit in EDITS:
        report = apply(apart, tokenizer, "rome", edits=[edit], calibration=SENTENCES, **QUICK)
    (name,) = report.changed
    # One layer alone is changed, and it does not change its own keys.
    assert torch.allclose(together.get_parameter(name), apart.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_the_layer_defaults_to_a_fraction_of_depth(tokenizer: Any) -> None:
    report = apply(
        tiny_model(), tokenizer, "rome", edits=EDITS[:1], calibration=SENTENCES, layer_fraction=0.5, z=QUICK["z"]
    )
    assert report.details["layers"] == [1]
