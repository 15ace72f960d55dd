"""Settings that cannot be, as strangers would type them: each is refused in one line, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_lmcompose.gate.thresholds import read_rules
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.recipe import Recipe, RecipeError, load_recipe
from pytest_lmcompose.run import CONF
from tests.plugin.conftest import Project

SECRET = "hunter2-is-my-secret"
OVERRIDES = """
evaluate.edits=0
evaluate.edits=-1
evaluate.edits=2.5
evaluate.edits=true
evaluate.edits=nan
evaluate.edits=null
evaluate.edits=99999999999999999999999
evaluate.facts=0
evaluate.texts=-3
evaluate.window=1
evaluate.window='128'
evaluate.question_limit=0
evaluate.num_fewshot=-1
evaluate.options=1
evaluate.latency_batch=0
evaluate.latency_length=0
evaluate.latency_repeats=1
evaluate.batch_size=0
evaluate.batch_size=inf
evaluate.chat_template=1
evaluate.system_prompt=x
evaluate.chat_template_args={tokenize:false}
evaluate.editing=2
evaluate.editing=yes
evaluate.tasks=mmlu
evaluate.tasks=[mmlu,mmlu]
evaluate.tasks=['']
evaluate.tasks=[1]
evaluate.also={nobody:{}}
evaluate.also=[x]
evaluate.edits=${oc.env:LMCOMPOSE_SECRET}
world.edits=''
world.edits=7
world.edits_schema=zsree
world.ask_as=Q
world.hazardous=[evil]
world.hazardous=[hazardous,hazardous]
world.pools={harmless:[]}
world.pools={harmless:[mmlu,mmlu]}
world.pools={harmless:mmlu}
world.pools.odd.x=[a]
world.forget={poison:7}
world.forget.poison=''
world.trust_code=3
world.trust_code=null
world.strip_nq=maybe
world.folder=${oc.env:LMCOMPOSE_SECRET}
world.forget={a:'${oc.env:LMCOMPOSE_SECRET}'}
world.forget={'${oc.env:LMCOMPOSE_SECRET}':a}
world.pools={a:[x,'${oc.env:LMCOMPOSE_SECRET}']}
model.dtype=float8
model.dtype=16
model.dtype=null
model.memory_budget=0
model.memory_budget=-1
model.memory_budget=nan
model.memory_budget=lots
model.device_map=everywhere
model.device_map={'':-1}
model.device_map={}
model.device_map=3
model.revision=1e5
model.revision=''
model.trust_remote_code=1
model.path=???
model.path='\\${oc.env:LMCOMPOSE_SECRET}'
model.path=\\$\\{oc.env:LMCOMPOSE_SECRET\\}
model.path='a ${oc.env:LMCOMPOSE_SECRET} b'
model.path=${oc.decode:${oc.env:LMCOMPOSE_SECRET}}
model.path=${model.dtype}
model.path=${hydra:runtime.cwd}
model@other=tinyworld
model={path:x}
suite.max_steps=0
suite.max_steps=two
suite.compositions=[awq,awq]
suite.compositions=awq
suite.compositions=['']
suite.permute=[awq,awq]
suite.across_categories=4
suite=nowhere
edit=[memit]
unlearn=rmu
awq.bits=33
awq.bits=1
awq.bits=4.0
awq.bits=true
awq.bits='4'
awq.bits=
awq.bits=[4]
awq.group_size=0
awq.group_size=-2
awq.grid=0
awq.search_tokens=0
awq.clip=3
awq.engine=autoawqq
awq={bits:9}
awq={bitz:4}
awq=4
gptq.damping=-0.01
gptq.damping=nan
gptq.damping=inf
gptq.damping=1e400
gptq.samples=0
gptq.max_tokens=-5
gptq={engine:auto_gptq,bits:5}
wanda.sparsity=1
wanda.sparsity=-0.1
wanda.sparsity=50
wanda.pattern=4:2
wanda.pattern=1:4
wanda.pattern=2x4
wanda.pattern=24
wanda.pattern=' 2:4'
magnitude.among=rows
sparsegpt.block_size=0
memit.layers=[]
memit.layers=[-1]
memit.layers=[2,1]
memit.layers=[1,1]
memit.layers=[1.5]
memit.layers=3
memit.layer_fractions=[0.5]
memit.layer_fractions=[0.5,0.2]
memit.layer_fractions=[0.1,1.0]
memit.layer_fractions=[0.1,0.2,0.3]
memit.covariance_weight=0
memit.covariance_tokens=0
memit.context_lengths=[]
memit.contexts_per_length=-1
memit.batch_size=0
memit.z.lr=0
memit.z.lr=-1
memit.z.lr=nan
memit.z.steps=1
memit.z.stop_loss=-1
memit.z={lr:-1}
memit.z={speed:1}
memit.z=null
memit.z.lr.x=1
rome.layer=-1
rome.layer_fraction=1.0
alphaedit.ridge=0
alphaedit.nullspace_threshold=-1
ft.lr=0
ft.lr=inf
ft.steps=0
ft.norm_constraint=0
ft.weight_decay=-1
lora.rank=0
lora.rank=12
lora.alpha=0
lora.targets=[]
lora.targets=[querry]
lora.targets=[query,query]
lora.warmup=1.5
lora={warmup:0.7,final:0.3}
rmu.layer=-1
rmu.alpha=-1
rmu.steering_coefficient=0
rmu.topics=[]
rmu.parameters=[]
rmu={layer:2,train_layers:[3]}
rmu.max_tokens=1
ga.layer_fraction=0
ga.layer_fraction=1.5
ga.max_grad_norm=0
ga.samples=0
gd={retain_weight:0,forget_weight:0}
gd.retain_weight=-40
npo.beta=0
simnpo.gamma=nan
emmet.ridge=-1
pmet.z.sure_weight=-1
wga.beta=-1
satimp.importance=-1
undial.beta=0
jensun.reply=''
jensun.reply=1
quail.bits=1
ft.edits_at_once=0
relearn.epochs=0
""".strip().splitlines()
COMPOSITIONS = """
awq[bits=33]
awq[bits=nan]
awq[bits=true]
awq[bits=${oc.env:LMCOMPOSE_SECRET}]
awq[bits='${oc.env:LMCOMPOSE_SECRET}']
awq[bits=\\$\\{oc.env:LMCOMPOSE_SECRET\\}]
awq[bits=${gptq.bits}]
awq[engine='${oc.env:LMCOMPOSE_SECRET}']
memit[layers=[${oc.env:LMCOMPOSE_SECRET}]]
memit[z={lr:'${oc.env:LMCOMPOSE_SECRET}'}]
memit[z.lr=-1]
memit[layers=[3,2]]
memit+awq[group_size=0]
wanda[sparsity=0.25,pattern='2:4']
gptq[engine=auto_gptq,bits=6]
awq[engine=autoawq,group_size=-1]
rmu[layer=1,train_layers=[2]]
lora[rank=16]
gd[forget_weight=0,retain_weight=0]
awq[bits=1,bits=2]
""".strip().splitlines()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCOMPOSE_SECRET", SECRET)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(CONF, ["model=any"])


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(RecipeError) as error:
        act()
    message = str(error.value)
    assert SECRET not in message
    return message


@pytest.mark.parametrize("text", OVERRIDES)
def test_an_override_that_cannot_be_is_refused_in_one_line(text: str) -> None:
    message = refusal(lambda: load_recipe(CONF, [text]))
    assert "\n" not in message
    assert text.partition("=")[0].partition(".")[0].partition("@")[0] in message


@pytest.mark.parametrize("text", COMPOSITIONS)
def test_a_composition_that_cannot_be_is_refused_where_it_is_read(recipe: Recipe, text: str) -> None:
    assert text.partition("[")[0].rpartition("+")[2] in refusal(lambda: recipe.read(text))


def test_suites_are_read_with_the_same_care() -> None:
    for key in ("suite.compositions", "suite.permute"):
        suite = load_recipe(CONF, [f"{key}=['awq[bits=33]']"])
        assert "awq.bits=33: expected a whole number from 2 to 8" in refusal(suite.suite_compositions)


def test_the_command_lines_of_plan_and_pytest_say_it_once(refused: Callable[..., str]) -> None:
    for given in ("--lmcompose-compose=awq[bits=33]", "--lmcompose-set=awq.bits=33"):
        error = refused(given)
        assert error.count("awq.bits=33: expected a whole number from 2 to 8") == 1
        assert "Traceback" not in error


def test_ini_values_and_thresholds_resolve_nothing(refused: Callable[..., str], pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nlmcompose_set =\n    evaluate.edits=${oc.env:LMCOMPOSE_SECRET}\n")
    error = refused()
    assert "is not resolved" in error and SECRET not in error
    pytester.makeini("[pytest]\n")
    thresholds = pytester.path / "thresholds.yaml"
    bound = "{value: 0.1, of: \"awq[bits='${oc.env:LMCOMPOSE_SECRET}']\"}"
    thresholds.write_text(f'"*":\n  recall: {{max_drop: {bound}}}\n')
    error = refused()
    assert "is not resolved" in error and "thresholds.yaml" in error and SECRET not in error
    thresholds.write_text('"awq[bits=${oc.env:LMCOMPOSE_SECRET}]":\n  "${oc.env:LMCOMPOSE_SECRET}": {min: 0.1}\n')
    (rule,) = read_rules(thresholds)  # globs are text, and match nothing else than themselves
    assert (rule.composition, rule.metric) == ("awq[bits=${oc.env:LMCOMPOSE_SECRET}]", "${oc.env:LMCOMPOSE_SECRET}")


def test_a_world_whose_tasks_name_code_is_refused_before_any_work(
    refused: Callable[..., str], project: Project, tmp_path: Path
) -> None:
    (tmp_path / "odd.yaml").write_text("task: odd\nprocess_docs: !function a.b\n")
    tasks = ("--lmcompose-set=evaluate.questions=true", f"--lmcompose-set=world.tasks='{tmp_path}'")
    error = refused(*tasks, "--collect-only")
    assert error.count("odd.yaml: line 2: !function a.b runs code; set world.trust_code=true") == 1
    for lifted in ("world.trust_code=true", "evaluate.questions=false"):
        assert project.run(*tasks, f"--lmcompose-set={lifted}", "--collect-only", compose=("nudge",)).ret == 0


def test_a_resolver_of_a_users_own_is_not_called(recipe: Recipe) -> None:
    from omegaconf import OmegaConf

    called = []
    OmegaConf.register_new_resolver("lmcompose_test", lambda: called.append(1) or 3)
    try:
        refusal(lambda: recipe.read("awq[bits=${lmcompose_test:}]"))
        refusal(lambda: load_recipe(CONF, ["awq.bits=${lmcompose_test:}"]))
    finally:
        OmegaConf.clear_resolver("lmcompose_test")
    assert called == []


def test_values_that_only_look_odd_pass() -> None:
    recipe = load_recipe(
        CONF,
        ["model=any", "ft.lr=1", "gptq.damping=0", "awq.group_size=-1", "memit.layers=null", "model.revision='1e5'"],
    )
    assert (recipe.config["ft"]["lr"], recipe.model.revision) == (1.0, "1e5")
    assert recipe.read("wanda[sparsity=0.75,pattern='1:4']").id == "wanda[pattern='1:4',sparsity=0.75]"
    assert Path(SUITE_FOLDER / "conf") == CONF
