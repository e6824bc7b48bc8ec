"""From curves and probes to a plan: damages in one currency, budgets from the recipe, the
allocation rule it names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.allocation import knapsack, published
from compressor.allocation.assign import Assignment, Group
from compressor.allocation.budgets import budgets, reserved
from compressor.allocation.decompose import Decomposition, apart
from compressor.allocation.knapsack import Limit, Row
from compressor.allocation.options import (
    Bundle,
    Option,
    cost_of,
    damage_of,
    decomposed,
    joint,
    linear_options,
    tied,
)
from compressor.allocation.probe import ProbeResult, damage
from compressor.allocation.rules import RULES, Rule
from compressor.errors import BudgetError, ConfigError
from compressor.linears import CompressedLinear
from compressor.plan import Choice, Plan
from compressor.recipe.sections import Recipe

MIB_BITS = 8 * 2**20
ResultOf = dict[
    tuple[str, int], ProbeResult
]  # (linear or group, index of its decomposition) → probe
Found = dict[
    str, list[Decomposition]
]  # linear or group → one decomposition for each method that competes for it


@dataclass(frozen=True)
class Problem:
    """What an allocation is about, apart from its options."""

    recipe: Recipe
    assignments: dict[str, Assignment]
    groups: dict[str, Group]
    found: Found
    other_bytes: int  # what the checkpoint holds besides the targets
    tokens: int  # of calibration

    @property
    def bits(self) -> bool:
        return self.recipe.allocation.count == "bits"

    def whole(self, name: str) -> int:
        """Dense cost of a linear."""
        return self.assignments[name].bits if self.bits else self.assignments[name].parameters


@dataclass(frozen=True)
class Solution:
    """Chosen options by linear or group, together one for every linear; the price λ in damage for
    each unit of cost; its currency.
    """

    options: dict[str, Option]
    price: float | None
    in_nats: bool


def options_of(problem: Problem, damages: dict[str, list[list[float]]]) -> dict[str, list[Option]]:
    """Options of every linear, and of every group whose linears are decomposed together."""
    found = {
        name: linear_options(name, assignment, problem.found[name], damages[name], problem.bits)
        for name, assignment in problem.assignments.items()
    }
    return found | {
        name: decomposed(name, problem.found[name], damages[name], problem.bits)
        for name in problem.groups
    }


def damages_of(
    recipe: Recipe,
    blocks: Mapping[str, int],
    found: Mapping[str, list[Decomposition]],
    probes: ResultOf,
    depth: int,
) -> dict[str, list[list[float]]]:
    """Damage of every candidate: nats per token from a probe, an error as it is in the metric
    named, or the relative error.

    The two-sided error is the second-order term ½ tr(H D G Dᵀ) of the loss, in nats per token; that
    of the Gram is tr(D G Dᵀ). blocks: block of each linear or group; depth: how many the model has.
    Raises ConfigError if a method's metric has no such reading.
    """
    kind, result = recipe.allocation.damage, {}
    for name, decompositions in found.items():
        weight = published.depth_weight(blocks[name], depth, recipe.allocation.depth_bias)
        result[name] = []
        for index, (method, curve) in enumerate((d.method, d.curve) for d in decompositions):
            if recipe.allocation.kind != "knapsack" or kind == "relative_error":
                result[name].append([candidate.error for candidate in curve.candidates])
            elif recipe.allocation.probes:
                result[name].append(
                    damage(curve, probes[name, index], weight) if curve.candidates else []
                )
            elif getattr(method, "metric", None) == kind:
                scale = curve.energy * (0.5 if kind == "two_sided" else 1.0)
                result[name].append([scale * candidate.error for candidate in curve.candidates])
            else:
                raise ConfigError(
                    f"{name}: allocation.damage '{kind}' needs methods with metric '{kind}'; "
                    "choose 'fisher_probe' or 'kl_probe'"
                )
    return result


def rows_of(
    problem: Problem,
    options: Mapping[str, list[Option]],
    names: Sequence[str],
    sharing: set[str] | None,
) -> list[list[Bundle]]:
    """Everything that can be chosen, a row for each decision: single linears, and groups that share
    or are tied.

    sharing: groups that are known to share or, None, not known yet. A known group has bundles that
    share alone, others are taken apart: with single options for each linear the answer is exact,
    where bundles hold only what some price makes the best. Raises ConfigError for a group that lies
    in two budgets, BudgetError for a linear that is left without an option.
    """
    rows, members = (
        [],
        {name for group in problem.groups.values() for name in group.members if name in names},
    )
    for group in problem.groups.values():
        inside = [name for name in group.members if name in names]
        if not inside:
            continue
        if len(inside) < len(group.members):
            raise ConfigError(
                f"{group.name}: linears that share or are tied need one budget; give them one "
                "entry of allocation.keep"
            )
        separate, together = (
            [options[name] for name in inside],
            [(option,) for option in options[group.name]],
        )
        if sharing is not None and group.name in sharing:
            rows.append(together)
        elif group.tied:
            rows.append(tied(group, separate) + together)
        elif sharing is None and together:
            alone = problem.assignments[inside[0]]
            rows.append((joint(separate) if alone.methods or alone.keep_dense else []) + together)
        else:
            members -= set(inside)
    rows += [[(option,) for option in options[name]] for name in names if name not in members]
    if not all(rows):
        raise BudgetError(
            "some linears have no candidate and may not stay dense"
        )  # met by entrants of a contest only
    return [sorted(row, key=lambda bundle: (cost_of(bundle), damage_of(bundle))) for row in rows]


def solve(problem: Problem, options: Mapping[str, list[Option]]) -> Solution:
    """Choose one option for each linear by the recipe's rule. Raises BudgetError or ConfigError
    where the rule cannot meet the budget.
    """
    recipe, assignments = problem.recipe, problem.assignments
    whole = {name: problem.whole(name) for name in assignments}
    chosen: list[Bundle] = []
    prices = []
    for names, keep in reserved(
        recipe, assignments, whole, budgets(recipe, assignments, whole, problem.other_bytes)
    ):
        budget = int(keep * sum(whole[name] for name in names) + 1e-6)
        if recipe.allocation.kind == "knapsack":
            bundles, price = spend(problem, options, names, budget)
            prices.append(price)
        else:
            table = rows_of(problem, options, names, sharing=None)
            settled = [row[0] for row in table if not is_open(problem, row)]
            table = [row for row in table if is_open(problem, row)]
            rows = [row_of(problem, row) for row in table]
            if (
                recipe.allocation.target_size is None
            ):  # rules keep a fraction of each linear: what stays dense anyway costs others nothing
                left = int(keep * sum(row.whole for row in rows) + 1e-6)
            else:
                left = budget - sum(map(cost_of, settled))
            units = [row[0][0].unit for row in table]
            rule = Rule(
                recipe, units, assignments, problem.found, options, rows, keep, left, problem.tokens
            )
            picks = RULES[recipe.allocation.kind](rule) if rows else []
            bundles = settled + [row[pick] for row, pick in zip(table, picks, strict=True)]
        chosen += bundles
    in_nats = recipe.allocation.probes or (
        recipe.allocation.kind == "knapsack" and recipe.allocation.damage == "two_sided"
    )
    return Solution(
        {option.unit: option for bundle in chosen for option in bundle},
        max(prices) if prices and in_nats else None,
        in_nats,
    )


def is_open(problem: Problem, row: Sequence[Bundle]) -> bool:
    """Whether anything in a row was decomposed; a linear that stays dense whatever the budget was
    not.
    """
    return any(problem.found[option.unit] for bundle in row for option in bundle)


def spend(
    problem: Problem, options: Mapping[str, list[Option]], names: Sequence[str], budget: int
) -> tuple[list[Bundle], float]:
    """Knapsack over the linears of one budget: which groups share is settled first, then everything
    else exactly.
    """
    sharing: set[str] | None = None
    while True:
        table = rows_of(problem, options, names, sharing)
        rows = [row_of(problem, row) for row in table]
        if problem.recipe.allocation.cap is not None:
            keep = budget / sum(row.whole for row in rows)
            rows = published.capped(
                rows,
                budget,
                published.uniform(rows, [keep] * len(rows)),
                problem.recipe.allocation.cap,
            )
        limits = [
            limit_of(problem, name, fraction, table, names)
            for name, fraction in problem.recipe.allocation.limits.items()
        ]
        answer = (
            knapsack.knapsack(rows, budget)
            if not limits
            else knapsack.constrained(rows, budget, limits)
        )
        bundles = [row[pick] for row, pick in zip(table, answer.choice, strict=True)]
        if sharing is not None or not any(problem.found[name] for name in problem.groups):
            return bundles, answer.price
        sharing = {option.unit for bundle in bundles for option in bundle} & problem.groups.keys()


def row_of(problem: Problem, bundles: Sequence[Bundle]) -> Row:
    members = [
        name
        for option in bundles[0]
        for name in (option.decomposition.members if option.decomposition else [option.unit])
    ]
    return Row(
        tuple(map(cost_of, bundles)),
        tuple(map(damage_of, bundles)),
        sum(problem.whole(name) for name in members),
    )


def limit_of(
    problem: Problem,
    name: str,
    fraction: float,
    table: Sequence[Sequence[Bundle]],
    names: Sequence[str],
) -> Limit:
    """Another constraint: what every bundle takes of it, and how much there is. Raises ConfigError
    for a method that does not say.
    """
    dense = [assignment for linear, assignment in problem.assignments.items() if linear in names]
    whole = sum(
        a.parameters if name == "parameters" else a.info.out_features * a.info.in_features
        for a in dense
    )
    for option in (option for row in table for bundle in row for option in bundle):
        if getattr(option.candidate, name) is None:
            raise ConfigError(
                f"method '{option.candidate.method}' does not say its {name}; take it out of "
                "allocation.limits"
            )
    return [
        [sum(getattr(option.candidate, name) for option in bundle) for bundle in row]
        for row in table
    ], int(fraction * whole + 1e-6)


def to_plan(
    solution: Solution,
    problem: Problem,
    modules: Mapping[str, CompressedLinear],
    expected: Mapping[str, float],
    measured: Mapping[str, float],
    contest: dict[str, float],
) -> Plan:
    """The solution as plain data; the price in nats for each MiB where both are known.

    expected, measured: error of each linear or group before and after it was built.

    Linears that share a decomposition are listed one by one: what each stores, the errors of all,
    and an equal part of the damage.
    """
    choices = {}
    for option in solution.options.values():
        candidate, members = (
            option.candidate,
            list(option.decomposition.members) if option.decomposition else [option.unit],
        )
        for name in members:
            dense, alone = problem.assignments[name], option.unit == name
            choices[name] = Choice(
                candidate.method,
                candidate.setting if alone else candidate.setting | {"shared": members},
                candidate.bits if alone else modules[name].bits(),
                candidate.parameters if alone else modules[name].stored_parameters(),
                dense.bits,
                dense.parameters,
                predicted=expected.get(option.unit, 0.0),
                measured=measured.get(option.unit, 0.0),
                kl=option.damage / len(members) if solution.in_nats else None,
                options=apart(option.decomposition, problem.found[option.unit])
                if option.decomposition
                else None,
            )
    known = solution.price is not None and problem.recipe.allocation.count == "bits"
    price = solution.price * MIB_BITS if known else None
    return Plan(
        {name: choices[name] for name in problem.assignments},
        price,
        problem.recipe.model_dump(mode="json"),
        contest,
    )
