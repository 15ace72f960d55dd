"""Merge a model with others, one parameter at a time. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interventions.context import Context
from interventions.intervention import without_gradients
from interventions.merge.kernels import formulas
from interventions.merge.kernels.depth import at, depths
from interventions.merge.kernels.others import read_others
from interventions.structure import placement
from interventions.types import InterventionError


@without_gradients
def merge_(model: nn.Module, tokenizer: Any, settings: Any, context: Context) -> dict[str, Any]:
    """Replace the weights of `model` with those merged; `settings` are those of `merge`, which has the details."""
    others = read_others(model, tokenizer, settings.named, context)
    base = others.pop() if settings.uses("base") else None
    ours = dict(model.named_parameters())
    starts_at_base = base is not None and all(_same(value, base.parameters[name]) for name, value in ours.items())
    for problem in settings.miscounted(starts_at_base=starts_at_base):
        raise InterventionError(f"merge: {problem}")
    recipe = _Recipe(model, settings, context, first=1 if starts_at_base else 0)
    copies, vectorless = set(others), set(others)
    for name, value in ours.items():
        read = [other.parameters[name] for other in others]
        start = None if base is None else base.parameters[name]
        copies = {other for other, theirs in zip(others, read, strict=True) if other in copies and _same(value, theirs)}
        if start is not None:
            vectorless = {o for o, t in zip(others, read, strict=True) if o in vectorless and _same(start, t)}
        device = placement(model).device if placement(model).streamed else value.device
        wide = torch.promote_types(value.dtype, torch.float32)
        merged = recipe.merge(
            name,
            [tensor.to(device, wide) for tensor in (read if starts_at_base else [value, *read])],
            None if start is None else start.to(device, wide),
        )
        value.copy_(merged)
        for other in (*others, *([] if base is None else [base])):
            other.free(name)
    if base is not None and vectorless:
        name = next(iter(vectorless)).name
        raise InterventionError(f"merge: with={name} has the weights of base={base.name}: name another model, or base")
    if copies:
        raise InterventionError(f"merge: with={next(iter(copies)).name} has the weights that the model has already")
    return {
        "models": [*([] if starts_at_base else ["(the current state)"]), *(other.name for other in others)],
        "contents": {other.name: other.content for other in (*others, *([] if base is None else [base]))},
        "base": None if base is None else base.name,
    }


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other.to(one.device, one.dtype))


class _Recipe:
    """The settings for each parameter."""

    def __init__(self, model: nn.Module, settings: Any, context: Context, first: int) -> None:
        """Merge all models from the one with number `first`; the current state has number 0."""
        self._settings, self._context, self._first = settings, context, first
        self._models = len(settings.others) + 1 - first
        values = (settings.weight, settings.density, settings.t)
        self._depths = depths(model) if any(isinstance(value, Sequence) for value in values) else {}

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Return the merged values of a parameter."""
        settings, depth = self._settings, self._depths.get(name, 0.0)
        normalize = settings.method in ("linear", "ties") if settings.normalize is None else settings.normalize
        if settings.method == "slerp":
            one, other = tensors
            return formulas.slerp(one, other, at(settings.t, depth))
        weights = self._each(settings.weight, depth)
        if base is None:
            if normalize and sum(weights) == 0:
                raise InterventionError(f"merge: weight: the sum for {name} is 0, which normalize divides by")
            return formulas.linear(tensors, weights, normalize)
        if settings.method == "model_stock":
            return formulas.model_stock(base, tensors, settings.filter_wise)
        if settings.method == "sce":
            return formulas.sce(base, tensors, at(settings.density, depth))
        return formulas.add_task_vectors(
            base,
            tensors,
            weights,
            partial(self._trim, name, self._each(settings.density, depth)),
            elect=settings.method in ("ties", "dare_ties"),
            normalize=normalize,
            scale=settings.lambda_,
        )

    def _each(self, value: Any, depth: float) -> list[float]:
        """Return one number for each model, of all numbers or of a single one."""
        if not isinstance(value, Sequence):
            return [float(value)] * self._models
        return [at(one, depth) for one in value[-self._models :]]

    def _trim(self, name: str, densities: Sequence[float], delta: Tensor, number: int) -> Tensor:
        """Return a task vector with zeros, as the method makes them."""
        settings, density = self._settings, densities[number]
        if settings.method == "task_arithmetic" or density >= 1:
            return delta
        if settings.method == "ties":
            mask = formulas.largest(delta, density)
        else:
            generator = self._context.generator(f"{name}\n{self._first + number}")
            mask = formulas.random_mask(delta, density, generator)
        rescale = settings.rescale or ("none" if settings.method == "ties" else "l1")
        return formulas.masked(delta, mask, rescale, density)
