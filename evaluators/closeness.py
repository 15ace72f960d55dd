"""Closeness to the base model: of next-token distributions on running text, and of right and wrong answers.

Accuracy can stay the same while answers change; flips and divergence show that a model changed before its accuracy
does (Dutta et al. 2024, "Accuracy is not all you need", arXiv 2407.09141).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluators.data import EvaluationData
from evaluators.measurement import Measurement
from evaluators.perplexity import measure_perplexity, read_texts
from evaluators.predictions import Predictions, Recorder
from evaluators.settings import PerplexitySettings


def evaluate(model: Any, tokenizer: Any, settings: PerplexitySettings, data: EvaluationData) -> list[Measurement]:
    """Measure `kl_to_base` and `top1_agreement` on the texts, in the pass for perplexity.

    Nothing without texts, or if the base model's predictions are unknown.
    """
    windows = read_texts(model, tokenizer, settings, data)[1] if data.texts else []
    if not windows:
        return []
    weights = [float(window.tokens) for window in windows]
    note = f"{len(windows)} windows, {sum(window.tokens for window in windows)} tokens, of the base model's predictions"
    kl, agreement = [window.kl for window in windows], [window.agreement for window in windows]
    return [
        Measurement.mean("kl_to_base", kl, higher_is_better=False, note=note, weights=weights),
        Measurement.mean("top1_agreement", agreement, note=note, weights=weights),
    ]


def capture_predictions(
    model: Any, tokenizer: Any, texts: Sequence[str], *, window: int = 128, batch_size: int = 32
) -> Predictions:
    """Record what the base model predicts for `texts`, in one pass.

    Raises EvaluationError like `measure_perplexity`.
    """
    recorder = Recorder(model)
    with recorder.watching():
        found = measure_perplexity(model, tokenizer, texts, window=window, batch_size=batch_size, observe=recorder)
    return recorder.predictions(found)
