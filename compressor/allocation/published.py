"""Published rules for sharing out a budget, which the knapsack is measured against.

A rule is a function of a `Table`, registered under the name that recipes give as
`allocation.kind`. The `pick_…` functions are the rules on plain numbers.

References: `uniform` is SVD-LLM's (arXiv 2403.07378); `threshold` WeLore's (arXiv 2407.11239);
`by_role` LoRAP's (arXiv 2404.09695); `svd_llm_v2` arXiv 2503.12340; `d_rank` arXiv 2509.25622; the
cap on single damages ROCKET's (arXiv 2602.11008); the depth bias LEMS's (ICML 2026). Glossary: as
in `knapsack`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compressor.allocation.assign import Assignment
from compressor.allocation.budgets import Budget
from compressor.allocation.decompose import Decompositions
from compressor.allocation.knapsack import Row, check_budget
from compressor.allocation.options import Option
from compressor.errors import BudgetError, ConfigError
from compressor.recipe.sections import Allocation

BISECTIONS = 100


@dataclass(frozen=True)
class Table:
    """What a published rule looks at: a row for each linear or group that was decomposed."""

    section: Allocation
    names: Sequence[str]  # of the linear or group of each row
    rows: Sequence[Row]
    options: Mapping[str, Sequence[Option]]
    assignments: Mapping[str, Assignment]
    decompositions: Decompositions
    each: Budget  # what every linear keeps, where a rule is about single ones
    budget: int  # of all rows
    tokens: int  # of calibration

    def role(self, name: str) -> str:
        """Return the role of a linear, or the name of a group. Raises ConfigError for none."""
        role = self.assignments[name].info.role if name in self.assignments else name
        if role is None:
            raise ConfigError(
                f"{name}: its role is unknown, and allocation '{self.section.kind}' goes by roles; "
                "use 'knapsack'"
            )
        return role


Rule = Callable[[Table], list[int]]  # index of the option of each row
RULES: dict[str, Rule] = {}  # by the name that recipes use


def rule(name: str) -> Callable[[Rule], Rule]:
    """Register a rule under the name that recipes use."""

    def register(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return register


@rule("fixed")
def fixed(table: Table) -> list[int]:
    """Take the one setting on offer; dense where that would not be smaller."""
    for decomposition in (part for name in table.names for part in table.decompositions[name]):
        if len(decomposition.curve.candidates) > 1:
            raise ConfigError(
                f"{decomposition.curve.linear}: '{decomposition.method.name}' offers several "
                "sizes, allocation 'fixed' takes one; list one in its options"
            )
    return [0] * len(table.rows)


@rule("uniform")
def uniform(table: Table) -> list[int]:
    """Keep the same fraction of every linear (SVD-LLM)."""
    check_budget(table.rows, table.budget)
    return pick_uniform(table.rows, [table.each.keep] * len(table.rows))


@rule("threshold")
def threshold(table: Table) -> list[int]:
    """Cut all spectra at one global threshold (WeLore)."""
    thresholds = []
    for name, row in zip(table.names, table.rows, strict=True):
        method, curve = table.decompositions[name][0].method, table.decompositions[name][0].curve
        if not curve.thresholds:
            raise ConfigError(
                f"{name}: method '{method.name}' has no threshold; use allocation 'knapsack'"
            )
        thresholds.append(curve.thresholds[: len(row.costs)])
    return pick_by_threshold(table.rows, thresholds, table.budget)


@rule("by_role")
def by_role(table: Table) -> list[int]:
    """Let the weighted roles share what all of them keep; others keep that fraction each (LoRAP).

    Groups have no role, and weight 1.
    """
    weights = [table.section.roles.get(table.role(name)) for name in table.names]
    picks = [0] * len(table.rows)
    for is_weighted in (False, True):
        places = [i for i, weight in enumerate(weights) if (weight is not None) == is_weighted]
        rows = [table.rows[i] for i in places]
        if rows:
            budget = table.each.share(sum(row.whole for row in rows))
            chosen = pick_by_role(rows, [weights[i] or 1.0 for i in places], budget)
            for place, pick in zip(places, chosen, strict=True):
                picks[place] = pick
    return picks


@rule("svd_llm_v2")
def svd_llm_v2(table: Table) -> list[int]:
    """Remove more where the loss at uniform sizes is smaller, role by role (SVD-LLM V2)."""
    losses = [
        math.sqrt(
            table.options[name][pick].candidate.error
            * table.decompositions[name][0].curve.energy
            * table.tokens
        )
        for name, pick in zip(table.names, uniform(table), strict=True)
    ]
    return pick_by_loss(table.rows, losses, [table.role(n) for n in table.names], table.budget)


@rule("d_rank")
def d_rank(table: Table) -> list[int]:
    """Size linears by their effective ranks, and move some of q and k to v (D-Rank)."""
    infos = [table.assignments[name].info for name in table.names]
    roles = [table.role(name) for name in table.names]
    values = {info.block: i for i, info in enumerate(infos) if roles[i] == "v"}
    donors = [
        values.get(info.block) if role in ("q", "k") else None
        for info, role in zip(infos, roles, strict=True)
    ]
    ranks = []
    for name in table.names:
        method, curve = table.decompositions[name][0].method, table.decompositions[name][0].curve
        if not curve.spectrum:
            raise ConfigError(
                f"{name}: method '{method.name}' has no spectrum for allocation 'd_rank'; use "
                "'low_rank'"
            )
        ranks.append(effective_rank(curve.spectrum))
    costs = [info.in_features + info.out_features for info in infos]
    return pick_by_effective_rank(
        table.rows, ranks, costs, donors, table.section.shift, table.budget
    )


def cap_damages(
    rows: Sequence[Row], budget: int, picks: Sequence[int], first: float, step: float = 0.1
) -> list[Row]:
    """Rule out options that hurt more than α times the mean damage of `picks` (ROCKET).

    Their damages become infinite. α is the smallest of `first`, `first` + step, … whose cheapest
    allowed options fit the budget. Raises BudgetError as `knapsack` does.
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
    """Return the index of the largest option of at most `limit`, or of the smallest one."""
    return max(int(np.searchsorted(row.costs, limit + 1e-6, side="right")) - 1, 0)


def bisect(rows: Sequence[Row], pick: Callable[[float], list[int]], budget: int) -> list[int]:
    """Pick options at the largest knob in [0, 1] that fits the budget.

    `pick` must not shrink any row as the knob grows.

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


def pick_uniform(rows: Sequence[Row], fractions: Sequence[float]) -> list[int]:
    """Pick the largest option of each row within its fraction of the dense cost."""
    return [
        largest_within(row, fraction * row.whole)
        for row, fraction in zip(rows, fractions, strict=True)
    ]


def pick_by_threshold(
    rows: Sequence[Row], thresholds: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Pick in each row the largest option whose own threshold is at least one global τ (WeLore).

    Args:
        rows: options of each linear.
        thresholds: one descending sequence for each row, an entry for each option; the dense
            option's is −1, below every τ but the last.
        budget: what all options may cost together.
    """

    def pick(knob: float) -> list[int]:
        return [
            max(int(np.searchsorted(-np.asarray(own), -(1 - knob), side="right")) - 1, 0)
            for own in thresholds
        ]

    return bisect(rows, pick, budget)


def pick_by_role(rows: Sequence[Row], weights: Sequence[float], budget: int) -> list[int]:
    """Keep fractions in fixed proportion to a weight for each row, 1 at most (LoRAP).

    The common factor is bisected.
    """
    scale = 1 / min(weights)
    return bisect(
        rows,
        lambda knob: pick_uniform(rows, [min(1.0, knob * scale * weight) for weight in weights]),
        budget,
    )


def pick_by_loss(
    rows: Sequence[Row], losses: Sequence[float], types: Sequence[str], budget: int
) -> list[int]:
    """Remove from each row of a type in proportion to 1 / ln L (SVD-LLM V2, arXiv 2503.12340).

    Args:
        rows: options of each linear.
        losses: L, the Frobenius norm of the output error over all calibration tokens at the
            uniform size.
        types: role of each row.
        budget: what all options may cost together.

    Raises:
        ConfigError: for a loss that does not exceed e.
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
        return pick_uniform(
            rows,
            [
                min(1.0, max(0.0, 1 - (1 - knob) * s / mean[kind]))
                for s, kind in zip(score, types, strict=True)
            ],
        )

    return bisect(rows, pick, budget)


def pick_by_effective_rank(
    rows: Sequence[Row],
    effective_ranks: Sequence[float],
    rank_costs: Sequence[int],
    donors: Sequence[int | None],
    share: float,
    budget: int,
) -> list[int]:
    """Size rows ∝ √(effective rank · cost of one rank), then move `share` of each donor's size to
    its receiver (D-Rank, arXiv 2509.25622).

    Args:
        rows: options of each linear.
        effective_ranks: of the spectrum of each row.
        rank_costs: in + out of each row.
        donors: index of the row that receives from this one (q, k → v of their block), or None.
        share: fraction β that is moved.
        budget: what all options may cost together.
    """
    sizes = np.sqrt(np.asarray(effective_ranks) * np.asarray(rank_costs))
    for giver, receiver in enumerate(donors):
        if receiver is not None:
            sizes[receiver] += share * sizes[giver]
            sizes[giver] *= 1 - share
    fractions = sizes / np.array([row.whole for row in rows])
    scale = 1 / fractions.min()
    return bisect(
        rows, lambda knob: pick_uniform(rows, np.minimum(1.0, knob * scale * fractions)), budget
    )


def effective_rank(spectrum: Sequence[float]) -> float:
    """Return exp of the entropy of the normalised squared singular values (arXiv 2509.25622)."""
    share = np.asarray(spectrum) / np.sum(spectrum)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def depth_weight(block: int, blocks: int, bias: float) -> float:
    """Return LEMS's propagation factor d = 1 + γ (L − b) / L.

    Damage in early blocks passes through more of the model.
    """
    return 1 + bias * (blocks - block) / blocks
