"""What changes the address of states, of measurements, of both, or of neither: one change at a time."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from interventions.compress.engines import identity
from interventions.types import Edit, Resources
from pytest_lmcompose.build.load import Loaded
from pytest_lmcompose.build.states import StateManager
from pytest_lmcompose.cache import address as addresses
from pytest_lmcompose.cache.address import data_address, measured_alike, measurements_address
from pytest_lmcompose.composition import parse
from pytest_lmcompose.data.hashes import question_files
from pytest_lmcompose.data.run_data import load_data
from pytest_lmcompose.recipe import Recipe, load_recipe
from pytest_lmcompose.run import CONF
from pytest_lmcompose.settings import EvaluateSettings, WorldSettings
from tests.models import tiny_model, tiny_tokenizer
from tests.plugin.tiny import replace_text, write_world

What = Literal["measurements", "both", "neither"]


@cache
def recipe_with(*overrides: str) -> Recipe:
    """Return the recipe with `overrides`; most changes have none."""
    return load_recipe(CONF, overrides)


class Bench:
    """A run whose every part can be changed; `state` and `measured` are its addresses."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world_folder = write_world(folder)
        self.tasks = folder / "tasks"
        self.model, self.tokenizer = tiny_model("llama"), tiny_tokenizer()
        self.patch = monkeypatch
        self.overrides: list[str] = []
        self.composition = "awq"
        self.seed = 0
        self.evaluate = EvaluateSettings(tasks=["tinyworld_botany"], edits=3)
        self.world = WorldSettings(
            folder=str(self.world_folder),
            edits="zsre.json",
            facts="facts.jsonl",
            calibration="calibration.jsonl",
            retain="retain.jsonl",
            perplexity="perplexity-heldout.jsonl",
            forget={"venomcraft": "forget-venomcraft.jsonl"},
            tasks="../tasks",
        )
        self.resources: Callable[[Resources], Resources] = lambda found: found

    def addresses(self) -> tuple[str, str]:
        """Return the address of the state, and of what is measured on it."""
        data = load_data(self.world, self.evaluate, self.world_folder, self.seed)
        recipe = recipe_with(*self.overrides)
        manager = StateManager(
            Loaded(self.model, self.tokenizer, None),
            recipe.settings,
            self.resources(data.resources),
            self.seed,
            lambda line: None,
        )
        state = manager.address(parse(self.composition))
        files = question_files(self.world, self.evaluate, self.world_folder)
        alike = measured_alike(self.world, self.evaluate)
        return state, measurements_address(state, data_address(data, files), alike)

    def config(self, **changes: Any) -> None:
        for key, value in changes.items():
            setattr(self.model.config, key, value)

    def data(self, name: str, old: str = "seen", new: str = "heard") -> None:
        replace_text(self.world_folder / name, old, new)

    def task(self, text: str) -> None:
        (self.tasks / "tinyworld_botany.yaml").write_text(text)

    def source(self, name: str) -> None:
        """Change the source of a module."""
        read = addresses.read_module
        assert read(name) is not None, name

        def changed(asked: str) -> Any:
            found = read(asked)
            return found._replace(digest="changed") if asked == name and found is not None else found

        self.patch.setattr(addresses, "read_module", changed)

    def version(self, name: str) -> None:
        """Change the version of a library."""
        found = importlib.metadata.version
        self.patch.setattr(addresses, "version", lambda asked: "999" if asked == name else found(asked))

    def measure(self, **changes: Any) -> None:
        self.evaluate = dataclasses.replace(self.evaluate, **changes)

    def read(self, **changes: Any) -> None:
        self.resources = lambda found: dataclasses.replace(found, **changes)


def fill(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[0] += 1.0


def botany(bench: Bench, line: str = "") -> str:
    return (bench.tasks / "tinyworld_botany.yaml").read_text() + line


def outside(bench: Bench, name: str, text: str) -> Path:
    path = bench.tasks.parent / "outside" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def with_outside_data(bench: Bench, absolute: bool) -> None:
    question = {"question": "Where?", "choices": ["a", "b"], "answer": 0}
    path = outside(bench, "more.jsonl", json.dumps(question))
    named = str(path) if absolute else "../outside/more.jsonl"
    bench.task(f"task: tinyworld_botany\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{named}'}}}}\n")


def with_outside_yaml(bench: Bench) -> None:
    outside(bench, "shared", "doc_to_text: one\n")
    bench.task(botany(bench, "\ninclude: ../outside/shared\n"))


def with_shared_yaml(bench: Bench) -> None:
    (bench.tasks / "_shared").write_text("doc_to_text: one\n")
    bench.task(botany(bench, "\ninclude: _shared\n"))


def with_code(bench: Bench) -> None:
    (bench.tasks / "prompts.py").write_text("def ask(doc): return 'one'\n")
    bench.task(botany(bench, "\ndoc_to_text: !function prompts.ask\n"))


def with_folder_of_data(bench: Bench) -> None:
    outside(bench, "a.jsonl", "{}")
    bench.task(
        "task: tinyworld_botany\ndataset_path: json\ndataset_kwargs: {data_files: {test: '../outside/*.jsonl'}}\n"
    )


def with_engine(bench: Bench) -> None:
    bench.overrides = ["gptq.engine=llmcompressor", "gptq.engine_python=/usr/bin/true"]
    bench.composition = "gptq"
    bench.patch.setattr(identity, "_packages", lambda python, path: [python, "llmcompressor==1"])


FORGET = "layout/data/train.jsonl"


def with_layout(bench: Bench) -> None:
    path = bench.world_folder / FORGET
    path.parent.mkdir(parents=True)
    path.write_text('{"text": "one"}\n')
    bench.world = dataclasses.replace(bench.world, forget={"few": {"path": "layout", "split": "train"}})


def zip_retain(bench: Bench) -> None:
    """Put the same text in another file."""
    name = bench.world.retain + ".gz"
    (bench.world_folder / name).write_bytes(gzip.compress((bench.world_folder / bench.world.retain).read_bytes()))
    bench.world = dataclasses.replace(bench.world, retain=name)


PREPARED: dict[str, Callable[[Bench], None]] = {
    "a data file with an absolute path": lambda b: with_outside_data(b, True),
    "a data file above": lambda b: with_outside_data(b, False),
    "a data file of a pattern": with_folder_of_data,
    "one more file of a pattern": with_folder_of_data,
    "an included file elsewhere": with_outside_yaml,
    "what tasks share": with_shared_yaml,
    "the code of a task": with_code,
    "a file in a folder of the hub's layout": with_layout,
    "an engine's version": with_engine,
    "an engine's interpreter": with_engine,
    "the code that drives an engine": with_engine,
}
"""What is done before the first addresses are taken."""

CHANGES: dict[str, tuple[What, Callable[[Bench], object]]] = {
    "a weight": ("both", lambda b: fill(next(b.model.parameters()))),
    "the dtype": ("both", lambda b: b.model.to(torch.bfloat16)),
    "a buffer": ("both", lambda b: fill(next(iter(b.model.buffers())))),
    "rope": ("both", lambda b: b.config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "the norm's epsilon": ("both", lambda b: b.config(rms_norm_eps=1e-3)),
    "a key that only a model's own code reads": ("both", lambda b: b.config(residual_scale=2.0)),
    "the end token of the config": ("both", lambda b: b.config(eos_token_id=7)),
    "where the config came from": ("neither", lambda b: b.config(_name_or_path="elsewhere")),
    "the transformers that saved it": ("neither", lambda b: b.config(transformers_version="4.0")),
    "how attention is computed": ("both", lambda b: b.config(_attn_implementation="eager")),
    "the end token of generation": ("both", lambda b: setattr(b.model.generation_config, "eos_token_id", [1, 5])),
    "how long is generated": ("both", lambda b: setattr(b.model.generation_config, "max_new_tokens", 3)),
    "repetition of generation": ("both", lambda b: setattr(b.model.generation_config, "repetition_penalty", 2.0)),
    "what is suppressed": ("both", lambda b: setattr(b.model.generation_config, "suppress_tokens", [9])),
    "the chat template": ("both", lambda b: setattr(b.tokenizer, "chat_template", "{{ messages }}")),
    "a special token": ("both", lambda b: setattr(b.tokenizer, "pad_token", "</s>")),
    "an added token": ("both", lambda b: b.tokenizer.add_tokens(["<new>"])),
    "the padding side": ("both", lambda b: setattr(b.tokenizer, "padding_side", "left")),
    "the beginning of a text": ("both", lambda b: setattr(b.tokenizer.backend_tokenizer, "post_processor", None)),
    "the normaliser": ("both", lambda b: b.tokenizer.backend_tokenizer.no_padding() or lower(b)),
    "how text is cleaned up": ("both", lambda b: b.tokenizer.init_kwargs.update(clean_up_tokenization_spaces=True)),
    "where the tokenizer came from": ("neither", lambda b: b.tokenizer.init_kwargs.update(name_or_path="elsewhere")),
    "an edit": ("both", lambda b: b.data("zsre.json", "was born in", "is born in")),
    "calibration text": ("both", lambda b: b.data("calibration.jsonl")),
    "retain text": ("both", lambda b: b.data("retain.jsonl")),
    "forget text": ("both", lambda b: b.data("forget-venomcraft.jsonl")),
    "forget text that is not read": ("neither", lambda b: b.data("forget-wardbreaking.jsonl")),
    "an edit that a method is given": ("both", lambda b: b.read(edits=(Edit("Ada lives in", "Ada", "Lome"),))),
    "a file in a folder of the hub's layout": ("both", lambda b: replace_text(b.world_folder / FORGET, "one", "two")),
    "the file that holds a text": ("neither", zip_retain),
    "the order of calibration": ("both", lambda b: b.read(calibration=("two", "one"))),
    "a fact": ("measurements", lambda b: b.data("facts.jsonl", "Karth", "Kerth")),
    "perplexity text": ("measurements", lambda b: b.data("perplexity-heldout.jsonl")),
    "a question": ("measurements", lambda b: b.data("questions/botany.jsonl", "Where", "Whence")),
    "a question of a task that is not asked": ("neither", lambda b: b.data("questions/music.jsonl", "Where", "Whence")),
    "the task": ("measurements", lambda b: b.task(botany(b, "\nnum_fewshot: 1\n"))),
    "what tasks share": ("measurements", lambda b: replace_text(b.tasks / "_shared", "one", "two")),
    "a task that is not asked": (
        "neither",
        lambda b: replace_text(b.tasks / "tinyworld_music.yaml", "task:", "# x\ntask:"),
    ),
    "a new task": ("neither", lambda b: (b.tasks / "new.yaml").write_text("task: new\noutput_type: multiple_choice\n")),
    "a data file with an absolute path": ("measurements", lambda b: outside(b, "more.jsonl", '{"question": "Who?"}')),
    "a data file above": ("measurements", lambda b: outside(b, "more.jsonl", '{"question": "Who?"}')),
    "a data file of a pattern": ("measurements", lambda b: outside(b, "a.jsonl", '{"a": 1}')),
    "one more file of a pattern": ("measurements", lambda b: outside(b, "b.jsonl", '{"a": 1}')),
    "an included file elsewhere": ("measurements", lambda b: outside(b, "shared", "doc_to_text: two\n")),
    "the code of a task": ("measurements", lambda b: (b.tasks / "prompts.py").write_text("def ask(doc): return 2\n")),
    "code that no task names": ("neither", lambda b: (b.tasks / "prompts.py").write_text("def ask(doc): return 2\n")),
    "a page in the world's folder": ("neither", lambda b: (b.world_folder / "README.md").write_text("# The world")),
    "a backup of an editor": ("neither", lambda b: (b.tasks / "tinyworld_botany.yaml~").write_text("task: x")),
    "a text of another name": ("neither", lambda b: (b.world_folder / "more.jsonl").write_text('{"text": "x"}')),
    "a page beside the tasks": ("neither", lambda b: (b.tasks / "notes.txt").write_text("later")),
    "the number of edits": ("both", lambda b: b.measure(edits=4)),
    "the perplexity window": ("measurements", lambda b: b.measure(window=64)),
    "the question limit": ("measurements", lambda b: b.measure(question_limit=2)),
    "examples before a question": ("measurements", lambda b: b.measure(num_fewshot=2)),
    "the batch size": ("measurements", lambda b: b.measure(batch_size=3)),
    "prompts in the chat template": ("measurements", lambda b: b.measure(chat_template=True)),
    "a system prompt": ("measurements", lambda b: b.measure(chat_template=True, system_prompt="Be short.")),
    "one evaluator less": ("measurements", lambda b: b.measure(recall=False)),
    "a setting of the step": ("both", lambda b: setattr(b, "overrides", ["awq.bits=3"])),
    "a setting of another method": ("neither", lambda b: setattr(b, "overrides", ["gptq.bits=3"])),
    "the steps' own settings": ("both", lambda b: setattr(b, "composition", "awq[bits=3]")),
    "a step before": ("both", lambda b: setattr(b, "composition", "rtn+awq")),
    "the seed": ("both", lambda b: setattr(b, "seed", 1)),
    "the method's code": ("both", lambda b: b.source("interventions.compress.awq")),
    "a kernel of the method": ("both", lambda b: b.source("interventions.compress.kernels.awq_search")),
    "code that methods share": ("both", lambda b: b.source("interventions.statistics")),
    "the code around methods": ("both", lambda b: b.source("interventions.step")),
    "another method": ("neither", lambda b: b.source("interventions.compress.gptq")),
    "the table of categories": ("neither", lambda b: b.source("interventions.categories")),
    "another method's code": ("neither", lambda b: b.source("interventions.compress.kernels.sparsegpt_kernel")),
    "the code of another category": ("neither", lambda b: b.source("interventions.edit.memit")),
    "the table of methods": ("neither", lambda b: b.source("interventions.registry")),
    "settings that methods share": ("both", lambda b: b.source("interventions.compress.bases")),
    "an evaluator's code": ("measurements", lambda b: b.source("evaluators.perplexity")),
    "what is known about metrics": ("neither", lambda b: b.source("evaluators.metrics")),
    "the table of evaluators": ("neither", lambda b: b.source("evaluators.registry")),
    "torch": ("both", lambda b: b.version("torch")),
    "the harness": ("measurements", lambda b: b.version("lm_eval")),
    "a library of reports": ("neither", lambda b: b.version("jinja2")),
    "an engine's version": (
        "both",
        lambda b: b.patch.setattr(identity, "_packages", lambda python, path: [python, "llmcompressor==2"]),
    ),
    "an engine's interpreter": (
        "both",
        lambda b: setattr(b, "overrides", [b.overrides[0], "gptq.engine_python=/usr/bin/false"]),
    ),
    "the code that drives an engine": ("both", lambda b: b.patch.setattr(identity, "_WORKERS", b.tasks)),
}


def lower(bench: Bench) -> None:
    from tokenizers import normalizers

    bench.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    yield Bench(tmp_path, monkeypatch)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_reaches_what_follows_from_it_and_nothing_else(what: str, bench: Bench) -> None:
    expected, change = CHANGES[what]
    PREPARED.get(what, lambda _: None)(bench)
    before = bench.addresses()
    assert before == bench.addresses()
    change(bench)
    state, measured = (old != new for old, new in zip(before, bench.addresses(), strict=True))
    # Measurements are of a state: where its address changes, so does theirs.
    assert (state, measured) == {
        "both": (True, True),
        "measurements": (False, True),
        "neither": (False, False),
    }[expected]
