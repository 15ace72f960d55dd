"""How an engine is found, started, understood and mistrusted; no engine is needed for it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interventions import InterventionError, apply
from interventions.anatomy import find_anatomy
from interventions.compress.engines.run import readable_by_older
from interventions.compress.engines.table import ENGINES
from interventions.statistics import window_batches
from tests.engines.fakes import install_driver, interpreter_that, interpreter_that_answers, register_fake
from tests.models import SENTENCES, tiny_model

TEXTS = tuple(" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES)))
METHODS = ("awq", "gptq", "wanda", "sparsegpt")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    register_fake(monkeypatch)


def run(model: Any, tokenizer: Any, method: str = "gptq", **settings: Any) -> Any:
    defaults: dict[str, Any] = {"engine": "fake", "samples": 8, "max_tokens": 40}
    return apply(model, tokenizer, method, calibration=TEXTS, **defaults | settings)


@torch.no_grad()
def rounded(model: Any) -> tuple[dict[str, Tensor], Any]:
    """Return coarser weights for every linear of the blocks, and a copy of the model that has them."""
    other = copy.deepcopy(model)
    weights = {}
    for linear in (linear for block in find_anatomy(other).blocks for linear in block.linears):
        step = linear.weight.abs().max() / 8
        linear.set_weight_((linear.weight / step).round() * step)
        weights[linear.parameter_name] = dict(other.named_parameters())[linear.parameter_name].detach().clone()
    return weights, other


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any) -> Tensor:
    """Return what a model says to the first window of the texts, as a job's probe has it."""
    return model(windows(tokenizer)["input_ids"][:1]).logits.float()  # type: ignore[no-any-return]


def windows(tokenizer: Any) -> Any:
    (batch,) = window_batches(tokenizer, TEXTS, samples=8, max_tokens=40)
    return batch


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("method", "family"), [*((m, "llama") for m in METHODS), ("gptq", "gpt2")])
def test_an_engines_answer_becomes_the_models_weights(method: str, family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(family)
    weights, other = rounded(model)
    python = interpreter_that_answers(tmp_path, weights, logits_of(other, tokenizer))
    report = run(model, tokenizer, method, engine_python=python)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name])
    assert report.changed == tuple(sorted(weights))
    assert report.details["engine"] == "fake"
    assert report.details["versions"] == {"fake": "1.0"}
    assert report.details["difference"] < 1e-5
    assert report.details["calibration_tokens"] == int(windows(tokenizer)["attention_mask"].sum())


@pytest.mark.usefixtures("fake")
def test_weights_are_rounded_to_the_models_dtype(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    weights, other = rounded(copy.deepcopy(model).float())
    run(model, tokenizer, engine_python=interpreter_that_answers(tmp_path, weights, logits_of(other, tokenizer)))
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.bfloat16
        if name in weights:
            assert torch.equal(parameter, weights[name].bfloat16())


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("shape", r"model\.layers\.1\.mlp\.down_proj\.weight of shape \(32, 47\), not \(32, 48\)"),
        ("name", r"answered with model\.layers\.7\.weight, which the model does not have"),
        ("nan", r"left NaN or infinite values in model\.layers\.1\.mlp\.down_proj\.weight"),
        ("lacking", r"left out model\.layers\.1\.mlp\.down_proj\.weight; does it know LlamaForCausalLM"),
        ("values", r"do not reproduce its own logits: relative difference"),
        ("logits", r"answered the probe with logits of shape \(1, 3, 320\)"),
        ("nan logits", r"do not reproduce its own logits"),
    ],
)
def test_a_wrong_answer_is_no_answer(spoil: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    weights, other = rounded(model)
    logits = logits_of(other, tokenizer)
    name = "model.layers.1.mlp.down_proj.weight"
    if spoil == "shape":
        weights[name] = weights[name][:, 1:]
    elif spoil == "name":
        weights["model.layers.7.weight"] = weights[name].clone()
    elif spoil == "nan":
        weights[name][3, 4] = torch.nan
    elif spoil == "lacking":
        del weights[name]
    elif spoil == "values":  # as if scales and zeros had been put together wrongly
        weights[name] = weights[name].flip(0)
    elif spoil == "logits":
        logits = logits[:, :3]
    else:
        logits[0, 0, 0] = torch.nan
    python = interpreter_that_answers(tmp_path, weights, logits)
    refuses(model, tokenizer, message, engine_python=python)


def refuses(model: Any, tokenizer: Any, message: str, method: str = "gptq", **settings: Any) -> None:
    """Expect an InterventionError, and the model as it was."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(InterventionError, match=message):
        run(model, tokenizer, method, **settings)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'something went awry' >&2; exit 3", r"the engine fake failed \(interpreter: .*\):\nsomething went awry"),
        ("kill -9 $$", r"was ended by SIGKILL; is there enough memory\?"),
        ("exit 0", r"ended without an answer: no answer\.safetensors, answer\.json, engine\.safetensors"),
        ("""echo '{"reason": "packs 4 bits only"}' > refused.json; exit 1""", r"the engine fake packs 4 bits only"),
        ("""echo '{"half": ' > refused.json; exit 1""", r"the engine fake failed"),
        ("echo rubbish > answer.safetensors; echo > answer.json; echo > engine.safetensors", r"cannot be read"),
    ],
)
def test_an_engine_that_fails_leaves_its_last_words(script: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    refuses(tiny_model(), tokenizer, message, engine_python=interpreter_that(tmp_path, script))


@pytest.mark.usefixtures("fake")
def test_the_engines_process_sees_neither_this_interpreters_settings_nor_a_hub(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    python = interpreter_that(tmp_path, f'env > "{tmp_path}/seen"; pwd > "{tmp_path}/stood"; ls > "{tmp_path}/files"')
    refuses(tiny_model(), tokenizer, "ended without an answer", engine_python=python)
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert "PYTHONPATH" not in seen
    assert "PYTEST_CURRENT_TEST" not in seen
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    files = (tmp_path / "files").read_text().split()
    assert {"config", "job.json", "probe.safetensors", "state.safetensors", "tokens.safetensors"} <= set(files)
    assert not Path((tmp_path / "stood").read_text().strip()).exists()


@pytest.mark.parametrize("method", METHODS)
def test_an_absent_engine_is_named_with_what_brings_it(
    method: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_fake(monkeypatch, package="no_such_engine")
    extra = r"needs fake-engine==1\.0: install the extra pytest-lmcompose\[fake\], or run `make engine-fake`"
    refuses(tiny_model(), tokenizer, extra, method)
    register_fake(monkeypatch, package="torch", own_environment=True)
    refuses(
        tiny_model(), tokenizer, r"cannot be installed beside .*: run `make engine-fake`.*LMCOMPOSE_FAKE_PYTHON", method
    )


@pytest.mark.usefixtures("fake")
def test_where_the_interpreter_comes_from(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_variable = interpreter_that(tmp_path, "echo by variable; exit 1")
    (tmp_path / "other").mkdir()
    by_setting = interpreter_that(tmp_path / "other", "echo by setting; exit 1")
    monkeypatch.setenv("LMCOMPOSE_FAKE_PYTHON", by_variable)
    refuses(tiny_model(), tokenizer, "by variable")
    refuses(tiny_model(), tokenizer, "by setting", engine_python=by_setting)
    refuses(
        tiny_model(),
        tokenizer,
        "engine_python names .*other, which is no interpreter",
        engine_python=str(tmp_path / "other"),
    )
    monkeypatch.setenv("LMCOMPOSE_FAKE_PYTHON", "/no/python")
    refuses(tiny_model(), tokenizer, "LMCOMPOSE_FAKE_PYTHON names /no/python, which is no interpreter")


@pytest.mark.usefixtures("fake")
def test_a_setting_that_the_engine_cannot_follow_is_refused(tokenizer: Any) -> None:
    refuses(tiny_model(), tokenizer, r"the engine fake cannot follow act_order=True; leave it at False", act_order=True)
    refuses(tiny_model(), tokenizer, r"the engine fake cannot follow clip=False", "awq", clip=False)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_engine_is_told_the_known_ones(method: str, tokenizer: Any) -> None:
    refuses(
        tiny_model(),
        tokenizer,
        rf"{method} has no engine 'fakee'\. Did you mean fake\? Known: own, fake",
        method,
        engine="fakee",
    )


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "gptq.bits=9"),
        ({"samples": 0}, "gptq.samples=0"),
        ({"max_tokens": 0}, "gptq.max_tokens=0"),
        ({"samples": 1, "max_tokens": 8}, "8 calibration tokens are too few for the 32 columns"),
    ],
)
def test_our_own_checks_come_first(settings: dict[str, int], message: str, tokenizer: Any, tmp_path: Path) -> None:
    never = interpreter_that(tmp_path, f'touch "{tmp_path}/started"')
    refuses(tiny_model(), tokenizer, message, engine_python=never, **settings)
    broken = tiny_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(InterventionError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or infinite"):
        run(broken, tokenizer, engine_python=never)
    with pytest.raises(InterventionError, match="needs calibration texts"):
        apply(tiny_model(), tokenizer, "gptq", engine="fake", engine_python=never)
    assert not (tmp_path / "started").exists()


def test_every_engine_follows_settings_that_its_methods_have() -> None:
    from dataclasses import fields

    from interventions import find_method

    for engine in ENGINES:
        for method, followed in engine.settings.items():
            assert followed <= {field.name for field in fields(find_method(method).settings_type())}


def test_a_config_is_written_for_older_readers_too() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    found = readable_by_older({"rope_parameters": rope, "dtype": "bfloat16", "vocab_size": 9})
    assert found["rope_theta"] == 5000.0
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert found["rope_parameters"] == rope
    plain = readable_by_older({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert plain["rope_theta"] == 1e4
    assert "rope_scaling" not in plain


DRIVER = """
    import sys
    import torch
    from .job import Clock, Job, Refused, Result, main

    def drive(job):
        assert not any(name.split(".")[0] in ("interventions", "pytest") for name in sys.modules)
        if job.settings["bits"] == 5:
            raise Refused("has five fingers only")
        model = job.model()
        assert job.method == "gptq" and len(job.rows) == 8 and max(map(len, job.rows)) == 40
        with Clock() as clock, torch.no_grad():
            for name in job.linears:
                weight = model.get_submodule(name).weight
                step = weight.abs().max() / 8
                weight.copy_((weight / step).round() * step)
        return Result(dict(model.named_parameters()), job.answer_to_probe(model), clock)

    if __name__ == "__main__":
        main(drive, "safetensors")
"""


@pytest.mark.usefixtures("fake")
def test_a_driver_in_a_process_of_its_own(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, tmp_path, DRIVER)
    model = tiny_model("llama-gqa")
    weights, other = rounded(model)
    report = run(model, tokenizer, engine_python=sys.executable)
    assert report.changed == tuple(sorted(weights))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(other.named_parameters())[name])
    assert set(report.details["versions"]) == {"safetensors", "transformers", "torch"}
    assert json.dumps(report.details)
    # Found without being named too, since its package is there; and a driver's reason passes on.
    refuses(model, tokenizer, "the engine fake has five fingers only", bits=5)


@pytest.mark.usefixtures("fake")
def test_a_model_that_computes_something_else_over_there_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_driver(monkeypatch, tmp_path, DRIVER)
    model = tiny_model("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()  # not in its config
    refuses(model, tokenizer, r"the same weights compute something else \(relative difference")
