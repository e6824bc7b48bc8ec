"""Spend one budget over many linears: the multiple-choice knapsack. Plain numbers.

References: the relaxation is Sinha and Zoltners' (Operations Research 27, 1979). A bisection on λ
solves it, and HiGHS finishes exactly what reduced costs leave open; docs/methods/allocation.md.

Glossary
    row      the options of one linear (or tied group), in order of growing cost; the dense weight
             is the last where it may be kept
    cost     integer size of an option, in bits or parameters      c
    damage   what an option costs in quality, smaller is better    e
    price    λ, damage for one unit of cost at the optimum; options minimise e + λ c
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from compressor.errors import BudgetError

# relative gap between the answer and its bound below which the exact finish is not needed
GAP = 1e-5
BISECTIONS = 100


@dataclass(frozen=True)
class Row:
    """Options of one linear: `costs` ascending, with the `damages` of the same order, infinite for
    options that are ruled out.

    whole: the cost of the dense linear.
    """

    costs: tuple[int, ...]
    damages: tuple[float, ...]
    whole: int


@dataclass(frozen=True)
class Allocation:
    """Index of the chosen option in each row; total cost and damage; the price λ; a lower bound of
    the least damage.
    """

    choice: tuple[int, ...]
    cost: int
    damage: float
    price: float
    bound: float


def solve_milp(*arguments: Any, **options: Any) -> OptimizeResult:
    """`milp` without what HiGHS prints to the process's standard output, where results of commands
    go.
    """
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        return milp(*arguments, **options)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def check_budget(rows: Sequence[Row], budget: int) -> None:
    """Raise BudgetError naming the least reachable size unless the cheapest options fit."""
    least = sum(min(row.costs) for row in rows)
    if least > budget:
        whole = sum(row.whole for row in rows)
        raise BudgetError(
            f"the budget cannot be met: the smallest candidates keep {least / whole:.4f} of the "
            f"targets, asked for {budget / whole:.4f}; "
            f"raise --keep to at least {math.ceil(least / whole * 1e4) / 1e4:.4f}, or offer "
            "smaller candidates"
        )


def knapsack(rows: Sequence[Row], budget: int, exact: bool = True) -> Allocation:
    """Minimise Σ damage subject to Σ cost ≤ budget, one option for each row.

    A bisection on λ gives the best solution of the relaxation, single upgrades spend what is left,
    and where the gap to the dual bound is above 1e-5 HiGHS solves what remains: only options whose
    reduced cost is within the gap can be part of a better answer. Raises BudgetError if the
    cheapest options exceed the budget.
    """
    check_budget(rows, budget)
    width = max(len(row.costs) for row in rows)
    costs = np.array(
        [list(row.costs) + [0] * (width - len(row.costs)) for row in rows], dtype=np.int64
    )
    damages = np.array([list(row.damages) + [np.inf] * (width - len(row.damages)) for row in rows])
    price, choice, bound = relax(costs, damages, budget)
    choice = upgrade(costs, damages, choice, budget)
    value = total(damages, choice)
    if exact and value - bound > GAP * abs(value):
        better = finish(costs, damages, budget, price, slack=value - bound)
        if better is not None and total(damages, better) < value:
            choice = better
    return Allocation(
        tuple(map(int, choice)),
        int(total(costs, choice)),
        float(total(damages, choice)),
        price,
        bound,
    )


def total(table: np.ndarray, choice: np.ndarray):
    """Sum of one entry for each row of `table` (rows, options)."""
    return table[np.arange(len(choice)), choice].sum()


def relax(costs: np.ndarray, damages: np.ndarray, budget: int) -> tuple[float, np.ndarray, float]:
    """Least λ whose per-row minimisers of e + λ c fit the budget: (λ, choice, dual bound). Ties go
    to the cheaper option.
    """

    def pick(price: float) -> np.ndarray:
        reduced = damages + price * costs
        ties = reduced <= reduced.min(1, keepdims=True) * (1 + 1e-15)
        return np.where(ties, costs, np.iinfo(np.int64).max).argmin(1)

    def dual(price: float) -> float:
        return float((damages + price * costs).min(1).sum() - price * budget)

    choice = pick(0.0)
    if total(costs, choice) <= budget:
        return 0.0, choice, dual(0.0)
    finite = damages[np.isfinite(damages)]
    low, high = (
        0.0,
        max(float(finite.max() - finite.min()), np.finfo(float).tiny),
    )  # one unit of cost outweighs any damage
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high) if low > 0 else high * 1e-6
        if total(costs, pick(middle)) <= budget:
            high = middle
        elif low == middle:
            break
        else:
            low = middle
        if low > 0 and high / low < 1 + 1e-12:
            break
    return high, pick(high), max(dual(low), dual(high))


def upgrade(costs: np.ndarray, damages: np.ndarray, choice: np.ndarray, budget: int) -> np.ndarray:
    """Spend the leftover on single changes of option, the largest gain in damage for each unit of
    cost first.
    """
    choice, left = choice.copy(), budget - int(total(costs, choice))
    while True:
        index = np.arange(len(choice))
        extra = costs - costs[index, choice][:, None]
        gain = damages[index, choice][:, None] - damages
        rate = np.where((extra <= left) & (gain > 0), gain / np.maximum(extra, 1), 0.0)
        row, option = np.unravel_index(rate.argmax(), rate.shape)
        if rate[row, option] <= 0:
            return choice
        left -= int(extra[row, option])
        choice[row] = option


def finish(
    costs: np.ndarray, damages: np.ndarray, budget: int, price: float, slack: float
) -> np.ndarray | None:
    """Exact solution by HiGHS over the options that reduced-cost fixing leaves; None if it finds
    none in time.

    HiGHS accepts a budget row that is violated within its tolerance; the bound is then tightened by
    the overshoot and solved again.
    """
    reduced = damages + price * costs
    rows, options = np.nonzero(reduced <= reduced.min(1, keepdims=True) + slack * (1 + 1e-9))
    one_each = csr_array(
        (np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(costs), len(rows))
    )
    cost, damage = costs[rows, options], damages[rows, options]
    limit = float(budget)
    for _ in range(4):
        answer = solve_milp(
            damage / max(damage.max(), np.finfo(float).tiny),
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(cost[None] / budget, -np.inf, limit / budget),
            ],
            options={"mip_rel_gap": GAP, "time_limit": 60.0},
        )
        if answer.x is None:
            return None
        taken = answer.x > 0.5
        choice = np.zeros(len(costs), dtype=np.int64)
        choice[rows[taken]] = options[taken]
        over = int(total(costs, choice)) - budget
        if over <= 0:
            return choice
        limit -= 2 * over
    return None


Limit = tuple[
    Sequence[Sequence[int]], int
]  # what every option of every row takes of something, and how much of it there is


def constrained(rows: Sequence[Row], budget: int, limits: Sequence[Limit]) -> Allocation:
    """Minimise Σ damage subject to Σ cost ≤ budget and to every further limit, by HiGHS.

    The price is that of the relaxation with the budget alone, without the further limits. Raises
    BudgetError if no choice meets all limits, or if HiGHS finds none in time.
    """
    check_budget(rows, budget)
    owner = np.repeat(np.arange(len(rows)), [len(row.costs) for row in rows])
    damage = np.concatenate([row.damages for row in rows])
    allowed = np.isfinite(damage)
    damage = np.where(allowed, damage, 0.0)
    usages = [
        (np.concatenate([row.costs for row in rows]), budget),
        *((np.concatenate(list(table)), most) for table, most in limits),
    ]
    one_each = csr_array(
        (np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(rows), len(owner))
    )
    slack = 0.0
    for _ in range(4):
        bounds = [
            LinearConstraint(taken[None] / most, -np.inf, 1 - slack) for taken, most in usages
        ]
        answer = solve_milp(
            damage / max(damage.max(), np.finfo(float).tiny),
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, allowed.astype(float)),
            constraints=[LinearConstraint(one_each, 1, 1), *bounds],
            options={"mip_rel_gap": GAP, "time_limit": 60.0},
        )
        if answer.x is None:
            raise BudgetError(
                "no choice meets the budget and all of allocation.limits; raise one of them, or "
                "offer smaller candidates"
            )
        taken = np.flatnonzero(answer.x > 0.5)
        over = max(used[taken].sum() / most - 1 for used, most in usages)
        if over <= 0:  # HiGHS accepts rows that are violated within its tolerance
            break
        slack += 2 * over
    else:
        raise BudgetError(
            "no choice found that meets the budget and all of allocation.limits exactly; change "
            "one of them slightly"
        )
    firsts = np.cumsum([0, *(len(row.costs) for row in rows[:-1])])
    bound = (
        float(answer.mip_dual_bound) * damage.max() if answer.mip_dual_bound is not None else 0.0
    )
    price = knapsack(rows, budget, exact=False).price
    return Allocation(
        tuple(map(int, taken - firsts)),
        int(usages[0][0][taken].sum()),
        float(damage[taken].sum()),
        price,
        bound,
    )
