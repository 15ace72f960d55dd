"""Latency of a forward pass with dense kernels: quantised weights are stored as ordinary tensors."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from evaluators.data import EvaluationData
from evaluators.encoding import check_length
from evaluators.measurement import EvaluationError, Measurement
from evaluators.passes import run_once
from evaluators.settings import PassSettings
from evaluators.state import borrowed


def evaluate(model: Any, tokenizer: Any, settings: PassSettings, data: EvaluationData) -> list[Measurement]:
    """Measure latency; see `measure_latency`."""
    return measure_latency(
        model, batch=settings.latency_batch, length=settings.latency_length, repeats=settings.latency_repeats
    )


def forward_pass(model: Any, *, batch: int = 1, length: int = 128) -> Callable[[], None]:
    """Return a function that runs one synchronised forward pass over (batch, length) tokens, without KV cache.

    The tokens are the vocabulary in order. The model must be in eval mode.
    Raises EvaluationError for a shape that does not fit the model.
    """
    if batch < 1 or length < 1:
        raise EvaluationError(f"latency: batch {batch} and length {length} must be at least 1")
    check_length(model, length, f"latency: a text of {length} tokens")
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(batch * length, device=model.device) % vocabulary).view(batch, length)

    @torch.no_grad()
    def run() -> None:
        run_once(model, ids)
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)

    return run


def measure_latency(
    model: Any, *, batch: int = 1, length: int = 128, repeats: int = 20, warm_up: int = 3
) -> list[Measurement]:
    """Measure `latency_ms` of a forward pass over (batch, length) tokens, and `tokens_per_second`.

    Both are medians over `repeats` passes after `warm_up` passes; samples are the single passes, and the
    error is that of the median for normal noise (1.25 standard errors of the mean).
    Raises EvaluationError for a shape that does not fit the model and fewer than 2 repeats.
    """
    if repeats < 2 or warm_up < 0:
        raise EvaluationError(f"latency: {repeats} repeats after {warm_up} warm-up passes; repeat at least twice")
    run = forward_pass(model, batch=batch, length=length)
    seconds = []
    with borrowed(model, None):
        for number in range(warm_up + repeats):
            start = time.perf_counter()
            run()
            if number >= warm_up:
                seconds.append(time.perf_counter() - start)
    note = (
        f"dense kernels, median of {repeats} forward passes after {warm_up}, batch {batch}, {length} tokens, "
        f"{str(next(model.parameters()).dtype).removeprefix('torch.')} on {model.device.type}, "
        f"{torch.get_num_threads()} threads"
    )
    return [
        _median("latency_ms", [1e3 * t for t in seconds], False, note),
        _median("tokens_per_second", [batch * length / t for t in seconds], True, note),
    ]


def _median(metric: str, samples: list[float], higher_is_better: bool, note: str) -> Measurement:
    error = math.sqrt(math.pi / 2 / len(samples)) * statistics.stdev(samples)
    return Measurement(metric, statistics.median(samples), error, len(samples), higher_is_better, tuple(samples), note)
