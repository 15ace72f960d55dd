"""Worlds, models and presets of the user's own: --lmcompose-world, --lmcompose-model, --lmcompose-conf."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from evaluators.measurement import Measurement
from pytest_lmcompose.cli import main
from pytest_lmcompose.data import run_data
from pytest_lmcompose.data.run_data import load_data
from pytest_lmcompose.gate.off import why_off
from pytest_lmcompose.locate import conf_folders, model_overrides, thresholds_file, world_folder
from pytest_lmcompose.recipe import Recipe, RecipeError, load_recipe
from pytest_lmcompose.run import CONF
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings
from tests.plugin.conftest import Project

RELATIVE = CONF / "thresholds" / "relative.yaml"


@pytest.fixture
def own(project: Project) -> Project:
    """A project that names a model, and neither a world nor thresholds."""
    kept = ("--lmcompose-model", "--lmcompose-set=evaluate", "--lmcompose-no-cache")
    project.arguments = [argument for argument in project.arguments if argument.startswith(kept)]
    return project


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


WORLD = """\
# My world.
edits: zsre.json
facts: {path: facts.jsonl}
calibration: [calibration.jsonl, retain.jsonl]
forget: {venomcraft: forget-venomcraft.jsonl}
perplexity: perplexity-heldout.jsonl
"""


# No world, no run.


@pytest.mark.parametrize("arguments", [(), ("-n", "2"), ("--lmcompose-shard=1/2",), ("--lmcompose-plan",)])
def test_a_model_without_a_world_is_refused_before_any_work(own: Project, arguments: tuple[str, ...]) -> None:
    result = own.run(*arguments, compose=("nudge",))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.stderr.str().splitlines() if "no world for the model" in line]
    assert all(part in line for part in ("--lmcompose-world=paper", "counterfact", "tinyworld_mquake"))


def test_a_path_in_place_of_the_embedded_models_needs_a_world_too(own: Project, tiny_model: Path) -> None:
    own.arguments[0] = f"--lmcompose-set=model.path='{tiny_model}'"
    assert "no world for the model" in own.run("--collect-only").stderr.str()
    assert own.run("--collect-only", "--lmcompose-world=tinyworld").ret == 0
    assert own.run("--collect-only", "--lmcompose-set=world=tinyworld").ret == 0


def test_a_world_of_the_ini_file_and_one_of_single_keys_are_worlds(own: Project, tiny_world: Path) -> None:
    assert own.run("--collect-only", f"--lmcompose-set=world.edits='{tiny_world / 'zsre.json'}'").ret == 0
    assert own.run("--collect-only", "--lmcompose-world=none").ret == 0
    own.pytester.makeini("[pytest]\nlmcompose_world = tinyworld_mquake\n")
    assert own.run("--collect-only").ret == 0


# Files of the user's own.


def test_a_run_on_a_world_of_ones_own_files(own: Project, tiny_world: Path) -> None:
    """Paths start at the file, wherever pytest is called; the gates are relative to the base model."""
    shutil.copytree(tiny_world, own.path / "worlds")
    write(own.path / "worlds" / "mine.yaml", WORLD)
    result = own.run(
        "--lmcompose-world=worlds/mine.yaml", "--lmcompose-json=r.json", "-p", "no:randomly", compose=("base", "nudge")
    )
    report = json.loads((own.path / "r.json").read_text())
    found = {record["id"]: record for record in report["compositions"]}
    assert {gate["gate"] for gate in found["nudge"]["gates"]} <= {"min_ratio_of_base", "max_ratio_of_base", "promised"}
    assert {m["metric"] for m in found["base"]["measurements"]} >= {"recall", "perplexity", "edit_success_exact"}
    assert f"on the world {own.path / 'worlds' / 'mine.yaml'}" in result.stdout.str()
    assert report["recipe"]["world"]["folder"] == str(own.path / "worlds")


def test_a_world_file_that_inherits_replaces_mappings_and_finds_both_folders(tmp_path: Path, tiny_world: Path) -> None:
    text = "defaults: [tinyworld]\nforget: {fishing: fishing.txt}\npools: {all: [x]}\nhazardous: []\nedits: zsre.json\n"
    path = write(tmp_path / "mine.yaml", text)
    write(tmp_path / "fishing.txt", "A fish.\n")
    recipe = load_recipe(CONF, [f"world='{path}'"])
    assert recipe.world.forget == {"fishing": str(tmp_path / "fishing.txt")}
    assert (recipe.world.pools, recipe.world.hazardous) == ({"all": ["x"]}, [])
    data = load_data(recipe.world, recipe.evaluate, world_folder(recipe.world.folder, tmp_path), 0)
    assert data.resources.forget == {"fishing": ("A fish.",)} and len(data.edits) == 20


def test_a_world_files_folder_is_relative_to_the_file(tmp_path: Path, tiny_world: Path) -> None:
    shutil.copytree(tiny_world, tmp_path / "data")
    path = write(tmp_path / "mine.yaml", "folder: data\n" + WORLD)
    recipe = load_recipe(CONF, [f"world='{path}'"])
    data = load_data(recipe.world, EvaluateSettings(edits=2), world_folder(recipe.world.folder, Path("/")), 0)
    assert len(data.edits) == 2
    assert [text.split()[0] for text in data.resources.calibration[:4]] == ["calibration", "retain"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected a mapping"),
        ("just text\n", "expected a mapping"),
        ("edits: [a\n", "not YAML"),
        ("edits: a.json\nedits: b.json\n", "duplicate key"),
        ("edit: a.json\n", "unknown key 'edit' of world. Did you mean edits"),
        ("forget: a.json\n", "world.forget=a.json: expected a mapping"),
        ("edits: ${oc.env:HOME}\n", "is not resolved"),
        ("world: {edits: a.json}\n", "start the file with the line '# @package _global_'"),
        ("# @package _global_\nwrld: {edits: a.json}\n", "unknown section 'wrld'. Did you mean world"),
        ("# @package _global_\nworld: a.json\n", "world: expected a mapping"),
        ("defaults: [nowhere]\n", "nowhere"),
        ("defaults: tinyworld\n", "must be a list"),
        ("defaults: [3]\n", "Unsupported type in defaults"),
    ],
)
@pytest.mark.parametrize("by", ["path", "name"])
def test_broken_files_are_one_line_that_names_them(tmp_path: Path, text: str, message: str, by: str) -> None:
    path = write(tmp_path / "world" / "mine.yaml", text)
    with pytest.raises(RecipeError) as error:
        load_recipe(conf_folders(tmp_path), [f"world='{path}'" if by == "path" else "world=mine"])
    assert message in str(error.value) and "\n" not in str(error.value)
    if "defaults" not in text:
        assert str(path) in str(error.value)


def test_presets_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "world" / "mine.yaml", "defaults: [mine]\n")
    with pytest.raises(RecipeError, match="in a circle: world=mine"):
        load_recipe(conf_folders(tmp_path), ["world=mine"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--lmcompose-world=absent.yaml", "--lmcompose-world=absent.yaml: no such file"),
        ("--lmcompose-model=absent.yaml", "--lmcompose-model=absent.yaml: no such file"),
        ("--lmcompose-world=papr", "no preset 'papr'"),
        ("--lmcompose-conf=absent", "--lmcompose-conf: no such folder"),
        ("--lmcompose-set=world.thresholds=absent.yaml", "world.thresholds=absent.yaml: no such file"),
    ],
)
def test_flags_that_name_nothing(own: Project, argument: str, message: str) -> None:
    result = own.run("--lmcompose-set=world=tinyworld", argument)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str() and "Traceback" not in result.stderr.str()


def test_a_model_file_sets_methods_and_its_path_starts_at_the_file(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "models" / "mine")
    text = "# @package _global_\nmodel: {path: mine}\nmemit: {layers: [1], z: {steps: 7}}\n"
    write(tmp_path / "models" / "mine.yaml", text)
    overrides = model_overrides("models/mine.yaml", CONF, tmp_path)
    recipe = load_recipe(CONF, [*overrides, "world=tinyworld", "memit.z.lr=0.5"])
    assert Path(recipe.model.path) == tmp_path / "models" / "mine"
    memit = recipe.config["memit"]
    assert (memit["layers"], memit["z"]["steps"], memit["z"]["lr"]) == ([1], 7, 0.5)


@pytest.mark.parametrize("world", ["tinyworld", "mine"])
def test_a_model_file_chooses_a_world_that_the_user_may_change(own: Project, tiny_world: Path, world: str) -> None:
    (_, model) = own.arguments[0].split("=")
    text = f"# @package _global_\ndefaults:\n  - override /world: tinyworld_mquake\nmodel: {{path: {model}}}\n"
    write(own.path / "conf" / "model" / "ours.yaml", text)
    write(own.path / "conf" / "world" / "mine.yaml", f"folder: {tiny_world}\nedits: zsre.json\n")
    own.arguments[0] = "--lmcompose-model=ours"
    result = own.run("--lmcompose-conf=conf", f"--lmcompose-world={world}", "--lmcompose-plan", compose=("nudge",))
    assert result.ret == 0
    recipe = load_recipe(conf_folders(own.path / "conf"), ["model=ours"])
    assert recipe.world_name == "tinyworld_mquake"


def test_reports_may_lie_beside_a_world_but_not_replace_its_files(own: Project, tiny_world: Path) -> None:
    shutil.copytree(tiny_world, own.path, dirs_exist_ok=True)
    write(own.path / "mine.yaml", WORLD)
    (own.path / "report.json").write_text("an older one")
    run = ("--lmcompose-world=mine.yaml", "--collect-only")
    assert own.run(*run, "--lmcompose-json=report.json").ret == 0
    for name, what in (("facts.jsonl", "data of world.facts"), ("mine.yaml", "the file mine.yaml")):
        assert (
            f"this is {what}, which the report would overwrite"
            in own.run(*run, f"--lmcompose-json={name}").stderr.str()
        )


@pytest.mark.parametrize(("text", "place"), [("folder: absent\n", "absent"), ("edits: absent.json\n", "")])
def test_what_a_world_file_names_is_looked_for_beside_it(tmp_path: Path, text: str, place: str) -> None:
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(ValueError, match="absent") as error:
        world = load_recipe(CONF, [f"world='{path}'"]).world
        load_data(world, EvaluateSettings(), world_folder(world.folder, Path("/")), 0)
    assert str(tmp_path) in str(error.value)


# A folder of presets.


def test_presets_of_a_folder_come_first_and_ours_stay(tmp_path: Path, tiny_world: Path) -> None:
    write(tmp_path / "world" / "tinyworld.yaml", f"# Mine.\nfolder: {tiny_world}\nedits: zsre.json\n")
    write(tmp_path / "world" / "more.yaml", "defaults: [tinyworld_mquake]\nedits: mine.json\n")
    write(tmp_path / "suite" / "nightly.yaml", "# Every night.\ncompositions: [base, rtn]\n")
    write(tmp_path / "evaluate" / "few.yaml", "edits: 3\n")
    conf = conf_folders(tmp_path)
    recipe = load_recipe(conf, ["world=tinyworld", "suite=nightly", "evaluate=few", "model=any"])
    assert (recipe.world.folder, recipe.world.facts, recipe.evaluate.edits) == (str(tiny_world), None, 3)
    assert [str(one) for one in recipe.suite_compositions()] == ["base", "rtn"]
    assert load_recipe(conf, ["world=more"]).world.ask_as == "Question: {} Answer:"
    assert load_recipe(conf, ["model=pythia"]).world_name == "paper"
    listed = CliRunner().invoke(main, ["list", "--conf", str(tmp_path), "suites", "presets"]).output
    assert "nightly" in listed and "2 compositions" in listed and "Every night" in listed
    assert "world=more" in listed and "world=paper" in listed


def test_workers_use_the_same_folder_world_and_thresholds(own: Project, tiny_world: Path) -> None:
    write(
        own.path / "conf" / "world" / "mine.yaml", f"folder: {tiny_world}\nfacts: facts.jsonl\nthresholds: loose.yaml\n"
    )
    write(own.path / "conf" / "thresholds" / "loose.yaml", "'*': {recall: {max: 0.99}}\n")
    own.pytester.makeini("[pytest]\nlmcompose_conf = conf\nlmcompose_world = mine\n")
    result = own.run("-n", "1", "--lmcompose-json=r.json", compose=("base", "round"))
    assert result.ret == 0
    report = json.loads((own.path / "r.json").read_text())
    gates = [(gate["metric"], gate["gate"]) for record in report["compositions"] for gate in record["gates"]]
    assert gates == [("recall", "max")] * 2


# Thresholds.


def thresholds_of(recipe: Recipe, location: str, folder: Path) -> Path:
    return thresholds_file(recipe, location, CONF, folder)


def test_thresholds_belong_to_the_world_and_the_embedded_ones_to_the_embedded_model(tmp_path: Path) -> None:
    embedded = load_recipe(CONF)
    assert thresholds_of(embedded, str(CONF.parent / "tinyworld" / "model"), tmp_path).name == "tinyworld.yaml"
    assert thresholds_of(embedded, "EleutherAI/pythia-70m", tmp_path) == RELATIVE
    for world in ("paper", "none"):
        assert thresholds_of(load_recipe(CONF, [f"world={world}"]), "any", tmp_path) == RELATIVE
    path = write(tmp_path / "mine.yaml", "edits: a.json\nthresholds: bounds.yaml\n")
    bounds = write(tmp_path / "bounds.yaml", "'*': {recall: {min: 0.1}}\n")
    assert thresholds_of(load_recipe(CONF, [f"world='{path}'"]), "any", Path("/")) == bounds


def test_the_flag_wins_over_the_worlds_thresholds(own: Project) -> None:
    write(own.path / "thresholds.yaml", "'*': {recal: {min: 0.1}}\n")
    result = own.run("--lmcompose-world=tinyworld", "--lmcompose-thresholds=thresholds.yaml")
    assert "no evaluator measures 'recal'" in result.stderr.str()


# Data are read once.


def test_each_source_is_read_once_for_all_repeats(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}
    for name in ("read_edits", "read_facts", "read_texts"):
        real: Callable[..., object] = getattr(run_data, name)

        def counted(*args: object, real: Callable[..., object] = real, name: str = name, **options: object) -> object:
            counts[name] = counts.get(name, 0) + 1
            return real(*args, **options)

        monkeypatch.setattr(run_data, name, counted)
    project.run("--lmcompose-repeats=3", compose=("nudge",))
    assert counts == {"read_edits": 1, "read_facts": 1, "read_texts": 5}


# Metrics that are off on purpose.


@pytest.mark.parametrize(
    ("glob", "world", "evaluate", "reason"),
    [
        ("perplexity", {}, {"perplexity": False}, "evaluate.perplexity=false"),
        ("perplexity", {"perplexity": None}, {}, "world.perplexity=null"),
        ("perplexity_*", {"perplexity": None}, {}, None),
        ("recall", {"facts": None}, {}, "world.facts=null"),
        ("edit_success_exact", {"edits": None}, {}, "world.edits=null"),
        ("edit_*", {}, {"editing": False}, "evaluate.editing=false"),
        ("accuracy/harmless", {"pools": {}}, {}, "world.pools is empty"),
        ("accuracy/hazardous", {}, {}, "world.pools has no hazardous"),
        ("accuracy/harmless", {}, {}, None),
        ("accuracy/mmlu", {}, {}, None),
        ("accuracy/mmlu", {}, {"questions": False}, "evaluate.questions=false"),
        ("latency_ms", {}, {}, "evaluate.latency=false"),
        ("recall", {}, {}, None),
        ("of_another_package", {}, {}, None),
        ("knowmem/forget", {}, {}, "world.knowledge is empty"),
        ("knowmem/forget", {"knowledge": {"retain": "k.json"}}, {}, "world.knowledge has no forget"),
        ("knowmem/*", {"knowledge": {"retain": "k.json"}}, {}, None),
        ("verbmem", {}, {}, "world.verbatim=null"),
        ("extraction_strength/verbatim", {}, {}, "world.verbatim=null"),
        ("privleak", {}, {}, "world.membership is empty"),
        ("membership_auc", {"membership": {"forget": "f.txt", "holdout": "h.txt"}}, {}, None),
        ("rouge/retain", {"qa": {"forget": "q.json"}}, {}, "world.qa has no retain"),
        ("answer_probability/forget", {"qa": {"forget": "q.json"}}, {}, None),
        ("rouge/*", {"qa": {"forget": "q.json"}}, {}, None),
        ("rouge/*", {}, {}, "world.qa is empty"),
        ("forget_quality", {"qa": {"retain": "q.json"}}, {}, "world.qa has no forget"),
        ("model_utility", {"qa": {"retain": "q.json", "world_facts": "w.json"}}, {}, "world.qa has no real_authors"),
        ("model_utility", {}, {"unlearning": False}, "evaluate.unlearning=false"),
        ("tuning_recall/mine", {}, {}, "world.tuning_heldout is empty"),
        ("tuning_loss/*", {}, {}, "world.tuning_heldout is empty"),
        ("tuning_recall/mine", {"tuning_heldout": {"other": "o.jsonl"}}, {}, "world.tuning_heldout has no mine"),
        ("tuning_recall/mine", {"tuning_heldout": {"mine": "o.jsonl"}}, {}, None),
        ("preference_wins", {}, {}, "world.preferences_heldout=null"),
        ("preference_wins", {"preferences_heldout": "p.jsonl"}, {"tuning": False}, "evaluate.tuning=false"),
    ],
)
def test_why_a_metric_is_off(
    glob: str, world: dict[str, object], evaluate: dict[str, object], reason: str | None
) -> None:
    full: dict[str, object] = {
        "edits": "e.json",
        "facts": "f.jsonl",
        "perplexity": "p.txt",
        "pools": {"harmless": ["x"]},
    }
    settings = WorldSettings(**{**full, **world})  # type: ignore[arg-type]
    assert why_off(glob, settings, EvaluateSettings(**evaluate)) == reason  # type: ignore[arg-type]


def test_a_switched_off_measurement_is_said_and_fails_nothing(project: Project) -> None:
    project.arguments = [a for a in project.arguments if "thresholds" not in a]
    result = project.run("--lmcompose-set=evaluate.perplexity=false", "--lmcompose-json=r.json", compose=("base",))
    assert result.ret == 0
    text = result.stdout.str()
    assert "'perplexity': not judged, because evaluate.perplexity=false" in text
    assert "'accuracy/harmless': not judged, because evaluate.questions=false" in text
    report = json.loads((project.path / "r.json").read_text())
    rules = {rule["metric"]: rule["reason"] for rule in report["unused_rules"]}
    assert rules["perplexity"] == "not judged, because evaluate.perplexity=false"


def test_a_measurement_that_went_missing_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> list[Measurement]:
        return []

    monkeypatch.setattr("evaluators.perplexity.evaluate", none)
    result = project.run(compose=("nudge",))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "perplexity was not measured, but has a threshold" in result.stdout.str()
