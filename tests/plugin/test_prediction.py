"""Predictions of orders: what a step does to other weights, the rules, and what runs do with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_lmcompose.budget import Budget
from pytest_lmcompose.cache.folder import Cache
from pytest_lmcompose.cache.run_cache import RunCache, StoredState
from pytest_lmcompose.composition import Step, parse
from pytest_lmcompose.costs import Costs, StepCost
from pytest_lmcompose.plan import reads_none
from pytest_lmcompose.prediction.effects import Effect, Grid, Mask, commutator, survival
from pytest_lmcompose.prediction.lines import cell
from pytest_lmcompose.prediction.predict import Predictor
from pytest_lmcompose.prediction.records import Pair, Prediction, in_order_of_information, pairs_of
from tests.plugin.conftest import NO_CACHE, Project

ROWS, COLS, STEP = 16, 64, 0.1


def weight(seed: int = 0, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed))


def rounded(values: Tensor, step: float = STEP) -> Tensor:
    return (values / step).round() * step


def effect(category: str, base: Tensor, changed: Tensor, **more: Tensor) -> Effect:
    """Return the effect of a step on a model of one linear weight, w, and of what `more` has."""
    return Effect(
        category,
        {"w": base} | {k: torch.ones_like(v) for k, v in more.items()},
        {"w": changed, **more},
        {"w": False},
        {},
    )


def test_a_weight_that_changes_no_more_is_rounded_as_before_however_that_was_chosen() -> None:
    base = weight()
    elsewhere = rounded(base + 0.7 * STEP * torch.randn(base.shape, generator=torch.Generator().manual_seed(1)))
    for state in (rounded(base), elsewhere):
        grid = Grid.of(state)
        assert grid is not None
        torch.testing.assert_close(grid.round(base, state, torch.zeros_like(base)), state)


def test_a_grid_is_the_same_whatever_is_likely() -> None:
    fine, coarse, none = rounded(weight()), rounded(weight(1), 0.3), weight(2)
    for values in (fine, coarse):
        found = Grid.of(values)
        assert found is not None
        for likely in map(Grid.of, (fine, coarse)):
            again = Grid.of(values, likely)
            assert again is not None and again[:2] == found[:2]
            torch.testing.assert_close(again.steps, found.steps, rtol=1e-6, atol=0)
    assert Grid.of(none, Grid.of(fine)) is None


def test_an_update_leaves_the_bucket_as_rounding_to_nearest_does() -> None:
    base = weight()
    delta = weight(1, scale=0.02) * (base.abs() < 0.5)  # within the range of the grid
    grid = Grid.of(rounded(base))
    assert grid is not None
    found, wanted = grid.round(base, rounded(base), delta), rounded(base + delta)
    assert ((found - wanted).abs() > 1e-5).float().mean() < 0.01
    assert 0.02 < float((found != grid.round(base, rounded(base), 0 * delta)).float().mean()) < 0.5


def largest(values: Tensor, counts: Tensor) -> Tensor:
    """Keep so many values of each row, those of largest magnitude."""
    places = values.abs().argsort(dim=1, descending=True).argsort(dim=1)
    return values * (places < counts.unsqueeze(1))


@pytest.mark.parametrize("counts", [torch.full((ROWS,), COLS // 2), 4 * torch.arange(ROWS)])
def test_pruning_chooses_again_what_magnitude_pruning_would(counts: Tensor) -> None:
    base, delta = weight(), weight(1, scale=0.1)
    own = largest(base, counts)
    mask = Mask.of(base, own, torch.ones(1))
    assert mask is not None
    torch.testing.assert_close(mask.prune(base, own, 0 * delta), own)
    found, wanted = mask.prune(base, own, delta), largest(base + delta, counts)
    assert ((found == 0) == (wanted == 0)).float().mean() > 0.98
    torch.testing.assert_close((found != 0).sum(1), counts)


def test_a_weight_with_few_zeros_has_no_mask() -> None:
    base = weight()
    assert Mask.of(base, base * (base.abs() > 0.005), torch.ones(1)) is None


def test_an_edit_of_a_model_with_other_scales_acts_on_its_scaled_inputs() -> None:
    base, delta = weight(), weight(1, scale=0.01)
    scales = torch.linspace(0.5, 2, COLS)
    smooth = effect("compress", base, base * scales, norm=1 / scales)
    edit = effect("edit", base, base + delta)
    torch.testing.assert_close(edit.after(smooth)["w"], (base + delta) * scales, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(smooth.after(edit)["w"], (base + delta) * scales, rtol=1e-3, atol=1e-5)


def test_differences_commute_and_projections_do_not() -> None:
    base = weight()
    one, other = effect("edit", base, base + weight(1, 0.01)), effect("unlearn", base, base + weight(2, 0.01))
    assert commutator(one.base, one.after(other), other.after(one)) < 1e-6
    lossy = effect("compress", base, rounded(base))
    assert commutator(one.base, one.after(lossy), lossy.after(one)) > 0.01
    faint = effect("edit", base, base + torch.zeros_like(base).index_fill(0, torch.tensor([0]), 1e-4))
    assert survival(faint, lossy, lossy.after(faint)) < 0.5
    assert survival(faint, faint, {"w": faint.changed["w"] + 1e-4}) > 0.9


def test_bits_are_lost_where_an_edit_comes_last() -> None:
    base = weight()
    edit, lossy = effect("edit", base, base + 0.01), effect("compress", base, rounded(base))
    mask = effect("compress", base, base * (base.abs() > 0.2))
    assert lossy.bits("w", edit) == lossy.grids["w"].bits < edit.bits("w", lossy) == 32
    assert mask.bits("w", lossy) == lossy.bits("w"), "a pruned weight stays on its grid"
    assert mask.bits("w", edit) < 32


def test_a_change_of_basis_is_not_readable() -> None:
    base = weight()
    rotation = torch.linalg.qr(weight(3)[:, :ROWS])[0]
    assert not effect("compress", base, rotation @ base).readable
    assert effect("edit", base, rotation @ base).readable


class OneWeight(nn.Module):
    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(base.clone())


class ReadsWeight:
    """Probes whose edits are there as far as the first row of the weight has moved by 0.03."""

    def __init__(self, base: Tensor) -> None:
        self.base = base
        self.pairs = {"edit": [1, 2], "unlearn": [], "perplexity": [1, 2], "recall": []}

    def measure(self, model: OneWeight, promises: Sequence[str]) -> dict[str, Tensor]:
        moved = (model.w.detach() - self.base)[0] / 0.03
        loss = -(model.w.detach() - self.base)[1:].square().sum().double()
        values = {"edit": moved[:2].double() * 0 + moved.mean().double(), "perplexity": loss.repeat(2)}
        return {promise: values[promise] for promise in promises}


@torch.no_grad()
def predictor(moved: float = 0.03) -> Predictor:
    """Return a predictor of one weight, whose first row an edit moves."""
    base = rounded(weight(scale=0.5)) + 1e-3
    edited = base.clone()
    edited[0] += moved  # less than half a step
    effects = {
        Step("memit"): effect("edit", base, edited),
        Step("rtn"): effect("compress", base, rounded(base)),
        Step("wanda"): effect("compress", base, base * (base.abs() > 0.2)),
        Step("rmu"): effect("unlearn", base, base - 0.5 * (edited - base)),
    }
    probes: Any = ReadsWeight(base)
    return Predictor(OneWeight(base), probes, effects)


def test_an_edit_that_rounding_would_undo_belongs_after_it() -> None:
    known = predictor()
    pair = known.pair(Step("memit"), Step("rtn"))
    told = {prediction.promise: prediction for prediction in pair.predictions}
    assert told["edit"].better == "rtn+memit"
    assert told["edit"].gap == pytest.approx(-1, abs=0.1)
    assert told["bits"].better == "memit+rtn"
    assert told["perplexity"].better is None, "both orders cost the same"
    assert pair.survival is not None and pair.survival < 0.1
    torch.testing.assert_close(known.model.w.data, known.effects[Step("rtn")].base["w"])  # restored


def test_a_step_keeps_its_own_promise_where_it_comes_last() -> None:
    (prediction, *rest) = predictor().pair(Step("rmu"), Step("memit")).predictions
    assert prediction.better == "rmu+memit"
    assert prediction.gap == pytest.approx(0.5, abs=0.01)
    assert [other.better for other in rest] == [None]


@pytest.mark.parametrize(("moved", "better"), [(0.03, "wanda+memit"), (0.009, None)])
def test_an_edit_that_holds_belongs_after_pruning_also_for_other_text(moved: float, better: str | None) -> None:
    told = {p.promise: p for p in predictor(moved).pair(Step("memit"), Step("wanda")).predictions}
    assert told["perplexity"].better == better


@pytest.mark.parametrize(("gap", "better"), [(0.01, "a+b"), (0.0001, "a+b"), (-0.5, None)])
def test_a_rule_decides_unless_the_gap_says_the_opposite(gap: float, better: str | None) -> None:
    assert Prediction("a", "b", "edit", gap, 0.1, rule=0.93).better == better
    assert Prediction("b", "a", "edit", -gap, 0.1, rule=0.07).better == better


@pytest.mark.parametrize(("gap", "better"), [(0.5, "a+b"), (-0.5, "b+a"), (0.05, None), (0.0, None), (None, None)])
def test_an_order_is_called_better_only_where_that_is_probable(gap: float | None, better: str | None) -> None:
    prediction = Prediction("a", "b", "edit", gap, 0.1)
    assert prediction.better == better
    assert json.loads(json.dumps(prediction.plain()))["better"] == better


def test_a_gain_is_named_only_in_the_direction_of_the_better_order() -> None:
    cells = [cell(Prediction("a", "b", "edit", gap, 0.1, rule=0.93)) for gap in (0.5, -0.001, None)]
    assert cells == ["a first (0.5)", "a first", "cannot tell"]


def test_what_is_least_certain_goes_first_after_single_steps() -> None:
    texts = ["memit+rtn", "rtn+memit", "memit+rmu", "base", "rtn", "rmu+memit", "rtn+rmu"]
    sure, unsure = (Prediction("a", "b", "edit", gap, 0.1) for gap in (0.9, 0.05))
    pairs = [
        Pair("memit", "rtn", (sure,), None, None, (0, 0)),
        Pair("rmu", "memit", (unsure,), None, None, (0, 0)),
    ]
    found = in_order_of_information([parse(text) for text in texts], pairs)
    assert list(map(str, found)) == ["base", "rtn", "rtn+rmu", "memit+rmu", "rmu+memit", "memit+rtn", "rtn+memit"]
    assert [set(map(str, pair)) for pair in pairs_of(found)] == [{"rtn", "rmu"}, {"memit", "rmu"}, {"memit", "rtn"}]


def test_a_budget_counts_states_once_and_leaves_out_what_would_end_late() -> None:
    now = [0.0]
    costs = Costs.of([StepCost("memit", "memit", 10, 1), StepCost("awq", "awq", 5, 1)], [2.0])
    budget = Budget(30, lambda: now[0])
    assert budget.fits(parse("memit"), costs, reads_none)  # 12 s
    now[0] = 12.0
    assert budget.fits(parse("memit+awq"), costs, reads_none)  # 7 s, because memit is there
    now[0] = 19.0
    assert not budget.fits(parse("awq+memit"), costs, reads_none)  # 17 s
    assert budget.fits(parse("awq"), costs, reads_none)
    assert budget.fits(parse("memit+awq"), costs, reads_none), "decided before"
    assert list(map(str, budget.left_out)) == ["awq+memit"]


def test_what_does_not_fit_is_neither_passed_nor_failed(project: Project) -> None:
    result = project.run("--lmcompose-budget=0.001s", "-rs", compose=("nudge", "nudge+round"))
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["not run, because the time was used up: 2 compositions: nudge, nudge+round"])


def test_predictions_come_from_the_cache_of_earlier_runs(project: Project, tmp_path: Path) -> None:
    project.arguments.remove(NO_CACHE)
    project.arguments.append(f"--lmcompose-cache-dir={tmp_path / 'cache'}")
    orders = ("nudge+nudge[layers=[1]]", "nudge[layers=[1]]+nudge")
    before = project.run("--lmcompose-plan", compose=orders)
    assert "predicted" not in before.stdout.str()
    project.run("--lmcompose-budget=1h", compose=("nudge", "nudge[layers=[1]]")).assert_outcomes(passed=2)
    result = project.run("--lmcompose-plan", compose=orders)
    result.stdout.fnmatch_lines(["predicted better orders*", "  nudge, nudge[[]layers=[[]1[]][]]: cannot tell"])


def test_a_missing_state_is_compared_with_the_most_similar_one(tmp_path: Path) -> None:
    cache = RunCache(Cache(tmp_path, 10**6, pytest.fail), "model")
    state = StoredState({"w": torch.zeros(2)}, (), "hash")
    for number, parts in enumerate(({"seed": 1, "code": "a"}, {"seed": 2, "code": "b"})):
        cache.keep_state(f"{number}" * 64, parse("ft"), state, parts, step_bytes=8)
    assert cache.differences(parse("ft"), {"seed": 1, "code": "c"}) == ("code",)
    assert cache.differences(parse("ft"), {"seed": 3, "code": "c"}) == ("seed", "code")
    assert cache.differences(parse("awq"), {"seed": 1, "code": "a"}) is None


@pytest.mark.parametrize("value", ["10", "0s", "ten minutes", "-1s", "1 h"])
def test_a_budget_needs_a_unit(refused: Any, value: str) -> None:
    assert "--lmcompose-budget: expected a time such as 90s" in refused(f"--lmcompose-budget={value}")


@pytest.mark.parametrize("others", [("-n", "2"), ("--lmcompose-engine=ray",)])
def test_a_budget_is_for_one_process(refused: Any, others: tuple[str, ...]) -> None:
    assert "one process decides what fits" in refused("--lmcompose-budget=1h", *others)
