"""Build the states of a model for compositions, step by step. Imports torch.

One working model is changed in place. For each state, the tensors that differ from the base model are kept, so a
composition starts from its longest prefix that is in memory or in the cache. `WorkingModel` manages who uses the model.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from interventions import Resources, apply
from interventions.context import OtherState
from interventions.known_grids import KnownGrid
from interventions.rounding import read_rounding
from pytest_lmcompose.build.addresses import Addresses
from pytest_lmcompose.build.addresses import step_seed as step_seed
from pytest_lmcompose.build.identity import base_address
from pytest_lmcompose.build.load import Loaded
from pytest_lmcompose.build.snapshot import Lease, Snapshot, WorkingModel, bytes_of
from pytest_lmcompose.cache.run_cache import RunCache, StoredState
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.errors import BuildError
from pytest_lmcompose.steps import StepRecord


@dataclass(frozen=True)
class ModelState:
    """A model in the state of a composition.

    It is the model of the run, which stays in this state until another one is requested.
    """

    composition: Composition
    tokenizer: Any
    steps: tuple[StepRecord, ...]
    state_hash: str
    """SHA-256 of the weights."""
    grids: Mapping[str, KnownGrid]
    """How checkpoints stored weights, by parameter name; it counts for those whose values are still the same."""
    _source: Lease | Pristine

    @property
    def model(self) -> Any:
        """The model; raises StateGoneError if it is no longer in this state."""
        return self._source.model


class Pristine(NamedTuple):
    """A second model in memory, which never changes."""

    model: Any


class _Built(NamedTuple):
    snapshot: Snapshot
    steps: tuple[StepRecord, ...]


def _no_others(step: Step) -> Mapping[str, Composition]:
    return {}


class StateManager:
    """Puts the working model into the state of any composition, with the data and seed of one repeat."""

    def __init__(
        self,
        loaded: Loaded,
        settings: Callable[[Step], Any],
        resources: Resources,
        seed: int,
        progress: Callable[[str], None],
        run_cache: RunCache | None = None,
        *,
        doing: Callable[[str], None] | None = None,
        applied: Callable[[Composition, StepRecord], None] | None = None,
        working: WorkingModel | None = None,
        folder: Path | None = None,
        others: Callable[[Step], Mapping[str, Composition]] = _no_others,
        base: str | None = None,
    ) -> None:
        """Take over `loaded`; `settings` returns a step's settings, `progress` takes one line per step.

        `others` returns the compositions that a step reads, by the text in its settings; they are built before it.

        States in the `run_cache` are read from it. `doing` takes the label of each step that starts, `applied` each
        step that finished. `working` is the model of another manager, to share it, and `base` the address of its base.
        """
        self.loaded = loaded
        self._settings = settings
        self._run_cache = run_cache
        self._resources, self._seed, self._progress = resources, seed, progress
        self._doing, self._applied = doing, applied
        self._folder = folder or Path.cwd()
        self._others = others
        self._working = working or WorkingModel(loaded.model)
        self.base_hash = self._working.base.state_hash
        self._states = {Composition(): _Built(self._working.base, ())}
        base = base_address(loaded, self.base_hash) if base is None else base
        self._addresses = Addresses(base, settings, resources, seed, self._folder, others)
        self._failures: dict[Composition, BuildError] = {}
        self._pristine: Pristine | None = None

    def enter(self, composition: Composition) -> ModelState:
        """Put the working model into the state of `composition`; build it if necessary.

        The caller may change the model until the next state is entered or visited. Raises BuildError if a step fails.
        """
        self._working.lease = None
        built = self._bring(composition)
        return self._state(composition, built, self._working.lend(built.snapshot))

    @contextmanager
    def visit(self, composition: Composition) -> Iterator[ModelState]:
        """Enter a state without changing the model, and restore the previous state if it is still in use.

        Raises BuildError if a step fails.
        """
        with self._working.borrowed():
            built = self._bring(composition)
            lease = self._working.lease = Lease(self._working, built.snapshot, given=False)
            yield self._state(composition, built, lease)

    def release(self, prefixes: Iterable[Composition]) -> None:
        """Free the states of `prefixes`, which no test needs any more; call this between tests.

        If one is needed again, it is read from the cache or built again.
        """
        self._working.lease = None
        for prefix in prefixes:
            if prefix.steps and (built := self._states.pop(prefix, None)) is not None:
                self._working.statistics.forget(built.snapshot.state_hash)

    def steps_built(self, composition: Composition) -> tuple[StepRecord, ...]:
        """Return the steps of the longest prefix of `composition` in memory."""
        built = [prefix for prefix in composition.prefixes() if prefix in self._states]
        return self._states[built[-1]].steps if built else ()

    def pristine(self) -> ModelState:
        """Return a copy of the base model, made on the first call."""
        if self._pristine is None:
            with self.visit(Composition()) as base:
                self._pristine = Pristine(copy.deepcopy(base.model))
        return self._state(Composition(), self._states[Composition()], self._pristine)

    def repeat(self, resources: Resources, seed: int, progress: Callable[[str], None]) -> StateManager:
        """Return a manager that shares the working model and its steps, with other data and another seed."""
        return StateManager(
            self.loaded,
            self._settings,
            resources,
            seed,
            progress,
            self._run_cache,
            doing=self._doing,
            applied=self._applied,
            working=self._working,
            folder=self._folder,
            others=self._others,
            base=self.address(Composition()),  # the present state may have changed the model's configuration
        )

    def stored(self, composition: Composition) -> Mapping[str, Tensor] | None:
        """Return the parameters of a state that differ from the base model, from the cache; None if it has none.

        Builds nothing.
        """
        found = None if self._run_cache is None else self._run_cache.state(self.address(composition))
        return None if found is None else found.changed

    @property
    def base(self) -> Mapping[str, Tensor]:
        """All parameters of the base model, on the host; read-only."""
        return self._working.values(self._working.base)

    def address(self, composition: Composition) -> str:
        """Return the content address of a state; see `Addresses.of`."""
        return self._addresses.of(composition)

    def differences(self, composition: Composition) -> tuple[str, ...] | None:
        """Return what the most similar state of `composition` in the cache was made with that this run has otherwise.

        Such as ("settings", "code"); None if the cache has none.
        """
        return (
            None
            if self._run_cache is None
            else self._run_cache.differences(composition, self._addresses.parts(composition))
        )

    def _state(self, composition: Composition, built: _Built, source: Lease | Pristine) -> ModelState:
        grids = ChainMap(*({**step.report.grids} for step in reversed(built.steps)), {**self.loaded.grids})
        return ModelState(composition, self.loaded.tokenizer, built.steps, built.snapshot.state_hash, grids, source)

    def _bring(self, composition: Composition) -> _Built:
        """Put the working model into a state, starting from the longest available prefix."""
        prefixes = (Composition(), *composition.prefixes())
        at = len(prefixes) - 1
        while prefixes[at] not in self._states and not self._read(prefixes[at]):
            at -= 1
        built = self._states[prefixes[at]]
        self._working.restore(built.snapshot)
        for prefix in prefixes[at + 1 :]:
            if prefix in self._failures:  # it would fail again, and take as long
                raise self._failures[prefix]
            others = self._other_states(prefix)
            self._working.restore(built.snapshot)
            self._build(prefix, built, composition, others)
            built = self._states[prefix]
        return built

    def _other_states(self, prefix: Composition) -> dict[str, OtherState]:
        """Return the states that the last step of `prefix` reads, by the text in its settings; build missing ones."""
        found = {}
        step = prefix.steps[-1]
        for text, other in self._others(step).items():
            try:
                if other not in self._states and not self._read(other):
                    self._bring(other)
            except BuildError as error:
                failure = self._failures[prefix] = BuildError(f"step {len(prefix.steps)}, {step}: {other}: {error}")
                raise failure from error
            snapshot = self._states[other].snapshot
            found[text] = OtherState(self._working.values(snapshot), snapshot.state_hash)
        return found

    def _build(
        self, prefix: Composition, before: _Built, composition: Composition, others: Mapping[str, OtherState]
    ) -> None:
        """Build the state of `prefix` from the current one, `before`, on the way to `composition`."""
        if self._run_cache is None:
            self._states[prefix] = self._apply(prefix, before, composition, others)
            return
        where = self.address(prefix)
        with self._run_cache.building(where, prefix):
            if self._read(prefix):  # another process made it meanwhile
                self._working.restore(self._states[prefix].snapshot)
                return
            built = self._states[prefix] = self._apply(prefix, before, composition, others)
            snapshot = built.snapshot
            added = [snapshot.changed[name] for name in built.steps[-1].report.changed]
            state = StoredState(dict(snapshot.changed), built.steps, snapshot.state_hash)
            self._run_cache.keep_state(where, prefix, state, self._addresses.parts(prefix), step_bytes=bytes_of(added))

    def _apply(
        self, prefix: Composition, before: _Built, composition: Composition, others: Mapping[str, OtherState]
    ) -> _Built:
        step = prefix.steps[-1]
        seed = step_seed(self._seed, prefix)
        label = f"{composition}  step {len(prefix.steps)}/{len(composition.steps)} {step}"
        self._working.distrust()
        if self._doing is not None:
            self._doing(label)
        try:
            report = apply(
                self.loaded.model,
                self.loaded.tokenizer,
                step.method,
                self._settings(step),
                resources=self._resources,
                seed=seed,
                statistics=self._working.statistics.of(before.snapshot.state_hash),
                copies=self._working.values(before.snapshot),
                folder=self._folder,
                states=others,
            )
        except Exception as error:
            self._progress(f"{label}  failed: {error}")
            failure = self._failures[prefix] = BuildError(f"step {len(prefix.steps)}, {step}: {error}")
            raise failure from error
        names = len(report.changed)
        self._progress(f"{label}  {report.seconds:.1f} s  {names} parameter{'s' * (names != 1)} changed")
        snapshot = self._working.take(before.snapshot, report.changed)
        record = StepRecord(step, seed, report)
        if self._applied is not None:
            self._applied(prefix, record)
        return _Built(snapshot, (*before.steps, record))

    def _read(self, prefix: Composition) -> bool:
        """Read a state from the cache and return whether it was there and valid; the model does not change."""
        if self._run_cache is None or not prefix.steps:
            return False
        stored = self._run_cache.state(self.address(prefix))
        if stored is None:
            return False
        near = max((p for p in (Composition(), *prefix.prefixes()) if p in self._states), key=lambda p: len(p.steps))
        try:
            rounding = read_rounding(stored.steps[-1].report.rounding)
            snapshot = self._working.adopt(self._states[near].snapshot, stored.changed, rounding)
        except (KeyError, ValueError):
            return False
        if snapshot.state_hash != stored.state_hash:
            return False
        self._progress(f"{prefix}  read from the cache")
        self._states[prefix] = _Built(snapshot, stored.steps)
        return True
