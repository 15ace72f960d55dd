"""The table of interventions: a name, its category, where its settings and its function live.

Targets are resolved only when asked for, so that looking a name up imports no torch.
Other packages add theirs through the entry-point group `lmcompose.interventions`, whose
entries name a `Method`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from interventions.names import near_names
from interventions.types import Category

ENTRY_POINT_GROUP = "lmcompose.interventions"


@dataclass(frozen=True)
class Method:
    """One intervention. `settings` and `function` are `module:attribute` targets."""

    name: str
    category: Category
    settings: str
    function: str

    def settings_type(self) -> type:
        """Return the frozen settings dataclass (its module imports no torch)."""
        return _resolve(self.settings)  # type: ignore[no-any-return]

    def load(self) -> Callable[..., dict[str, Any]]:
        """Return the function `f(model, tokenizer, settings, resources, context) -> details`."""
        return _resolve(self.function)  # type: ignore[no-any-return]


BUILT_IN = (
    Method("ft", "edit", "interventions.edit.settings:FtSettings", "interventions.edit.ft:ft"),
    Method("lora", "edit", "interventions.edit.settings:LoraSettings", "interventions.edit.lora:lora"),
    Method("memit", "edit", "interventions.edit.settings:MemitSettings", "interventions.edit.memit:memit"),
    Method("rome", "edit", "interventions.edit.settings:RomeSettings", "interventions.edit.rome:rome"),
    Method(
        "alphaedit", "edit", "interventions.edit.settings:AlphaEditSettings", "interventions.edit.alphaedit:alphaedit"
    ),
    Method("rmu", "unlearn", "interventions.unlearn.settings:RmuSettings", "interventions.unlearn.rmu:rmu"),
    Method("ga", "unlearn", "interventions.unlearn.settings:GaSettings", "interventions.unlearn.ascent:ga"),
    Method("gd", "unlearn", "interventions.unlearn.settings:GdSettings", "interventions.unlearn.ascent:gd"),
    Method("npo", "unlearn", "interventions.unlearn.settings:NpoSettings", "interventions.unlearn.npo:npo"),
    Method("simnpo", "unlearn", "interventions.unlearn.settings:SimNpoSettings", "interventions.unlearn.npo:simnpo"),
    Method(
        "relearn", "unlearn", "interventions.unlearn.settings:RelearnSettings", "interventions.unlearn.relearn:relearn"
    ),
    Method("rtn", "compress", "interventions.compress.settings:RtnSettings", "interventions.compress.rtn:rtn"),
    Method("gptq", "compress", "interventions.compress.settings:GptqSettings", "interventions.compress.gptq:gptq"),
    Method("awq", "compress", "interventions.compress.settings:AwqSettings", "interventions.compress.awq:awq"),
    Method(
        "magnitude",
        "compress",
        "interventions.compress.settings:MagnitudeSettings",
        "interventions.compress.magnitude:magnitude",
    ),
    Method("wanda", "compress", "interventions.compress.settings:WandaSettings", "interventions.compress.wanda:wanda"),
    Method(
        "sparsegpt",
        "compress",
        "interventions.compress.settings:SparseGptSettings",
        "interventions.compress.sparsegpt:sparsegpt",
    ),
)


class UnknownMethod(ValueError):
    """A name that no intervention has; the message lists near names."""


@cache
def methods() -> dict[str, Method]:
    """Return every known intervention by name, built-in ones first."""
    table = {method.name: method for method in BUILT_IN}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        method = entry.load()
        if method.name in table:
            raise ValueError(f"entry point {entry.value!r} redefines the intervention {method.name!r}")
        table[method.name] = method
    return table


def find_method(name: str) -> Method:
    """Return the intervention called `name`.

    Raises UnknownMethod, with near names and the full list, if there is none.
    """
    table = methods()
    if name in table:
        return table[name]
    known = ", ".join(sorted(table))
    raise UnknownMethod(f"unknown intervention {name!r}.{near_names(name, table)} Known: {known}.")


def category_of(name: str) -> str:
    """Return the category of the intervention called `name`, "other" for one of a package that is not installed."""
    found = methods().get(name)
    return "other" if found is None else found.category


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
