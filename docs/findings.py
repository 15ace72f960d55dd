"""Judge claims on reports: those of `findings.yaml` on the suite `findings`, or those of another file.

    python docs/findings.py tinyworld=tinyworld.json SmolLM2-135M=smollm2.json
    python docs/findings.py --claims docs/formats.yaml tinyworld=formats.json

Prints a table for each report: the effects of each claim, their 95 % intervals and verdicts. A claim holds if its
interval lies above 0, fails if it lies below 0, and is open otherwise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

from evaluators.measurement import Measurement
from evaluators.significance import error_over_repeats
from pytest_lmcompose.baseline.storage import read_run
from pytest_lmcompose.gate.repeats import evened, independent
from pytest_lmcompose.results import Report

CLAIMS = Path(__file__).with_suffix(".yaml")
LEVEL = 0.95
AGREES, DISAGREES, OPEN, UNMEASURED = "agrees", "disagrees", "cannot tell", "not measured"


@dataclass(frozen=True)
class Effect:
    """A linear combination of one metric over compositions, above 0 if a claim is right."""

    name: str
    metric: str
    terms: Mapping[str, float]
    """Factors by composition."""

    @property
    def formula(self) -> str:
        """The terms as text, those with a positive factor first."""
        ordered = sorted(self.terms.items(), key=lambda item: item[1] < 0)
        text = " ".join(f"{'-' if factor < 0 else '+'} `{name}`" for name, factor in ordered)
        return text.removeprefix("+ ")


@dataclass(frozen=True)
class Found:
    """The estimate of an effect."""

    value: float
    error: float
    units: int
    """Independent samples."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""
        half = float(stats.t.ppf((1 + LEVEL) / 2, max(1, self.units - 1))) * self.error
        return self.value - half, self.value + half

    @property
    def verdict(self) -> str:
        """Whether the claim agrees with the measurement."""
        low, high = self.interval
        return AGREES if low > 0 else DISAGREES if high < 0 else OPEN


def read_claims(path: Path = CLAIMS) -> list[tuple[dict[str, Any], list[Effect]]]:
    """Return each claim with its effects, those of several metrics one by one."""
    claims = yaml.safe_load(path.read_text("utf-8"))
    return [(claim, [one for given in claim["effects"] for one in _by_metric(**given)]) for claim in claims]


def _by_metric(name: str, metric: str | list[str], terms: Mapping[str, float]) -> list[Effect]:
    return [Effect(name, one, terms) for one in ([metric] if isinstance(metric, str) else metric)]


def estimate(effect: Effect, report: Report) -> Found | None:
    """Return an effect in a report; None if a composition or its metric is missing.

    The samples of the compositions are paired within each repeat. Raises ValueError if they cannot be paired.
    """
    records = report.by_id
    if any(name not in records or effect.metric not in records[name].by_metric for name in effect.terms):
        return None
    known = [records[name].by_metric[effect.metric] for name in effect.terms]
    factors = list(effect.terms.values())
    values, errors, samples = [], [], []
    for runs in zip(*(one.runs for one in known), strict=True):
        columns = [evened(run.samples, run.weights) for run in runs]
        if len({len(column) for column in columns}) != 1 or not columns[0]:
            raise ValueError(f"{effect.name}: the samples of {effect.metric} cannot be paired")
        sums = [math.fsum(map(mul, factors, row)) for row in zip(*columns, strict=True)]
        mean = Measurement.mean(effect.metric, sums, clusters=runs[0].clusters)
        values.append(mean.value)
        errors.append(mean.stderr)
        samples.append(independent(sums, runs[0].clusters))
    error = error_over_repeats(values, errors, samples)
    if error is None:
        raise ValueError(f"{effect.name}: a single sample of {effect.metric} has no standard error")
    return Found(math.fsum(values) / len(values), error, min(map(len, samples)))


def rows(report: Report, claims: Path = CLAIMS) -> Iterator[tuple[str, ...]]:
    """Yield claim, source, effect, terms, estimate with interval, and verdict, of each effect."""
    for claim, effects in read_claims(claims):
        for number, effect in enumerate(effects):
            found = estimate(effect, report)
            head = (claim["claim"], claim["source"]) if number == 0 else ("", "")
            if found is None:
                yield (*head, effect.name, effect.formula, "", UNMEASURED)
                continue
            low, high = found.interval
            metric = "log perplexity" if effect.metric == "perplexity" else effect.metric
            value = f"{found.value:+.3f} ({low:+.3f} to {high:+.3f}) {metric}"
            yield (*head, effect.name, effect.formula, value, found.verdict)


def table(report: Report, claims: Path = CLAIMS) -> str:
    """Return the rows as a Markdown table."""
    heads = ("claim", "source", "effect", "terms", "estimate (95 % interval)", "verdict")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(report, claims))])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reports", nargs="+", metavar="NAME=REPORT")
    parser.add_argument("--claims", type=Path, default=CLAIMS)
    chosen = parser.parse_args()
    for argument in chosen.reports:
        name, _, path = argument.rpartition("=")
        print(f"## {name or path}\n\n{table(read_run(Path(path)), chosen.claims)}\n")
