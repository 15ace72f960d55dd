"""Loading a model safely, building states that share prefixes, and keeping them in the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluators.measurement import Measurement
from interventions import Edit, Resources, StepReport, registry, safety
from pytest_lmcompose.build.load import Loaded, choose_device, hash_tensors, hash_weights, load_model
from pytest_lmcompose.build.snapshot import StateGoneError
from pytest_lmcompose.build.states import StateManager, step_seed
from pytest_lmcompose.cache.address import read_module
from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.cache.run_cache import RunCache, costs
from pytest_lmcompose.composition import Composition, Step, parse
from pytest_lmcompose.errors import BuildError, ModelError
from pytest_lmcompose.gate.repeats import Repeat
from pytest_lmcompose.settings import ModelSettings
from pytest_lmcompose.steps import StepRecord
from tests.plugin.stubs import METHODS, NudgeSettings, RoundSettings

CPU = torch.device("cpu")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def manager(tiny_model: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[StateManager]:
    for method in METHODS:
        monkeypatch.setitem(registry._table, method.name, method)

    def settings(step: Any) -> Any:
        kind = registry.find_method(step.method).settings_type()
        return kind(**{key: int(value) for key, value in step.settings})

    yield StateManager(load_model(ModelSettings(), str(tiny_model), CPU), settings, Resources(), 5, lines.append)


def test_weights_are_those_of_the_file_in_float32(tiny_model: Path) -> None:
    loaded = load_model(ModelSettings(), str(tiny_model), CPU)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    half = load_model(ModelSettings(dtype="bfloat16"), str(tiny_model), CPU)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model\.safetensors, only pytorch_model\.bin"):
        load_model(ModelSettings(), str(folder), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="--lmcompose-device=cuda:0: torch finds no CUDA device"):
        choose_device("cuda:0")
    assert choose_device("auto") == CPU


def test_hash_knows_names_values_shapes_and_dtypes_but_no_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(1.5)
    first = hash_tensors({"a": a, "b": b})
    assert hash_tensors({"b": b, "a": a.t().contiguous().t()}) == first
    others = [
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a + torch.eye(2, 3) * 1e-6, "b": b},
        {"a": a.to(torch.bfloat16), "b": b},
        {"a": a.view(torch.int32), "b": b},
    ]
    assert len({first, *map(hash_tensors, others)}) == 6


def test_a_prefix_is_built_once_and_each_state_returns_exactly(manager: StateManager, lines: list[str]) -> None:
    ids = ("nudge+round", "nudge", "base", "round+nudge", "nudge+round", "nudge")
    seen: dict[str, str] = {}
    for name in ids:
        state = manager.enter(parse(name))
        assert hash_weights(state.model) == state.state_hash
        assert [str(record.step) for record in state.steps] == ([] if name == "base" else name.split("+"))
        assert seen.setdefault(name, state.state_hash) == state.state_hash
    assert len(set(seen.values())) == 4
    # nudge, its round, round, its nudge: nothing was built twice
    assert [line.split("  ")[:2] for line in lines] == [
        ["nudge+round", "step 1/2 nudge"],
        ["nudge+round", "step 2/2 round"],
        ["round+nudge", "step 1/2 round"],
        ["round+nudge", "step 2/2 nudge"],
    ]


def test_a_step_makes_no_copy_of_weights_that_the_run_has(
    manager: StateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = manager.enter(parse("nudge")).state_hash

    def refuse(*_: Any) -> list[str]:
        raise AssertionError("copied")

    monkeypatch.setattr(safety, "_first_names", refuse)
    manager.enter(parse("nudge+round"))
    with pytest.raises(BuildError, match="layer 7 is missing"):
        manager.enter(parse("nudge+refuse"))
    state = manager.enter(parse("nudge"))
    assert hash_weights(state.model) == state.state_hash == before


def test_a_state_is_the_same_whoever_asks_first(tiny_model: Path, manager: StateManager) -> None:
    alone = manager.enter(parse("nudge")).state_hash
    other = StateManager(
        load_model(ModelSettings(), str(tiny_model), CPU),
        lambda step: registry.find_method(step.method).settings_type()(),
        Resources(),
        5,
        lambda line: None,
    )
    other.enter(parse("nudge+round"))
    assert other.enter(parse("nudge")).state_hash == alone


def test_seeds_differ_by_run_and_prefix() -> None:
    prefixes = [parse(text) for text in ("nudge", "round+nudge", "nudge+nudge", "nudge[scale=2]")]
    seeds = [step_seed(run, prefix) for run in (0, 1) for prefix in prefixes]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_failing_step_is_tried_once_and_leaves_its_prefix(manager: StateManager, lines: list[str]) -> None:
    for name in ("nudge+refuse", "nudge+refuse", "nudge+refuse+round"):
        with pytest.raises(BuildError, match="step 2, refuse: layer 7 is missing"):
            manager.enter(parse(name))
        assert [str(r.step) for r in manager.steps_built(parse(name))] == ["nudge"]
    assert sum("failed" in line for line in lines) == 1


def test_what_a_user_does_to_the_model_is_undone(manager: StateManager) -> None:
    state = manager.enter(parse("nudge"))
    state.model.train()
    state.model.config.use_cache = not state.model.config.use_cache
    for parameter in state.model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        state.model.model.norm.weight.fill_(0)
    again = manager.enter(parse("nudge"))
    assert hash_weights(again.model) == state.state_hash
    assert not again.model.training and again.model.config.use_cache
    assert all(parameter.requires_grad for parameter in again.model.parameters())


def test_the_pristine_model_is_another_one(manager: StateManager) -> None:
    state = manager.enter(parse("nudge+round"))
    pristine = manager.pristine()
    assert pristine.model is not state.model
    assert hash_weights(pristine.model) == manager.base_hash
    assert pristine.composition == Composition()
    # The working model still holds the state that its holder was promised.
    assert hash_weights(state.model) == state.state_hash


def test_records_tell_what_a_step_did(manager: StateManager) -> None:
    (record,) = manager.enter(parse("round[digits=1]")).steps
    assert record.report.settings == {"digits": 1} != {"digits": RoundSettings().digits}
    assert record.report.warnings == ("rounded to nearest",)
    assert len(record.report.changed) == 14


def test_states_are_forgotten_when_released(manager: StateManager, lines: list[str]) -> None:
    manager.enter(parse("nudge+round"))
    manager.release([parse("nudge+round")])
    manager.enter(parse("nudge+round"))
    assert [line.split("  ")[1] for line in lines] == ["step 1/2 nudge", "step 2/2 round", "step 2/2 round"]
    manager.release([Composition(), parse("nudge"), parse("nudge+round")])
    assert manager.enter(Composition()).state_hash == manager.base_hash
    assert len(lines) == 3


def test_a_visit_returns_to_the_state_that_a_test_holds(manager: StateManager) -> None:
    state = manager.enter(parse("nudge"))
    with torch.no_grad():
        state.model.model.norm.weight.fill_(0)  # and a visitor does not see it
    with manager.visit(parse("nudge+round")) as visited:
        assert hash_weights(visited.model) == visited.state_hash != state.state_hash
        with manager.visit(Composition()) as base:
            assert hash_weights(base.model) == manager.base_hash
        assert hash_weights(visited.model) == visited.state_hash
    assert hash_weights(state.model) == state.state_hash


@pytest.fixture
def store(tmp_path: Path, lines: list[str]) -> Cache:
    return Cache(tmp_path / "store", 10**9, lines.append)


class Input:
    """Everything that a state follows from, to change one at a time."""

    def __init__(self, model: Path, store: Cache, lines: list[str]) -> None:
        self.model, self.store, self.lines = model, store, lines
        self.settings: dict[str, Any] = {"nudge": NudgeSettings(), "round": RoundSettings()}
        self.resources = Resources(edits=(Edit("Ada was born in", "Ada", "Lome"),), forget={"d": ("text",)})
        self.seed = 5
        self.files = "files"
        self.change_model: Callable[[Loaded], None] = lambda loaded: None

    def manager(self) -> StateManager:
        loaded = load_model(ModelSettings(), str(self.model), CPU)
        self.change_model(loaded)
        run_cache = RunCache(self.store, "tiny")
        return StateManager(
            loaded, lambda step: self.settings[step.method], self.resources, self.seed, self.lines.append, run_cache
        )

    def applied(self, name: str = "nudge+round") -> list[str]:
        """Build a state in a manager of its own; return the steps that were applied for it."""
        self.lines.clear()
        state = self.manager().enter(parse(name))
        assert hash_weights(state.model) == state.state_hash
        assert [str(record.step) for record in state.steps] == name.split("+")
        return [line.split("  ")[1].split()[-1] for line in self.lines if "  step " in line]


@pytest.fixture
def inputs(tiny_model: Path, store: Cache, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Input]:
    for method in METHODS:
        monkeypatch.setitem(registry._table, method.name, method)
    yield Input(tiny_model, store, lines)
    read_module.cache_clear()


def test_what_was_built_once_is_read_by_the_next_run(inputs: Input, lines: list[str]) -> None:
    first = inputs.manager().enter(parse("nudge+round"))
    again = inputs.manager().enter(parse("nudge+round"))
    assert again.state_hash == first.state_hash == hash_weights(again.model)
    assert [line.split("  ")[1] for line in lines] == ["step 1/2 nudge", "step 2/2 round", "read from the cache"]
    assert [record.report.changed for record in again.steps] == [record.report.changed for record in first.steps]
    assert [record.seed for record in again.steps] == [record.seed for record in first.steps]
    assert again.steps[1].report.warnings == ("rounded to nearest",)
    assert inputs.applied("nudge+nudge") == ["nudge"]  # its prefix is there
    assert inputs.applied("nudge") == []


def _code(inputs: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the source of the stubs, as an editor would."""
    read = Path.read_bytes

    def changed(path: Path) -> bytes:
        return read(path) + (b"# changed" if path.name == "stubs.py" else b"")

    monkeypatch.setattr(Path, "read_bytes", changed)
    read_module.cache_clear()


def _libraries(inputs: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_lmcompose.build.addresses.versions", lambda names: {"torch": "9.9"})


def _weights(loaded: Loaded) -> None:
    with torch.no_grad():
        loaded.model.model.norm.weight[0] += 1


def _rope(loaded: Loaded) -> None:
    loaded.model.config.rms_norm_eps *= 2


def _tokenizer(loaded: Loaded) -> None:
    loaded.tokenizer.add_tokens(["Quill"])


STALE: dict[str, tuple[Callable[[Input, pytest.MonkeyPatch], object], list[str]]] = {
    "a setting of the first step": (
        lambda i, m: i.settings.update(nudge=NudgeSettings(scale=0.02)),
        ["nudge", "round"],
    ),
    "a setting of the last step": (lambda i, m: i.settings.update(round=RoundSettings(digits=3)), ["round"]),
    "an edit": (
        lambda i, m: setattr(i, "resources", replace(i.resources, edits=())),
        ["nudge", "round"],
    ),
    "a text": (
        lambda i, m: setattr(i, "resources", replace(i.resources, forget={"d": ("texts",)})),
        ["nudge", "round"],
    ),
    "the seed": (lambda i, m: setattr(i, "seed", 6), ["nudge", "round"]),
    "the weights": (lambda i, m: setattr(i, "change_model", _weights), ["nudge", "round"]),
    "the architecture": (lambda i, m: setattr(i, "change_model", _rope), ["nudge", "round"]),
    "the tokenizer": (lambda i, m: setattr(i, "change_model", _tokenizer), ["nudge", "round"]),
    "the code": (_code, ["nudge", "round"]),
    "a library": (_libraries, ["nudge", "round"]),
}


@pytest.mark.parametrize("what", STALE)
def test_a_change_of_any_input_misses_the_store(inputs: Input, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inputs.applied() == ["nudge", "round"]
    assert inputs.applied() == []
    change, expected = STALE[what]
    change(inputs, monkeypatch)
    assert inputs.applied() == expected
    assert inputs.applied() == []


def test_a_broken_state_is_built_again(inputs: Input, store: Cache, lines: list[str]) -> None:
    assert inputs.applied() == ["nudge", "round"]
    for entry in store.entries():
        path = entry.folder / "changed.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    assert inputs.applied() == ["nudge", "round"]
    assert sum("is broken" in line for line in lines) == 2
    assert inputs.applied() == []


def test_a_store_that_cannot_be_written_stops_nothing(inputs: Input, store: Cache, lines: list[str]) -> None:
    store.folder.parent.write_text("a file where the folder should be")
    assert inputs.applied() == ["nudge", "round"]
    assert sum("going on without storing" in line for line in lines) == 1
    assert inputs.applied() == ["nudge", "round"]


def test_stored_steps_tell_what_they_cost(inputs: Input, store: Cache) -> None:
    inputs.applied()
    found = costs(store, "tiny")
    down_proj = 4 * 32 * 64
    assert found.seconds(Step("nudge")) is not None and found.bytes(Step("nudge")) == down_proj
    assert found.bytes(Step("round", (("digits", "1"),))) == found.bytes(Step("round"))
    assert costs(store, "another model").steps == {}


def test_measurements_come_back_exactly(store: Cache) -> None:
    run_cache = RunCache(store, "tiny")
    report = StepReport("nudge", {"scale": 0.1}, ("a",), {"loss": float("nan")}, ("w",), 1.5, 7)
    samples = (1 / 3, float("inf"), 2.0)
    steps, measurements = (
        (StepRecord(Step("nudge"), 3, report),),
        (Measurement("m", 0.1, None, 3, True, samples, "n", (1.0, 2.0, 3.0), (0, 0, 1)),),
    )
    found = Repeat(5, "state", steps, measurements, 2.5)
    assert run_cache.measured("a" * 64, parse("nudge"), lambda: found) is found
    again = run_cache.measured("a" * 64, parse("nudge"), lambda: pytest.fail("it is there"))
    assert again is not found and repr(again) == repr(found)
    assert costs(store, "tiny").evaluation == 2.5


def test_a_state_ends_where_another_one_is_entered(manager: StateManager) -> None:
    first = manager.enter(parse("nudge"))
    weights = first.model.state_dict()
    assert weights
    with manager.visit(Composition()) as base:
        assert base.model is not None
        with pytest.raises(StateGoneError, match="no longer in this state"):
            _ = first.model
    assert first.model is not None  # which got it back
    with pytest.raises(StateGoneError):
        _ = base.model
    manager.enter(Composition())
    with pytest.raises(StateGoneError):
        _ = first.model


def test_a_state_rests_while_another_manager_uses_the_model(manager: StateManager) -> None:
    other = manager.repeat(Resources(), 6, lambda line: None)
    held = manager.enter(parse("nudge"))
    before = hash_weights(held.model)
    with other.visit(parse("nudge+round")) as state:
        assert hash_weights(state.model) == state.state_hash
        with pytest.raises(StateGoneError):
            _ = held.model
        with manager.visit(Composition()) as base:
            assert hash_weights(base.model) == manager.base_hash
        assert hash_weights(state.model) == state.state_hash
    assert hash_weights(held.model) == before == held.state_hash


def test_the_base_model_beside_it_never_ends(manager: StateManager) -> None:
    pristine = manager.pristine()
    manager.enter(parse("nudge"))
    assert hash_weights(pristine.model) == manager.base_hash
