"""Predictions as text. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pytest_lmcompose.prediction.records import Pair, Prediction

HEADS = ("pair", "edit", "unlearn", "perplexity", "recall", "bits", "commutator", "survival")
UNTOLD, NOT_CONCERNED = "cannot tell", "-"
UNITS = (
    "In brackets, the expected gain: probability of the new answer (edit) or of the answer (recall), nats per token "
    "(unlearn, perplexity), bits per weight."
)


def rows(pairs: Iterable[Pair]) -> Iterator[tuple[str, ...]]:
    """Yield the heads, then for each pair the step to apply first for each promise, with the expected gain."""
    yield HEADS
    for pair in pairs:
        told = {prediction.promise: cell(prediction) for prediction in pair.predictions}
        about = (_share(pair.commutator), _share(pair.survival))
        yield (f"{pair.first}, {pair.second}", *(told.get(head, NOT_CONCERNED) for head in HEADS[1:6]), *about)


def cell(prediction: Prediction) -> str:
    """Return which step to apply first, and what is gained by it, if that is known."""
    if prediction.better is None:
        return UNTOLD
    as_given = prediction.better == prediction.orders[0]
    gain = (prediction.gap or 0.0) * (1 if as_given else -1)
    first = prediction.first if as_given else prediction.second
    return f"{first} first ({gain:.3g})" if gain > 0 else f"{first} first"


def planned(pairs: Iterable[Pair]) -> Iterator[str]:
    """Yield a line for each pair: the better orders, for the plan of a run."""
    for pair in pairs:
        told = [(p.better, p.promise) for p in pair.predictions if p.better is not None]
        orders = {order: [promise for better, promise in told if better == order] for order, _ in told}
        text = "; ".join(f"{order} for {', '.join(promises)}" for order, promises in orders.items())
        yield f"  {pair.first}, {pair.second}: {text or UNTOLD}"


def _share(value: float | None) -> str:
    return NOT_CONCERNED if value is None else f"{value:.2f}"
