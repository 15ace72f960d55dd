"""Recognise and read an evaluation log."""

from __future__ import annotations

from pathlib import Path

from pytest_lmcompose.logs import inspect_ai, lighteval, lm_eval
from pytest_lmcompose.logs.log import Log, LogError

KNOWN = (
    "a folder of lm-evaluation-harness with --log_samples (samples_TASK_DATE.jsonl), a .eval or .json log of Inspect, "
    "or a folder of LightEval with --save-details (details_TASK_DATE.parquet)"
)


def read_log(path: Path) -> Log:
    """Return the samples of the last evaluation at `path`; raises LogError."""
    if not path.exists():
        raise LogError(f"{path}: no such file or folder")
    if is_report(path):
        raise LogError(f"{path} is a report of lmcompose: compare it with another report")
    if path.is_file():
        found = inspect_ai.read(path)
    else:
        samples, details, archives = lm_eval.find(path), lighteval.find(path), sorted(path.glob("*.eval"))
        if sum(map(bool, (samples, details, archives))) > 1:
            raise LogError(f"{path}: logs of several tools; name the file or folder of one")
        if samples:
            found = lm_eval.read(path, samples)
        elif details:
            found = lighteval.read(path, details)
        elif logs := archives + sorted(path.glob("*.json")):
            found = _together(path, [inspect_ai.read(file) for file in logs])
        else:
            raise LogError(f"{path}: no evaluation log: expected {KNOWN}")
    if not found.metrics:
        raise LogError(f"{path}: the log has no scores of single samples; {found.tool} must keep them")
    return found


def is_report(path: Path) -> bool:
    """Return whether a file is a report of this project."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as stream:
        return b'"schema_version"' in stream.read(4096)


def _together(folder: Path, logs: list[Log]) -> Log:
    """Return one log of several tasks; raises LogError if two are of one task, or of two models."""
    if len(models := sorted({log.model for log in logs})) > 1:
        raise LogError(f"{folder}: logs of {len(models)} models, {', '.join(models)}; name one of the files")
    found = {}
    for log in logs:
        for name, metric in log.metrics.items():
            if name in found:
                raise LogError(f"{folder}: {name} is in several logs; name one of the files")
            found[name] = metric
    return Log(str(folder), logs[0].tool, found, models[0])
