"""Whether `interventions` and `evaluators` are this project's own packages, and not those of a project under test.

Both names are common, so the plugin imports neither package before a composition is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

PACKAGES = ("interventions", "evaluators")
HOME = Path(__file__).resolve().parent.parent
"""The folder that holds this package, and those two."""


def hidden() -> str | None:
    """Return what hides one of the packages, or is hidden by it, and what to do; None if nothing does."""
    for name in PACKAGES:
        for folder in _found(name):
            if folder != HOME / name:
                return (
                    f"the folder {folder} hides the package {name!r} of pytest-lmcompose: rename it, or keep it off "
                    "sys.path: run the tests of compositions alone, by `pytest --import-mode=importlib PATH`"
                )
    return None


def _found(name: str) -> Iterator[Path]:
    """Yield the folder of a package that was imported, then the folder that an import would find."""
    imported = getattr(sys.modules.get(name), "__spec__", None)
    for spec in (imported, _search(name)):
        if spec is not None and spec.origin is not None:  # a folder without code hides nothing
            path = Path(spec.origin).resolve()
            yield path.parent if path.stem == "__init__" else path


def _search(name: str) -> ModuleSpec | None:
    """Return what an import of `name` would find if it had not been imported."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and (spec := find(name, None, None)) is not None:
            return spec  # type: ignore[no-any-return]
    return None
