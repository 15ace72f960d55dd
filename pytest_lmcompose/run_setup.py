"""The inputs of a run: recipe, rules, baseline, data, cache. Loads each once; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.measurement import EvaluationError
from interventions.checkpoint.reading import ReadingError, sources
from interventions.checkpoint.reading.hub import commit
from interventions.registry import methods
from pytest_lmcompose.baseline.history import choose
from pytest_lmcompose.baseline.reference import Baseline, architecture_at
from pytest_lmcompose.baseline.storage import StorageError
from pytest_lmcompose.build.checkpoint import check_folder
from pytest_lmcompose.cache.address import address, data_address, hash_files
from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.cache.journal import Journal
from pytest_lmcompose.cache.remote import RemoteCache
from pytest_lmcompose.cache.run_cache import RunCache, costs
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.costs import Costs, duration
from pytest_lmcompose.data.hashes import data_hashes, question_files
from pytest_lmcompose.errors import ModelError
from pytest_lmcompose.gate.possible import check_metrics
from pytest_lmcompose.gate.thresholds import (
    Rule,
    check_compositions,
    needs_baseline,
    own_compositions,
    read_expression,
    read_rules,
)
from pytest_lmcompose.locate import CONF as CONF
from pytest_lmcompose.locate import (
    check_world,
    conf_folders,
    model_location,
    model_overrides,
    preset_overrides,
    thresholds_file,
    world_folder,
)
from pytest_lmcompose.options import Options
from pytest_lmcompose.plan import Plan
from pytest_lmcompose.presets import Conf
from pytest_lmcompose.recipe import Recipe, RecipeError, load_recipe
from pytest_lmcompose.step_checks import check_step

if TYPE_CHECKING:
    from pytest_lmcompose.data.run_data import RunData

_WORKERS = (2, 4, 8, 64)
"""Numbers of workers for which a plan forecasts the time."""


class RunSetup:
    """Reads the inputs that the options select."""

    def __init__(self, options: Options, progress: Callable[[str], None]) -> None:
        """Call `progress` with log lines."""
        self.options = options
        self.baseline_chosen: str | None = None
        """In a worker: the file of the controller's stored run, empty if there is none."""
        self.baseline_read = False
        """Whether `baseline` has been read."""
        self._progress = progress
        self._checked: set[Step] = set()
        """Steps that can start."""

    @cached_property
    def recipe(self) -> Recipe:
        """The composed recipe; raises RecipeError."""
        options, conf = self.options, self.conf
        chosen = model_overrides(options.model, conf, options.folder) if options.model else ()
        for group, name in (("world", options.world), ("suite", options.suite)):
            chosen += preset_overrides(group, name, conf, options.folder) if name else ()
        overrides = (*chosen, *options.overrides)
        recipe = load_recipe(conf, overrides)
        if not any(text.startswith("world=") for text in overrides):
            check_world(recipe, model_location(recipe.model.path, options.folder), conf, options.folder)
        return recipe

    @property
    def conf(self) -> Conf:
        """The folders of presets."""
        return conf_folders(self.options.conf)

    @cached_property
    def thresholds(self) -> Path:
        """The file of thresholds: the one given, else the world's; raises RecipeError."""
        given = self.options.thresholds
        return given or thresholds_file(self.recipe, self.location, self.conf, self.options.folder)

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The thresholds, then the --lmcompose-compare-fail expressions; raises ThresholdError."""
        return (*read_rules(self.thresholds), *map(read_expression, self.options.baselines.fail))

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
            found = tuple(dict.fromkeys(self.recipe.read(text) for text in self.options.compose))
        else:
            found = self.recipe.suite_compositions()
        for composition in found:
            self.recipe.check(composition)
        self._check_steps(found)
        return found

    def read(self, text: str) -> Composition:
        """Parse a composition id and check that its steps can start; raises RecipeError."""
        composition = self.recipe.read(text)
        self._check_steps([composition])
        return composition

    def _check_steps(self, compositions: Iterable[Composition]) -> None:
        """Raise RecipeError if a step of the compositions, or of those that they read, cannot start."""
        steps = dict.fromkeys(step for composition in compositions for step in composition.steps)
        for step in steps:
            self.settings(step)
            self._check_steps(self.recipe.reads(step))

    def settings(self, step: Step) -> Any:
        """Return the settings of a step; raises RecipeError if it cannot start here."""
        found = self.recipe.settings(step)
        if step not in self._checked:
            check_step(step, found, self.location, self.options, self.recipe.world)
            self._checked.add(step)
        return found

    @cached_property
    def location(self) -> str:
        """The folder or hub id of the model; raises RecipeError."""
        return model_location(self.recipe.model.path, self.options.folder)

    @property
    def world_folder(self) -> Path:
        """The folder of the world's files."""
        return world_folder(self.recipe.world.folder, self.options.folder)

    @property
    def seeds(self) -> range:
        """The seed of each repeat."""
        return range(self.options.seed, self.options.seed + self.options.repeats)

    def check(self) -> None:
        """Check all options before any work.

        Raises RecipeError, ModelError, ThresholdError or StorageError.
        """
        _ = self.compositions
        if Path(self.location).exists():
            check_folder(Path(self.location))
        check_compositions(self.rules, self.thresholds, methods())
        recipe, thresholds = self.recipe, self.thresholds
        check_metrics(self.rules, thresholds, recipe.world, recipe.evaluate, self.world_folder)
        for name in own_compositions(self.rules):
            try:
                self.read(name)
            except RecipeError as error:
                raise RecipeError(f"{thresholds}: {error}") from None
        baseline = self.baseline
        if baseline is not None and (problem := baseline.unlike(architecture_at(self.location))) is not None:
            raise StorageError(f"{baseline.path} cannot be compared with {self.location}: {problem}")
        self._check_tasks()
        _ = self.retain_model_hash
        self._check_chat()

    def _check_chat(self) -> None:
        """Raise RecipeError or ModelError for prompts that cannot be put into the chat template of a local model."""
        locations = (self.location, self.retain_model)
        local = [location for location in locations if location is not None and Path(location).exists()]
        if self.recipe.evaluate.chat is None or not local:
            return
        from pytest_lmcompose.build.chat import check_chat
        from pytest_lmcompose.build.load import load_tokenizer

        for location in local:
            check_chat(load_tokenizer(self.recipe.model, location), self.recipe.evaluate, location)

    def _check_tasks(self) -> None:
        """Raise RecipeError if task files would run code that the recipe does not trust."""
        world, evaluate = self.recipe.world, self.recipe.evaluate
        if world.tasks is None or world.trust_code or not evaluate.questions:
            return
        from evaluators.task_code import refuse_code

        try:
            refuse_code(self.world_folder / world.tasks)
        except EvaluationError as error:
            raise RecipeError(str(error)) from None

    @cached_property
    def data(self) -> tuple[RunData, ...]:
        """The edits, facts and texts of each repeat; raises WorldError."""
        from pytest_lmcompose.data.run_data import read_world, sample_data

        world, evaluate, folder = self.recipe.world, self.recipe.evaluate, self.world_folder
        found = read_world(world, evaluate, folder)
        return tuple(sample_data(found, world, evaluate, folder, seed) for seed in self.seeds)

    @cached_property
    def cache(self) -> Cache | None:
        """States and measurements of all runs; None with --lmcompose-no-cache."""
        options = self.options
        if options.cache_dir is None:
            return None
        if options.cache_url is not None:
            return RemoteCache(options.cache_url, options.cache_dir, options.cache_size, self._progress)
        return Cache(options.cache_dir, options.cache_size, self._progress)

    @cached_property
    def run_cache(self) -> RunCache | None:
        """The cache, for the model of this run."""
        if self.cache is None:
            return None
        return RunCache(self.cache, self.recipe.model.path)

    @cached_property
    def journal(self) -> Journal | None:
        """The finished compositions of this run, for --lmcompose-resume."""
        if self.cache is None:
            return None
        options = self.options
        name = address(recipe=self.recipe.plain(), model=self.location, compose=options.compose, seeds=list(self.seeds))
        return Journal(self.cache.folder, name)

    def plan(self, compositions: Iterable[Composition]) -> Iterator[str]:
        """Yield the lines of the plan of `compositions`, and how long several workers would take."""
        plan, costs = Plan.of(compositions, self.recipe.reads), self.costs
        yield from plan.lines(costs, repeats=len(self.seeds))
        known = costs.evaluation is not None and all(costs.seconds(state.steps[-1]) for state in plan.states)
        if known and len(plan.order) > 1 and find_spec("xdist") is not None:
            from pytest_lmcompose.distribute.forecast import forecast

            shared = self.cache is not None
            useful = [n for n in _WORKERS if n <= len(plan.order)]
            seconds = (len(self.seeds) * forecast(plan.order, n, costs, shared=shared) for n in useful)
            times = ", ".join(f"{duration(of)} with -n {n}" for n, of in zip(useful, seconds, strict=True))
            yield f"about {times}, if each worker has a core or GPU of its own"

    @cached_property
    def costs(self) -> Costs:
        """The costs of steps and evaluations, recorded in earlier runs."""
        return Costs() if self.cache is None else costs(self.cache, self.recipe.model.path)

    @cached_property
    def data_hashes(self) -> dict[str, str]:
        """Hashes of the parts of the data; raises WorldError."""
        recipe = self.recipe
        return data_hashes(self.data, recipe.world, recipe.evaluate, self.world_folder, self.retain_model_hash)

    @cached_property
    def retain_model(self) -> str | None:
        """The folder or hub id of the model to compare unlearning with, None if there is none; raises RecipeError."""
        world, evaluate = self.recipe.world, self.recipe.evaluate
        if world.retain_model is None or not evaluate.unlearning:
            return None
        if not ("forget" in world.qa or world.membership):
            raise RecipeError("world.retain_model is compared on world.qa.forget or world.membership: set one of them")
        try:
            found = model_location(world.retain_model, self.options.folder)
            if Path(found).exists():
                check_folder(Path(found))
        except (RecipeError, ModelError) as error:
            raise RecipeError(f"world.retain_model: {error}") from None
        return found

    @cached_property
    def retain_model_hash(self) -> str:
        """The hash of the files of the retain model, or its commit on the hub; empty if there is none.

        Raises RecipeError if the hub does not have it.
        """
        if self.retain_model is None:
            return ""
        read = sources(self.retain_model)  # an adapter reads its base too
        files = [Path(place) for place in read if Path(place).exists()]
        try:
            commits = [commit(place, None) for place in read if not Path(place).exists()]
        except ReadingError as error:
            raise RecipeError(f"world.retain_model: {error}") from None
        return (hash_files(files) if files else "") + "".join(commits)

    @cached_property
    def data_addresses(self) -> tuple[str, ...]:
        """The hash of everything that evaluators read, by repeat."""
        files = question_files(self.recipe.world, self.recipe.evaluate, self.world_folder)
        return tuple(data_address(data, files, self.retain_model_hash) for data in self.data)
