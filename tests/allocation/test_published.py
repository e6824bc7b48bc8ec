"""Allocation on plain numbers: against brute force, bounds and the published rules' definitions."""

import itertools
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.allocation import knapsack, published
from compressor.allocation.knapsack import Row
from compressor.errors import BudgetError, ConfigError

EXACT = 1e-4  # relative; the solver's own gap is 1e-5


def random_rows(seed: int, groups: int, options: int, dense: bool = True) -> list[Row]:
    """Rows with noisy, roughly convex damages, in the manner of real error curves."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(groups):
        whole = int(rng.integers(5_000, 50_000))
        costs = np.unique(np.append(rng.integers(whole // 20, whole, options - 1), whole // 20))
        damages = rng.lognormal(0, 1) * (1 - costs / whole) ** 2 * rng.uniform(0.9, 1.1, len(costs))
        if dense:
            costs, damages = np.append(costs, whole), np.append(damages, 0.0)
        rows.append(Row(tuple(map(int, costs)), tuple(map(float, damages)), whole))
    return rows


def brute_force(rows: list[Row], budget: int) -> float:
    best = math.inf
    for choice in itertools.product(*(range(len(row.costs)) for row in rows)):
        if sum(row.costs[i] for row, i in zip(rows, choice, strict=True)) <= budget:
            best = min(best, sum(row.damages[i] for row, i in zip(rows, choice, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8])
def test_knapsack_equals_brute_force(seed, keep):
    rows = random_rows(seed, groups=5, options=5)
    budget = int(keep * sum(row.whole for row in rows))
    answer = knapsack.knapsack(rows, budget)
    assert answer.cost <= budget
    assert answer.damage == pytest.approx(brute_force(rows, budget), rel=EXACT)
    assert answer.bound <= answer.damage * (1 + EXACT)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.2, 0.95))
def test_more_budget_never_hurts_and_scaling_changes_nothing(seed, keep):
    rows = random_rows(seed, groups=8, options=6)
    budget = int(keep * sum(row.whole for row in rows))
    small, large = knapsack.knapsack(rows, budget), knapsack.knapsack(rows, int(budget * 1.05))
    assert large.damage <= small.damage * (1 + EXACT) + 1e-12
    scaled = [
        Row(row.costs, tuple(1e-6 * damage for damage in row.damages), row.whole) for row in rows
    ]
    assert knapsack.knapsack(scaled, budget).damage == pytest.approx(
        1e-6 * small.damage, rel=EXACT, abs=1e-18
    )


def test_dominated_option_changes_nothing():
    rows = random_rows(3, groups=6, options=6)
    budget = int(0.6 * sum(row.whole for row in rows))
    first = rows[0]
    worse = Row((*first.costs, first.whole + 1), (*first.damages, max(first.damages)), first.whole)
    assert (
        knapsack.knapsack([worse, *rows[1:]], budget).choice
        == knapsack.knapsack(rows, budget).choice
    )


def test_without_dense_option_greedy_on_convex_curves_is_optimal():
    costs = tuple(range(1, 9))
    rows = [Row(costs, tuple(scale / cost for cost in costs), 10) for scale in (1.0, 2.0, 5.0)]
    for budget in (5, 9, 14):
        assert knapsack.knapsack(rows, budget, exact=False).damage == pytest.approx(
            brute_force(rows, budget)
        )


def test_knapsack_is_never_worse_than_uniform():
    for seed in range(20):
        rows = random_rows(seed, groups=20, options=12)
        budget = int(0.7 * sum(row.whole for row in rows))
        uniform = published.pick_uniform(rows, [0.7] * len(rows))
        assert knapsack.knapsack(rows, budget).damage <= sum(
            row.damages[i] for row, i in zip(rows, uniform, strict=True)
        )


def usage(rows: list[Row], seed: int) -> list[list[int]]:
    """What each option takes of another resource: growing with its cost, unevenly."""
    rng = np.random.default_rng(seed)
    return [[int(cost * rng.uniform(0.3, 1.2)) for cost in row.costs] for row in rows]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.4, 0.6])
def test_further_limits_hold_and_the_answer_is_the_best(seed, share):
    rows = random_rows(seed, groups=4, options=5)
    budget, table = int(0.6 * sum(row.whole for row in rows)), usage(rows, seed)
    most = int(share * sum(max(row) for row in table))
    answer = knapsack.constrained(rows, budget, [(table, most)])
    assert answer.cost <= budget
    assert sum(row[pick] for row, pick in zip(table, answer.choice, strict=True)) <= most
    best = min(
        sum(row.damages[i] for row, i in zip(rows, choice, strict=True))
        for choice in itertools.product(*(range(len(row.costs)) for row in rows))
        if sum(row.costs[i] for row, i in zip(rows, choice, strict=True)) <= budget
        and sum(row[i] for row, i in zip(table, choice, strict=True)) <= most
    )
    assert answer.damage == pytest.approx(best, rel=EXACT)
    loose = knapsack.constrained(rows, budget, [(table, 10**9)])
    assert loose.damage == pytest.approx(knapsack.knapsack(rows, budget).damage, rel=EXACT)


def test_nothing_of_the_solver_reaches_standard_output(monkeypatch, capfd):
    """HiGHS prints now and then; standard output belongs to results."""

    def loud(*_, **__):
        os.write(1, b"HiGHS was here")
        return "answer"

    monkeypatch.setattr(knapsack, "milp", loud)
    assert knapsack.solve_milp() == "answer"
    print("result")
    assert capfd.readouterr().out == "result\n"


def test_limits_that_cannot_all_be_met_say_so():
    rows = [Row((40, 100), (1.0, 0.0), 100)]
    with pytest.raises(BudgetError, match=r"allocation\.limits"):
        knapsack.constrained(rows, 100, [([[50, 60]], 49)])


def test_infeasible_budget_names_the_least_reachable_fraction():
    rows = [Row((40, 100), (1.0, 0.0), 100), Row((20, 100), (1.0, 0.0), 100)]
    with pytest.raises(BudgetError, match=r"at least 0\.3000"):
        knapsack.knapsack(rows, 59)
    assert knapsack.knapsack(rows, 60).choice == (0, 0)


def test_uniform_takes_the_largest_option_within_the_fraction():
    row = Row((10, 20, 30, 100), (3.0, 2.0, 1.0, 0.0), 100)
    assert published.pick_uniform([row] * 3, [0.2, 0.29, 1.0]) == [1, 1, 3]


def test_threshold_is_one_cut_for_all_rows():
    rows = [Row((10, 20, 30, 100), (0.0,) * 4, 100), Row((10, 20, 30, 100), (0.0,) * 4, 100)]
    own = [(0.9, 0.5, 0.1, -1.0), (0.6, 0.4, 0.3, -1.0)]
    assert published.pick_by_threshold(rows, own, 30) == [1, 0]  # a cut at 0.5
    assert published.pick_by_threshold(rows, own, 40) == [1, 1]
    assert published.pick_by_threshold(rows, own, 59) == [1, 2]  # a cut between 0.3 and 0.1
    assert published.pick_by_threshold(rows, own, 129) == [
        2,
        2,
    ]  # below every component, above the dense options


def test_by_role_keeps_the_proportion_until_a_role_is_whole():
    row = Row(tuple(range(1, 101)), tuple(0.0 for _ in range(100)), 100)
    light, heavy = published.pick_by_role([row, row], [1.0, 3.0], 120)
    assert row.costs[heavy] == pytest.approx(3 * row.costs[light], abs=3)
    light, heavy = published.pick_by_role([row, row], [1.0, 3.0], 180)
    assert row.costs[heavy] == 100 and row.costs[light] == 80


def test_svd_llm_v2_removes_in_proportion_to_one_over_log_loss():
    row = Row(tuple(range(1, 1001)), tuple(0.0 for _ in range(1000)), 1000)
    low, high = published.pick_by_loss([row, row], [math.e**2, math.e**4], ["q", "q"], 1400)
    removed = 1000 - row.costs[low], 1000 - row.costs[high]
    assert removed[0] == pytest.approx(2 * removed[1], abs=4)
    with pytest.raises(ConfigError, match="above e"):
        published.pick_by_loss([row, row], [2.0, 50.0], ["q", "q"], 1400)


def test_d_rank_follows_the_square_root_rule_and_moves_ranks_to_values():
    row = Row(tuple(range(1, 1001)), tuple(0.0 for _ in range(1000)), 1000)
    one, four = published.pick_by_effective_rank(
        [row, row], [10.0, 40.0], [20, 20], [None, None], 0.0, 900
    )
    assert row.costs[four] == pytest.approx(2 * row.costs[one], abs=3)
    query, key, value = published.pick_by_effective_rank(
        [row] * 3, [10.0] * 3, [20] * 3, [2, 2, None], 0.25, 900
    )
    assert row.costs[query] == pytest.approx(225, abs=2)
    assert row.costs[value] == pytest.approx(450, abs=2)
    assert query == key


def test_effective_rank_of_flat_and_single_spectra():
    assert published.effective_rank([0.25] * 4) == pytest.approx(4)
    assert published.effective_rank([1.0, 0.0]) == pytest.approx(1)


def test_depth_weight_falls_to_the_last_block():
    assert published.depth_weight(0, 4, bias=5) == 6
    assert published.depth_weight(3, 4, bias=5) == pytest.approx(2.25)
    assert published.depth_weight(2, 4, bias=0) == 1


def test_capped_by_hand():
    """Mean damage 2 at uniform sizes. At α = 1 the first row needs its 9, and 9 + 4 exceed 12; at
    1.1 damages up to 2.2 are let in.
    """
    rows = [Row((2, 5, 9), (5.0, 2.2, 0.0), 9), Row((4, 8), (1.8, 0.0), 8)]
    capped = published.cap_damages(rows, 12, (1, 0), 1.0)
    assert [row.damages for row in capped] == [(math.inf, 2.2, 0.0), (1.8, 0.0)]
    assert [row.costs for row in capped] == [row.costs for row in rows]
    assert published.cap_damages(rows, 13, (1, 0), 1.0)[0].damages == (math.inf, math.inf, 0.0)
    assert published.cap_damages(rows, 12, (1, 0), 3.0) == rows
    assert published.cap_damages(rows, 17, (2, 1), 1.0) == rows  # nothing hurts
    with pytest.raises(BudgetError, match="the budget cannot be met"):
        published.cap_damages(rows, 5, (1, 0), 1.0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [0.4, 0.8])
def test_a_capped_knapsack_is_the_best_within_the_cap(seed, keep):
    rows = random_rows(seed, groups=5, options=5)
    budget = int(keep * sum(row.whole for row in rows))
    capped = published.cap_damages(rows, budget, published.pick_uniform(rows, [keep] * 5), 1.0)
    answer = knapsack.knapsack(capped, budget)
    assert answer.cost <= budget
    assert answer.damage == pytest.approx(brute_force(capped, budget), rel=EXACT)
    assert answer.damage >= knapsack.knapsack(rows, budget).damage * (1 - EXACT)
    limited = knapsack.constrained(
        capped, budget, [([row.costs for row in rows], budget)]
    )  # a second limit that says the same
    assert limited.damage == pytest.approx(answer.damage, rel=EXACT)
