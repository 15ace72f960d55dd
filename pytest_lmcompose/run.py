"""Build and measure the model's states in one process. Imports torch on first use, not for collection."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from evaluators.flips import measure_flips
from evaluators.measurement import Measurement
from pytest_lmcompose.build.addresses import Addresses
from pytest_lmcompose.build.facts import Facts, facts_address, facts_of
from pytest_lmcompose.cache.address import measured_alike, measurements_address, retained_address
from pytest_lmcompose.cache.run_cache import RunCache, stored
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.composition_run import Result
from pytest_lmcompose.counter import Counter
from pytest_lmcompose.errors import ModelError
from pytest_lmcompose.gate.repeats import Repeat, pooled
from pytest_lmcompose.imports import fast_imports
from pytest_lmcompose.options import Options
from pytest_lmcompose.results import Model
from pytest_lmcompose.run_setup import CONF as CONF
from pytest_lmcompose.run_setup import RunSetup

if TYPE_CHECKING:
    from evaluators import UneditedAnswers
    from evaluators.data import RetainReference
    from pytest_lmcompose.build.states import ModelState, StateManager
    from pytest_lmcompose.prediction.records import Pair
    from pytest_lmcompose.steps import StepRecord


def ignore(*_: object) -> None:
    """Do nothing."""


class Run(RunSetup):
    """Builds, measures and caches compositions; every result is computed once."""

    compares_with_own_base = True
    """Whether states are compared with the model that has no steps, and not with one of a report."""

    def __init__(
        self,
        options: Options,
        progress: Callable[[str], None],
        doing: Callable[[str], None] = ignore,
        applied: Callable[[Composition, StepRecord], None] = ignore,
    ) -> None:
        """Call `progress` with log lines, `doing` with the status, and `applied` after each step."""
        super().__init__(options, progress)
        self.results: dict[Composition, Result] = {}
        self.touched: dict[Composition, Result] = {}
        """Results that may have changed since they were last sent to the controller."""
        self.first: Collection[str] = ()
        """Metrics to measure first."""
        self.watch: Callable[[Composition, Sequence[StepRecord], Sequence[Measurement]], None] | None = None
        """Called with what is measured of a state so far; its exceptions end the measuring, and nothing is kept."""
        self.enough: Callable[[Composition, Sequence[StepRecord], Sequence[Measurement]], bool] | None = None
        """Whether the questions that were asked of a state decide it, see `EvaluateSettings.sequential`."""
        self.counter = Counter(options.repeats)
        self._applied = applied
        self._doing: Callable[[str], None] = lambda text: doing(
            " ".join(filter(None, (self.counter.bar, str(self.counter), text)))
        )
        self._manager: StateManager | None = None
        self._facts: Facts | None = None
        self._answers: dict[int, UneditedAnswers | None] = {}
        self._base: dict[int, Repeat] = {}
        """Repeats of the base model."""

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
            with fast_imports():
                from pytest_lmcompose.build.chat import check_chat
                from pytest_lmcompose.build.load import choose_device, load_model
                from pytest_lmcompose.build.states import StateManager

                loaded = load_model(self.recipe.model, self.location, choose_device(self.options.device))
            check_chat(loaded.tokenizer, self.recipe.evaluate, self.location)
            manager = StateManager(
                loaded,
                self.settings,
                data[0].resources,
                self.seeds[0],
                self._progress,
                self.run_cache,
                doing=self._doing,
                applied=self._applied,
                folder=self.options.folder,
                others=self.recipe.others,
            )
            self._learn(manager)
            self._manager = manager
        return self._manager

    @property
    def facts(self) -> Facts:
        """What the run must know of the base model: from the cache, or by loading the model."""
        if self._facts is None and self._kept_facts is not None:
            cache, where = self._kept_facts
            self._facts = cache.facts(where)
        if self._facts is None:
            _ = self.manager
        assert self._facts is not None
        return self._facts

    def _learn(self, manager: StateManager) -> None:
        """Take the facts from the loaded model and keep them; raises ModelError if those from the cache differ."""
        base, recipe = manager.address(Composition()), self.recipe
        found = facts_of(manager.loaded, base, manager.base_hash, recipe.model, self.location, self._asked)
        if self._kept_facts is not None and self._facts != found:
            cache, where = self._kept_facts
            if self._facts is not None:
                cache.forget_facts(where)
                raise ModelError(
                    f"{self.location}: the cache had other facts of this model, which are removed now: run again"
                )
            cache.keep_facts(where, found)
        self._facts = found

    @cached_property
    def _kept_facts(self) -> tuple[RunCache, str] | None:
        """The cache and the address of the facts in it; None without a cache, or if they depend on more than files."""
        if self.run_cache is None:
            return None
        where = facts_address(self.recipe.model, self.location, self.options.device, self._asked, os.environ)
        return None if where is None else (self.run_cache, where)

    @cached_property
    def _addresses(self) -> tuple[Addresses, ...]:
        """The addresses of states in each repeat."""
        repeats = zip(self.data, self.seeds, strict=True)
        folder, others = self.options.folder, self.recipe.others
        return tuple(
            Addresses(self.facts.address, self.settings, data.resources, seed, folder, others) for data, seed in repeats
        )

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

    def plan(self, compositions: Iterable[Composition]) -> Iterator[str]:
        """Yield the lines of the plan, and the predicted better orders of pairs whose states are in the cache."""
        compositions = tuple(compositions)
        yield from super().plan(compositions)
        pairs = self.predicted(compositions)
        if pairs:
            from pytest_lmcompose.prediction.lines import planned

            yield "predicted better orders, from single states in the cache (see `lmcompose predict`):"
            yield from planned(pairs)

    def predicted(self, compositions: Iterable[Composition]) -> tuple[Pair, ...]:
        """Predict the pairs of `compositions` whose single states the cache has; if it has some, load the model."""
        from pytest_lmcompose.prediction.records import pairs_of

        if self.cache is None or not (names := stored(self.cache, self.recipe.model.path)):
            return ()
        known = [Composition(pair) for pair in pairs_of(compositions) if names.issuperset(map(str, pair))]
        if not known:
            return ()
        from pytest_lmcompose.data.records import WorldError
        from pytest_lmcompose.prediction.states import predict

        try:
            return predict(self.manager, self.data[0], known).pairs
        except (WorldError, ModelError):  # the tests report it
            return ()

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
                repeats.append(self._with_flips(composition, number))
                if number == 0:
                    result.steps, result.state_hash = repeats[0].steps, repeats[0].state_hash
            result.measurements = pooled([repeat.measurements for repeat in repeats])
            result.repeats = tuple(repeats)
            result.data = self.data_hashes
            result.evaluate_seconds = sum(repeat.evaluate_seconds for repeat in repeats)
        return result.measurements

    def _with_flips(self, composition: Composition, number: int) -> Repeat:
        """Return one repeat of `composition` with the answers that changed since the base model."""
        if not self.recipe.evaluate.closeness:
            return self._repeat(composition, number)
        base = self._measured_base(number)
        found = (None if composition.steps else self._base.get(number)) or self._repeat(composition, number)
        flips = measure_flips(base, found.measurements)
        return dataclasses.replace(found, measurements=(*found.measurements, *flips))

    def _measured_base(self, number: int) -> Sequence[Measurement]:
        """Return the measurements of the base model in a repeat."""
        if number not in self._base:
            self._base[number] = self._repeat(Composition(), number)
        return self._base[number].measurements

    def _repeat(self, composition: Composition, number: int) -> Repeat:
        """Return one repeat of `composition` from the cache, or build and measure it."""
        run_cache = self.run_cache
        if run_cache is None:
            return self._measure(composition, number)
        read = run_cache.measurements_read
        found = run_cache.measured(
            self.address(composition, number), composition, lambda: self._measure(composition, number)
        )
        if run_cache.measurements_read > read:
            self._count(composition, None, "measurements read from the cache")
        return found

    def address(self, composition: Composition, number: int) -> str:
        """Return the cache address of the measurements of one repeat."""
        state = self._addresses[number].of(composition)
        return measurements_address(state, self.data_addresses[number], self._measured_alike)

    @cached_property
    def _measured_alike(self) -> dict[str, Any]:
        return measured_alike(self.recipe.world, self.recipe.evaluate, self._asked)

    def _measure(self, composition: Composition, number: int) -> Repeat:
        """Build and measure one repeat of `composition`; restores the model's state."""
        from pytest_lmcompose.measure import measure_state

        unedited, manager, retained = self._unedited(number), self.managers[number], self._retained
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
                lambda name, k, n: self._doing(f"{composition}  measuring {name} ({k}/{n})"),
                retained,
                state.grids,
                state.steps,
                is_base=self.compares_with_own_base and not composition.steps,
                first=self.first,
                watch=None if self.watch is None else partial(self.watch, composition, state.steps),
                enough=None if self.enough is None else partial(self.enough, composition, state.steps),
            )
            end = time.perf_counter()
        self._count(composition, end - begun, f"{end - start:.1f} s to measure")
        return Repeat(self.seeds[number], state.state_hash, state.steps, tuple(found), end - start)

    @cached_property
    def _retained(self) -> RetainReference | None:
        """What unlearning is compared with: results of the retain model, from the cache if it has them."""
        if self.retain_model is None:
            return None
        if self.run_cache is None:
            return self._measure_retained(self.retain_model)
        recipe, device = self.recipe, str(self.options.device)
        where = retained_address(
            self.retain_model_hash, recipe.model, self.data[0], recipe.evaluate, device, self._asked
        )
        return self.run_cache.retained(where, partial(self._measure_retained, self.retain_model))

    def _measure_retained(self, location: str) -> RetainReference:
        """Load the retain model, measure and release it."""
        from pytest_lmcompose.build.load import choose_device, load_model
        from pytest_lmcompose.measure import capture_retained

        self._doing(f"measuring the retain model {location}")
        settings = dataclasses.replace(self.recipe.model, path=location, revision=None)
        loaded = load_model(settings, location, choose_device(self.options.device))
        return capture_retained(loaded.model, loaded.tokenizer, self.data[0], self.recipe.evaluate)

    def _count(self, composition: Composition, seconds: float | None, done: str) -> None:
        """Count a repeat that took `seconds`, and log `done`."""
        self.counter.measured(composition, seconds)
        counted = str(self.counter) if composition in self.counter.expected else ""
        self._progress(f"{composition}  {counted}{': ' if counted else ''}{done}")

    def _unedited(self, number: int) -> UneditedAnswers | None:
        """Return the base model's answers in a repeat, and its predictions on the texts of all, computed once."""
        from pytest_lmcompose.measure import capture_unedited

        if number not in self._answers:
            with self.manager.visit(Composition()) as base:
                self._doing("the base model answers")
                predictions = next((answers.predictions for answers in self._answers.values() if answers), None)
                self._answers[number] = capture_unedited(
                    base.model, base.tokenizer, self.data[number], self.recipe.evaluate, predictions
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

    @cached_property
    def _asked(self) -> str | None:
        """A prompt in the chat template, with {} for its text; None for plain prompts."""
        chat = self.recipe.evaluate.chat
        if chat is None:
            return None
        from pytest_lmcompose.build.load import load_tokenizer

        return chat.ask(load_tokenizer(self.recipe.model, self.location), "{}")

    def model_facts(self) -> Model | None:
        """Return the model's entry in the report, or None if nothing is known of it."""
        return None if self._facts is None else self._facts.model
