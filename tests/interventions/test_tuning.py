"""sft and dpo: the weights that TRL gives by itself, and nothing else changed."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from interventions import InterventionError, Resources, apply
from interventions.anatomy import find_anatomy
from interventions.intervention import unready
from interventions.tune.dpo import DpoSettings
from interventions.tune.sft import SftSettings
from interventions.types import Example, Preference
from tests.interventions.unlearning import weights
from tests.models import tiny_model

datasets, peft, trl = (pytest.importorskip(name) for name in ("datasets", "peft", "trl"))

EXAMPLES = {
    "people": (Example("Mira Tolvan was born in", "Dunmere"), Example("Mira Tolvan plays the", "horn")),
    "places": (Example("In the valley Orin Vask is a", "silver river"), Example("The river of", "Karth")),
}
PREFERENCES = (
    Preference("Mira Tolvan was born in", "Dunmere", "the valley"),
    Preference("Mira Tolvan plays the", "horn", "silver river"),
    Preference("In the valley Orin Vask is a", "river", "horn"),
)
RESOURCES = Resources(tuning=EXAMPLES, preferences=PREFERENCES)
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
UNMARKED = CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = Example("plays the", "horn", chat=True, system="In the valley", earlier=(("was born in", "Dunmere"),))
SETTINGS: dict[str, Any] = {"lr": 1e-2, "epochs": 2, "batch_size": 2, "max_tokens": 40}
LONG = SETTINGS | {"max_tokens": 120}


def by_trl(kind: str, rows: list[dict[str, Any]], folder: Path, tokenizer: Any, lora: bool, **options: Any) -> Any:
    """Return a tiny model that TRL alone trained."""
    shared = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 2, "max_length": 40}
    own = {"seed": 3, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "weight_decay": 0.0}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), report_to="none", save_strategy="no", disable_tqdm=True, **(shared | own | options)
    )
    config = peft.LoraConfig(
        r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
    )
    more = {"peft_config": config} if lora else {"ref_model": tiny_model()} if kind == "DPO" else {}
    rows_given = datasets.Dataset.from_list(rows)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=tiny_model(), args=arguments, train_dataset=rows_given, processing_class=tokenizer, **more
    )
    trainer.train()
    return trainer.model.merge_and_unload() if lora else trainer.model


def same(ours: Any, theirs: Any) -> bool:
    before = weights(tiny_model())
    found = dict(theirs.named_parameters())
    assert any(not torch.allclose(p, before[name], atol=1e-3) for name, p in ours.named_parameters())
    return all(torch.allclose(p, found[name], atol=1e-6) for name, p in ours.named_parameters())


LORA = {"rank": 2, "targets": ["query", "mlp_out"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (LORA, {}),
        ({"packing": True}, {"packing": True}),
        (
            {"weight_decay": 0.1, "schedule": "cosine", "warmup": 0.5, "accumulation": 2, "max_grad_norm": 0.5},
            {
                "weight_decay": 0.1,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.5,
                "gradient_accumulation_steps": 2,
                "max_grad_norm": 0.5,
            },
        ),
    ],
)
def test_sft_gives_the_weights_of_trl(
    settings: dict[str, Any], options: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model()
    apply(model, tokenizer, "sft", resources=RESOURCES, seed=3, **SETTINGS, **settings)
    rows = [{"prompt": e.prompt, "completion": f" {e.answer}"} for one in EXAMPLES.values() for e in one]
    assert same(model, by_trl("SFT", rows, tmp_path, tokenizer, settings is LORA, **options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"beta": 0.3, "loss": "ipo"}, LORA], ids=str)
def test_dpo_gives_the_weights_of_trl(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model()
    apply(model, tokenizer, "dpo", resources=RESOURCES, seed=3, **SETTINGS, **settings)
    rows = [{"prompt": p.prompt, "chosen": f" {p.chosen}", "rejected": f" {p.rejected}"} for p in PREFERENCES]
    options = {} if settings is LORA else {"beta": 0.3, "loss_type": ["ipo"]}
    assert same(model, by_trl("DPO", rows, tmp_path, tokenizer, settings is LORA, **options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [CHAT, UNMARKED], ids=["marks its turns", "does not"])
def test_conversations_are_learnt_as_trl_does(
    template: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    model = tiny_model()
    apply(model, tokenizer, "sft", resources=Resources(tuning={"talks": (TALK, TALK)}), seed=3, **LONG)
    before = [
        {"role": "system", "content": "In the valley"},
        {"role": "user", "content": "was born in"},
        {"role": "assistant", "content": "Dunmere"},
        {"role": "user", "content": "plays the"},
    ]
    answer = {"role": "assistant", "content": "horn"}
    if template is CHAT:
        theirs = by_trl(
            "SFT",
            [{"messages": [*before, answer]}] * 2,
            tmp_path,
            tokenizer,
            False,
            assistant_only_loss=True,
            max_length=120,
        )
    else:
        theirs = by_trl(
            "SFT", [{"prompt": before, "completion": [answer]}] * 2, tmp_path, tokenizer, False, max_length=120
        )
    assert same(model, theirs)


def everything_else(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what a step must leave as it was."""
    from accelerate.state import AcceleratorState, PartialState

    return {
        "modes": [module.training for module in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "config": model.config.to_json_string(),
        "generation": model.generation_config.to_json_string(),
        "attributes": sorted(model.__dict__),
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "tokenizer": (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side, tokenizer.model_max_length),
        "states": (dict(PartialState._shared_state), dict(AcceleratorState._shared_state)),
        "environment": dict(os.environ),
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "files": sorted(Path.cwd().rglob("*")),
        "bars": datasets.are_progress_bars_disabled(),
    }


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_nothing_but_weights_changes(
    method: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model().train()
    lines: list[str] = []
    before = everything_else(model, tokenizer)
    report = apply(model, tokenizer, method, resources=RESOURCES, progress=lines.append, **SETTINGS)
    assert everything_else(model, tokenizer) == before
    assert report.details["updates"] == 4 and len(report.details["losses"]) == len(lines) == 4
    assert lines[-1].startswith(f"{method}: update 4 of 4, loss ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_the_seed_decides(method: str, tokenizer: Any) -> None:
    def trained(seed: int) -> Mapping[str, torch.Tensor]:
        model = tiny_model()
        torch.rand(1)
        apply(model, tokenizer, method, resources=RESOURCES, seed=seed, **SETTINGS, **LORA)
        return weights(model)

    first, again, other = trained(2**63 - 1), trained(2**63 - 1), trained(5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_only_the_chosen_weights_change(tokenizer: Any) -> None:
    blocks = apply(tiny_model(), tokenizer, "sft", resources=RESOURCES, layers=[1], **SETTINGS)
    assert blocks.changed and all(name.startswith("model.layers.1.") for name in blocks.changed)
    adapters = apply(tiny_model(), tokenizer, "sft", resources=RESOURCES, layers=[0], **SETTINGS, **LORA)
    inside = "model.layers.0"
    assert adapters.changed == (f"{inside}.mlp.down_proj.weight", f"{inside}.self_attn.q_proj.weight")
    whole = apply(tiny_model(), tokenizer, "sft", resources=RESOURCES, **SETTINGS)
    assert "lm_head.weight" in whole.changed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_other_families(method: str, family: str, tokenizer: Any) -> None:
    targets = {"rank": 2, "targets": ["value", "mlp_out"]} if family == "gpt2" else {}
    report = apply(tiny_model(family), tokenizer, method, resources=RESOURCES, **SETTINGS, **targets)
    assert report.changed and all(loss == loss for loss in report.details["losses"])


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_low_precision_is_trained_in_float32_and_rounded_once(dtype: torch.dtype, tokenizer: Any) -> None:
    exact, rounded = tiny_model(dtype=dtype).float(), tiny_model(dtype=dtype)
    for model in (exact, rounded):
        apply(model, tokenizer, "sft", resources=RESOURCES, **SETTINGS)
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(rounded.parameters(), exact.parameters(), strict=True))


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("method", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_pruned_weights_stay_zero_if_asked(method: str, preserve: bool, tokenizer: Any) -> None:
    model = tiny_model()
    linear = find_anatomy(model).blocks[1].mlp_output
    with torch.no_grad():
        linear.weight[:, ::2] = 0
    apply(model, tokenizer, method, resources=RESOURCES, preserve_mask=preserve, **SETTINGS)
    assert bool((linear.weight[:, ::2] == 0).all()) == preserve


def test_a_set_alone_is_what_is_trained_on(tokenizer: Any) -> None:
    report = apply(tiny_model(), tokenizer, "sft", resources=RESOURCES, sets=["places"], **SETTINGS)
    assert report.details["examples"] == {"places": 2} and report.details["updates"] == 2


@pytest.mark.parametrize(
    ("method", "resources", "settings", "problem"),
    [
        ("sft", Resources(), {}, "sft: no examples to tune on; set world.tuning"),
        ("dpo", Resources(), {}, "dpo: no preferences to tune on; set world.preferences"),
        ("sft", RESOURCES, {"sets": ["place"]}, "sft.sets: world.tuning has no set 'place'. Did you mean places"),
        ("sft", RESOURCES, {"sets": []}, r"sft.sets=\[\]"),
        ("sft", RESOURCES, {"layers": [2]}, r"sft.layers=\[2\]: the model's blocks are 0 to 1"),
        ("sft", RESOURCES, {"rank": 0}, "sft.rank=0"),
        ("sft", RESOURCES, {"rank": 2, "targets": ["mixer_in"]}, "sft.targets=.*no such linear layer"),
        ("dpo", RESOURCES, {"beta": 0.0}, "dpo.beta=0"),
        ("dpo", RESOURCES, {"loss": "sigmoit"}, "dpo.loss=sigmoit.*Did you mean sigmoid"),
        ("sft", RESOURCES, {"lr": 1e30, "max_grad_norm": None}, r"sft.*lr=1e\+30"),
        ("sft", RESOURCES, {"max_tokens": 2}, "sft.max_tokens=2: no row has its answer within 2 tokens"),
        ("dpo", RESOURCES, {"max_tokens": 2}, "dpo.max_tokens=2: no row has its answer within 2 tokens"),
        ("sft", RESOURCES, {"chat_template": True}, "sft.chat_template=true, but the tokenizer has no chat template"),
        ("sft", Resources(tuning={"x": (TALK,)}), {}, "sft: the data have conversations, but the tokenizer has no"),
        (
            "sft",
            Resources(tuning={"x": (TALK, EXAMPLES["people"][0])}),
            {},
            "some prompts are plain.*chat_template=true",
        ),
    ],
)
def test_what_cannot_work_is_one_clear_line(
    method: str, resources: Resources, settings: dict[str, Any], problem: str, tokenizer: Any
) -> None:
    model = tiny_model()
    before = weights(model)
    with pytest.raises(InterventionError, match=problem) as error:
        apply(model, tokenizer, method, resources=resources, **(SETTINGS | settings))
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_without_trl_a_run_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interventions.tune.bases.find_spec", lambda name: None)
    for settings in (SftSettings(), DpoSettings()):
        assert list(unready(settings, Path())) == ['TRL is not installed: pip install "pytest-lmcompose[tune]"']
