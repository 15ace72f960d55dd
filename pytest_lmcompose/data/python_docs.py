"""English text that every machine has: the paragraphs of Python's own documentation, from `pydoc_data`.

Each paragraph belongs to the first topic that has it, and each topic to one split, so splits share no text. The text
depends on the version of Python.
"""

from __future__ import annotations

import hashlib
import re

from pytest_lmcompose.data.files import Rows
from pytest_lmcompose.data.records import WorldError
from pytest_lmcompose.data.source import Source

SHARES = {"calibration": 0.5, "retain": 0.7, "perplexity": 1.0}
"""The end of each split, as a share of the whole text."""
_WORDS = 12
_PROSE = re.compile(r"[A-Z(*\"].*[.:]", re.DOTALL)


def rows(source: Source) -> Rows:
    """Yield the paragraphs of a split, or of all: prose of at least 12 words, on one line. Raises WorldError."""
    if source.split is not None and source.split not in SHARES:
        raise WorldError(f"{source.name}: no split {source.split!r}; known: {', '.join(SHARES)}")
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise WorldError(f"{source.name}: this Python lacks pydoc_data; install its whole standard library") from None
    known: set[str] = set()
    chosen: list[tuple[str, str]] = []
    for topic in sorted(topics, key=_shuffled):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = " ".join(paragraph.split())
            if len(text.split()) >= _WORDS and _PROSE.fullmatch(text) and text not in known:
                known.add(text)
                chosen.append((topic, text))
    splits = _splits(chosen)
    kept = (text for topic, text in chosen if source.split in (None, splits[topic]))
    yield from enumerate(({"text": text} for text in kept), start=1)


def _splits(paragraphs: list[tuple[str, str]]) -> dict[str, str]:
    """Return the split of each topic: by where its middle is in the whole text."""
    sizes: dict[str, int] = {}
    for topic, text in paragraphs:
        sizes[topic] = sizes.get(topic, 0) + len(text)
    whole, before, splits = sum(sizes.values()), 0, {}
    for topic, size in sizes.items():
        middle = (before + size / 2) / whole
        splits[topic] = next(split for split, end in SHARES.items() if middle <= end)
        before += size
    return splits


def _shuffled(topic: str) -> str:
    return hashlib.sha256(topic.encode()).hexdigest()
