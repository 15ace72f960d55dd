"""Texts that begin alike as a tree of tokens, so that a model reads what they share once.

Each token attends to itself and to those before it in its own text, and has the position that it has there: tree
attention, as in SpecInfer (Miao et al. 2024, arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from interventions.tokens import shared_start


@dataclass
class Tree:
    """Tokens of some texts, each after its parent."""

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """Place of the token before each; -1 for the first of a text."""
    positions: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    """By number of a text, the places of its tokens."""

    def add(self, number: int, text: Sequence[int], shared: Sequence[int]) -> list[int]:
        """Add a text whose first tokens are at the places `shared`; return the places of all its tokens."""
        path = list(shared)
        for position in range(len(path), len(text)):
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.ids))
            self.ids.append(text[position])
            self.positions.append(position)
        self.paths[number] = path
        return path


def grow(texts: Sequence[Sequence[int]], width: int) -> list[Tree]:
    """Return trees of up to `width` tokens that hold all `texts`; a longer text has a tree of its own."""
    trees: list[Tree] = []
    before: Sequence[int] = ()
    path: list[int] = []
    for number in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        text = texts[number]
        shared = shared_start(before, text)
        if not trees or len(trees[-1].ids) + len(text) - shared > width:
            trees.append(Tree())
            shared = 0
        before, path = text, trees[-1].add(number, text, path[:shared])
    return trees


def visible(trees: Sequence[Tree], width: int) -> Tensor:
    """Return which token attends to which, bool (trees, width, width); padding attends to itself."""
    found = np.zeros((len(trees), width, width), dtype=bool)
    for seen, tree in zip(found, trees, strict=True):
        np.fill_diagonal(seen, True)
        for place, parent in enumerate(tree.parents):
            if parent >= 0:
                seen[place, : parent + 1] = seen[parent, : parent + 1]
    return torch.from_numpy(found)
