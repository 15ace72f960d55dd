"""Build the states of a model that compositions ask for, step by step. Imports torch.

One working model is changed in place. Each state that was built is kept as the tensors in which it
differs from the base model, on the host, so that a composition starts from its longest prefix that
any earlier one had.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interventions import Resources, StepReport, apply
from pytest_lmcompose.composition import Composition, Step
from pytest_lmcompose.errors import BuildError
from pytest_lmcompose.load import Loaded, hash_weights


@dataclass(frozen=True)
class StepRecord:
    """A step that was applied, as the report tells it."""

    step: Step
    seed: int
    report: StepReport


@dataclass(frozen=True)
class ModelState:
    """A model in the state that a composition makes of it.

    The model is the one of the run: it holds this state until the next test asks for another.
    """

    composition: Composition
    model: Any
    tokenizer: Any
    steps: tuple[StepRecord, ...]
    state_hash: str
    """SHA-256 of the weights."""


@dataclass(frozen=True)
class _Snapshot:
    changed: dict[str, Tensor]
    """Parameters that differ from the base model, on the host."""
    steps: tuple[StepRecord, ...]
    state_hash: str


class StateManager:
    """Owns the working model, and brings it into the state of any composition."""

    def __init__(
        self,
        loaded: Loaded,
        settings: Callable[[Step], Any],
        resources: Resources,
        seed: int,
        progress: Callable[[str], None],
    ) -> None:
        """Take over `loaded`; `settings` gives a step's settings, `progress` takes one line a step."""
        self.loaded = loaded
        self._settings = settings
        self._resources = resources
        self._seed = seed
        self._progress = progress
        self._base = {n: p.detach().to("cpu", copy=True) for n, p in loaded.model.named_parameters()}
        self._flags = {n: p.requires_grad for n, p in loaded.model.named_parameters()}
        self._use_cache = getattr(loaded.model.config, "use_cache", None)
        self.base_hash = hash_weights(loaded.model)
        self._snapshots = {Composition(): _Snapshot({}, (), self.base_hash)}
        self._failures: dict[Composition, BuildError] = {}
        self._pristine: Any = None
        self._current = Composition()

    def enter(self, composition: Composition) -> ModelState:
        """Bring the working model into the state of `composition`, building what is missing.

        Raises BuildError if a step fails.
        """
        prefixes = (Composition(), *composition.prefixes())
        built = max(i for i, prefix in enumerate(prefixes) if prefix in self._snapshots)
        self._restore(self._snapshots[prefixes[built]])
        self._current = prefixes[built]
        for i in range(built, len(composition.steps)):
            if prefixes[i + 1] in self._failures:  # it would fail again, after as long
                raise self._failures[prefixes[i + 1]]
            self._snapshots[prefixes[i + 1]] = self._apply(composition, i, self._snapshots[prefixes[i]])
            self._current = prefixes[i + 1]
        snapshot = self._snapshots[composition]
        return ModelState(composition, self.loaded.model, self.loaded.tokenizer, snapshot.steps, snapshot.state_hash)

    @contextmanager
    def visit(self, composition: Composition) -> Iterator[ModelState]:
        """Enter a state and go back to the one before, which a test may hold."""
        before = self._current
        try:
            yield self.enter(composition)
        finally:
            if self._current != before:
                self.enter(before)

    def steps_built(self, composition: Composition) -> tuple[StepRecord, ...]:
        """Return the records of the longest prefix of `composition` that was built."""
        built = [prefix for prefix in composition.prefixes() if prefix in self._snapshots]
        return self._snapshots[built[-1]].steps if built else ()

    def pristine(self) -> ModelState:
        """Return the base model as a second model in memory, made when first asked for."""
        if self._pristine is None:
            with self.visit(Composition()) as base:
                self._pristine = copy.deepcopy(base.model)
        return ModelState(Composition(), self._pristine, self.loaded.tokenizer, (), self.base_hash)

    def _apply(self, composition: Composition, index: int, before: _Snapshot) -> _Snapshot:
        step = composition.steps[index]
        seed = step_seed(self._seed, Composition(composition.steps[: index + 1]))
        label = f"{composition}  step {index + 1}/{len(composition.steps)} {step}"
        try:
            report = apply(
                self.loaded.model,
                self.loaded.tokenizer,
                step.method,
                self._settings(step),
                resources=self._resources,
                seed=seed,
            )
        except Exception as error:
            self._progress(f"{label}  failed: {error}")
            failure = BuildError(f"step {index + 1}, {step}: {error}")
            self._failures[Composition(composition.steps[: index + 1])] = failure
            raise failure from error
        names = len(report.changed)
        self._progress(f"{label}  {report.seconds:.1f} s  {names} parameter{'s' * (names != 1)} changed")
        parameters = dict(self.loaded.model.named_parameters())
        touched = sorted({*before.changed, *report.changed})
        changed = {name: parameters[name].detach().to("cpu", copy=True) for name in touched}
        record = StepRecord(step, seed, report)
        return _Snapshot(changed, (*before.steps, record), hash_weights(self.loaded.model))

    @torch.no_grad()
    def _restore(self, snapshot: _Snapshot) -> None:
        """Copy a whole state into the working model, whatever a test has done to it."""
        model = self.loaded.model
        for name, parameter in model.named_parameters():
            parameter.copy_(snapshot.changed.get(name, self._base[name]))
            parameter.requires_grad_(self._flags[name])
            parameter.grad = None
        model.eval()
        if self._use_cache is not None:
            model.config.use_cache = self._use_cache


def step_seed(seed: int, prefix: Composition) -> int:
    """Return the seed of the last step of `prefix`: the same for whoever shares that prefix."""
    digest = hashlib.sha256(f"{seed}\n{prefix}\n{len(prefix.steps)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
