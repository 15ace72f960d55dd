"""Removing a direction from everything that writes into the residual stream."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.steer.kernels.choice import Candidate, best, divergence, refusal_scores, removed
from interventions.steer.kernels.prompts import Prompts
from interventions.steer.kernels.removal import apart, without
from interventions.steer.kernels.writers import block_writers
from interventions.tokens import Chat
from interventions.tying import tied_head
from tests.architectures.tiny import tiny
from tests.tokenizers import SENTENCES, tiny_tokenizer

PROMPTS: Mapping[str, tuple[str, ...]] = {"harmful": SENTENCES[:4], "harmless": SENTENCES[4:]}
# Biases and positions, parallel attention, norms after sublayers and after embeddings, experts, scaled residuals.
FAMILIES = ("gpt2", "opt", "llama", "phi", "bloom", "gemma2", "olmo2", "gemma4_text", "qwen2_moe", "gpt_oss", "granite")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def states(model: Any, tokenizer: Any, text: str) -> list[Tensor]:
    """Outputs of all blocks, (tokens, width) each, from forward hooks of the test's own."""
    found: list[Tensor] = []
    handles = [
        block.module.register_forward_hook(
            lambda _, __, out: found.append((out if isinstance(out, Tensor) else out[0])[0].detach().double())
        )
        for block in find_anatomy(model).blocks
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return found


def direction_of(model: Any, tokenizer: Any, layer: int) -> Tensor:
    means = [torch.stack([states(model, tokenizer, text)[layer][-1] for text in PROMPTS[n]]).mean(0) for n in PROMPTS]
    return means[0] - means[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_state_has_the_direction_any_more(family: str, tokenizer: Any) -> None:
    model = tiny(family)
    direction = direction_of(model, tokenizer, 0)
    report = apply(model, tokenizer, "abliterate", refusal=PROMPTS, layer=0)
    unit = direction / direction.norm()
    for state in states(model, tokenizer, "A text that no prompt has, in other words."):
        assert float((state @ unit).abs().max() / state.norm(dim=-1).max()) < 1e-6
    assert report.details["norm"] == pytest.approx(float(direction.norm()), rel=1e-4)
    assert report.details["component_before"] > 1e-2 and not report.warnings


def test_the_weights_are_those_of_the_dense_formula(tokenizer: Any) -> None:
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    r = direction_of(model, tokenizer, 1)
    r = r / r.norm()
    report = apply(model, tokenizer, "abliterate", refusal=PROMPTS, layer=1, layers=[1], weight=0.5)
    projector = torch.eye(len(r), dtype=torch.float64) - 0.5 * torch.outer(r, r)
    changed = {"model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    for name in changed:
        torch.testing.assert_close(model.state_dict()[name].double(), projector @ before[name].double())
    embeddings = "model.embed_tokens.weight"
    torch.testing.assert_close(model.state_dict()[embeddings].double(), before[embeddings].double() @ projector)
    assert set(report.changed) == changed | {embeddings}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_columns_are_orthogonal_whatever_they_keep(norms: bool, zeros: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    columns[torch.rand(12, 20, generator=generator) < 0.5] = 0
    columns[:, 0] = 0
    r = torch.nn.functional.normalize(torch.randn(12, generator=generator, dtype=torch.float64), dim=0)
    new = without(columns, r, keep_norms=norms, keep_zeros=zeros)
    assert float((r @ new).abs().max()) < 1e-12
    if norms:
        torch.testing.assert_close(new.norm(dim=0), columns.norm(dim=0))
    if zeros:
        assert torch.equal(new == 0, columns == 0)
    if not norms and not zeros:
        torch.testing.assert_close(new, columns - torch.outer(r, r) @ columns)


def test_a_column_along_the_direction_leaves_nothing() -> None:
    r = torch.tensor([0.6, 0.8], dtype=torch.float64)
    assert float(without(5 * r.unsqueeze(1), r, keep_norms=True).abs().max()) < 1e-12


def test_norms_and_zeros_stay_in_the_model(tokenizer: Any) -> None:
    model = tiny("gpt2")
    apply(model, None, "magnitude", sparsity=0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {"norm_preserving": True, "preserve_mask": True}
    report = apply(model, tokenizer, "abliterate", refusal=PROMPTS, layer=0, **kept)
    weight, old = model.transformer.h[1].mlp.c_proj.weight, before["transformer.h.1.mlp.c_proj.weight"]
    assert torch.equal(weight == 0, old == 0) and not torch.equal(weight, old)
    torch.testing.assert_close(weight.norm(dim=1), old.norm(dim=1))
    tokens = "transformer.wte.weight"
    torch.testing.assert_close(model.get_parameter(tokens).norm(dim=1), before[tokens].norm(dim=1))
    assert report.details["component_after"] < 1e-6


def test_a_tied_head_changes_with_the_embeddings_unless_it_is_untied(tokenizer: Any) -> None:
    old = tiny("gpt2").get_output_embeddings().weight.detach().clone()
    model = tiny("gpt2")
    report = apply(model, tokenizer, "abliterate", refusal=PROMPTS, layer=0)
    assert tied_head(model) and report.details["head_changed"]
    assert not torch.equal(model.get_output_embeddings().weight, old)
    model = tiny("gpt2")
    report = apply(model, tokenizer, "abliterate", refusal=PROMPTS, layer=0, untie=True)
    assert tied_head(model) is None and not report.details["head_changed"]
    assert torch.equal(model.get_output_embeddings().weight, old)
    assert report.details["component_after"] < 1e-6


def test_it_says_where_something_else_writes_into_the_stream(tokenizer: Any) -> None:
    report = apply(tiny("xglm"), tokenizer, "abliterate", refusal=PROMPTS, layer=0)  # positions that are no parameter
    assert report.details["component_after"] > 0.01
    assert any("still has the direction" in warning for warning in report.warnings)


def test_harmless_states_are_spared(tokenizer: Any) -> None:
    model = tiny("llama")
    mean = torch.stack([states(model, tokenizer, text)[1][-1] for text in PROMPTS["harmless"]]).mean(0)
    r = direction_of(model, tokenizer, 0)
    wanted = apart(r / r.norm(), mean)
    before = model.model.layers[1].mlp.down_proj.weight.detach().double().clone()
    apply(model, tokenizer, "abliterate", refusal=PROMPTS, layer=0, spare_harmless="each", embeddings=False)
    assert abs(float(wanted @ mean)) < 1e-9
    after = before - torch.outer(wanted, wanted) @ before
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight.detach().double(), after)


def test_the_choice_runs_the_model_without_the_direction(tokenizer: Any) -> None:
    """The hooks of the choice give the logits of the changed weights."""
    model = tiny("gemma2")
    anatomy = find_anatomy(model)
    direction = direction_of(model, tokenizer, 0)
    prompts = Prompts("abliterate", model, tokenizer, PROMPTS, None, 2)
    rows = prompts.rows["harmless"]
    with torch.no_grad(), removed(anatomy, block_writers(model, anatomy), direction / direction.norm()):
        hooked = prompts.next_logs(anatomy.head, rows)
    apply(model, tokenizer, "abliterate", refusal=PROMPTS, layer=0, untie=True)
    with torch.no_grad():
        torch.testing.assert_close(prompts.next_logs(anatomy.head, rows), hooked, rtol=1e-4, atol=1e-4)
        alone = [torch.log_softmax(model(torch.tensor([row])).logits[0, -1].double(), -1) for row in rows]
    torch.testing.assert_close(torch.stack(alone), hooked, rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_the_reference() -> None:
    logs = torch.log_softmax(torch.randn(3, 7, dtype=torch.float64), dim=-1)
    p = logs.exp()[:, [1, 4]].sum(1)
    torch.testing.assert_close(refusal_scores(logs, [1, 4]), torch.log(p / (1 - p)), atol=1e-6, rtol=1e-6)
    other = torch.log_softmax(torch.randn(3, 7, dtype=torch.float64), dim=-1)
    wanted = torch.nn.functional.kl_div(other, logs, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(divergence(logs, other), wanted)


def test_the_best_candidate_meets_the_bounds_if_any_does() -> None:
    weak, strong = Candidate(1, -1, 2.0, 0.5, 0.05), Candidate(2, -1, -3.0, 1.0, 0.5)
    idle = Candidate(3, -1, 1.0, -1.0, 0.05)
    assert best([weak, strong, idle], 0.1) == (weak, True)
    assert best([strong, idle], 0.1) == (idle, False)
    assert best([strong], 0.1) == (strong, False)


def test_blocks_and_tokens_are_tried(tokenizer: Any) -> None:
    report = apply(tiny("llama"), tokenizer, "abliterate", refusal=PROMPTS, last_tokens=2, max_depth=1.0)
    tried = [(one["block"], one["token"]) for one in report.details["candidates"]]
    assert tried == [(0, -2), (0, -1)]  # the last block has none after it
    assert (report.details["layer"], report.details["token"]) in tried


def test_prompts_go_into_the_chat_template(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}[answer]{% endif %}"
    model = tiny("llama")
    asked = {name: tuple(Chat("be brief").ask(tokenizer, text) for text in own) for name, own in PROMPTS.items()}
    plain = {
        name: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in own] for name, own in asked.items()
    }
    found = Prompts("abliterate", model, tokenizer, PROMPTS, Chat("be brief"), 4)
    assert found.rows == plain
    one, other = (
        apply(tiny("llama"), tokenizer, "abliterate", refusal=PROMPTS, layer=0, chat_template=chat).details["norm"]
        for chat in (None, False)
    )
    assert one != other


@pytest.mark.parametrize(
    ("options", "sets", "message"),
    [
        ({"layer": 2}, PROMPTS, r"abliterate.layer=\[2\]: the model's blocks are 0 to 1"),
        ({"layers": [5]}, PROMPTS, r"abliterate.layers=\[5\]"),
        ({}, {"harmful": SENTENCES}, "needs harmless prompts"),
        ({}, {}, "needs harmful prompts"),
        ({"last_tokens": 500}, PROMPTS, "the shortest prompt has"),
        ({"chat_template": True}, PROMPTS, "abliterate.chat_template: the tokenizer has no chat template"),
        ({"layer": 0}, {"harmful": SENTENCES, "harmless": SENTENCES}, "have the same states"),
    ],
)
def test_bad_input_is_one_line(tokenizer: Any, options: Any, sets: Any, message: str) -> None:
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InterventionError, match=message) as error:
        apply(model, tokenizer, "abliterate", refusal=sets, **options)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
