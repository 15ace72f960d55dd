"""Editing and unlearning in models with routed experts: what every token reaches is edited, the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

from interventions import Edit, apply
from interventions.types import InterventionError
from tests.experts import tiny_experts
from tests.models import SENTENCES, tiny_tokenizer

EDITS = [Edit(prompt="Mira Tolvan was born in", subject="Mira Tolvan", target="Ossel")]
TEXTS = [" ".join(SENTENCES)] * 2
OTHERS = [" ".join(reversed(SENTENCES))] * 2
REWRITERS: dict[str, dict[str, Any]] = {
    "memit": {"layers": [1], "covariance_tokens": 400},
    "rome": {"layer": 1, "covariance_tokens": 400},
}
LEARNERS: dict[str, dict[str, Any]] = {
    "ft": {"edits": EDITS, "steps": 2, "layers": [1]},
    "rmu": {"forget": TEXTS, "retain": OTHERS, "max_num_batches": 2, "layer": 1, "lr": 1e-2},
    "gd": {"forget": TEXTS, "retain": OTHERS, "max_updates": 2, "layers": [1]},
}


def run(method: str, family: str, **settings: Any) -> set[str]:
    model = tiny_experts(family)
    routers = {name: p.clone() for name, p in model.named_parameters() if ".gate." in name or "router" in name}
    report = apply(model, tiny_tokenizer(), method, **settings)
    assert all((p == routers[name]).all() for name, p in model.named_parameters() if name in routers)
    return set(report.changed)


@pytest.mark.parametrize("method", REWRITERS)
@pytest.mark.parametrize(("family", "path"), [("qwen2_moe", "shared_expert"), ("glm4_moe", "shared_experts")])
def test_facts_are_written_into_the_shared_expert(method: str, family: str, path: str) -> None:
    changed = run(method, family, edits=EDITS, calibration=TEXTS, **REWRITERS[method])
    assert changed == {f"model.layers.1.mlp.{path}.down_proj.weight"}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", LEARNERS)
def test_training_reaches_all_experts_at_once(method: str, family: str) -> None:
    changed = run(method, family, **LEARNERS[method])
    assert "model.layers.1.mlp.experts.down_proj" in changed
    assert (changed == {"model.layers.1.mlp.experts.down_proj"}) == (method == "ft")


def test_adapters_go_into_attention_and_shared_experts_only() -> None:
    given: dict[str, Any] = {"edits": EDITS, "steps": 2, "adaptive": False}
    changed = run("lora", "qwen2_moe", targets=["value", "mlp_out"], layers=[1], **given)
    assert changed == {"model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.shared_expert.down_proj.weight"}
    with pytest.raises(InterventionError, match=r"lora.targets: mlp_out in model.layers.0 is in routed experts"):
        run("lora", "mixtral", targets=["mlp_out"], **given)


def test_a_router_is_trained_where_the_settings_name_it() -> None:
    settings = LEARNERS["gd"] | {"parameters": ["mlp.gate.weight"]}
    model = tiny_experts("mixtral")
    report = apply(model, tiny_tokenizer(), "gd", train_head=False, **settings)
    assert report.changed == ("model.layers.1.mlp.gate.weight",)
