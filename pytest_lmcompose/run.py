"""One run in one process: the recipe, the model's states, and what was found about each composition.

Everything heavy is made when first asked for, so that a run that collects only imports no torch.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.measurement import EvaluationError, Measurement
from interventions.registry import methods
from pytest_lmcompose.baseline.history import choose
from pytest_lmcompose.baseline.reference import Baseline, architecture, architecture_at
from pytest_lmcompose.baseline.storage import StorageError
from pytest_lmcompose.build.checkpoint import check_folder
from pytest_lmcompose.cache.address import address, data_address, measurements_address
from pytest_lmcompose.cache.folder import Store
from pytest_lmcompose.cache.journal import Journal
from pytest_lmcompose.cache.remote import RemoteStore
from pytest_lmcompose.cache.run_cache import RunCache, costs
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.composition_run import Result
from pytest_lmcompose.costs import Costs
from pytest_lmcompose.counter import Counter
from pytest_lmcompose.data.asked import asked, question_files
from pytest_lmcompose.gate.possible import check_metrics
from pytest_lmcompose.gate.repeats import Repeat, pooled
from pytest_lmcompose.gate.thresholds import (
    Rule,
    check_compositions,
    needs_baseline,
    own_compositions,
    read_expression,
    read_rules,
    without_losses,
)
from pytest_lmcompose.locate import model_location, model_overrides, world_folder
from pytest_lmcompose.options import SUITE_FOLDER, Options
from pytest_lmcompose.plan import Plan
from pytest_lmcompose.recipe import Recipe, RecipeError, load_recipe
from pytest_lmcompose.results import Model, Tokenisation

if TYPE_CHECKING:
    from evaluators import UneditedAnswers
    from pytest_lmcompose.build.states import ModelState, StateManager
    from pytest_lmcompose.data.run_data import RunData
    from pytest_lmcompose.steps import StepRecord

CONF = SUITE_FOLDER / "conf"


def ignore(*_: object) -> None:
    """Do nothing."""


class Run:
    """The work of a session, each part done once."""

    def __init__(
        self,
        options: Options,
        progress: Callable[[str], None],
        doing: Callable[[str], None] = ignore,
        applied: Callable[[Composition, StepRecord], None] = ignore,
    ) -> None:
        """Call `progress` with log lines, `doing` with the status, and `applied` after each step."""
        self.options = options
        self.results: dict[Composition, Result] = {}
        self.touched: dict[Composition, Result] = {}
        """Results that may have changed since they were last sent to the controller."""
        self.baseline_chosen: str | None = None
        """In a worker: the stored run that the controller compares with, empty if there is none."""
        self.baseline_read = False
        """Whether the stored run to compare with was looked for."""
        self.counter = Counter(options.repeats)
        self._progress, self._applied = progress, applied
        self._doing: Callable[[str], None] = lambda text: doing("  ".join(filter(None, (str(self.counter), text))))
        self._manager: StateManager | None = None
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
        """The thresholds, then the expressions of the command line; raises ThresholdError."""
        rules = read_rules(self.options.thresholds)
        own_file = self.options.thresholds == SUITE_FOLDER / "thresholds.yaml"
        if own_file and not Path(self.location).is_relative_to(SUITE_FOLDER):
            rules = without_losses(rules)  # which the suite accepts for its own model, and nobody for another
        return (*rules, *map(read_expression, self.options.baselines.fail))

    @cached_property
    def baseline(self) -> Baseline | None:
        """The stored run to compare with; raises StorageError."""
        options, chosen = self.options, self.baseline_chosen
        if chosen is None:
            found = choose(options.baselines, options.folder, needed=needs_baseline(self.rules))
        else:
            found = Baseline.read(Path(chosen)) if chosen else None
        self.baseline_read = True
        return found

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

        Raises RecipeError, ModelError, ThresholdError or StorageError.
        """
        _ = self.compositions, self.rules
        if Path(self.location).exists():
            check_folder(Path(self.location))
        check_compositions(self.rules, self.options.thresholds, methods())
        world = self.recipe.world
        check_metrics(
            self.rules,
            self.options.thresholds,
            world,
            self.recipe.evaluate,
            world_folder(world.folder, self.options.folder),
        )
        for name in own_compositions(self.rules):
            try:
                self.recipe.read(name)
            except RecipeError as error:
                raise RecipeError(f"{self.options.thresholds}: {error}") from None
        build = architecture_at(self.location) if self.baseline is not None else None
        if self.baseline is not None and (problem := self.baseline.unlike(build)) is not None:
            raise StorageError(f"{self.baseline.path} cannot be compared with {self.location}: {problem}")
        self._check_tasks(world_folder(self.recipe.world.folder, self.options.folder))

    def _check_tasks(self, folder: Path) -> None:
        """Raise RecipeError for a world whose task files would run code, unless the recipe trusts them."""
        world, evaluate = self.recipe.world, self.recipe.evaluate
        if world.tasks is None or world.trust_code or not evaluate.questions:
            return
        from evaluators.task_code import refuse_code

        try:
            refuse_code(folder / world.tasks)
        except EvaluationError as error:
            raise RecipeError(str(error)) from None

    @cached_property
    def data(self) -> tuple[RunData, ...]:
        """The edits, facts and texts of each repeat; raises WorldError."""
        from pytest_lmcompose.data.run_data import load_data

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
        if options.cache_url is not None:
            return RemoteStore(options.cache_url, options.cache_dir, options.cache_size, self._progress)
        return Store(options.cache_dir, options.cache_size, self._progress)

    @cached_property
    def run_cache(self) -> RunCache | None:
        """This run's part of the store."""
        if self.store is None:
            return None
        return RunCache(self.store, self.recipe.model.path)

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
        return Plan.of(compositions).lines(self.costs, repeats=len(self.seeds))

    @cached_property
    def costs(self) -> Costs:
        """What earlier runs tell of the cost of steps and evaluations."""
        return Costs() if self.store is None else costs(self.store, self.recipe.model.path)

    def prepare(self, composition: Composition) -> tuple[str, ...]:
        """Build the state of `composition` in every repeat and return its addresses; raises BuildError."""
        for manager in self.managers:
            with manager.visit(composition):
                pass
        return tuple(manager.address(composition) for manager in self.managers)

    def release(self, states: Iterable[Composition]) -> None:
        """Release states that no test needs any more."""
        if self._manager is not None:
            for manager in self.managers:
                manager.release(states)

    @property
    def manager(self) -> StateManager:
        """The states of the first repeat; loads the model."""
        if self._manager is None:
            data = self.data  # fail on broken data before loading the model
            self._doing(f"loading {self.recipe.model.path}")
            from pytest_lmcompose.build.load import choose_device, load_model
            from pytest_lmcompose.build.states import StateManager

            loaded = load_model(self.recipe.model, self.location, choose_device(self.options.device))
            self._manager = StateManager(
                loaded,
                self.recipe.settings,
                data[0].resources,
                self.seeds[0],
                self._progress,
                self.run_cache,
                doing=self._doing,
                applied=self._applied,
            )
        return self._manager

    @cached_property
    def managers(self) -> tuple[StateManager, ...]:
        """The states of each repeat; all managers share one working model."""

        def named(number: int) -> Callable[[str], None]:
            return lambda line: self._progress(f"{line}  (repeat {number} of {len(self.seeds)})")

        others = zip(self.data[1:], self.seeds[1:], strict=True)
        return (
            self.manager,
            *(self.manager.repeat(data.resources, seed, named(i)) for i, (data, seed) in enumerate(others, start=2)),
        )

    def result(self, composition: Composition) -> Result:
        """Return the result of `composition`, which is created if needed, and mark it as touched."""
        self.touched[composition] = self.results.setdefault(composition, Result(composition))
        return self.touched[composition]

    def state(self, composition: Composition) -> ModelState:
        """Bring the model into the state of `composition`; record errors in its result."""
        result = self.result(composition)
        with self._kept(result):
            state = self.manager.enter(composition)
        result.steps, result.state_hash = state.steps, state.state_hash
        return state

    def measurements(self, composition: Composition) -> tuple[Measurement, ...]:
        """Measure `composition`, or return its measurements if it has been measured; restores the model's state."""
        known = self.results.get(composition)
        if known is not None and known.measurements is not None:
            return known.measurements
        result = self.result(composition)
        with self._kept(result):
            repeats: list[Repeat] = []
            for number in range(len(self.seeds)):
                repeats.append(self._repeat(composition, number))
                if number == 0:
                    result.steps, result.state_hash = repeats[0].steps, repeats[0].state_hash
            result.measurements = pooled([repeat.measurements for repeat in repeats])
            result.repeats = tuple(repeats)
            result.data = self.asked
            result.evaluate_seconds = sum(repeat.evaluate_seconds for repeat in repeats)
        return result.measurements

    @cached_property
    def asked(self) -> dict[str, str]:
        """Hashes of what the evaluators ask; raises WorldError."""
        world = self.recipe.world
        return asked(self.data, world, self.recipe.evaluate, world_folder(world.folder, self.options.folder))

    def _repeat(self, composition: Composition, number: int) -> Repeat:
        """Return one repeat of `composition` from the store, or build and measure it."""
        run_cache = self.run_cache
        if run_cache is None:
            return self._measure(composition, number)
        read = run_cache.measurements_read
        found = run_cache.measured(
            self._address(composition, number), composition, lambda: self._measure(composition, number)
        )
        if run_cache.measurements_read > read:
            self._count(composition, None, "measurements read from the cache")
        return found

    def _address(self, composition: Composition, number: int) -> str:
        """Return the cache address of the measurements of one repeat."""
        state = self.managers[number].address(composition)
        world, evaluate = self.recipe.world, self.recipe.evaluate
        return measurements_address(state, self._data_addresses[number], world, evaluate)

    @cached_property
    def _data_addresses(self) -> tuple[str, ...]:
        """The hash of all that the evaluators ask, by repeat."""
        world = self.recipe.world
        files = question_files(world, self.recipe.evaluate, world_folder(world.folder, self.options.folder))
        return tuple(data_address(data, files) for data in self.data)

    def _measure(self, composition: Composition, number: int) -> Repeat:
        """Build and measure one repeat of `composition`; restores the model's state."""
        from pytest_lmcompose.measure import measure_state

        unedited, manager = self._unedited(number), self.managers[number]
        begun = time.perf_counter()  # excludes loading the model and measuring the base model
        with manager.visit(composition) as state:
            start = time.perf_counter()
            self._doing(f"{composition}  measuring")
            found = measure_state(
                state.model,
                state.tokenizer,
                self.data[number],
                self.recipe.world,
                self.recipe.evaluate,
                unedited,
                **self._shown_evaluators(measure_state, composition),
            )
            end = time.perf_counter()
        self._count(composition, end - begun, f"{end - start:.1f} s to measure")
        return Repeat(self.seeds[number], state.state_hash, state.steps, tuple(found), end - start)

    def _count(self, composition: Composition, seconds: float | None, done: str) -> None:
        """Count a repeat that took `seconds`, and log `done`."""
        self.counter.measured(composition, seconds)
        counted = str(self.counter) if composition in self.counter.expected else ""
        self._progress(f"{composition}  {counted}{': ' if counted else ''}{done}")

    def _shown_evaluators(self, measure: Callable[..., Any], composition: Composition) -> dict[str, Any]:
        """Return the argument that shows which evaluator runs, if `measure` takes it."""

        def show(name: str, k: int, n: int) -> None:
            self._doing(f"{composition}  measuring {name} ({k}/{n})")

        return {"progress": show} if "progress" in inspect.signature(measure).parameters else {}

    def _unedited(self, number: int) -> UneditedAnswers | None:
        """Return the base model's answers to the edit prompts of a repeat, computed once."""
        from pytest_lmcompose.measure import capture_unedited

        if number not in self._answers:
            with self.manager.visit(Composition()) as base:
                self._doing("the base model answers the prompts of the edits")
                self._answers[number] = capture_unedited(
                    base.model, base.tokenizer, self.data[number], self.recipe.evaluate
                )
        return self._answers[number]

    @contextmanager
    def _kept(self, result: Result) -> Iterator[None]:
        """Record errors, including interrupts, and the steps that were built."""
        try:
            yield
        except BaseException as error:
            if self._manager is not None:
                result.steps = self._manager.steps_built(result.composition)
            result.fail(error)
            self.counter.failed(result.composition)
            raise
        result.error = None

    def model_facts(self) -> Model | None:
        """Return the model's entry in the report, or None if it was not loaded."""
        return None if self._manager is None else self._model_facts

    @cached_property
    def _model_facts(self) -> Model:
        from interventions.tokens import frame

        loaded = self.manager.loaded
        parameter = next(loaded.model.parameters())
        start, end = map(loaded.tokenizer.convert_ids_to_tokens, frame(loaded.tokenizer))
        return Model(
            id=self.recipe.model.path,
            location=self.location,
            revision=loaded.revision,
            weight_hash=self.manager.base_hash,
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            parameters=sum(p.numel() for p in loaded.model.parameters()),
            architecture=architecture(loaded.model.config.to_dict()),
            tokenisation=Tokenisation(bool(start), tuple(start), tuple(end)),
        )
