"""AlphaEdit: updates that other text does not see, and batches that leave each other alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interventions import Edit, apply
from interventions.anatomy import find_anatomy
from interventions.edit.bases import ValueSettings
from interventions.edit.kernels.closed_form import NullSpaceSolve, null_space
from interventions.edit.kernels.subjects import keys_and_values
from interventions.edit.kernels.target_values import optimise_values
from interventions.statistics import collect_statistics, token_batches
from tests.models import SENTENCES, tiny_model

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
    Edit("The lighthouse of Ossel", "Ossel", "fern"),
)
QUICK = {"layers": [0], "contexts_per_length": 0, "z": ValueSettings(steps=6), "nullspace_relative": True}


def _second_moment(model: nn.Module, tokenizer: Any) -> Tensor:
    output = find_anatomy(model).blocks[0].mlp_output
    batches = token_batches(tokenizer, SENTENCES, max_tokens=64, batch_size=8)
    return collect_statistics(model, batches, [output])[output.name].second_moment()


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "opt"])
def test_the_update_lies_in_the_null_space_of_the_present_state(family: str, tokenizer: Any) -> None:
    model, before = tiny_model(family), tiny_model(family)
    name = find_anatomy(model).blocks[0].mlp_output.name
    with torch.no_grad():  # a state that an earlier step left: its statistics are not those of the first model
        find_anatomy(model).blocks[0].group("mlp_in").linears[0].weight.mul_(-1.5)
    basis = null_space(_second_moment(model, tokenizer), 0.3, relative=True)
    report = apply(
        model, tokenizer, "alphaedit", edits=EDITS, calibration=SENTENCES, nullspace_threshold=0.3, ridge=1e-3, **QUICK
    )
    linears = [find_anatomy(m).blocks[0].mlp_output for m in (model, before)]
    change = (linears[0].weight - linears[1].weight).double()
    outside = change - change @ basis @ basis.t()
    assert float(outside.norm()) < 1e-4 * float(change.norm())
    assert report.details["free_directions"] == {f"{name}.weight": basis.shape[1] / basis.shape[0]}


def test_with_every_direction_free_the_subjects_reach_their_values(tokenizer: Any) -> None:
    model = tiny_model()
    anatomy = find_anatomy(model)
    wanted = optimise_values(model, tokenizer, anatomy, EDITS, [""], 0, QUICK["z"], lambda line: None)
    report = apply(
        model, tokenizer, "alphaedit", edits=EDITS, calibration=SENTENCES, nullspace_threshold=1e9, ridge=1e-6, **QUICK
    )
    _, reached = keys_and_values(model, tokenizer, anatomy, EDITS, [""], 0)
    assert float((reached - wanted.z).norm()) < 1e-3 * float(wanted.z.norm())
    assert any("no key is preserved" in warning for warning in report.warnings)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_batches_keep_what_earlier_ones_stored(batch_size: int | None, tokenizer: Any) -> None:
    model = tiny_model()
    anatomy = find_anatomy(model)
    settings = QUICK | {"nullspace_threshold": 1e9, "ridge": 1e-6}
    states = []
    for count in (1, 3):
        edited = tiny_model()
        report = apply(
            edited,
            tokenizer,
            "alphaedit",
            edits=EDITS[:count],
            calibration=SENTENCES,
            batch_size=batch_size,
            **settings,
        )
        states.append(keys_and_values(edited, tokenizer, find_anatomy(edited), EDITS[:1], [""], 0).values)
    before = keys_and_values(model, tokenizer, anatomy, EDITS[:1], [""], 0).values
    # What the first edit brought about is still there after the others.
    assert float((states[1] - states[0]).norm()) < 1e-2 * float((states[0] - before).norm())
    assert report.details["batches"] == {1: 3, 2: 2, None: 1}[batch_size]


def test_the_solve_remembers_its_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, residuals = torch.randn(12, 4, generator=generator), torch.randn(5, 4, generator=generator)
    basis = torch.eye(12, dtype=torch.float64)[:, :9]
    solve = NullSpaceSolve(basis, 1e-8)
    first = solve(keys[:, :2], residuals[:, :2])
    second = solve(keys[:, 2:], residuals[:, 2:])
    projected = basis @ basis.t() @ keys.double()
    assert torch.allclose(first @ projected[:, :2], residuals[:, :2].double(), atol=1e-5)
    assert torch.allclose((first + second) @ projected[:, :2], residuals[:, :2].double(), atol=1e-5)
