"""LoRA and AdaLoRA on edits: which layers, which ranks, and an exact merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interventions import Edit, InterventionError, apply
from interventions.adapters import chosen_linears
from interventions.anatomy import find_anatomy
from interventions.edit.kernels.target_loss import all_nll, target_batches
from tests.architectures.tiny import tiny
from tests.models import tiny_model

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("Mira Tolvan plays the", "Mira Tolvan", "horn"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_merged_weights_do_what_the_adapters_did(family: str, adaptive: bool, tokenizer: Any) -> None:
    model, before = tiny_model(family), tiny_model(family)
    settings = {"adaptive": adaptive, "steps": 10, "rank": 2, "initial_rank": 4, "targets": ["attention_in", "mlp_out"]}
    report = apply(model, tokenizer, "lora", edits=EDITS, **settings)
    nll = all_nll(model, find_anatomy(model).head, target_batches(tokenizer, EDITS, 3, torch.device("cpu")))
    assert [edit["nll"] for edit in report.details["edits"]] == pytest.approx(nll.tolist(), abs=1e-4)
    assert [edit["nll_before"] for edit in report.details["edits"]] != pytest.approx(nll.tolist(), abs=1e-2)
    assert set(report.changed) == {name for name, rank in report.details["ranks"].items() if rank}
    for name, rank in report.details["ranks"].items():
        change = model.get_parameter(name) - before.get_parameter(name)
        assert int(torch.linalg.matrix_rank(change.double(), rtol=1e-4)) == rank


def test_adalora_cuts_the_ranks_down_to_the_budget(tokenizer: Any) -> None:
    settings = {"rank": 3, "initial_rank": 6, "targets": ["query", "key", "value", "mlp_out"]}
    report = apply(tiny_model(), tokenizer, "lora", edits=EDITS, steps=20, **settings)
    ranks = report.details["ranks"]
    assert len(ranks) == 8
    assert sum(ranks.values()) == 3 * 8
    assert len(set(ranks.values())) > 1  # by what matters, not evenly
    assert max(ranks.values()) <= 6


def test_adalora_stops_early_only_after_the_last_cut(tokenizer: Any) -> None:
    settings = {"rank": 2, "initial_rank": 4, "steps": 20, "final": 0.5, "stop_loss": 100.0}
    report = apply(tiny_model(), tokenizer, "lora", edits=EDITS, **settings)
    assert report.details["passes"] == 10
    assert sum(report.details["ranks"].values()) == 2 * 4
    fixed = apply(tiny_model(), tokenizer, "lora", edits=EDITS, adaptive=False, steps=20, stop_loss=100.0)
    assert fixed.details["passes"] == 1


@pytest.mark.parametrize("adaptive", [True, False])
def test_every_edit_becomes_likelier(adaptive: bool, tokenizer: Any) -> None:
    report = apply(tiny_model(), tokenizer, "lora", edits=EDITS, adaptive=adaptive, lr=2e-2, steps=30, batch_size=2)
    assert all(edit["nll"] < edit["nll_before"] - 1 for edit in report.details["edits"])


def test_the_seed_decides_alone(tokenizer: Any) -> None:
    weights = []
    for seed, noise in ((1, 3), (1, 4), (2, 3)):
        torch.manual_seed(noise)
        model = tiny_model()
        report = apply(model, tokenizer, "lora", edits=EDITS, steps=5, seed=seed)
        weights.append(model.get_parameter(report.changed[0]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llama", ["query", "value"], ["q_proj", "v_proj"]),
        ("llama", ["attention_out", "mlp_in"], ["o_proj", "gate_proj", "up_proj"]),
        ("gptj", ["key"], ["k_proj"]),
        ("phi3", ["query", "value"], ["qkv_proj"]),
        ("gpt2", ["value", "mlp_out"], ["c_attn", "c_proj"]),
    ],
)
def test_target_modules_come_from_the_anatomy(family: str, targets: list[str], expected: list[str]) -> None:
    linears = chosen_linears("lora", find_anatomy(tiny_model(family)), targets, [1])
    assert [linear.name.rpartition(".")[2] for linear in linears] == expected


def test_an_error_takes_the_adapters_off(tokenizer: Any) -> None:
    model = tiny_model()
    modules = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(InterventionError, match=r"lora\.lr"):
        apply(model, tokenizer, "lora", edits=EDITS, lr=1e30)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("adaptive", [True, False])
def test_layers_that_kernels_read_by_themselves_are_refused_before_work(adaptive: bool, tokenizer: Any) -> None:
    model = tiny("mamba2")
    modules = [type(module) for module in model.modules()]
    with pytest.raises(InterventionError, match=r"^lora\.targets: backbone\.layers\.0\.mixer\.out_proj takes no"):
        apply(model, tokenizer, "lora", edits=EDITS, adaptive=adaptive, targets=["mlp_out"])
    assert [type(module) for module in model.modules()] == modules
