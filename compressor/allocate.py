"""Spend one budget over many linears: the multiple-choice knapsack, and the published rules it is measured against. Plain numbers.

References: the λ-bisection with an exact finish is the allocation card's procedure 9.7 (Sinha and Zoltners 1979 for the relaxation);
uniform is SVD-LLM's; `threshold` WeLore's (arXiv 2407.11239); `by_role` LoRAP's (arXiv 2404.09695); `svd_llm_v2` arXiv 2503.12340;
`d_rank` arXiv 2509.25622; the depth bias is LEMS's (ICML 2026).

Glossary
    row      the options of one linear (or tied group), in order of growing cost; the dense weight is the last where it may be kept
    cost     integer size of an option, in bits or parameters      c
    damage   what an option costs in quality, smaller is better    e
    price    λ, damage for one unit of cost at the optimum; options minimise e + λ c
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from compressor.errors import BudgetError, ConfigError

GAP = 1e-5  # relative gap between the answer and its bound below which the exact finish is not needed
BISECTIONS = 100


@dataclass(frozen=True)
class Row:
    """Options of one linear: `costs` ascending, with the `damages` of the same order; `whole` is the cost of the dense linear."""

    costs: tuple[int, ...]
    damages: tuple[float, ...]
    whole: int


@dataclass(frozen=True)
class Allocation:
    """Index of the chosen option in each row; total cost and damage; the price λ; a lower bound of the least damage."""

    choice: tuple[int, ...]
    cost: int
    damage: float
    price: float
    bound: float


def check_budget(rows: Sequence[Row], budget: int) -> None:
    """Raise BudgetError naming the least reachable size unless the cheapest options fit."""
    least = sum(min(row.costs) for row in rows)
    if least > budget:
        whole = sum(row.whole for row in rows)
        raise BudgetError(
            f"the budget cannot be met: the smallest candidates keep {least / whole:.4f} of the targets, asked for {budget / whole:.4f}; "
            f"raise --keep to at least {math.ceil(least / whole * 1e4) / 1e4:.4f}, or offer smaller candidates"
        )


def knapsack(rows: Sequence[Row], budget: int, exact: bool = True) -> Allocation:
    """Minimise Σ damage subject to Σ cost ≤ budget, one option for each row.

    A bisection on λ gives the best solution of the relaxation, single upgrades spend what is left, and where the gap to the dual
    bound is above 1e-5 HiGHS solves what remains: only options whose reduced cost is within the gap can be part of a better answer.
    Raises BudgetError if the cheapest options exceed the budget.
    """
    check_budget(rows, budget)
    width = max(len(row.costs) for row in rows)
    costs = np.array([list(row.costs) + [0] * (width - len(row.costs)) for row in rows], dtype=np.int64)
    damages = np.array([list(row.damages) + [np.inf] * (width - len(row.damages)) for row in rows])
    price, choice, bound = relax(costs, damages, budget)
    choice = upgrade(costs, damages, choice, budget)
    value = total(damages, choice)
    if exact and value - bound > GAP * abs(value):
        better = finish(costs, damages, budget, price, slack=value - bound)
        if better is not None and total(damages, better) < value:
            choice = better
    return Allocation(tuple(map(int, choice)), int(total(costs, choice)), float(total(damages, choice)), price, bound)


def total(table: np.ndarray, choice: np.ndarray):
    """Sum of one entry for each row of `table` (rows, options)."""
    return table[np.arange(len(choice)), choice].sum()


def relax(costs: np.ndarray, damages: np.ndarray, budget: int) -> tuple[float, np.ndarray, float]:
    """Least λ whose per-row minimisers of e + λ c fit the budget: (λ, choice, dual bound). Ties go to the cheaper option."""

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
    low, high = 0.0, max(float(finite.max() - finite.min()), np.finfo(float).tiny)  # one unit of cost outweighs any damage
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
    """Spend the leftover on single changes of option, the largest gain in damage for each unit of cost first."""
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


def finish(costs: np.ndarray, damages: np.ndarray, budget: int, price: float, slack: float) -> np.ndarray | None:
    """Exact solution by HiGHS over the options that reduced-cost fixing leaves; None if it finds none in time.

    HiGHS accepts a budget row that is violated within its tolerance; the bound is then tightened by the overshoot and solved again.
    """
    reduced = damages + price * costs
    rows, options = np.nonzero(reduced <= reduced.min(1, keepdims=True) + slack * (1 + 1e-9))
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(costs), len(rows)))
    cost, damage = costs[rows, options], damages[rows, options]
    limit = float(budget)
    for _ in range(4):
        answer = milp(
            damage / max(damage.max(), np.finfo(float).tiny),
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None] / budget, -np.inf, limit / budget)],
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


def largest_within(row: Row, limit: float) -> int:
    """Index of the largest option of at most `limit`, or of the smallest option where none is."""
    return max(int(np.searchsorted(row.costs, limit + 1e-6, side="right")) - 1, 0)


def bisect(rows: Sequence[Row], pick: Callable[[float], list[int]], budget: int) -> list[int]:
    """Options at the largest knob in [0, 1] that fits the budget; `pick` must not shrink any row as the knob grows.

    Raises BudgetError if even the knob at 0 exceeds the budget.
    """
    check_budget(rows, budget)

    def fits(knob: float) -> bool:
        return sum(row.costs[option] for row, option in zip(rows, pick(knob), strict=True)) <= budget

    if fits(1.0):
        return pick(1.0)
    if not fits(0.0):
        raise BudgetError("the budget cannot be met by this allocation rule; choose `allocation.kind: knapsack` or raise --keep")
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return pick(low)


def uniform(rows: Sequence[Row], fractions: Sequence[float]) -> list[int]:
    """The largest option of each row within its fraction of the dense cost (rule R1)."""
    return [largest_within(row, fraction * row.whole) for row, fraction in zip(rows, fractions, strict=True)]


def threshold(rows: Sequence[Row], thresholds: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One global threshold τ: each row takes its largest option whose own threshold is at least τ (rule R2, WeLore).

    thresholds: one descending sequence for each row, an entry for each option; the dense option's is −1, below every τ but the last.
    """

    def pick(knob: float) -> list[int]:
        return [max(int(np.searchsorted(-np.asarray(own), -(1 - knob), side="right")) - 1, 0) for own in thresholds]

    return bisect(rows, pick, budget)


def by_role(rows: Sequence[Row], weights: Sequence[float], budget: int) -> list[int]:
    """Kept fractions in fixed proportion to a weight for each row, 1 at most; the common factor is bisected (rule R3, LoRAP)."""
    scale = 1 / min(weights)
    return bisect(rows, lambda knob: uniform(rows, [min(1.0, knob * scale * weight) for weight in weights]), budget)


def svd_llm_v2(rows: Sequence[Row], losses: Sequence[float], types: Sequence[str], budget: int) -> list[int]:
    """SVD-LLM V2 (rule R4): within each type the removed share is proportional to 1 / ln L.

    losses: L, the Frobenius norm of the output error over all calibration tokens at the uniform size; must exceed e.
    Raises ConfigError for a loss that does not.
    """
    for loss in losses:
        if loss <= math.e:
            raise ConfigError(f"allocation 'svd_llm_v2' needs losses above e, one is {loss:.3g}; give more text or use 'knapsack'")
    score = [1 / math.log(loss) for loss in losses]
    mean = {kind: float(np.mean([s for s, other in zip(score, types, strict=True) if other == kind])) for kind in set(types)}

    def pick(knob: float) -> list[int]:
        return uniform(rows, [min(1.0, max(0.0, 1 - (1 - knob) * s / mean[kind])) for s, kind in zip(score, types, strict=True)])

    return bisect(rows, pick, budget)


def d_rank(
    rows: Sequence[Row],
    effective_ranks: Sequence[float],
    rank_costs: Sequence[int],
    donors: Sequence[int | None],
    share: float,
    budget: int,
) -> list[int]:
    """D-Rank (rule R8): sizes ∝ √(effective rank · cost of one rank), then `share` of each donor's size moves to its receiver.

    rank_costs: in + out of each row; donors: index of the row that receives from this one (q, k → v of their block), or None.
    """
    sizes = np.sqrt(np.asarray(effective_ranks) * np.asarray(rank_costs))
    for giver, receiver in enumerate(donors):
        if receiver is not None:
            sizes[receiver] += share * sizes[giver]
            sizes[giver] *= 1 - share
    fractions = sizes / np.array([row.whole for row in rows])
    scale = 1 / fractions.min()
    return bisect(rows, lambda knob: uniform(rows, np.minimum(1.0, knob * scale * fractions)), budget)


def effective_rank(spectrum: Sequence[float]) -> float:
    """exp of the entropy of the normalised squared singular values (rule R7)."""
    share = np.asarray(spectrum) / np.sum(spectrum)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def depth_weight(block: int, blocks: int, bias: float) -> float:
    """LEMS's propagation factor d = 1 + γ (L − b) / L: damage in early blocks passes through more of the model."""
    return 1 + bias * (blocks - block) / blocks
