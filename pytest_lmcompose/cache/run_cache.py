"""Read and write the states and measurements of one run. Imports torch with the first state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from evaluators.data import RetainReference
from evaluators.measurement import Measurement
from interventions.types import StepReport
from pytest_lmcompose.build.facts import Facts
from pytest_lmcompose.cache.address import address as content_address
from pytest_lmcompose.cache.folder import Cache, Entry
from pytest_lmcompose.composition import Composition, parse
from pytest_lmcompose.costs import Costs, StepCost
from pytest_lmcompose.gate.repeats import Repeat
from pytest_lmcompose.steps import StepRecord

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
STATE, MEASUREMENTS, RETAINED, FACTS = "state", "measurements", "retained", "facts"


class StoredState(NamedTuple):
    """A state from the cache."""

    changed: dict[str, Tensor]
    """Parameters that differ from the base model."""
    steps: tuple[StepRecord, ...]
    state_hash: str


class RunCache:
    """The cache, for the states and measurements of one run."""

    def __init__(self, cache: Cache, model: str) -> None:
        """Use `cache` for runs of the model called `model`."""
        self._cache = cache
        self._model = model
        self.states_read = self.measurements_read = 0
        """How many states and measurements were read."""

    def building(self, address: str, composition: Composition) -> AbstractContextManager[None]:
        """Lock the entry at `address`; other processes wait."""
        return self._cache.building(address, str(composition))

    def state(self, address: str) -> StoredState | None:
        """Return the state at `address`, or None."""
        entry = self._cache.read(address, STATE)
        if entry is None:
            return None
        from safetensors import SafetensorError, safe_open

        from pytest_lmcompose.cache.codec import decode

        try:
            with safe_open(entry.folder / "changed.safetensors", framework="pt") as file:
                changed = decode({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):  # evicted since it was checked, or invalid
            return None
        self.states_read += 1
        return StoredState(changed, _steps(entry), entry.about["state_hash"])

    def differences(self, composition: Composition, given: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return which parts differ between `given` and the most similar state of `composition`; None without one."""
        mine = _hashed(given)
        alike = (about for about in _states(self._cache, self._model) if about["composition"] == str(composition))
        known = (about["parts"] for about in alike if "parts" in about)
        found = (tuple(name for name in mine if mine[name] != parts.get(name)) for parts in known)
        return min(found, key=len, default=None)

    def keep_state(
        self, address: str, composition: Composition, state: StoredState, parts: Mapping[str, Any], *, step_bytes: int
    ) -> None:
        """Write a state; `parts` are what its address depends on, `step_bytes` what its last step changed."""
        from safetensors.torch import save_file

        from pytest_lmcompose.cache.codec import encode

        stored, metadata = encode(state.changed)
        about = {
            "model": self._model,
            "composition": str(composition),
            "state_hash": state.state_hash,
            "steps": [_step_to_json(record) for record in state.steps],
            "step_bytes": step_bytes,
            "parts": _hashed(parts),
        }
        self._cache.write(
            address, STATE, about, lambda folder: save_file(stored, folder / "changed.safetensors", metadata)
        )

    def measured(self, address: str, composition: Composition, make: Callable[[], Repeat]) -> Repeat:
        """Return the measurements at `address`; call `make` and write its result if there are none."""
        return _once(
            self.building(address, composition),
            lambda: self._measurements(address),
            make,
            lambda found: None if found.partial else self._keep_measurements(address, composition, found),
        )

    def retained(self, address: str, make: Callable[[], RetainReference]) -> RetainReference:
        """Return the results of the retain model at `address`; call `make` and write them if there are none."""
        return _once(
            self._cache.building(address, "the results of the retain model"),
            lambda: self._retained(address),
            make,
            lambda found: self._cache.write(address, RETAINED, dataclasses.asdict(found), lambda folder: None),
        )

    def facts(self, address: str) -> Facts | None:
        """Return the facts of the base model at `address`, or None."""
        entry = self._cache.read(address, FACTS)
        return None if entry is None else msgspec.convert(entry.about, Facts)

    def keep_facts(self, address: str, facts: Facts) -> None:
        """Write the facts of the base model."""
        self._cache.write(address, FACTS, msgspec.to_builtins(facts), lambda folder: None)

    def forget_facts(self, address: str) -> None:
        """Remove the facts at `address`."""
        if (entry := self._cache.read(address, FACTS)) is not None:
            self._cache.remove(entry.folder)

    def _retained(self, address: str) -> RetainReference | None:
        entry = self._cache.read(address, RETAINED)
        return None if entry is None else RetainReference(**{k: _frozen(v) for k, v in entry.about.items()})

    def _measurements(self, address: str) -> Repeat | None:
        entry = self._cache.read(address, MEASUREMENTS)
        if entry is None:
            return None
        try:
            fields = json.loads((entry.folder / "measurements.json").read_text(encoding="utf-8"))
        except OSError:  # evicted since it was checked
            return None
        self.measurements_read += 1
        about = entry.about
        found = tuple(Measurement(**_with_tuples(item)) for item in fields)
        return Repeat(about["seed"], about["state_hash"], _steps(entry), found, about["evaluate_seconds"])

    def _keep_measurements(self, address: str, composition: Composition, found: Repeat) -> None:
        about = {
            "model": self._model,
            "composition": str(composition),
            "seed": found.seed,
            "state_hash": found.state_hash,
            "steps": [_step_to_json(record) for record in found.steps],
            "evaluate_seconds": found.evaluate_seconds,
        }
        text = json.dumps([dataclasses.asdict(measurement) for measurement in found.measurements])

        def fill(folder: Path) -> None:
            (folder / "measurements.json").write_text(text, encoding="utf-8")

        self._cache.write(address, MEASUREMENTS, about, fill)


def costs(cache: Cache, model: str) -> Costs:
    """Return what steps and evaluations of the model called `model` cost, from all entries."""
    steps, evaluations = [], []
    for kind, about in map(cache.about, cache.entries()):
        if about.get("model") != model:
            continue
        if kind == MEASUREMENTS:
            evaluations.append(about["evaluate_seconds"])
        elif kind == STATE and about["steps"]:
            last = about["steps"][-1]
            report = last["report"]
            steps.append(StepCost(last["step"], report["method"], report["seconds"], about["step_bytes"]))
    return Costs.of(steps, evaluations)


def stored(cache: Cache, model: str) -> frozenset[str]:
    """Return the ids of the compositions that the cache has a state of, of whatever settings, of the model `model`."""
    return frozenset(about["composition"] for about in _states(cache, model))


def _states(cache: Cache, model: str) -> Iterator[dict[str, Any]]:
    entries = map(cache.about, cache.entries())
    return (about for kind, about in entries if kind == STATE and about.get("model") == model)


def _hashed(parts: Mapping[str, Any]) -> dict[str, str]:
    return {name: content_address(part=part) for name, part in parts.items()}


def _once(
    building: AbstractContextManager[None],
    read: Callable[[], T | None],
    make: Callable[[], T],
    keep: Callable[[T], None],
) -> T:
    """Return what `read` finds, or make and keep it under the lock `building`."""
    found = read()
    if found is None:
        with building:
            found = read()  # another process may have made it meanwhile
            if found is None:
                found = make()
                keep(found)
    return found


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with lists of plain values as the tuples they were; faster than `_frozen`."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _frozen(value: Any) -> Any:
    """Return lists, also nested ones, as the tuples they were before they were written."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _step_to_json(record: StepRecord) -> dict[str, Any]:
    return {"step": str(record.step), "seed": record.seed, "report": dataclasses.asdict(record.report)}


def _steps(entry: Entry) -> tuple[StepRecord, ...]:
    return tuple(map(_step_from_json, entry.about["steps"]))


def _step_from_json(data: Mapping[str, Any]) -> StepRecord:
    fields = dict(data["report"])
    for name in ("changed", "warnings"):
        fields[name] = tuple(fields[name])
    if fields["grids"]:
        from interventions.known_grids import KnownGrid

        fields["grids"] = {name: KnownGrid(**grid) for name, grid in fields["grids"].items()}
    return StepRecord(parse(data["step"]).steps[0], data["seed"], StepReport(**fields))
