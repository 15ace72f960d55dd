"""The samples of an evaluation, whatever tool wrote them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_LIKELIHOODS = ("perplexity", "ppl", "bits_per_byte")
"""Parts of the names of metrics whose samples are log-likelihoods."""

_UNITS = ("word", "byte", "weighted")
"""Parts of the names of those that are averages over units of the texts, not over texts."""


class LogError(Exception):
    """A log that cannot be read, or two that cannot be compared; one line that names the file."""


@dataclass
class Metric:
    """One metric of one task, by sample."""

    name: str
    """As `task/metric`."""
    higher_is_better: bool = True
    samples: list[str] = field(default_factory=list)
    """Ids; one appears several times if it was asked several times."""
    prompts: list[str] = field(default_factory=list)
    """What was asked, or a hash of it, for each of `samples`; empty if unknown."""
    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """Units of each of `samples`, such as words, that a perplexity is an average over; empty: all count the same."""
    exponential: bool = False
    """Whether the metric is the exponential of the mean, as a perplexity is."""

    def means(self) -> dict[str, float]:
        """Return the value of each sample; those of one that was asked several times are averaged."""
        found = dict(zip(self.samples, self.values, strict=True))
        if len(found) < len(self.samples):
            several: dict[str, list[float]] = {}
            for sample, value in zip(self.samples, self.values, strict=True):
                several.setdefault(sample, []).append(value)
            found = {sample: sum(values) / len(values) for sample, values in several.items()}
        return found

    def asked(self) -> dict[str, str]:
        """Return the prompt of each sample, empty if unknown."""
        return dict(zip(self.samples, self.prompts, strict=True))


@dataclass(frozen=True)
class Log:
    """What one evaluation of one model measured."""

    path: str
    tool: str
    """lm-evaluation-harness, Inspect or LightEval."""
    metrics: Mapping[str, Metric]
    model: str = ""
    """The model's name; empty: unknown."""


def gather(
    found: dict[str, Metric], metric: Metric, samples: Sequence[str], prompts: Sequence[str], values: Sequence[Any]
) -> None:
    """Add a column of values to the metric of that name in `found`; what is no score of a sample is left out."""
    name = metric.name.rpartition("/")[2]
    weights: list[float] = []
    if any(word in name for word in _LIKELIHOODS) and (texts := _likelihoods(values)):
        bits = "bits" in name
        metric.higher_is_better, metric.exponential = False, not bits
        weights = [units if any(unit in name for unit in _UNITS) else 1.0 for _, units in texts]
        base = math.log(2) if bits else 1.0
        scores = [-likelihood / units / base for (likelihood, _), units in zip(texts, weights, strict=True)]
    else:
        if set(map(type, values)) <= {bool, int, float}:
            scores = list(map(float, values))
        else:
            known_scores = list(map(number, values))
            scores = [score for score in known_scores if score is not None]
            samples, prompts = (
                [item for item, score in zip(column, known_scores, strict=True) if score is not None]
                for column in (samples, prompts)
            )
    if scores:
        known = found.setdefault(metric.name, metric)
        known.samples += samples
        known.prompts += prompts
        known.values += scores
        known.weights += weights


def lower_is_better(name: str) -> bool:
    """Return whether a metric is better low, by its name."""
    return any(word in name for word in (*_LIKELIHOODS, "brier", "loss"))


def _likelihoods(values: Sequence[Any]) -> list[tuple[float, float]]:
    """Return the log-likelihoods of texts, each with its number of units, such as words; empty if one is neither."""
    found = []
    for value in values:
        match value:
            case {"logprobs": likelihood, "weights": units} | [likelihood, units]:
                pair = number(likelihood), number(units)
            case _:
                pair = number(value), 1.0
        if pair[0] is None or pair[0] > 0 or not pair[1]:
            return []
        found.append((pair[0], pair[1]))
    return found


def last_run(folder: Path, files: str, dated: re.Pattern[str], level: int = 0) -> list[Path]:
    """Return the files of the last run in a folder, or below it: those that match `dated` with the latest `date`.

    The folder `level` steps above a file is that of the model. Raises LogError for files of several models.
    """
    found = [(match["date"], file) for file in folder.rglob(files) if (match := dated.fullmatch(file.name))]
    if len(models := sorted({str(file.parents[level]) for _, file in found})) > 1:
        raise LogError(
            f"{folder}: logs in {len(models)} folders, of several models or runs; name one, such as {models[0]}"
        )
    last = max((date for date, _ in found), default="")
    return sorted(file for date, file in found if date == last)


def decode(text: bytes, kind: type[T]) -> T:
    """Decode JSON, also with the NaN and Infinity that Python writes; raises ValueError or msgspec.MsgspecError."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return msgspec.convert(json.loads(text), kind)


def number(value: object) -> float | None:
    """Return a score as a number: right or wrong as 1 or 0; None if it is neither."""
    if isinstance(value, bool | int | float):
        return float(value)
    return _GRADES.get(value) if isinstance(value, str) else None


_GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""Inspect's grades: correct, incorrect, partially correct, no answer."""
