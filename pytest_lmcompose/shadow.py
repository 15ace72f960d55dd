"""Detect packages of another project that hide our `interventions` and `evaluators`.

Both names are common, so the plugin imports neither until a test uses a composition.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

PACKAGES = ("interventions", "evaluators")
HOME = Path(__file__).resolve().parent.parent
"""The folder of this package and of `PACKAGES`."""


def hidden() -> str | None:
    """Return an error message if another folder hides one of the packages; None otherwise."""
    for name in PACKAGES:
        for folder in _found(name):
            if folder != HOME / name:
                return (
                    f"the folder {folder} hides the package {name!r} of pytest-lmcompose: rename it, or keep it off "
                    "sys.path by running the tests of compositions separately: pytest --import-mode=importlib PATH"
                )
    return None


def _found(name: str) -> Iterator[Path]:
    """Yield the folder that the package was imported from, if it was, then the folder an import would find."""
    imported = getattr(sys.modules.get(name), "__spec__", None)
    for spec in (imported, _search(name)):
        if spec is not None and spec.origin is not None:  # a namespace package hides nothing
            path = Path(spec.origin).resolve()
            yield path.parent if path.stem == "__init__" else path


def _search(name: str) -> ModuleSpec | None:
    """Return the spec that an import of `name` would find, ignoring sys.modules."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and (spec := find(name, None, None)) is not None:
            return spec  # type: ignore[no-any-return]
    return None
