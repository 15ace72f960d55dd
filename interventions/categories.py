"""The table of categories: promised metrics, resources, streaming.

Other packages add a `Category` through the entry-point group `lmcompose.categories`; a notebook or a
`conftest.py` calls `register_category`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points

ENTRY_POINT_GROUP = "lmcompose.categories"


@dataclass(frozen=True)
class Category:
    """One kind of intervention."""

    name: str
    summary: str
    """One line."""
    promises: tuple[str, ...] = ()
    """Globs of the metrics that every step makes a promise about."""
    promised: str = "what it is for"
    """The promise of a step; follows "promises" in messages."""
    removes: bool = False
    """Steps remove something: only the metrics in `promises` where lower is better count."""
    reads: tuple[str, ...] = ()
    """Fields of `Resources` that steps read."""
    streams: bool = False
    """The weights may stay on the host while steps compute."""
    bounds: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)
    """Thresholds on the promised metrics in a new release repository."""
    compare: tuple[str, ...] = ()
    """Comparisons with the baseline in such a repository, as values of `--lmcompose-compare-fail`."""


BUILT_IN = (
    Category(
        "edit",
        "rewrites single facts",
        promises=("edit_success*", "edit_paraphrase*", "edit_locality*"),
        promised="that its edits are made, also in other words, and that other answers stay",
        reads=("edits", "calibration"),
        bounds={
            "edit_success_exact": {"min": 0.9},
            "edit_paraphrase_exact": {"min": 0.7},
            "edit_locality_agreement": {"min": 0.85},
        },
        compare=("edit_success_exact:0.02",),
    ),
    Category(
        "unlearn",
        "removes knowledge",
        promises=("accuracy/*",),
        promised="that knowledge is gone",
        removes=True,
        reads=("forget", "retain"),
        bounds={"accuracy/hazardous": {"max_ratio_of_base": 0.8}},
        compare=("accuracy/hazardous:p0.01",),
    ),
    Category("compress", "makes the weights smaller", reads=("calibration",), streams=True),
    Category("checkpoint", "brings in weights made elsewhere", streams=True),
    Category(
        "merge",
        "combines the weights of several models",
        promises=("tuning_recall/*",),
        promised="that what each of the models was tuned on is kept",
        streams=True,
    ),
    Category(
        "tune",
        "trains on prompts with answers, or on preferences",
        promises=("tuning_loss/*", "tuning_recall/*", "preference_wins"),
        promised="that the model answers as it was tuned to",
        reads=("tuning", "preferences"),
    ),
    Category(
        "steer",
        "removes or adds a direction in the residual stream",
        promises=("refusal_rate",),
        promised="that harmful prompts are no longer refused",
        removes=True,
        reads=("refusal",),
    ),
)


_table = {category.name: category for category in BUILT_IN}


def register_category(category: Category) -> Category:
    """Add a category and return it; raises ValueError for a name that another one has."""
    if _table.setdefault(category.name, category) != category:
        raise ValueError(f"the category {category.name!r} is there already, and is another one")
    return category


def categories() -> dict[str, Category]:
    """Return every known category by name, built-in ones first."""
    _load()
    return dict(_table)


def find_category(name: str) -> Category:
    """Return the category called `name`; raises ValueError that lists all, if there is none."""
    found = categories()
    if name not in found:
        raise ValueError(f"unknown category {name!r}; known: {', '.join(found)}. Add it by register_category")
    return found[name]


@cache
def _load() -> None:
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        register_category(entry.load())
