"""One run in one process: the recipe, the model's states, and what was found about each composition.

Everything heavy is made when first asked for, so that a run that collects only imports no torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evaluators.measurement import Measurement
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.gate import Rule, Verdict, judge, needs_base, read_rules
from pytest_lmcompose.locate import model_location, model_overrides, world_folder
from pytest_lmcompose.options import SUITE_FOLDER, Options
from pytest_lmcompose.recipe import Recipe, load_recipe

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
        self._progress = progress

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
    def data(self) -> RunData:
        """The edits, facts and texts of the run; raises WorldError."""
        from pytest_lmcompose.data import load_data

        folder = world_folder(self.recipe.world.folder, self.options.folder)
        return load_data(self.recipe.world, self.recipe.evaluate, folder, self.options.seed)

    @cached_property
    def manager(self) -> StateManager:
        """The states of the model, which is loaded here."""
        data = self.data  # broken data are known before the model is loaded
        from pytest_lmcompose.build import StateManager
        from pytest_lmcompose.load import choose_device, load_model

        loaded = load_model(self.recipe.model, self.location, choose_device(self.options.device))
        return StateManager(loaded, self.recipe.settings, data.resources, self.options.seed, self._progress)

    def result(self, composition: Composition) -> Result:
        """Return the result of `composition`, begun if need be."""
        return self.results.setdefault(composition, Result(composition))

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
                unedited = self._unedited
                with self.manager.visit(composition) as state:
                    result.steps, result.state_hash = state.steps, state.state_hash
                    from pytest_lmcompose.measure import measure_state

                    start = time.perf_counter()
                    found = measure_state(
                        state.model,
                        state.tokenizer,
                        self.data,
                        self.recipe.world,
                        self.recipe.evaluate,
                        unedited,
                    )
                    result.evaluate_seconds = time.perf_counter() - start
            result.measurements = tuple(found)
        return result.measurements

    def gates(self, composition: Composition) -> tuple[Verdict, ...]:
        """Judge the measurements of `composition` by the thresholds."""
        base: Sequence[Measurement] | None = None
        if needs_base(self.rules, composition.id):
            base = self.measurements(Composition())
        result = self.result(composition)
        result.gates = judge(self.rules, composition.id, self.measurements(composition), base)
        return result.gates

    @cached_property
    def _unedited(self) -> UneditedAnswers | None:
        from pytest_lmcompose.measure import capture_unedited

        with self.manager.visit(Composition()) as base:
            return capture_unedited(base.model, base.tokenizer, self.data, self.recipe.evaluate)

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
