"""Simulate each kind of gate, and print its level and power as the table of docs/gates.md.

    python docs/power.py          # 10,000 runs of each kind
    python docs/power.py 500

The level is the share of wrong verdicts where the truth is hardest: `no_drop_p` fails a model without any loss, and
`not_worse_than` passes one that lost exactly the margin. The power is the share of right ones where the truth is as
the last column says.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from evaluators.bounded import chance
from evaluators.pools import PARTS
from evaluators.significance import Drops, compare_drops, holm, t_bound

Floats = NDArray[np.float64]
LEVEL = 0.05
TASKS = 40


@dataclass(frozen=True)
class Kind:
    """A kind of gate, and how to draw one run of it."""

    gate: str
    samples: str
    wrong: Callable[[Generator], bool]
    """Draws a run in which the verdict "worse", or "not worse", is wrong; returns whether it was given."""
    right: Callable[[Generator], bool]
    """Draws a run in which it is right."""
    truth: str
    """What `right` draws."""


@cache
def lost(losses: int, gains: int, n: int) -> float:
    """Return the p of right or wrong answers; a p depends on the counts alone."""
    return compare_drops(answers(losses, gains, n)).p


@cache
def kept(losses: int, gains: int, n: int, margin: float) -> bool:
    """Return whether answers exclude a loss of the margin."""
    return excluded(answers(losses, gains, n), margin)


def answers(losses: int, gains: int, n: int) -> Drops:
    """Return right or wrong answers, some of which changed."""
    before, after = np.zeros(n), np.zeros(n)
    before[:losses], after[losses : losses + gains] = 1, 1
    return Drops(before, after, higher_is_better=True)


def graded(losses: Floats, span: float | None = 1.0, clusters: Floats | None = None) -> Drops:
    """Return samples with these losses."""
    groups = None if clusters is None else clusters.tolist()
    return Drops(losses, np.zeros(len(losses)), higher_is_better=True, span=span, clusters=groups)


def worse(drops: Drops) -> bool:
    """Return whether `no_drop_p` fails."""
    return compare_drops(drops).p <= LEVEL


def excluded(drops: Drops, margin: float) -> bool:
    """Return whether `not_worse_than` passes: the upper bound of the loss is below the margin."""
    if drops.span is None:
        return t_bound(drops, LEVEL) < margin
    return chance(-drops.sums, drops.sizes, drops.span, -margin) < LEVEL


def counts(rng: Generator, n: int, loss: float) -> tuple[int, int, int]:
    """Return losses and gains of n answers: 2 % of them change either way by chance, the share `loss` more is lost."""
    return of_tasks(rng, n, loss, 1)[0]


def of_tasks(rng: Generator, n: int, loss: float, number: int = TASKS) -> list[tuple[int, int, int]]:
    """Return losses and gains in each of several tasks of n questions."""
    drawn = rng.multinomial(n, [0.02 + loss, 0.02, 0.96 - loss], size=number)
    return [(int(losses), int(gains), n) for losses, gains, _ in drawn]


@cache
def excess(losses: int, gains: int, n: int, margin: float = 0.05) -> float:
    """Return the p of a loss of the margin."""
    drops = answers(losses, gains, n)
    return chance(-drops.sums, drops.sizes, 1.0, -margin)


def decided(rng: Generator, n: int, loss: float, p_of: Callable[[int, int, int], float]) -> tuple[bool, int]:
    """Ask questions in parts, as --lmcompose-sequential; return whether one decides, and how many were asked."""
    losses = gains = before = 0
    for part in PARTS[1:]:
        asked = math.ceil(n * part)
        lost_now, gained_now, _ = counts(rng, asked - before, loss)
        losses, gains = losses + lost_now, gains + gained_now
        if p_of(losses, gains, asked) <= LEVEL * (asked**2 - before**2) / n**2:
            return True, asked
        before = asked
    return False, n


def scores(rng: Generator, loss: float, n: int = 200) -> Floats:
    """Return losses of scores between 0 and 1: three of four samples keep theirs."""
    return np.where(rng.random(n) < 0.25, rng.uniform(-0.6, 0.6, n) + 4 * loss, 0.0)


def rare(rng: Generator, loss: float, sign: int, n: int = 50) -> Floats:
    """Return changes of 0.01 in most samples, and of 0.59 the other way in one of 60, which a sample may not have."""
    return loss + sign * np.where(rng.random(n) < 1 / 60, -0.59, 0.01)


def edits(rng: Generator, loss: float, n: int = 50, prompts: int = 5) -> Drops:
    """Return right or wrong answers to the prompts of edits, which mostly change together."""
    chances = rng.choice([0.0, 0.8], size=(n, 1), p=[0.9 - loss / 0.8, 0.1 + loss / 0.8])
    won = rng.choice([0.0, 0.8], size=(n, 1), p=[0.9, 0.1])
    losses = (rng.random((n, prompts)) < chances).astype(float) - (rng.random((n, prompts)) < won)
    return graded(losses.ravel(), clusters=np.repeat(np.arange(n), prompts))


def windows(rng: Generator, loss: float, n: int = 60) -> Drops:
    """Return losses of windows of text, in nats."""
    return graded(rng.normal(loss, 0.05, n), None)


def skewed(rng: Generator, loss: float, sign: int, n: int = 60) -> Drops:
    """Return losses of samples without a range: log-normal, with the long tail on the side of `sign`."""
    return graded(loss + sign * 0.05 * (np.exp(rng.normal(size=n)) - math.exp(0.5)), None)


def forty(rng: Generator, loss: float) -> bool:
    """Return whether one of forty gates fails, after Holm's correction."""
    return min(holm([lost(*found) for found in of_tasks(rng, 100, loss)])) <= LEVEL


def together(rng: Generator, loss: float) -> tuple[int, int, int]:
    """Return losses and gains of forty tasks together."""
    losses, gains, n = np.sum(of_tasks(rng, 100, loss), axis=0)
    return int(losses), int(gains), int(n)


def beyond(rng: Generator, loss: float) -> bool:
    """Return whether answers lost more than three standard errors."""
    drops = answers(*counts(rng, 200, loss))
    return drops.error is not None and drops.mean > 3 * drops.error


def rounded(rng: Generator, loss: float) -> bool:
    """Return whether losses of one millionth, in every sample, fail either test."""
    noise = loss + 1e-6 * rng.random(200)
    return worse(graded(noise)) or worse(Drops(noise + 2, np.full(200, 2.0), higher_is_better=True))


KINDS = (
    Kind(
        "`no_drop_p`", "200 right or wrong answers", lambda r: lost(*counts(r, 200, 0)) <= LEVEL,
        lambda r: lost(*counts(r, 200, 0.05)) <= LEVEL, "a loss of 0.05",
    ),
    Kind(
        "`no_drop_p`", "50 right or wrong answers", lambda r: lost(*counts(r, 50, 0)) <= LEVEL,
        lambda r: lost(*counts(r, 50, 0.15)) <= LEVEL, "a loss of 0.15",
    ),
    Kind(
        "`no_drop_p`", "200 scores", lambda r: worse(graded(scores(r, 0))),
        lambda r: worse(graded(scores(r, 0.05))), "a loss of 0.05",
    ),
    Kind(
        "`no_drop_p`", "50 scores, rare large gains", lambda r: worse(graded(rare(r, 0, 1))),
        lambda r: worse(graded(rare(r, 0.1, 1))), "a loss of 0.1",
    ),
    Kind(
        "`no_drop_p`", "50 edits with 5 prompts each", lambda r: worse(edits(r, 0)),
        lambda r: worse(edits(r, 0.2)), "a loss of 0.2",
    ),
    Kind(
        "`no_drop_p`", "60 windows of text", lambda r: worse(windows(r, 0)),
        lambda r: worse(windows(r, 0.02)), "a loss of 0.02 nats",
    ),
    Kind(
        "`no_drop_p`", "60 samples without a range, rare large gains", lambda r: worse(skewed(r, 0, -1)),
        lambda r: worse(skewed(r, 0.05, -1)), "a loss of half a standard deviation",
    ),
    Kind(
        "40 gates of `no_drop_p`", "100 right or wrong answers each", lambda r: forty(r, 0),
        lambda r: forty(r, 0.01), "a loss of 0.01 in every task",
    ),
    Kind(
        "`no_drop_p` with `pool`", "40 tasks of 100 right or wrong answers", lambda r: lost(*together(r, 0)) <= LEVEL,
        lambda r: lost(*together(r, 0.01)) <= LEVEL, "a loss of 0.01 in every task",
    ),
    Kind(
        "`not_worse_than: 0.05`", "200 right or wrong answers", lambda r: kept(*counts(r, 200, 0.05), 0.05),
        lambda r: kept(*counts(r, 200, 0), 0.05), "no loss",
    ),
    Kind(
        "`not_worse_than: 0.05`", "200 scores", lambda r: excluded(graded(scores(r, 0.05)), 0.05),
        lambda r: excluded(graded(scores(r, 0)), 0.05), "no loss",
    ),
    Kind(
        "`not_worse_than: 0.1`", "50 scores, rare large losses", lambda r: excluded(graded(rare(r, 0.1, -1)), 0.1),
        lambda r: excluded(graded(rare(r, 0, -1)), 0.1), "no loss",
    ),
    Kind(
        "`not_worse_than: 0.2`", "50 edits with 5 prompts each", lambda r: excluded(edits(r, 0.2), 0.2),
        lambda r: excluded(edits(r, 0), 0.2), "no loss",
    ),
    Kind(
        "`not_worse_than: 2%`", "60 windows of text", lambda r: excluded(windows(r, 0.02), 0.02),
        lambda r: excluded(windows(r, 0), 0.02), "no loss",
    ),
    Kind(
        "`not_worse_than`", "60 samples without a range, rare large losses",
        lambda r: excluded(skewed(r, 0.05, 1), 0.05), lambda r: excluded(skewed(r, 0, 1), 0.05), "no loss",
    ),
    Kind(
        "`not_worse_than: 0.01` with `pool`", "40 tasks of 100 right or wrong answers",
        lambda r: kept(*together(r, 0.01), 0.01), lambda r: kept(*together(r, 0), 0.01), "no loss",
    ),
    Kind(
        "`no_drop_p`, sequential", "200 right or wrong answers", lambda r: decided(r, 200, 0, lost)[0],
        lambda r: decided(r, 200, 0.05, lost)[0], "a loss of 0.05",
    ),
    Kind(
        "`not_worse_than: 0.05`, sequential", "200 right or wrong answers", lambda r: decided(r, 200, 0.05, excess)[0],
        lambda r: decided(r, 200, 0, excess)[0], "no loss",
    ),
    Kind(
        "`not_worse_than: 0.05`, sequential", "1000 right or wrong answers",
        lambda r: decided(r, 1000, 0.05, excess)[0], lambda r: decided(r, 1000, 0, excess)[0], "no loss",
    ),
    Kind(
        "`max_loss: 3se`", "200 right or wrong answers", lambda r: beyond(r, 0), lambda r: beyond(r, 0.1),
        "a loss of 0.1",
    ),
    Kind(
        "`no_drop_p`", "200 samples that differ by rounding", lambda r: rounded(r, 0), lambda r: rounded(r, 0.01),
        "a loss of 0.01 in every sample",
    ),
)  # fmt: skip


def simulate(runs: int) -> Iterator[tuple[Kind, float, float]]:
    """Yield each kind of gate with the shares of its wrong and of its right verdicts."""
    for kind in KINDS:
        rng = np.random.default_rng(0)
        wrong, right = (sum(draw(rng) for _ in range(runs)) / runs for draw in (kind.wrong, kind.right))
        yield kind, wrong, right


def asked(runs: int, n: int, loss: float, p_of: Callable[[int, int, int], float]) -> float:
    """Return the mean share of n questions that are asked in parts until one decides."""
    rng = np.random.default_rng(0)
    return sum(decided(rng, n, loss, p_of)[1] for _ in range(runs)) / runs / n


ASKED = (
    ("`not_worse_than: 0.05`", 200, 0.0, excess), ("`not_worse_than: 0.05`", 1000, 0.0, excess),
    ("`not_worse_than: 0.05`", 1000, 0.05, excess), ("`no_drop_p`", 200, 0.05, lost), ("`no_drop_p`", 1000, 0.05, lost),
    ("`no_drop_p`", 1000, 0.2, lost), ("`no_drop_p`", 1000, 0.0, lost),
)  # fmt: skip
"""Gates of right or wrong answers, their questions, the true loss, and the test, to count the questions asked."""

if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    print("| gate | samples | level | power | the power is for |\n|---|---|---|---|---|")
    for kind, wrong, right in simulate(number):
        print(f"| {kind.gate} | {kind.samples} | {wrong:.1%} | {right:.0%} | {kind.truth} |", flush=True)
    print("\n| gate | questions | true loss | asked on average |\n|---|---|---|---|")
    for gate, n, loss, p_of in ASKED:
        print(f"| {gate} | {n} | {loss:g} | {asked(number, n, loss, p_of):.0%} |", flush=True)
