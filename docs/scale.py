"""Forecast the time of suites, and check the forecast against a measured run.

    python docs/scale.py check report.json --workers 2
    python docs/scale.py paper

`check` takes the costs of the base model and of single steps from a report, forecasts its longer compositions and the
whole run, and compares. `paper` prints the tables of docs/scale.md: the suite `paper` on models of 8 and 70 billion
weights with 1, 8 and 64 workers, from times on one GPU.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from pytest_lmcompose.baseline.storage import read_run
from pytest_lmcompose.composition import Composition, Step, parse
from pytest_lmcompose.costs import Costs, StepCost, duration, size
from pytest_lmcompose.distribute.forecast import forecast
from pytest_lmcompose.distribute.ray.engine import PARTS_PER_TASK, WORTH_A_PROCESS
from pytest_lmcompose.distribute.ray.parts import Part, parts
from pytest_lmcompose.options import SUITE_FOLDER
from pytest_lmcompose.plan import Plan
from pytest_lmcompose.recipe import load_recipe

WORKERS = (1, 8, 64)
WITHIN = 0.2


class Model(NamedTuple):
    """Shapes of a dense model with grouped-query attention and a gated MLP."""

    name: str
    blocks: int
    hidden: int
    mlp: int
    kv: int
    vocabulary: int = 128_256

    @property
    def in_blocks(self) -> int:
        """Weights of the blocks' linear layers."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv
        return self.blocks * (attention + 3 * self.hidden * self.mlp)

    @property
    def weights(self) -> int:
        return self.in_blocks + 2 * self.hidden * self.vocabulary

    @property
    def gram(self) -> int:
        """Entries of the inputs' second moments: one matrix for q, k and v, one for gate and up."""
        return self.blocks * (3 * self.hidden**2 + self.mlp**2)

    @property
    def cubes(self) -> int:
        """Sum of the cubes of their sizes: factorisations and column loops."""
        return self.blocks * (3 * self.hidden**3 + self.mlp**3)


SMALL = Model("8B", 32, 4096, 14_336, 1024)
LARGE = Model("70B", 80, 8192, 28_672, 1024)
COPY = 12.0
"""Seconds around a step of the 8B model: the copy of the weights to the host, and the check of what changed."""
MEASURED = {"wanda": 40.0, "sparsegpt": 131.0, "gptq": 118.0, "awq": 85.0, "memit": 16.0, "rmu": 18.0}
"""Seconds of a step of the 8B model on one H200: docs/performance.md."""
CALIBRATION = 128 * 2048
"""Tokens."""
TRAINED = {"ft": 25 * 50 * 24, "lora": 70 * 50 * 24, "ga": 1000 * 1024, "gd": 2 * 1000 * 1024}
"""Tokens that are trained on: updates x edits x their length, or texts x their length."""
EDITED = {"ft": 1, "memit": 5, "rmu": 3}
"""MLP output projections that change."""
BYTES = 2
EVALUATED = 5_900 * 100 + 290_000 + 50 * 20 * 24
"""Tokens that a state is measured on: questions, text for perplexity, prompts of edits."""


class Rates(NamedTuple):
    """What a GPU does in a second."""

    passes: float
    """Operations in passes and second moments."""
    cubes: float
    """Cubes of the sizes of second moments."""

    @classmethod
    def of(cls, wanda: float, sparsegpt: float) -> Rates:
        """Return the rates at which Wanda and SparseGPT take these seconds for the 8B model."""
        passes = operations(SMALL, 2, 0) / wanda
        return cls(passes, SMALL.cubes / (sparsegpt - operations(SMALL, 2, 1) / passes))


def operations(model: Model, passes: int, grams: int) -> float:
    """Return the operations of passes over the calibration text, and of its second moments."""
    return 2.0 * CALIBRATION * (passes * model.in_blocks + grams * model.gram)


def step_seconds(method: str, model: Model, rates: Rates) -> float:
    """Return the seconds of a step, with the copy of the weights."""
    ratio = model.weights / SMALL.weights
    if method in TRAINED:
        seconds = 6.0 * TRAINED[method] * model.weights / rates.passes
    elif method == "wanda":
        seconds = operations(model, 2, 0) / rates.passes
    elif method in ("sparsegpt", "gptq"):
        runs = 2 if method == "sparsegpt" else 1
        seconds = operations(model, runs, 1) / rates.passes + model.cubes / rates.cubes
    else:  # passes take most of their time
        seconds = MEASURED[method] * ratio
    return seconds + COPY * ratio


def changed_bytes(step: Step, model: Model) -> int:
    """Return the size of the tensors that a step changes, in 16 bits."""
    if step.method in EDITED:
        return BYTES * EDITED[step.method] * model.hidden * model.mlp
    return BYTES * (model.weights if step.method in ("ga", "gd") else model.in_blocks)


def evaluation_seconds(model: Model, rates: Rates) -> float:
    """Return the seconds to measure a state."""
    return 2.0 * EVALUATED * model.weights / rates.passes


def ray_seconds(compositions: Sequence[Composition], workers: int, costs: Costs) -> float:
    """Return the seconds of a run on a Ray cluster: its parts, those with the most work behind them first."""
    found = parts(compositions, PARTS_PER_TASK * workers, costs.expected, WORTH_A_PROCESS)
    after: dict[int | None, list[int]] = {}
    for number, part in enumerate(found):
        after.setdefault(part.after, []).append(number)
    ready = [(-found[i].cost, i) for i in after.get(None, ())]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            _, number = heapq.heappop(ready)
            heapq.heappush(running, (now + _own(found[number], costs), number))
        now, number = heapq.heappop(running)
        for follower in after.get(number, ()):
            heapq.heappush(ready, (-found[follower].cost, follower))
    return now


def _own(part: Part, costs: Costs) -> float:
    """Return the seconds of a part by itself."""
    wanted = [*part.compositions] if part.leaves is None else [*part.compositions, part.leaves]
    states = Plan.of(wanted).states
    built = [state for state in states if len(state.steps) > len(part.start.steps)]
    return sum(costs.expected(s.steps[-1]) for s in built) + len(part.compositions) * costs.expected(None)


def check(path: Path, workers: int) -> Iterator[str]:
    """Yield how well the costs of single steps forecast the longer compositions and the whole run."""
    report = read_run(path)
    ran = [record for record in report.compositions if record.status == "measured"]
    single = [record for record in ran if len(record.steps) <= 1]
    costs = Costs.of(
        [StepCost(step.id, step.method, step.seconds, 0) for record in single for step in record.steps],
        [record.evaluate_seconds for record in single if record.evaluate_seconds is not None],
    )
    close, longer = 0, [record for record in ran if len(record.steps) > 1]
    for record in longer:
        measured = record.steps[-1].seconds + (record.evaluate_seconds or 0.0)
        forecasted = costs.expected(parse(record.id).steps[-1]) + costs.expected(None)
        close += abs(forecasted / measured - 1) <= WITHIN
    yield f"{close} of {len(longer)} longer compositions within {WITHIN:.0%}: last step and evaluation"
    compositions = [parse(record.id) for record in ran]
    took = {tuple(s.id for s in r.steps[: i + 1]): step.seconds for r in ran for i, step in enumerate(r.steps)}
    work = sum(took.values()) + sum(record.evaluate_seconds or 0.0 for record in ran)
    yield _compared("all steps and evaluations", Plan.of(compositions).seconds(costs), work)
    start, end = (datetime.fromisoformat(str(time)) for time in (report.started, report.finished))
    whole = (end - start).total_seconds()
    yield _compared(f"whole run with {workers} workers", forecast(compositions, workers, costs), whole)


def _compared(what: str, forecasted: float, measured: float) -> str:
    return f"{what}: forecast {forecasted:,.0f} s, measured {measured:,.0f} s, {forecasted / measured - 1:+.1%}"


def paper() -> Iterator[str]:
    """Yield the tables of the suite `paper`."""
    rates = Rates.of(MEASURED["wanda"], MEASURED["sparsegpt"])
    gptq = step_seconds("gptq", SMALL, rates) - COPY
    yield (
        f"{rates.passes / 1e12:.0f} tera-operations a second in passes; GPTQ from these rates: {gptq:.0f} s, "
        f"measured {MEASURED['gptq']:.0f} s"
    )
    compositions = [Composition(), *load_recipe(SUITE_FOLDER / "conf", ["suite=paper"]).suite_compositions()]
    steps = [state.steps[-1] for state in Plan.of(compositions).states]
    yield "\n| method | steps | 8B: seconds a step | hours | 70B: seconds a step | hours |\n|---|---|---|---|---|---|"
    for method in dict.fromkeys(step.method for step in steps):
        count = sum(step.method == method for step in steps)
        cells = [step_seconds(method, model, rates) for model in (SMALL, LARGE)]
        yield f"| {method} | {count} | " + " | ".join(f"{s:,.0f} | {count * s / 3600:.1f}" for s in cells) + " |"
    cells = [evaluation_seconds(model, rates) for model in (SMALL, LARGE)]
    n = len(compositions)
    yield f"| evaluation | {n} | " + " | ".join(f"{s:,.0f} | {n * s / 3600:.1f}" for s in cells) + " |"
    yield "\n| model | workers | xdist | times faster | Ray | times faster |\n|---|---|---|---|---|---|"
    for model in (SMALL, LARGE):
        costs = _costs(model, rates, steps)
        alone = Plan.of(compositions).seconds(costs)
        for workers in WORKERS:
            times = forecast(compositions, workers, costs), ray_seconds(compositions, workers, costs)
            yield (
                f"| {model.name} | {workers} | " + " | ".join(f"{duration(t)} | {alone / t:.1f}" for t in times) + " |"
            )
    yield "\n| model | weights | snapshots of a worker | all states in the cache |\n|---|---|---|---|"
    for model in (SMALL, LARGE):
        plan, costs = Plan.of(compositions), _costs(model, rates, steps)
        stored = sum(costs.bytes(step) or 0 for step in steps)
        sizes = (BYTES * model.weights, plan.peak_bytes(costs), stored)
        yield f"| {model.name} | " + " | ".join(map(size, sizes)) + " |"


def _costs(model: Model, rates: Rates, steps: Sequence[Step]) -> Costs:
    found = [StepCost(str(s), s.method, step_seconds(s.method, model, rates), changed_bytes(s, model)) for s in steps]
    return Costs.of(found, [evaluation_seconds(model, rates)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checked = commands.add_parser("check", help="compare the forecast with a measured run")
    checked.add_argument("report", type=Path)
    checked.add_argument("--workers", type=int, default=1, help="workers of the run (1)")
    commands.add_parser("paper", help="forecast the suite `paper`")
    given = parser.parse_args()
    for line in check(given.report, given.workers) if given.command == "check" else paper():
        print(line)


if __name__ == "__main__":
    main()
