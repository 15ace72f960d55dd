"""Measurements of samples, and an import that stays light."""

from __future__ import annotations

import ast
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import evaluators
from evaluators import EvaluationError, Measurement

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


@given(samples=VALUES)
def test_mean_and_its_error(samples: list[float]) -> None:
    got = Measurement.mean("m", samples)
    assert got.value == pytest.approx(statistics.fmean(samples), abs=1e-9)
    assert got.stderr == pytest.approx(statistics.stdev(samples) / math.sqrt(len(samples)), abs=1e-9)


@given(samples=VALUES, copies=st.integers(2, 5))
def test_copies_of_a_sample_add_no_certainty(samples: list[float], copies: int) -> None:
    once = Measurement.mean("m", samples)
    clusters = [i for i in range(len(samples)) for _ in range(copies)]
    many = Measurement.mean("m", [samples[i] for i in clusters], clusters=clusters)
    assert many.n == copies * once.n
    assert many.stderr == pytest.approx(once.stderr, abs=1e-9)


def test_single_samples_clusters_and_none() -> None:
    assert Measurement.mean("m", [0.5]).stderr is None
    assert Measurement.mean("m", [0.5, 1.0], clusters=["a", "a"]).stderr is None
    assert math.isnan(Measurement.mean("m", [0.5, math.nan]).value)
    with pytest.raises(EvaluationError, match="m: no samples"):
        Measurement.mean("m", [])
    with pytest.raises(EvaluationError, match="2 clusters for 3 samples"):
        Measurement.mean("m", [0.0, 1.0, 1.0], clusters=["a", "b"])


def test_clusters_are_kept_as_numbers_where_there_are_any() -> None:
    assert Measurement.mean("m", [0.5, 1.0, 0.0], clusters=["b", "a", "b"]).clusters == (0, 1, 0)
    assert Measurement.mean("m", [0.5, 1.0, 0.0], clusters=["b", "a", "c"]).clusters == ()
    assert Measurement.mean("m", [0.5, 1.0, 0.0]).clusters == ()


def test_importing_the_package_imports_neither_torch_nor_the_harness() -> None:
    code = (
        "import sys, evaluators; evaluators.Measurement; "
        "sys.exit(bool({'torch', 'transformers', 'lm_eval', 'datasets', 'pytest'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_resolves() -> None:
    for name in evaluators.__all__:
        assert getattr(evaluators, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = evaluators.nothing


def test_evaluators_import_only_small_helpers_of_the_interventions() -> None:
    root = Path(evaluators.__file__).parents[1]
    packages = ("pytest_lmcompose", "compositions", "interventions", "evaluators", "pytest")

    def imported(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        return {name for name in names if name.partition(".")[0] in packages}

    def by_package(name: str) -> set[str]:
        return {found for path in (root / name).rglob("*.py") for found in imported(path)}

    others = {name for name in by_package("evaluators") if not name.startswith("evaluators")}
    names = ("floats", "known_grids", "logits", "names", "parts", "ranges", "rounded_bits", "tokens", "types")
    leaves = {f"interventions.{name}" for name in (*names, "early_exit")}  # which `logits` imports
    assert others == leaves - {"interventions.early_exit"}
    assert all(name.startswith("interventions") for name in by_package("interventions"))
    for name in leaves:
        assert imported(root.joinpath(*name.split(".")).with_suffix(".py")) <= leaves


@pytest.mark.parametrize(
    "samples", [[math.inf, 1.0], [math.inf, -math.inf], [1e308, 1e308, 1e308], [math.nan, math.inf]]
)
def test_a_mean_beyond_numbers_is_a_value_without_an_error(samples: list[float]) -> None:
    found = Measurement.mean("m", samples)
    assert not math.isfinite(found.value) and found.stderr is None
    assert not found.is_mean or found.value == math.inf
