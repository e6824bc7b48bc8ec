"""From curves and probes to a plan: damages in one currency, budgets from the recipe, the allocation rule it names."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from compressor import allocate
from compressor.allocate import Row
from compressor.decompose import Assignment, Decomposition
from compressor.errors import ConfigError
from compressor.model import selects
from compressor.plan import DENSE, Candidate, Choice, Plan
from compressor.probe import ProbeResult, damage
from compressor.recipe import Recipe, size_in_bytes

MIB_BITS = 8 * 2**20
ResultOf = dict[tuple[str, int], ProbeResult]  # (linear, index of its decomposition) → probe


@dataclass(frozen=True)
class Option:
    """One way to store one linear, as the allocation sees it."""

    cost: int
    damage: float
    candidate: Candidate
    decomposition: Decomposition | None  # None: dense


@dataclass(frozen=True)
class Solution:
    """The option of every linear, the price λ in damage for each unit of cost, and whether damages are nats."""

    options: dict[str, Option]
    price: float | None
    in_nats: bool


def linear_options(recipe: Recipe, assignment: Assignment, found: Sequence[Decomposition], damages: list[list[float]]) -> list[Option]:
    """All options of one linear in order of growing cost; dense is among them if it may be kept, or if nothing is smaller."""
    bits = recipe.allocation.count == "bits"
    options = [
        Option(candidate.bits if bits else candidate.parameters, hurt, candidate, decomposition)
        for decomposition, hurts in zip(found, damages, strict=True)
        for candidate, hurt in zip(decomposition.curve.candidates, hurts, strict=True)
    ]
    if assignment.keep_dense or not options:
        curve = found[0].curve
        dense = Candidate(DENSE, {}, curve.dense_bits, curve.dense_parameters, 0.0)
        options.append(Option(dense.bits if bits else dense.parameters, 0.0, dense, None))
    return sorted(options, key=lambda option: (option.cost, option.damage))


def damages_of(
    recipe: Recipe, assignments: dict[str, Assignment], found: dict[str, list[Decomposition]], probes: ResultOf, blocks: int
) -> dict[str, list[list[float]]]:
    """Damage of every candidate: nats per token from a probe or the two-sided error as it is, or the relative error.

    The two-sided error is the second-order term ½ tr(H D G Dᵀ) of the loss, in nats per token. Raises ConfigError if a method's metric has
    no such reading.
    """
    kind, result = recipe.allocation.damage, {}
    for name, decompositions in found.items():
        weight = allocate.depth_weight(assignments[name].info.block, blocks, recipe.allocation.depth_bias)
        result[name] = []
        for index, (method, curve) in enumerate((d.method, d.curve) for d in decompositions):
            if recipe.allocation.kind != "knapsack" or kind == "relative_error":
                result[name].append([candidate.error for candidate in curve.candidates])
            elif kind == "kl_probe":
                result[name].append(damage(curve, probes[name, index], weight) if curve.candidates else [])
            elif getattr(method, "metric", None) == "two_sided":
                result[name].append([0.5 * curve.energy * candidate.error for candidate in curve.candidates])
            else:
                raise ConfigError(f"{name}: allocation.damage 'two_sided' needs methods with metric 'two_sided'; choose 'kl_probe'")
    return result


def budgets(recipe: Recipe, assignments: dict[str, Assignment], whole: dict[str, int], other_bytes: int) -> list[tuple[list[str], float]]:
    """Linears that share a budget, and the fraction of their dense cost it is. `whole`: dense cost of each linear.

    other_bytes: what the checkpoint holds besides the targets, for `target_size`. Raises ConfigError for linears without a fraction.
    """
    names, keep = list(assignments), recipe.allocation.keep
    if recipe.allocation.target_size is not None:
        left = 8 * (size_in_bytes(recipe.allocation.target_size) - other_bytes)
        if recipe.allocation.count != "bits":
            raise ConfigError("allocation.target_size counts bytes; set allocation.count to bits, or give keep")
        if left <= 0:
            raise ConfigError(
                f"allocation.target_size {recipe.allocation.target_size} is less than what is not targeted ({other_bytes:,} bytes); "
                "raise it or target more linears"
            )
        return [(names, min(1.0, left / sum(whole.values())))]
    if not isinstance(keep, dict):
        return [(names, keep)]
    groups: dict[str, list[str]] = {pattern: [] for pattern in keep}
    for name in names:
        pattern = next((pattern for pattern in keep if selects(pattern, assignments[name].info)), None)
        if pattern is None:
            raise ConfigError(f"allocation.keep has no entry for {name}; add a last entry '*'")
        groups[pattern].append(name)
    if empty := [pattern for pattern, members in groups.items() if not members]:
        raise ConfigError(f"allocation.keep: '{empty[0]}' selects no target that an earlier entry has not taken")
    return [(members, keep[pattern]) for pattern, members in groups.items()]


def solve(
    recipe: Recipe,
    assignments: dict[str, Assignment],
    found: dict[str, list[Decomposition]],
    options: dict[str, list[Option]],
    other_bytes: int,
    tokens: int,
) -> Solution:
    """Choose one option for each linear by the recipe's rule. `tokens`: calibration tokens, which scale SVD-LLM V2's losses.

    Raises BudgetError or ConfigError where the rule cannot meet the budget.
    """
    bits = recipe.allocation.count == "bits"
    whole = {name: (d[0].curve.dense_bits if bits else d[0].curve.dense_parameters) for name, d in found.items()}
    chosen: dict[str, Option] = {}
    prices = []
    for names, keep in budgets(recipe, assignments, whole, other_bytes):
        rows = [Row(tuple(o.cost for o in options[name]), tuple(o.damage for o in options[name]), whole[name]) for name in names]
        budget = int(keep * sum(row.whole for row in rows) + 1e-6)
        if recipe.allocation.kind == "knapsack":
            answer = allocate.knapsack(rows, budget)
            picks: Sequence[int] = answer.choice
            prices.append(answer.price)
        else:
            picks = RULES[recipe.allocation.kind](Rule(recipe, names, assignments, found, options, rows, keep, budget, tokens))
        chosen |= {name: options[name][pick] for name, pick in zip(names, picks, strict=True)}
    in_nats = recipe.allocation.kind == "knapsack" and recipe.allocation.damage != "relative_error"
    return Solution(chosen, max(prices) if prices and in_nats else None, in_nats)


@dataclass(frozen=True)
class Rule:
    """What a published rule looks at."""

    recipe: Recipe
    names: list[str]
    assignments: dict[str, Assignment]
    found: dict[str, list[Decomposition]]
    options: dict[str, list[Option]]
    rows: list[Row]
    keep: float
    budget: int
    tokens: int

    def role(self, name: str) -> str:
        role = self.assignments[name].info.role
        if role is None:
            raise ConfigError(f"{name}: its role is unknown, and allocation '{self.recipe.allocation.kind}' goes by roles; use 'knapsack'")
        return role

    def spectrum(self, name: str) -> tuple[float, ...]:
        spectrum = self.found[name][0].curve.spectrum
        if not spectrum:
            raise ConfigError(f"{name}: method '{self.found[name][0].method.name}' has no spectrum for allocation 'd_rank'; use 'low_rank'")
        return spectrum

    def uniform(self) -> list[int]:
        allocate.check_budget(self.rows, self.budget)
        return allocate.uniform(self.rows, [self.keep] * len(self.rows))

    def threshold(self) -> list[int]:
        thresholds = []
        for name, row in zip(self.names, self.rows, strict=True):
            own = self.found[name][0].curve.thresholds
            if not own:
                raise ConfigError(f"{name}: method '{self.found[name][0].method.name}' has no threshold; use allocation 'knapsack'")
            thresholds.append(own[: len(row.costs)])
        return allocate.threshold(self.rows, thresholds, self.budget)

    def by_role(self) -> list[int]:
        roles = self.recipe.allocation.roles
        return allocate.by_role(self.rows, [roles.get(self.role(name), 1.0) for name in self.names], self.budget)

    def svd_llm_v2(self) -> list[int]:
        picks = self.uniform()
        losses = [
            math.sqrt(self.options[name][pick].candidate.error * self.found[name][0].curve.energy * self.tokens)
            for name, pick in zip(self.names, picks, strict=True)
        ]
        return allocate.svd_llm_v2(self.rows, losses, [self.role(name) for name in self.names], self.budget)

    def d_rank(self) -> list[int]:
        values = {self.assignments[n].info.block: i for i, n in enumerate(self.names) if self.role(n) == "v"}
        donors = [values.get(self.assignments[n].info.block) if self.role(n) in ("q", "k") else None for n in self.names]
        ranks = [allocate.effective_rank(self.spectrum(name)) for name in self.names]
        costs = [info.in_features + info.out_features for info in (self.assignments[n].info for n in self.names)]
        return allocate.d_rank(self.rows, ranks, costs, donors, self.recipe.allocation.shift, self.budget)


RULES: dict[str, Callable[[Rule], list[int]]] = {
    "uniform": Rule.uniform,
    "threshold": Rule.threshold,
    "by_role": Rule.by_role,
    "svd_llm_v2": Rule.svd_llm_v2,
    "d_rank": Rule.d_rank,
}


def correct(options: list[Option], candidate: Candidate, factor: float) -> list[Option]:
    """Options with the damage of one candidate multiplied by what its stored error departs by from the expected one."""
    return [replace(option, damage=option.damage * factor) if option.candidate is candidate else option for option in options]


def to_plan(solution: Solution, found: dict[str, list[Decomposition]], recipe: Recipe) -> Plan:
    """The solution as plain data, errors not yet measured; the price in nats for each MiB where both are known."""
    choices = {}
    for name, option in solution.options.items():
        curve, candidate = found[name][0].curve, option.candidate
        choices[name] = Choice(
            candidate.method,
            candidate.setting,
            candidate.bits,
            candidate.parameters,
            curve.dense_bits,
            curve.dense_parameters,
            predicted=candidate.error,
            kl=option.damage if solution.in_nats else None,
        )
    known = solution.price is not None and recipe.allocation.count == "bits"
    return Plan(choices, solution.price * MIB_BITS if known else None, recipe.model_dump(mode="json"))
