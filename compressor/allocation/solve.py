"""From curves and probes to a plan: damages in one currency, budgets from the recipe, the
allocation rule it names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.allocation import knapsack, published
from compressor.allocation.assign import Assignment, Group
from compressor.allocation.budgets import Budget, divide, reserve_residuals
from compressor.allocation.decompose import Decompositions, distinguishing_options
from compressor.allocation.knapsack import Limit, Row, check_budget
from compressor.allocation.options import (
    Bundle,
    Option,
    combine,
    cost_of,
    damage_of,
    decomposed_options,
    linear_options,
    tie,
)
from compressor.allocation.probe import ProbeResult, predict_damages
from compressor.allocation.published import RULES, Table
from compressor.errors import BudgetError, ConfigError
from compressor.linears.base import Modules
from compressor.plan import Choice, Plan
from compressor.recipe.sections import Recipe

MIB_BITS = 8 * 2**20
# (linear or group, index of its decomposition) → probe
ProbeResults = dict[tuple[str, int], ProbeResult]
Options = Mapping[str, Sequence[Option]]  # linear or group → what can be chosen for it


@dataclass(frozen=True)
class Problem:
    """What an allocation is about, apart from its options."""

    recipe: Recipe
    assignments: dict[str, Assignment]
    groups: dict[str, Group]
    decompositions: Decompositions
    other_bytes: int  # what the checkpoint holds besides the targets
    tokens: int  # of calibration

    def linears(self, names: Sequence[str]) -> list[Assignment]:
        """Return the assignments of some linears."""
        return [self.assignments[name] for name in names]

    def size(self, name: str) -> int:
        """Return the dense size of a linear, bits or parameters."""
        return getattr(self.assignments[name], self.recipe.allocation.count)


@dataclass(frozen=True)
class Selection:
    """One option for every linear, and the price at which they were chosen."""

    options: dict[str, Option]  # by linear or group
    price: float | None  # λ, damage for each unit of cost
    in_nats: bool  # whether damages are nats per token


def list_options(
    problem: Problem, damages: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, list[Option]]:
    """List the options of every linear, and of every group whose linears share a decomposition.

    Args:
        problem: what is allocated.
        damages: of every linear or group, a list for each decomposition, a number for each of its
            candidates.
    """
    count, decompositions = problem.recipe.allocation.count, problem.decompositions
    alone = {
        name: linear_options(name, assignment, decompositions[name], damages[name], count)
        for name, assignment in problem.assignments.items()
    }
    return alone | {
        name: decomposed_options(name, decompositions[name], damages[name], count)
        for name in problem.groups
    }


def damages_of(
    recipe: Recipe,
    blocks: Mapping[str, int],
    decompositions: Decompositions,
    probes: ProbeResults,
    depth: int,
) -> dict[str, list[list[float]]]:
    """Return the damage of every candidate in the currency of the recipe.

    That is nats per token from a probe, an error as it is in the metric named, or the relative
    error. The two-sided error is the second-order term ½ tr(H D G Dᵀ) of the loss, in nats per
    token; that of the Gram is tr(D G Dᵀ).

    Args:
        recipe: its allocation names the currency.
        blocks: block of each linear or group.
        decompositions: of each linear or group.
        probes: what each decomposition's probe gave.
        depth: how many blocks the model has.

    Raises:
        ConfigError: if a method's metric has no such reading.
    """
    kind = recipe.allocation.damage
    result: dict[str, list[list[float]]] = {}
    for name, parts in decompositions.items():
        weight = published.depth_weight(blocks[name], depth, recipe.allocation.depth_bias)
        result[name] = []
        for index, (method, curve) in enumerate((part.method, part.curve) for part in parts):
            errors = [candidate.error for candidate in curve.candidates]
            if recipe.allocation.kind != "knapsack" or kind == "relative_error" or not errors:
                result[name].append(errors)
            elif recipe.allocation.probes:
                result[name].append(predict_damages(curve, probes[name, index], weight))
            elif getattr(method, "metric", None) == kind:
                scale = curve.energy * (0.5 if kind == "two_sided" else 1.0)
                result[name].append([scale * error for error in errors])
            else:
                raise ConfigError(
                    f"{name}: allocation.damage '{kind}' needs methods with metric '{kind}'; "
                    "choose 'fisher_probe' or 'kl_probe'"
                )
    return result


def rows_while_undecided(
    problem: Problem, options: Options, names: Sequence[str]
) -> list[list[Bundle]]:
    """List everything that can be chosen, a row for each decision, before groups have settled.

    The row of a group that may share holds what its linears share and what they take apart, of
    which bundles hold only the combinations on the convex hull. Raises ConfigError for a group
    that lies in two budgets, BudgetError for a linear that is left without an option.
    """
    rows: list[list[Bundle]] = []
    grouped: set[str] = set()
    for group in groups_within(problem, names):
        apart = [options[name] for name in group.members]
        together: list[Bundle] = [(option,) for option in options[group.name]]
        if group.tied:
            rows.append(tie(group, apart) + together)
        elif together:
            first = problem.assignments[group.members[0]]
            may_part = first.methods or first.keep_dense
            rows.append((combine(apart) if may_part else []) + together)
        else:
            continue
        grouped |= set(group.members)
    return complete_rows(rows, options, [name for name in names if name not in grouped])


def rows_with_sharing(
    problem: Problem, options: Options, names: Sequence[str], sharing: set[str]
) -> list[list[Bundle]]:
    """List what can be chosen once it is known which groups share.

    The others are taken apart. Their single options make the second solve exact, where bundles of
    the first one held only combinations on the convex hull. Raises as `rows_while_undecided`.
    """
    rows: list[list[Bundle]] = []
    grouped: set[str] = set()
    for group in groups_within(problem, names):
        together: list[Bundle] = [(option,) for option in options[group.name]]
        if group.name in sharing:
            rows.append(together)
        elif group.tied:
            rows.append(tie(group, [options[name] for name in group.members]) + together)
        else:
            continue
        grouped |= set(group.members)
    return complete_rows(rows, options, [name for name in names if name not in grouped])


def groups_within(problem: Problem, names: Sequence[str]) -> list[Group]:
    """Return the groups among some linears. Raises ConfigError for one that is so in part only."""
    among = [group for group in problem.groups.values() if not set(group.members).isdisjoint(names)]
    for group in among:
        if not set(group.members) <= set(names):
            raise ConfigError(
                f"{group.name}: linears that share or are tied need one budget; give them one "
                "entry of allocation.keep"
            )
    return among


def complete_rows(
    rows: list[list[Bundle]], options: Options, single: Sequence[str]
) -> list[list[Bundle]]:
    """Add a row for each single linear, and order all rows by growing cost."""
    apart: list[list[Bundle]] = [[(option,) for option in options[name]] for name in single]
    rows = rows + apart
    if not all(rows):  # a method alone, in a contest, may have nothing for some linear
        raise BudgetError("some linears have no candidate and may not stay dense")
    return [sorted(row, key=lambda bundle: (cost_of(bundle), damage_of(bundle))) for row in rows]


def check_size(problem: Problem, options: Options) -> int:
    """Return what all linears take at most, residuals included, bits or parameters.

    Raises BudgetError if their smallest options take more.
    """
    total, section = 0, problem.recipe.allocation
    shares = divide(problem.recipe, problem.assignments, problem.other_bytes)
    left = reserve_residuals(problem.recipe, problem.assignments, shares)
    for (names, whole), (_, budget) in zip(shares, left, strict=True):
        rows = [row_of(problem, row) for row in rows_while_undecided(problem, options, names)]
        linears = problem.linears(names)
        least = sum(min(row.costs) for row in rows)
        size = least if section.kind == "fixed" else budget.of(linears)
        check_budget(rows, size)
        total += size + Budget(section.count, whole.keep - budget.keep).of(linears)
    return total


def solve(problem: Problem, options: Options) -> Selection:
    """Choose one option for each linear by the recipe's rule.

    Raises BudgetError or ConfigError where the rule cannot meet the budget.
    """
    recipe, assignments, section = problem.recipe, problem.assignments, problem.recipe.allocation
    chosen: list[Bundle] = []
    prices = []
    shares = divide(recipe, assignments, problem.other_bytes)
    for names, budget in reserve_residuals(recipe, assignments, shares):
        if section.kind == "knapsack":
            bundles, price = spend(problem, options, names, budget.of(problem.linears(names)))
            prices.append(price)
        else:
            bundles = apply_rule(problem, options, names, budget)
        chosen += bundles
    in_nats = section.probes or (section.kind == "knapsack" and section.damage == "two_sided")
    return Selection(
        {option.unit: option for bundle in chosen for option in bundle},
        max(prices) if prices and in_nats else None,
        in_nats,
    )


def apply_rule(
    problem: Problem, options: Options, names: Sequence[str], budget: Budget
) -> list[Bundle]:
    """Choose for the linears of one budget by a published rule.

    Linears that stay dense anyway cost the others nothing, since rules keep a fraction of each;
    with a target size they do.
    """
    rows = rows_while_undecided(problem, options, names)
    settled = [row[0] for row in rows if not is_open(problem, row)]
    rows = [row for row in rows if is_open(problem, row)]
    if not rows:
        return settled
    plain = [row_of(problem, row) for row in rows]
    if problem.recipe.allocation.target_size is None:
        left = budget.share(sum(row.whole for row in plain))
    else:
        left = budget.of(problem.linears(names)) - sum(map(cost_of, settled))
    table = Table(
        problem.recipe.allocation,
        [row[0][0].unit for row in rows],
        plain,
        options,
        problem.assignments,
        problem.decompositions,
        budget,
        left,
        problem.tokens,
    )
    picks = RULES[problem.recipe.allocation.kind](table)
    return settled + [row[pick] for row, pick in zip(rows, picks, strict=True)]


def is_open(problem: Problem, row: Sequence[Bundle]) -> bool:
    """Tell whether anything in a row was decomposed; else its linears stay dense."""
    return any(problem.decompositions[option.unit] for bundle in row for option in bundle)


def spend(
    problem: Problem, options: Options, names: Sequence[str], budget: int
) -> tuple[list[Bundle], float]:
    """Choose for the linears of one budget by the knapsack; return the options and the price.

    Which groups share is settled first, then everything else exactly.
    """
    bundles, price = choose_bundles(problem, rows_while_undecided(problem, options, names), budget)
    if not any(problem.decompositions[name] for name in problem.groups):
        return bundles, price
    sharing = {option.unit for bundle in bundles for option in bundle} & problem.groups.keys()
    return choose_bundles(problem, rows_with_sharing(problem, options, names, sharing), budget)


def choose_bundles(
    problem: Problem, table: Sequence[Sequence[Bundle]], budget: int
) -> tuple[list[Bundle], float]:
    """Choose a bundle of each row by the knapsack; return them and the price."""
    section = problem.recipe.allocation
    rows = [row_of(problem, row) for row in table]
    if section.cap is not None:
        keep = budget / sum(row.whole for row in rows)
        picks = published.pick_uniform(rows, [keep] * len(rows))
        rows = published.cap_damages(rows, budget, picks, section.cap)
    limits = [limit_of(problem, table, Budget(*limit)) for limit in section.limits.items()]
    answer = (
        knapsack.constrained(rows, budget, limits) if limits else knapsack.knapsack(rows, budget)
    )
    return [row[pick] for row, pick in zip(table, answer.choice, strict=True)], answer.price


def members_of(bundle: Bundle) -> list[str]:
    """Return the linears that a bundle decides."""
    parts = ((option.unit, option.decomposition) for option in bundle)
    return [name for unit, part in parts for name in (part.members if part else [unit])]


def row_of(problem: Problem, bundles: Sequence[Bundle]) -> Row:
    """Return a row of bundles as plain numbers."""
    whole = sum(map(problem.size, members_of(bundles[0])))
    return Row(tuple(map(cost_of, bundles)), tuple(map(damage_of, bundles)), whole)


def limit_of(problem: Problem, table: Sequence[Sequence[Bundle]], budget: Budget) -> Limit:
    """Return what every bundle takes of a further budget, and how large that is.

    Raises ConfigError for a method that does not say.
    """
    for option in (option for row in table for bundle in row for option in bundle):
        if budget.size(option.candidate) is None:
            raise ConfigError(
                f"method '{option.candidate.method}' does not say its {budget.count}; take it out "
                "of allocation.limits"
            )
    usages = [
        [sum(budget.size(option.candidate) for option in bundle) for bundle in row] for row in table
    ]
    names = [name for row in table for name in members_of(row[0])]
    return usages, budget.of(problem.linears(names))


def to_plan(
    selection: Selection,
    problem: Problem,
    modules: Modules,
    expected: Mapping[str, float],
    measured: Mapping[str, float],
    contest: dict[str, float],
) -> Plan:
    """Return a selection as plain data; the price in nats for each MiB where both are known.

    Linears that share a decomposition are listed one by one: what each stores, the errors of all,
    and an equal part of the damage.

    Args:
        selection: what was chosen.
        problem: what it was chosen from.
        modules: as they are stored, of all linears that share a decomposition at least.
        expected: error of each linear or group before it was built.
        measured: the same error afterwards.
        contest: held-out divergence of the plans that competed.
    """
    choices = {}
    for option in selection.options.values():
        candidate, part = option.candidate, option.decomposition
        members = members_of((option,))
        for name in members:
            dense, is_alone = problem.assignments[name], option.unit == name
            choices[name] = Choice(
                candidate.method,
                candidate.setting,
                candidate.bits if is_alone else modules[name].bits(),
                candidate.parameters if is_alone else modules[name].stored_parameters(),
                dense.bits,
                dense.parameters,
                predicted=expected.get(option.unit, 0.0),
                measured=measured.get(option.unit, 0.0),
                kl=option.damage / len(members) if selection.in_nats else None,
                options=None
                if part is None
                else distinguishing_options(part, problem.decompositions[option.unit]),
                members=() if is_alone else tuple(members),
            )
    price = None
    if selection.price is not None and problem.recipe.allocation.count == "bits":
        price = selection.price * MIB_BITS
    recipe = problem.recipe.model_dump(mode="json")
    return Plan({name: choices[name] for name in problem.assignments}, price, recipe, contest)
