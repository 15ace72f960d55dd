"""The table of interventions.

Every module of the folders in `PACKAGES` is imported, and every `Intervention` with a name that it defines is a method:
a new file there is a new method. (What methods compute with lies in folders below, such as `kernels`, and is not looked
at.) Other packages add theirs through the entry-point group `lmcompose.interventions`, whose entries name an
`Intervention` or a `Method`; a notebook or a `conftest.py` calls `register`. Imports no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from interventions.intervention import Intervention
from interventions.names import near_names

ENTRY_POINT_GROUP = "lmcompose.interventions"
PACKAGES = tuple(f"interventions.{name}" for name in ("edit", "unlearn", "compress", "checkpoint", "merge", "tune", "steer"))


@dataclass(frozen=True)
class Method:
    """One intervention by its name; `settings` and `function` are objects, or `module:attribute` targets."""

    name: str
    category: str
    settings: type | str
    function: Callable[..., dict[str, Any]] | str | None = None
    """None: `run` of the settings."""

    def settings_type(self) -> type:
        """Return the frozen settings dataclass (its module imports no torch)."""
        return _resolve(self.settings)  # type: ignore[no-any-return]

    def load(self) -> Callable[..., dict[str, Any]]:
        """Return the function `f(model, tokenizer, settings, resources, context) -> details`."""
        return _run if self.function is None else _resolve(self.function)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose source says what the method does."""
        targets = [target for target in (self.function, self.settings) if target is not None]
        return tuple(dict.fromkeys(t.partition(":")[0] if isinstance(t, str) else t.__module__ for t in targets))


class UnknownMethod(ValueError):
    """A name that no intervention has; the message lists near names."""


_table: dict[str, Method] = {}


def register(found: type[Intervention] | Method) -> Method:
    """Add a method and return it. One that is defined once more, as by a notebook, takes the place of the former.

    Raises ValueError for a name that another method has.
    """
    method = found if isinstance(found, Method) else Method(found.name, found.category, found, found.function)
    former = _table.get(method.name, method)
    if former != method and _where(former) != _where(method):
        raise ValueError(f"{_where(method)} redefines the intervention {method.name!r} of {_where(former)}")
    _table[method.name] = method
    return method


def methods() -> dict[str, Method]:
    """Return every known intervention by name."""
    _load()
    return dict(_table)


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


def defined_in(package: str) -> Iterator[type[Intervention]]:
    """Yield the methods that the modules of a package define, without its subpackages."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if not found.ispkg:
            for kind in vars(importlib.import_module(found.name)).values():
                if isinstance(kind, type) and kind.__module__ == found.name and "name" in vars(kind):
                    yield kind


@cache
def _load() -> None:
    for package in PACKAGES:
        for kind in defined_in(package):
            register(kind)
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        register(entry.load())


def _run(model: Any, tokenizer: Any, settings: Any, resources: Any, context: Any) -> dict[str, Any]:
    details: dict[str, Any] = settings.run(model, tokenizer, resources, context)
    return details


def _where(method: Method) -> str:
    settings = method.settings
    return settings if isinstance(settings, str) else f"{settings.__module__}:{settings.__qualname__}"


def _resolve(target: Any) -> Any:
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
