"""Predict the pairs of a run from the single states in its cache. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from evaluators.efficiency import decoder_linears
from interventions.registry import category_of
from pytest_lmcompose.build.states import StateManager
from pytest_lmcompose.composition import Composition
from pytest_lmcompose.data.run_data import RunData
from pytest_lmcompose.prediction.effects import Effect
from pytest_lmcompose.prediction.predict import Predictor
from pytest_lmcompose.prediction.probes import Probes, input_norms
from pytest_lmcompose.prediction.records import Pair, pairs_of


class Predicted(NamedTuple):
    """Predictions of pairs, and the steps without which others cannot be predicted."""

    pairs: tuple[Pair, ...]
    missing: Mapping[str, tuple[str, ...] | None]
    """Steps whose states the cache does not have, and in what the most similar ones differ; see `differences`."""


@torch.no_grad()
def predict(manager: StateManager, data: RunData, compositions: Iterable[Composition]) -> Predicted:
    """Predict the orders of all pairs of steps that `compositions` apply; builds no state and restores the model's."""
    pairs = pairs_of(compositions)
    steps = dict.fromkeys(step for pair in pairs for step in pair)
    found = {step: manager.stored(Composition((step,))) for step in steps}
    missing = {str(step): manager.differences(Composition((step,))) for step, state in found.items() if state is None}
    with manager.visit(Composition()) as state:
        base, probes = manager.base, Probes.of(state.tokenizer, data)
        layers = {
            name: weight.shape != base[name].shape or not weight.is_contiguous()
            for name, weight in decoder_linears(state.model).items()
            if name in base
        }
        norms = input_norms(state.model, probes, layers)
        effects = {
            step: Effect(category_of(step.method), base, changed, layers, norms)
            for step, changed in found.items()
            if changed is not None
        }
        return Predicted(tuple(Predictor(state.model, probes, effects).pairs(pairs)), missing)
