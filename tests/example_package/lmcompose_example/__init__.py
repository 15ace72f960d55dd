"""What the entry points name. Imports no torch, so that every run may look at it."""

from evaluators import Evaluator, Metric

REPETITION = Evaluator(
    "repetition",
    "how often the model says again what it has just said",
    settings="lmcompose_example.settings:RepetitionSettings",
    function="lmcompose_example.repetition:repetition",
    metrics=(Metric("repetition", "share", higher_is_better=False, low=0, high=1, data="texts"),),
)
