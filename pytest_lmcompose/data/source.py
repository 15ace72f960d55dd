"""Where the data of a world comes from: a file, a folder in the hub's layout, or a dataset on the hub. No torch.

A key of a world takes a path or hub id, with options behind a question mark or as a mapping:

    calibration: calibration.jsonl
    perplexity: Salesforce/wikitext?configuration=wikitext-2-raw-v1&split=test
    retain: {path: allenai/c4, configuration: en, split: train, limit: 1000}
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from interventions.ranges import Checked, Count, SettingError, check_value, shown

_SCHEME = "hf://datasets/"
_NUMBERS = ("limit", "seed")


@dataclass(frozen=True)
class Source(Checked):
    """Where records come from, and which of them to read."""

    path: str
    """A file, a folder in the hub's layout (both relative to the world's folder), or a hub id."""
    configuration: str | None = None
    """Configuration of a dataset, such as `wikitext-2-raw-v1`; also the name of a subfolder."""
    split: str | None = None
    """Split of a dataset, such as `test` or `train[:10%]`; null: its only one."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    file: str | None = None
    """A single file of the folder or hub dataset."""
    field: str | None = None
    """The field that holds the text; null: `text`."""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other names of fields: `{prompt: question}` reads the field `question` as `prompt`. `a.b` is `b` inside `a`."""
    filter: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Read only records with these values: `{topic: biology}`, or one of several: `{topic: [biology, chemistry]}`."""
    limit: Count | None = None
    """Number of records to read: the first ones, or with `seed`, a random sample."""
    seed: int | None = None
    """Seed of the sample."""

    def problems(self) -> Iterator[str]:
        """Yield a seed without a limit."""
        if self.seed is not None and self.limit is None:
            yield f"seed={self.seed}: needs a limit, the number of records to sample"

    @property
    def name(self) -> str:
        """The source as errors name it."""
        parts = [p for p in (self.file, self.configuration, self.split, self.revision) if p]
        return f"{self.path} ({', '.join(parts)})" if parts else self.path


def parse_source(value: Any, key: str = "source") -> Source:
    """Return the source that the value of a world's `key` describes; raises SettingError."""
    given = value
    if isinstance(value, (str, os.PathLike)):
        path, _, query = os.fspath(value).partition("?")
        options: dict[str, Any] = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))
        if path.startswith(_SCHEME):
            path, _, revision = path.removeprefix(_SCHEME).partition("@")
            options |= {"revision": revision} if revision else {}
        for name in _NUMBERS:
            if options.get(name, "").lstrip("-").isdecimal():
                options[name] = int(options[name])
        value = {"path": path, **options}
    if not isinstance(value, Mapping) or not value.get("path"):
        raise SettingError(
            f"{key}={shown(given)}: expected a file, a folder, a hub id, or a mapping with the key path, or null"
        )
    check_value(key, Source, value)
    try:
        return Source(**value)
    except SettingError as error:
        raise SettingError(f"{key}.{error}") from None


def source_problem(key: str, value: Any) -> str | None:
    """Say what is wrong with the value of a key that takes a source, None for a sound one."""
    try:
        parse_source(value, key)
    except SettingError as error:
        return str(error)
    return None
