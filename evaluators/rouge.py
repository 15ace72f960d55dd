"""ROUGE-L of generated texts (Lin, 2004), as the package rouge-score computes it. Imports no torch."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple


class Rouge(NamedTuple):
    """Agreement of a text with a reference by their longest common subsequence of words, from 0 to 1."""

    recall: float
    """Share of the reference's words."""
    f1: float


def rouge_l(reference: str, text: str, *, stem: bool) -> Rouge:
    """Compare `text` with `reference`; with `stem`, words of the same Porter stem are equal."""
    score = _scorer(stem).score(reference, text)["rougeL"]
    return Rouge(float(score.recall), float(score.fmeasure))


@cache
def _scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stem)
