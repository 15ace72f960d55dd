"""What a name of another model stands for: a composition of the run, or a checkpoint. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from interventions.contents import checkpoint_content, local
from interventions.names import near_names
from interventions.registry import methods

BASE = "base"
"""The composition without steps."""
_FIRST = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?=[+\[]|$)")
"""The method of the first step of a composition."""


def is_composition(name: str) -> bool:
    """Return whether a name is that of a composition: it begins with the name of a method, or is `base`."""
    first = _FIRST.match(name)
    return first is not None and (first[1] == BASE or first[1] in methods())


def split_revision(name: str) -> tuple[str, str | None]:
    """Return a folder or hub id, and the revision behind the hub id, None if there is none."""
    id, _, revision = name.partition("@")
    return (id, revision) if revision and not id.startswith((".", "/", "~")) else (name, None)


def content(name: str, folder: Path) -> str:
    """Return what identifies the weights of a checkpoint."""
    return checkpoint_content(*split_revision(name), folder)


def absent(name: str, folder: Path) -> str | None:
    """Return that there is no folder called `name`, with near names of methods; None if it is there or a hub id."""
    place = local(split_revision(name)[0], folder)
    if place is None or place.exists():
        return None
    first = _FIRST.match(name)
    near = "" if first is None else near_names(first[1], methods())
    return f"no such folder: {place}{f', and no composition.{near}' if near else ''}".removesuffix(".")
