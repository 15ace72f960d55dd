"""Build the states of a model that compositions ask for, step by step. Imports torch.

One working model is changed in place. Each state that was built is kept as the tensors in which it
differs from the base model, so that a composition starts from its longest prefix that is there: in
memory, or in the store that runs and processes share. `WorkingModel` says who may use the model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from interventions import Resources, apply, find_method
from interventions.compress.engines.identity import engine_identity
from pytest_lmcompose.build.identity import base_address
from pytest_lmcompose.build.load import Loaded
from pytest_lmcompose.build.snapshot import Lease, Snapshot, WorkingModel, bytes_of
from pytest_lmcompose.cache.address import METHOD_LIBRARIES, address, method_code, versions
from pytest_lmcompose.cache.run_cache import RunCache, StoredState
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.errors import BuildError
from pytest_lmcompose.steps import StepRecord


@dataclass(frozen=True)
class ModelState:
    """A model in the state that a composition makes of it.

    The model is the one of the run: it is in this state until the next test asks for another.
    """

    composition: Composition
    tokenizer: Any
    steps: tuple[StepRecord, ...]
    state_hash: str
    """SHA-256 of the weights."""
    _source: Lease | Pristine

    @property
    def model(self) -> Any:
        """The model; raises StateGoneError if it is in another state by now."""
        return self._source.model


class Pristine(NamedTuple):
    """A second model in memory, which stays in its state."""

    model: Any


class _Built(NamedTuple):
    snapshot: Snapshot
    steps: tuple[StepRecord, ...]


class StateManager:
    """Brings the working model into the state of any composition, on the data and from the seed of one repeat."""

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
    ) -> None:
        """Take over `loaded`; `settings` gives a step's settings, `progress` takes one line a step.

        With a `run_cache`, states that were built before, or are in another process, are read from it. `doing` takes
        what is being built, `applied` each step that was applied. `working` is the model of another manager.
        """
        self.loaded = loaded
        self._settings = settings
        self._run_cache = run_cache
        self._resources, self._seed, self._progress = resources, seed, progress
        self._doing, self._applied = doing, applied
        # The hash of what steps read, and of what computes.
        self._data = address(resources=resources, libraries=versions(METHOD_LIBRARIES))
        self._working = working or WorkingModel(loaded.model)
        self.base_hash = self._working.base.state_hash
        self._states = {Composition(): _Built(self._working.base, ())}
        self._addresses = {Composition(): base_address(loaded, self.base_hash)}
        self._failures: dict[Composition, BuildError] = {}
        self._pristine: Pristine | None = None

    def enter(self, composition: Composition) -> ModelState:
        """Bring the working model into the state of `composition`, building what is missing.

        The caller may do to the model what it likes, until the next state is entered or visited.
        Raises BuildError if a step fails.
        """
        self._working.lease = None
        built = self._bring(composition)
        return self._state(composition, built, self._working.lend(built.snapshot))

    @contextmanager
    def visit(self, composition: Composition) -> Iterator[ModelState]:
        """Enter a state to look at it, and go back to the one before if somebody uses that.

        The model must be left as it is. Raises BuildError if a step fails.
        """
        with self._working.borrowed():
            built = self._bring(composition)
            lease = self._working.lease = Lease(self._working, built.snapshot, given=False)
            yield self._state(composition, built, lease)

    def release(self, prefixes: Iterable[Composition]) -> None:
        """Forget the states of `prefixes`, which no test needs any more; called between tests.

        One that is asked for nevertheless is read from the store, or built again.
        """
        self._working.lease = None
        for prefix in prefixes:
            if prefix.steps:
                self._states.pop(prefix, None)

    def steps_built(self, composition: Composition) -> tuple[StepRecord, ...]:
        """Return the records of the longest prefix of `composition` that was built."""
        built = [prefix for prefix in composition.prefixes() if prefix in self._states]
        return self._states[built[-1]].steps if built else ()

    def pristine(self) -> ModelState:
        """Return the base model as a second model in memory, made when first asked for."""
        if self._pristine is None:
            with self.visit(Composition()) as base:
                self._pristine = Pristine(copy.deepcopy(base.model))
        return self._state(Composition(), self._states[Composition()], self._pristine)

    def repeat(self, resources: Resources, seed: int, progress: Callable[[str], None]) -> StateManager:
        """Return a manager of the same working model, for the same steps on other data and from another seed."""
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
        )

    def address(self, composition: Composition) -> str:
        """Return the content address of a state: the hash of all that it follows from.

        These are the base model, and of each step up to this one the settings, seed, data, code, and
        versions of libraries.
        """
        parent = Composition()
        for prefix in composition.prefixes():
            if prefix not in self._addresses:
                step = prefix.steps[-1]
                self._addresses[prefix] = address(
                    before=self._addresses[parent],
                    method=step.method,
                    settings=self._settings(step),
                    seed=step_seed(self._seed, prefix),
                    data=self._data,
                    code=method_code(find_method(step.method)),
                    engine=engine_identity(self._settings(step)),
                )
            parent = prefix
        return self._addresses[composition]

    def _state(self, composition: Composition, built: _Built, source: Lease | Pristine) -> ModelState:
        return ModelState(composition, self.loaded.tokenizer, built.steps, built.snapshot.state_hash, source)

    def _bring(self, composition: Composition) -> _Built:
        """Bring the working model into a state, from the nearest one that is there."""
        prefixes = (Composition(), *composition.prefixes())
        at = len(prefixes) - 1
        while prefixes[at] not in self._states and not self._read(prefixes[at]):
            at -= 1
        built = self._states[prefixes[at]]
        self._working.restore(built.snapshot)
        for prefix in prefixes[at + 1 :]:
            if prefix in self._failures:  # it would fail again, after as long
                raise self._failures[prefix]
            self._build(prefix, built, composition)
            built = self._states[prefix]
        return built

    def _build(self, prefix: Composition, before: _Built, composition: Composition) -> None:
        """Make the state of `prefix` from the one before, which the model is in, for `composition`."""
        if self._run_cache is None:
            self._states[prefix] = self._apply(prefix, before, composition)
            return
        where = self.address(prefix)
        with self._run_cache.building(where, prefix):
            if self._read(prefix):  # another process made it meanwhile
                self._working.restore(self._states[prefix].snapshot)
                return
            built = self._states[prefix] = self._apply(prefix, before, composition)
            snapshot = built.snapshot
            added = [snapshot.changed[name] for name in built.steps[-1].report.changed]
            state = StoredState(dict(snapshot.changed), built.steps, snapshot.state_hash)
            self._run_cache.keep_state(where, prefix, state, step_bytes=bytes_of(added))

    def _apply(self, prefix: Composition, before: _Built, composition: Composition) -> _Built:
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
        """Read a state from the store, if it is there and is what it says; the model is left as it is."""
        if self._run_cache is None or not prefix.steps:
            return False
        stored = self._run_cache.state(self.address(prefix))
        if stored is None:
            return False
        near = max((p for p in (Composition(), *prefix.prefixes()) if p in self._states), key=lambda p: len(p.steps))
        try:
            snapshot = self._working.adopt(self._states[near].snapshot, stored.changed)
        except (KeyError, ValueError):
            return False
        if snapshot.state_hash != stored.state_hash:
            return False
        self._progress(f"{prefix}  read from the cache")
        self._states[prefix] = _Built(snapshot, stored.steps)
        return True


def step_seed(seed: int, prefix: Composition) -> int:
    """Return the seed of the last step of `prefix`: the same for whoever shares that prefix."""
    digest = hashlib.sha256(f"{seed}\n{prefix}\n{len(prefix.steps)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
