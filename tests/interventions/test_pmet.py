"""PMET: its target values against a plain formulation, what it stores, and how it spreads it over layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interventions import Edit, InterventionError, Resources, apply
from interventions.anatomy import find_anatomy
from interventions.context import Context
from interventions.edit.kernels.closed_form import factorise, memit_update
from interventions.edit.kernels.prompts import tokenise
from interventions.edit.kernels.rewriting import rewrite
from interventions.edit.kernels.subjects import keys_and_values
from interventions.edit.kernels.tail import attention_and_mlp
from interventions.edit.kernels.target_values import Components, optimise_values
from interventions.edit.pmet import PmetSettings, PmetValueSettings
from tests.models import SENTENCES, tiny_model

EDITS = (
    Edit("Mira Tolvan was born in", "Mira Tolvan", "Dunmere"),
    Edit("In the valley Orin Vask is a", "Orin Vask", "silver river"),
    Edit("The lighthouse of Ossel", "Ossel", "fern"),
)
QUICK = PmetValueSettings(steps=8, lr=0.5, clamp_norm_factor=3.0)
SURE = Components(0.1, 0.01)


def _plain(model: nn.Module, tokenizer: Any, edit: Edit, layer: int, z: PmetValueSettings) -> tuple[Tensor, Tensor]:
    """The published loop: whole texts, one by one, and two hooks that add to outputs of attention and MLP."""
    asked = tokenise(tokenizer, edit, with_target=True)
    essence = tokenise(tokenizer, Edit(f"{edit.subject} is a", edit.subject, ""))
    modules = attention_and_mlp(find_anatomy(model).blocks[layer])
    deltas = [torch.zeros(32, requires_grad=True) for _ in modules]
    optimizer = torch.optim.Adam(deltas, lr=z.lr)
    starts: dict[int, Tensor] = {}

    def run(ids: tuple[int, ...], place: int) -> Tensor:
        def add(number: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            rows = output.reshape(1, -1, 32)
            starts.setdefault(number, rows[0, place].detach().clone())
            return rows.index_put((torch.tensor(0), torch.tensor(place)), rows[0, place] + deltas[number])

        handles = [m.register_forward_hook(partial(add, number)) for number, m in enumerate(modules)]
        says: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=-1)
        for handle in handles:
            handle.remove()
        return says

    before, factor = None, 1.0
    nll = torch.zeros(())
    for step in range(z.steps):
        says = run(asked.ids[:-1], asked.subject_end)
        places = [place - 1 for place in asked.target_places]
        targets = torch.tensor([asked.ids[place] for place in asked.target_places])
        nll = -says[places].gather(1, targets[:, None]).mean()
        about = run(essence.ids[: essence.subject_end + 1], essence.subject_end)[-1]
        before = about.detach() if before is None else before
        divergence = z.kl_factor * (before.exp() * (before - about)).sum()
        decay = sum(delta.norm() / starts[n].norm() ** 2 for n, delta in enumerate(deltas))
        loss = factor * nll + divergence + z.weight_decay * decay
        sure = bool((says[places].argmax(dim=1) == targets).all())
        factor = z.sure_weight if sure else 1.0
        if loss < z.stop_loss or (sure and divergence <= z.sure_divergence) or step == z.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for number, delta in enumerate(deltas):
                delta *= min(1.0, float(z.clamp_norm_factor * starts[number].norm() / delta.norm()))
    return starts[1] + deltas[1].detach(), nll.detach()


@pytest.mark.parametrize("family", ["llama-gqa", "gptj", "gemma2", "opt"])
def test_target_values_are_those_of_a_plain_loop(family: str, tokenizer: Any) -> None:
    model = tiny_model(family).requires_grad_(False)
    found = optimise_values(
        model, tokenizer, find_anatomy(model), EDITS, [""], 0, QUICK, lambda line: None, components=SURE
    )
    for number, edit in enumerate(EDITS):
        value, nll = _plain(model, tokenizer, edit, 0, QUICK)
        assert float((found.z[number] - value).norm()) < 1e-3 * float((value - found.start[number]).norm())
        assert float(found.nll[number]) == pytest.approx(float(nll), rel=1e-3)


def test_a_sure_edit_weighs_its_likelihood_less_and_stops(tokenizer: Any) -> None:
    model = tiny_model()
    z = PmetValueSettings(steps=40, lr=1.0, clamp_norm_factor=100.0, kl_factor=0.0, stop_loss=0.0, weight_decay=0.0)
    edits = [Edit("The lighthouse of Ossel", "Ossel", "in")]  # one token
    run = partial(optimise_values, model, tokenizer, find_anatomy(model), edits, [""], 1, z, lambda line: None)
    sure, never = run(components=SURE), run(components=Components(1.0, -1.0))
    assert int(sure.steps) < int(never.steps) == 39
    assert float(sure.nll) > float(never.nll)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "gemma2", "gptj"])
def test_the_mlp_puts_out_its_target_value_and_attention_keeps_its_weights(family: str, tokenizer: Any) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    wanted = optimise_values(model, tokenizer, anatomy, EDITS, [""], 1, QUICK, lambda line: None, components=SURE)
    settings = {"layers": [0, 1], "covariance_weight": 1e-8, "contexts_per_length": 0, "z": QUICK}
    report = apply(model, tokenizer, "pmet", edits=EDITS, calibration=SENTENCES, **settings)
    reached = keys_and_values(model, tokenizer, anatomy, EDITS, [""], 1, inside=True).values
    assert float((reached - wanted.z).norm()) < 1e-3 * float((wanted.z - wanted.start).norm())
    assert set(report.changed) == {block.mlp_output.parameter_name for block in anatomy.blocks}
    assert [edit["reached"] for edit in report.details["edits"]] == pytest.approx([1.0] * 3, abs=1e-3)


def test_a_layer_takes_the_square_root_of_its_share(tokenizer: Any) -> None:
    model = tiny_model()
    anatomy = find_anatomy(model)
    settings = PmetSettings(layers=[0, 1], contexts_per_length=0, z=QUICK)
    wanted = optimise_values(model, tokenizer, anatomy, EDITS, [""], 1, QUICK, lambda line: None, components=SURE)
    seen: list[Tensor] = []

    def make_solve(output: Any, second_moment: Tensor) -> Any:
        def solve(keys: Tensor, residuals: Tensor) -> Tensor:
            seen.append(residuals.t())
            return memit_update(keys, residuals, factorise(second_moment), 1e-8)

        return solve

    rewrite(
        model,
        tokenizer,
        settings,
        Resources(edits=EDITS, calibration=SENTENCES),
        Context(),
        make_solve,
        remedy="",
        components=SURE,
        spread=math.sqrt,
    )
    assert torch.allclose(seen[0], (wanted.z - wanted.start) / math.sqrt(2), rtol=1e-3, atol=1e-5)
    assert float((seen[1] - (wanted.z - wanted.start)).norm()) > 0  # the first layer changed the last one's inputs


def test_a_block_without_attention_is_refused_by_name(tokenizer: Any) -> None:
    from tests.architectures.tiny import tiny

    model = tiny("mamba")
    with pytest.raises(InterventionError, match=r"layers\.\d has no linear layer with the role attention_out"):
        apply(model, tokenizer, "pmet", edits=EDITS, calibration=SENTENCES, layers=[0], covariance_tokens=100)
