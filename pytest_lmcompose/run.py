"""One run in one process: the recipe, the model's states, and what was found about each composition.

Everything heavy is made when first asked for, so that a run that collects only imports no torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evaluators.measurement import Measurement
from pytest_lmcompose.address import address, data_address, hash_files, measurements_address
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.gate import Rule, Verdict, judge, needs_base, paired_gates, read_rules, settle
from pytest_lmcompose.journal import Journal
from pytest_lmcompose.locate import model_location, model_overrides, world_folder
from pytest_lmcompose.options import SUITE_FOLDER, Options
from pytest_lmcompose.plan import Plan
from pytest_lmcompose.recipe import Recipe, load_recipe
from pytest_lmcompose.repeats import Repeat, pooled
from pytest_lmcompose.store import Store
from pytest_lmcompose.stored import Shelf, costs

if TYPE_CHECKING:
    from evaluators import UneditedAnswers
    from pytest_lmcompose.build import ModelState, StateManager, StepRecord
    from pytest_lmcompose.data import RunData

CONF = SUITE_FOLDER / "conf"


@dataclasses.dataclass
class Result:
    """What is known so far about one composition."""

    composition: Composition
    steps: tuple[StepRecord, ...] = ()
    state_hash: str | None = None
    measurements: tuple[Measurement, ...] | None = None
    """Over all repeats."""
    repeats: tuple[Repeat, ...] = ()
    """Behind the measurements; `steps` and `state_hash` are the first one's."""
    evaluate_seconds: float | None = None
    gates: tuple[Verdict, ...] | None = None
    error: str | None = None
    interrupted: bool = False

    @property
    def status(self) -> str:
        """Say how far it came: failed, interrupted, measured, built or begun."""
        if self.error is not None:
            return "interrupted" if self.interrupted else "failed"
        if self.measurements is not None:
            return "measured"
        return "built" if self.state_hash is not None else "begun"

    def fail(self, error: BaseException) -> None:
        """Keep what went wrong."""
        self.error = f"{type(error).__name__}: {error}".removesuffix(": ")
        self.interrupted = isinstance(error, KeyboardInterrupt)


class Run:
    """The work of a session, each part done once."""

    def __init__(self, options: Options, progress: Callable[[str], None]) -> None:
        self.options = options
        self.results: dict[Composition, Result] = {}
        self.touched: dict[Composition, Result] = {}
        """Results that may have changed since they were last sent on."""
        self.judged: tuple[Composition, ...] = ()
        """Compositions whose gates this run is going to judge, here or in other workers."""
        self._progress = progress
        self._answers: dict[int, UneditedAnswers | None] = {}

    @cached_property
    def recipe(self) -> Recipe:
        """The composed recipe; raises RecipeError."""
        options = self.options
        chosen = model_overrides(options.model, CONF, options.folder) if options.model else ()
        suite = (f"suite={options.suite}",) if options.suite else ()
        return load_recipe(CONF, (*chosen, *suite, *options.overrides))

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The thresholds; raises ThresholdError."""
        return read_rules(self.options.thresholds)

    @cached_property
    def compositions(self) -> tuple[Composition, ...]:
        """The compositions to test: those given, else the suite's; raises RecipeError."""
        if self.options.compose:
            return tuple(dict.fromkeys(self.recipe.read(text) for text in self.options.compose))
        return self.recipe.suite_compositions()

    @cached_property
    def location(self) -> str:
        """Where the model is: a folder or a hub id; raises RecipeError."""
        return model_location(self.recipe.model.path, self.options.folder)

    def check(self) -> None:
        """Find everything that is wrong with the options before any work.

        Raises RecipeError or ThresholdError.
        """
        _ = self.compositions, self.rules, self.location
        world_folder(self.recipe.world.folder, self.options.folder)

    @cached_property
    def data(self) -> tuple[RunData, ...]:
        """The edits, facts and texts of each repeat; raises WorldError."""
        from pytest_lmcompose.data import load_data

        folder = world_folder(self.recipe.world.folder, self.options.folder)
        return tuple(load_data(self.recipe.world, self.recipe.evaluate, folder, seed) for seed in self.seeds)

    @property
    def seeds(self) -> range:
        """The seed of each repeat."""
        return range(self.options.seed, self.options.seed + self.options.repeats)

    @cached_property
    def store(self) -> Store | None:
        """Finished work of this and other runs, unless the user wants none."""
        options = self.options
        if options.cache_dir is None:
            return None
        return Store(options.cache_dir, options.cache_size, self._progress)

    @cached_property
    def shelf(self) -> Shelf | None:
        """This run's part of the store."""
        if self.store is None:
            return None
        world = self.recipe.world
        folder = world_folder(world.folder, self.options.folder)
        read = [world.edits, world.calibration, world.retain, *(name for _, name in sorted(world.forget.items()))]
        files = hash_files(folder / name for name in read if name is not None)
        return Shelf(self.store, self.recipe.model.path, files)

    @cached_property
    def journal(self) -> Journal | None:
        """Notes of what this run has finished, for one that goes on if it is killed."""
        if self.store is None:
            return None
        options = self.options
        asked = address(
            recipe=self.recipe.plain(), model=self.location, compose=options.compose, seeds=list(self.seeds)
        )
        return Journal(self.store.folder, asked)

    def plan(self, compositions: Iterable[Composition]) -> Iterator[str]:
        """Yield the plan of `compositions`, a line each."""
        known = Costs() if self.store is None else costs(self.store, self.recipe.model.path)
        return Plan.of(compositions).lines(known, repeats=len(self.seeds))

    def release(self, states: Iterable[Composition]) -> None:
        """Forget states that no test needs any more."""
        if "manager" in self.__dict__:
            for manager in self.managers:
                manager.release(states)

    @cached_property
    def manager(self) -> StateManager:
        """The states of the model, which is loaded here; the first repeat's, and the only one's."""
        data = self.data  # broken data are known before the model is loaded
        from pytest_lmcompose.build import StateManager
        from pytest_lmcompose.load import choose_device, load_model

        loaded = load_model(self.recipe.model, self.location, choose_device(self.options.device))
        return StateManager(loaded, self.recipe.settings, data[0].resources, self.seeds[0], self._progress, self.shelf)

    @cached_property
    def managers(self) -> tuple[StateManager, ...]:
        """The states of every repeat, all of the one working model."""

        def named(number: int) -> Callable[[str], None]:
            return lambda line: self._progress(f"{line}  (repeat {number} of {len(self.seeds)})")

        others = zip(self.data[1:], self.seeds[1:], strict=True)
        return (
            self.manager,
            *(self.manager.repeat(data.resources, seed, named(i)) for i, (data, seed) in enumerate(others, start=2)),
        )

    def result(self, composition: Composition) -> Result:
        """Return the result of `composition`, begun if need be."""
        self.touched[composition] = self.results.setdefault(composition, Result(composition))
        return self.touched[composition]

    def state(self, composition: Composition) -> ModelState:
        """Bring the model into the state of `composition`; a failure is kept in its result."""
        result = self.result(composition)
        with self._kept(result):
            state = self.manager.enter(composition)
        result.steps, result.state_hash = state.steps, state.state_hash
        return state

    def measurements(self, composition: Composition) -> tuple[Measurement, ...]:
        """Return the measurements of `composition`, made once; the model's state is left as found."""
        result = self.result(composition)
        if result.measurements is None:
            with self._kept(result):
                repeats: list[Repeat] = []
                for number in range(len(self.seeds)):
                    repeats.append(self._repeat(composition, number))
                    if number == 0:
                        result.steps, result.state_hash = repeats[0].steps, repeats[0].state_hash
                result.measurements = pooled([repeat.measurements for repeat in repeats])
                result.repeats = tuple(repeats)
                result.evaluate_seconds = sum(repeat.evaluate_seconds for repeat in repeats)
        assert result.measurements is not None
        return result.measurements

    def gates(self, composition: Composition) -> tuple[Verdict, ...]:
        """Judge the measurements of `composition` by the thresholds.

        A paired gate is judged with those of the compositions before; see `gate.settle` for the end.
        """
        base: Sequence[Measurement] | None = None
        base_runs: list[tuple[Measurement, ...]] | None = None
        if needs_base(self.rules, composition.id):
            base = self.measurements(Composition())
            base_runs = self._runs(Composition())
        measured = self.measurements(composition)
        metrics = [m.metric for m in measured]
        planned = dict.fromkeys((*self.judged, composition))
        gates = max(1, sum(paired_gates(self.rules, c.id, metrics) for c in planned))
        found = judge(
            self.rules, composition.id, measured, base, runs=self._runs(composition), base_runs=base_runs, gates=gates
        )
        known = {c.id: result.gates for c, result in self.results.items() if result.gates is not None}
        result = self.result(composition)
        result.gates = settle({**known, composition.id: found}, gates)[composition.id]
        return result.gates

    def _runs(self, composition: Composition) -> list[tuple[Measurement, ...]]:
        return [repeat.measurements for repeat in self.result(composition).repeats]

    def _repeat(self, composition: Composition, number: int) -> Repeat:
        """Return one repeat of `composition` from the store, or build and measure it."""
        shelf = self.shelf
        if shelf is None:
            return self._measure(composition, number)
        read = shelf.measurements_read
        found = shelf.measured(
            self._address(composition, number), composition, lambda: self._measure(composition, number)
        )
        if shelf.measurements_read > read:
            self._progress(f"{composition}  measurements read from the store")
        return found

    def _address(self, composition: Composition, number: int) -> str:
        """Return the content address of the measurements of one repeat."""
        state = self.managers[number].address(composition)
        world, evaluate = self.recipe.world, self.recipe.evaluate
        return measurements_address(state, self._data_addresses[number], world, evaluate)

    @cached_property
    def _data_addresses(self) -> tuple[str, ...]:
        """The hash of all that the evaluators ask, by repeat."""
        folder = world_folder(self.recipe.world.folder, self.options.folder)
        tasks = self.recipe.world.tasks
        files = hash_files([folder] if tasks is None else [folder, folder / tasks])
        return tuple(data_address(data, files) for data in self.data)

    def _measure(self, composition: Composition, number: int) -> Repeat:
        """Build and measure one repeat of `composition`; the model's state is left as found."""
        unedited = self._unedited(number)
        with self._state(composition, number) as state:
            from pytest_lmcompose.measure import measure_state

            start = time.perf_counter()
            found = measure_state(
                state.model,
                state.tokenizer,
                self.data[number],
                self.recipe.world,
                self.recipe.evaluate,
                unedited,
            )
            seconds = time.perf_counter() - start
        return Repeat(self.seeds[number], state.state_hash, state.steps, tuple(found), seconds)

    @contextmanager
    def _state(self, composition: Composition, number: int) -> Iterator[ModelState]:
        manager = self.managers[number]
        if manager is self.manager:
            with manager.visit(composition) as state:
                yield state
            return
        with self.manager.visit(Composition()):  # which goes back to the state that a test may hold
            try:
                with manager.visit(composition) as state:
                    yield state
            finally:
                with manager.visit(Composition()):
                    pass

    def _unedited(self, number: int) -> UneditedAnswers | None:
        """Return the base model's answers about the edits of a repeat, asked once."""
        from pytest_lmcompose.measure import capture_unedited

        if number not in self._answers:
            with self.manager.visit(Composition()) as base:
                self._answers[number] = capture_unedited(
                    base.model, base.tokenizer, self.data[number], self.recipe.evaluate
                )
        return self._answers[number]

    @contextmanager
    def _kept(self, result: Result) -> Iterator[None]:
        """Keep what goes wrong, an interrupt too, and how far it came."""
        try:
            yield
        except BaseException as error:
            if "manager" in self.__dict__:
                result.steps = self.manager.steps_built(result.composition)
            result.fail(error)
            raise
        result.error = None

    def model_facts(self) -> dict[str, Any] | None:
        """Return what the report says of the model, or None if it was never loaded."""
        if "manager" not in self.__dict__:
            return None
        loaded = self.manager.loaded
        parameter = next(loaded.model.parameters())
        return {
            "id": self.recipe.model.path,
            "location": self.location,
            "revision": loaded.revision,
            "weight_hash": self.manager.base_hash,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
        }
