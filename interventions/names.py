"""Names in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_names(name: str, known: Iterable[str], *, n: int = 3, cutoff: float = 0.4) -> str:
    """Return " Did you mean a or b?" with at most `n` names, or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=n, cutoff=cutoff)
    return f" Did you mean {' or '.join(near)}?" if near else ""
