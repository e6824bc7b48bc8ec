"""Published rules for sharing out a budget, which the knapsack is measured against. Plain numbers.

References: uniform is SVD-LLM's; `threshold` WeLore's (arXiv 2407.11239); `by_role` LoRAP's (arXiv
2404.09695); `svd_llm_v2` arXiv 2503.12340; `d_rank` arXiv 2509.25622; the cap on single damages
ROCKET's (arXiv 2602.11008); the depth bias LEMS's (ICML 2026). Glossary: as in `knapsack`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from compressor.allocation.knapsack import Row, check_budget
from compressor.errors import BudgetError, ConfigError

BISECTIONS = 100


def capped(
    rows: Sequence[Row], budget: int, picks: Sequence[int], first: float, step: float = 0.1
) -> list[Row]:
    """Rows in which no option hurts more than α times the mean damage of `picks`: beyond, damages
    become infinite (ROCKET).

    α is the smallest of `first`, `first` + step, … whose cheapest allowed options fit the budget.
    Raises BudgetError as `knapsack` does.
    """
    check_budget(rows, budget)
    mean = float(np.mean([row.damages[pick] for row, pick in zip(rows, picks, strict=True)]))
    if mean <= 0:
        return list(rows)
    factor = first
    while True:
        allowed = [
            Row(
                row.costs,
                tuple(e if e <= factor * mean else math.inf for e in row.damages),
                row.whole,
            )
            for row in rows
        ]
        least = [
            min(
                (c for c, e in zip(row.costs, row.damages, strict=True) if e < math.inf),
                default=math.inf,
            )
            for row in allowed
        ]
        if sum(least) <= budget:
            return allowed
        factor += step


def largest_within(row: Row, limit: float) -> int:
    """Index of the largest option of at most `limit`, or of the smallest option where none is."""
    return max(int(np.searchsorted(row.costs, limit + 1e-6, side="right")) - 1, 0)


def bisect(rows: Sequence[Row], pick: Callable[[float], list[int]], budget: int) -> list[int]:
    """Options at the largest knob in [0, 1] that fits the budget; `pick` must not shrink any row as
    the knob grows.

    Raises BudgetError if even the knob at 0 exceeds the budget.
    """
    check_budget(rows, budget)

    def fits(knob: float) -> bool:
        return (
            sum(row.costs[option] for row, option in zip(rows, pick(knob), strict=True)) <= budget
        )

    if fits(1.0):
        return pick(1.0)
    if not fits(0.0):
        raise BudgetError(
            "the budget cannot be met by this allocation rule; choose `allocation.kind: knapsack` "
            "or raise --keep"
        )
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return pick(low)


def uniform(rows: Sequence[Row], fractions: Sequence[float]) -> list[int]:
    """The largest option of each row within its fraction of the dense cost (rule R1)."""
    return [
        largest_within(row, fraction * row.whole)
        for row, fraction in zip(rows, fractions, strict=True)
    ]


def threshold(rows: Sequence[Row], thresholds: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One global threshold τ: each row takes its largest option whose own threshold is at least τ
    (rule R2, WeLore).

    thresholds: one descending sequence for each row, an entry for each option; the dense option's
    is −1, below every τ but the last.
    """

    def pick(knob: float) -> list[int]:
        return [
            max(int(np.searchsorted(-np.asarray(own), -(1 - knob), side="right")) - 1, 0)
            for own in thresholds
        ]

    return bisect(rows, pick, budget)


def by_role(rows: Sequence[Row], weights: Sequence[float], budget: int) -> list[int]:
    """Kept fractions in fixed proportion to a weight for each row, 1 at most; the common factor is
    bisected (rule R3, LoRAP).
    """
    scale = 1 / min(weights)
    return bisect(
        rows,
        lambda knob: uniform(rows, [min(1.0, knob * scale * weight) for weight in weights]),
        budget,
    )


def svd_llm_v2(
    rows: Sequence[Row], losses: Sequence[float], types: Sequence[str], budget: int
) -> list[int]:
    """SVD-LLM V2 (rule R4): within each type the removed share is proportional to 1 / ln L.

    losses: L, the Frobenius norm of the output error over all calibration tokens at the uniform
    size; must exceed e. Raises ConfigError for a loss that does not.
    """
    for loss in losses:
        if loss <= math.e:
            raise ConfigError(
                f"allocation 'svd_llm_v2' needs losses above e, one is {loss:.3g}; give more text "
                "or use 'knapsack'"
            )
    score = [1 / math.log(loss) for loss in losses]
    mean = {
        kind: float(np.mean([s for s, other in zip(score, types, strict=True) if other == kind]))
        for kind in set(types)
    }

    def pick(knob: float) -> list[int]:
        return uniform(
            rows,
            [
                min(1.0, max(0.0, 1 - (1 - knob) * s / mean[kind]))
                for s, kind in zip(score, types, strict=True)
            ],
        )

    return bisect(rows, pick, budget)


def d_rank(
    rows: Sequence[Row],
    effective_ranks: Sequence[float],
    rank_costs: Sequence[int],
    donors: Sequence[int | None],
    share: float,
    budget: int,
) -> list[int]:
    """D-Rank (rule R8): sizes ∝ √(effective rank · cost of one rank), then `share` of each donor's
    size moves to its receiver.

    rank_costs: in + out of each row; donors: index of the row that receives from this one (q, k → v
    of their block), or None.
    """
    sizes = np.sqrt(np.asarray(effective_ranks) * np.asarray(rank_costs))
    for giver, receiver in enumerate(donors):
        if receiver is not None:
            sizes[receiver] += share * sizes[giver]
            sizes[giver] *= 1 - share
    fractions = sizes / np.array([row.whole for row in rows])
    scale = 1 / fractions.min()
    return bisect(
        rows, lambda knob: uniform(rows, np.minimum(1.0, knob * scale * fractions)), budget
    )


def effective_rank(spectrum: Sequence[float]) -> float:
    """exp of the entropy of the normalised squared singular values (rule R7)."""
    share = np.asarray(spectrum) / np.sum(spectrum)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def depth_weight(block: int, blocks: int, bias: float) -> float:
    """LEMS's propagation factor d = 1 + γ (L − b) / L: damage in early blocks passes through more
    of the model.
    """
    return 1 + bias * (blocks - block) / blocks
