"""Count the calibration tokens that reach routed experts."""

from __future__ import annotations

from collections.abc import Iterator

from interventions.structure import Block, LinearGroup


class Reach:
    """The tokens of each routed expert that a method works on."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[int, int]] = {}
        """By expert: its tokens, and the most columns of one of its layers."""

    def reached(self, block: Block, group: LinearGroup, tokens: int) -> bool:
        """Return whether any token reached the group."""
        if not group.routed:
            return True
        name = f"{block.name}.{group.expert}"
        _, widest = self._tokens.get(name, (0, 0))
        self._tokens[name] = (tokens, max(widest, group.in_features))
        return tokens > 0

    def warnings(self, method: str) -> Iterator[str]:
        """Yield how many experts got no token, or fewer than their layers have columns."""
        total = len(self._tokens)
        remedy = f"give more calibration text, raise {method}.samples, or set {method}.calibrate_all_experts=true"
        none = [name for name, (tokens, _) in self._tokens.items() if not tokens]
        if none:
            yield (
                f"{method}: no calibration token reached {len(none)} of {total} experts ({len(none) / total:.1%}), "
                f"such as {none[0]}: their weights are rounded to nearest, or pruned by magnitude: {remedy}"
            )
        few = sorted(tokens for tokens, widest in self._tokens.values() if 0 < tokens < widest)
        if few:
            yield (
                f"{method}: fewer calibration tokens than columns reached {len(few)} of {total} experts "
                f"({few[0]} to {few[-1]} tokens): {remedy}"
            )
