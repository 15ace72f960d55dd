"""JUnit XML properties of each test and of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.junitxml import LogXML

    from pytest_lmcompose.composition_run import Result
    from pytest_lmcompose.report.collect import Collected

PREFIX = "lmcompose."


def properties_of(result: Result) -> Iterator[tuple[str, str]]:
    """Yield the properties of the test of one composition, as text: xdist workers send them."""
    yield f"{PREFIX}composition", result.composition.id
    if result.state_hash is not None:
        yield f"{PREFIX}state", result.state_hash
    for measured in result.measurements or ():
        yield f"{PREFIX}metric.{measured.metric}", repr(measured.value)
        if measured.stderr is not None:
            yield f"{PREFIX}stderr.{measured.metric}", repr(measured.stderr)
    for gate in result.gates or ():
        yield f"{PREFIX}gate.{gate.metric}.{gate.gate}", f"{gate.state}: {gate.message}"


def add_suite_properties(config: pytest.Config, collected: Collected, seed: int, status: str) -> None:
    """Add the properties of the run to the JUnit file, if there is one."""
    xml = junit_file(config)
    if xml is not None:
        for name, value in run_properties(collected, seed, status):
            xml.add_global_property(name, value)


def junit_file(config: pytest.Config) -> LogXML | None:
    """Return the JUnit writer, or None without --junitxml."""
    from _pytest.junitxml import xml_key

    return config.stash.get(xml_key, None)


def run_properties(collected: Collected, seed: int, status: str) -> Iterator[tuple[str, str]]:
    """Yield the properties of the run."""
    from pytest_lmcompose.report.view import headline_metrics  # slow to import

    yield f"{PREFIX}status", status
    yield f"{PREFIX}seed", str(seed)
    for key in ("id", "revision", "weight_hash", "dtype", "device"):
        if (value := getattr(collected.model, key, None)) is not None:
            yield f"{PREFIX}model.{key}", str(value)
    states = Counter(gate.state for record in collected.results for gate in record.gates)
    yield f"{PREFIX}compositions", str(len(collected.records))
    yield f"{PREFIX}gates", str(states.total())
    for state in ("failed", "lost"):
        yield f"{PREFIX}gates.{state}", str(states[state])
    for number, message in enumerate(collected.late, start=1):
        yield f"{PREFIX}failed_in_the_end.{number}", message
    metrics = headline_metrics(collected.results)
    for entry in () if collected.composability is None else collected.composability.orders:
        for kind in ("order_free_error", "order_sensitivity"):
            if entry.metric in metrics and (found := getattr(entry, kind)) is not None:
                yield f"{PREFIX}{kind}.{'&'.join(entry.steps)}.{entry.metric}", repr(found.value)
