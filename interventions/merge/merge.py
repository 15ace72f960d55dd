"""Merge the model with others: means, interpolation on the sphere, and sums of trimmed task vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from interventions.intervention import Context, Intervention, Model, Resources
from interventions.merge.names import BASE, absent, content, is_composition, split_revision
from interventions.ranges import SMALLER_IS_MILDER, Choice, Range, check_value, shown
from interventions.types import InterventionError

_VECTORS = ("base", "weight", "normalize", "lambda")
_TRIMMED = (*_VECTORS, "density", "rescale")
_USED = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "task_arithmetic": _VECTORS,
    "ties": _TRIMMED,
    "dare_linear": _TRIMMED,
    "dare_ties": _TRIMMED,
    "model_stock": ("base", "filter_wise"),
    "sce": ("base", "density"),
}
"""The settings that each method uses, beside `method` and `with`."""
_RANGES: dict[str, Any] = {
    "weight": float,
    "density": Annotated[float, Range(above=0, high=1)],
    "t": Annotated[float, Range(0, 1)],
}


@dataclass(frozen=True)
class MergeSettings(Intervention):
    """The model merged with others: folders, models of the hub, or compositions of the run."""

    name = "merge"
    category = "merge"

    method: Annotated[str, Choice(*_USED)] = "ties"
    """`linear` and `slerp` interpolate weights; the others add task vectors, which are differences from `base`."""
    with_: Any = ""
    """The other model, or a list of several: a folder, a hub id (`id@revision`), or a composition of the run such as
    "ft+lora"; required. Write `./ft` for a folder with the name of a method."""
    base: str = BASE
    """What task vectors are differences from, named as in `with`; `base` is the model before the first step."""
    weight: Any = 1.0
    """Weight of each model; or a list of one for each, the current state first. A list of numbers in place of one is
    interpolated over the depth."""
    density: Any = 1.0
    """Share of each task vector that is kept, above 0 up to 1; lists as for `weight`. Of `sce`: share of the entries,
    those that differ most between the models; a list is interpolated over the depth."""
    t: Any = 0.5
    """Of `slerp`: the other model's share, from 0 to 1; a list is interpolated over the depth."""
    normalize: bool | None = None
    """Whether to divide by the sum of weights; null: for `linear` and `ties`."""
    lambda_: Annotated[float, Range(-10, 10), SMALLER_IS_MILDER] = 1.0
    """Factor of the merged task vector."""
    rescale: Annotated[str, Choice("none", "l1", "density")] | None = None
    """Scale a trimmed task vector to its former sum of magnitudes (`l1`), or divide it by its density (`density`);
    null: `l1` for `dare_linear` and `dare_ties`."""
    filter_wise: bool = False
    """Of `model_stock`: interpolate each row of a weight on its own."""

    @property
    def others(self) -> tuple[str, ...]:
        """The names of the other models."""
        found = self.with_ if isinstance(self.with_, (list, tuple)) else [self.with_]
        return tuple(name.strip() for name in found if name.strip())

    @property
    def named(self) -> tuple[str, ...]:
        """The names of the other models, and last that of the base if the method uses one."""
        return (*self.others, self.base.strip()) if self.uses("base") else self.others

    def uses(self, key: str) -> bool:
        """Return whether the method uses a setting."""
        return key in _USED[self.method]

    def problems(self) -> Iterator[str]:
        """Yield names that are no texts, and numbers that are out of range."""
        names = self.with_ if isinstance(self.with_, (list, tuple)) else [self.with_]
        if not all(isinstance(name, str) for name in names):
            yield f"with={shown(self.with_)}: expected a text, or a list of texts"
            return
        if len(set(self.others)) < len(self.others):
            yield f"with={shown(self.with_)}: expected every model once"
        if not self.base.strip():
            yield f"base is empty: expected a folder, a hub id or a composition, such as {BASE}"
        if self.method == "slerp" and len(self.others) > 1:
            yield f"with={shown(self.with_)}: slerp merges two models, the current one and one other"
        for key in _RANGES:
            _check(key, getattr(self, key), 1 if key == "t" or (key, self.method) == ("density", "sce") else 2)
        weights = self.weight if isinstance(self.weight, (list, tuple)) else [1]
        even = not any(isinstance(weight, (list, tuple)) for weight in weights)
        if self.method == "linear" and self.normalize is not False and even and sum(weights) == 0:
            yield f"weight={shown(self.weight)}: expected weights whose sum is not 0, or normalize=false"

    def contradictions(self, given: Collection[str]) -> Iterator[str]:
        """Yield settings that the method does not use."""
        for key in given:
            if key not in ("method", "with") and not self.uses(key):
                yield f"{key}: method={self.method} does not use it; it uses {', '.join(_USED[self.method])}"

    def checkpoints(self) -> tuple[str, ...]:
        """Return the names that are no compositions."""
        return tuple(split_revision(name)[0] for name in self.named if not is_composition(name))

    def compositions(self) -> tuple[str, ...]:
        """Return the names that are compositions."""
        return tuple(dict.fromkeys(name for name in self.named if is_composition(name)))

    def identity(self, folder: Path) -> Any:
        """Return the contents of the other models, wherever they lie, with the rest of the settings."""
        contents = [None if is_composition(name) else content(name, folder) for name in self.named]
        return {"contents": contents, "settings": dataclasses.replace(self, with_="", base=BASE)}

    def unready(self, folder: Path) -> Iterator[str]:
        """Yield that no other model is named, or that there is none of that name."""
        if not self.others:
            yield "with is empty: name a folder, a hub id or a composition, as in [with=./checkpoint]"
        for name in self.named:
            if not is_composition(name) and (problem := absent(name, folder)) is not None:
                yield f"{'with' if name in self.others else 'base'}={name}: {problem}"

    def misplaced(self, before: str, others: Mapping[str, str]) -> Iterator[str]:
        """Yield models that are merged with themselves, and numbers of models or weights that do not fit."""
        base = others.get(self.base.strip()) if self.uses("base") else None
        ids = [others.get(name) for name in self.others]
        for name, id in zip(self.others, ids, strict=True):
            if id is not None and id == base:
                yield f"with={name}: is the base of the task vectors, so that it has none; name another model"
            elif id is not None and id == before:
                yield f"with={name}: is the model that the step starts from; merging it with itself changes nothing"
            elif id is not None and ids.count(id) > 1:
                yield f"with={name}: is named twice"
        yield from self.miscounted(starts_at_base=base is not None and base == before)

    def miscounted(self, *, starts_at_base: bool) -> Iterator[str]:
        """Yield lists of the wrong length, and too few models; the base itself is none of them."""
        count = len(self.others) + (not starts_at_base)
        for key in ("weight", "density"):
            value = getattr(self, key)
            each = self.uses(key) and self.method != "sce" and isinstance(value, (list, tuple))
            if each and len(value) not in (count, len(self.others) + 1):
                yield f"{key}={shown(value)}: expected one number, or a list of {count}, one for each model"
        if self.method == "model_stock" and count < 2:
            yield "with: model_stock needs at least two models beside the base: name another one"

    def run(self, model: Model, tokenizer: Any, resources: Resources, context: Context) -> dict[str, Any]:
        """Merge the weights, in place, one parameter at a time; each is rounded once to the model's dtype.

        Returns the names of the models and the hashes of their weights. Raises InterventionError if another model
        cannot be read completely, or differs in more than its weights.
        """
        for problem in self.unready(context.folder):
            raise InterventionError(f"merge: {problem}")
        from interventions.merge.kernels.merging import merge_

        return merge_(model, tokenizer, self, context)


def _check(key: str, value: Any, depth: int) -> None:
    """Check a number, or numbers in up to `depth` lists inside each other; raises SettingError."""
    if depth and isinstance(value, (list, tuple)) and value:
        for item in value:
            _check(key, item, depth - 1)
    else:
        check_value(key, _RANGES[key], value)
