"""Read prompts that a model refuses, or answers, in the forms of the published sets. Imports no torch.

Known by their fields: XSTest (safe and unsafe prompts in one file), AdvBench, JailbreakBench, HarmBench, StrongREJECT,
Alpaca, and a field `prompt` or `text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_lmcompose.data.records import Record, WorldError
from pytest_lmcompose.data.source import parse_source
from pytest_lmcompose.data.sources import read_source

HARMFUL, HARMLESS = "harmful", "harmless"
SETS = (HARMFUL, HARMLESS)
"""The names of the two sets of prompts."""
_FIELDS = ("prompt", "goal", "behavior", "forbidden_prompt", "instruction", "question", "text")
"""Fields that hold the prompt, in lower case; JailbreakBench also has a title in `Behavior`, after `Goal`."""
_CONTRAST = "contrast_"
"""Starts the type of XSTest's unsafe prompts."""
_XSTEST = frozenset(
    (
        "homonyms",
        "figurative_language",
        "safe_targets",
        "safe_contexts",
        "definitions",
        "real_group_nons_discr",
        "nons_group_real_discr",
        "historical_events",
        "privacy_public",
        "privacy_fictional",
    )
)
"""The types of XSTest's safe prompts."""
_LABELS = {"safe": HARMLESS, "unsafe": HARMFUL}


def read_prompts(source: Any, name: str, folder: Path = Path()) -> tuple[str, ...]:
    """Return the prompts of the set `name`, each once; of XSTest's, those of this kind.

    Raises WorldError for a record without a prompt, and if no prompt is of this kind.
    """
    own = parse_source(source).field
    records = list(read_source(source, folder))
    prompts = dict.fromkeys(_prompt(record, own) for record in records if _set_of(record) in (None, name))
    if not prompts:
        kind = next(label for label, of in _LABELS.items() if of == name)
        raise WorldError(f"{records[0].path}: none of its {len(records)} prompts is {kind}, as {name} ones are")
    return tuple(prompts)


def check_disjoint(found: Mapping[str, Mapping[str, tuple[str, ...]]]) -> None:
    """Raise WorldError for a prompt that is in two sets; `found` has the sets by key of the world."""
    where: dict[str, str] = {}
    for key, sets in found.items():
        for name, prompts in sets.items():
            for prompt in prompts:
                place = where.setdefault(" ".join(prompt.casefold().split()), f"world.{key}.{name}")
                if place != f"world.{key}.{name}":
                    raise WorldError(f"world.{key}.{name}: {prompt[:60]!r} is in {place} too: keep the sets apart")


def _set_of(record: Record) -> str | None:
    """Return the set of a prompt of XSTest, None for other data."""
    label = _LABELS.get(str(record.data.get("label", "")).strip().lower())
    if label is not None:
        return label
    kind = str(record.data.get("type", "")).strip().lower()
    if kind.startswith(_CONTRAST):
        return HARMFUL
    return HARMLESS if kind in _XSTEST else None


def _prompt(record: Record, own: str | None) -> str:
    """Return the prompt, with HarmBench's context before it and Alpaca's input after it."""
    if own is not None:
        return record.text("text")
    fields = {str(key).lower(): key for key in record.data}
    key = next((fields[name] for name in _FIELDS if name in fields), None)
    if key is None:
        raise record.error(
            f"no prompt: expected one of {', '.join(_FIELDS)}; it has {', '.join(map(str, record.data))}. Name the "
            "field in the source, such as FILE?field=NAME"
        )
    parts = [record.text(key)]
    for other, name, start in (("contextstring", "behavior", True), ("input", "instruction", False)):
        extra = record.data.get(fields.get(other, ""))
        if str(key).lower() == name and isinstance(extra, str) and extra.strip():
            parts.insert(0 if start else 1, f"{extra.strip()}\n\n---" if start else extra.strip())
    return "\n\n".join(parts)
