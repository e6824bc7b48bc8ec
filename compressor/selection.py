"""From curves and probes to modules: solve, build, measure, and let the plans of several methods meet on held-out windows."""

from dataclasses import replace
from typing import NamedTuple

from compressor import model as models
from compressor.decompose import Decomposition
from compressor.errors import BudgetError, ConfigError
from compressor.linears import CompressedLinear
from compressor.plan import DENSE, Candidate, Plan
from compressor.planning import Found, Problem, ResultOf, Solution, damages_of, options_of, solve, to_plan
from compressor.stages import Job, Probes, other_bytes, output_dtype
from compressor.units import Option, correct, without
from compressor.weights import stored_tensors

REMEASURE = 0.05  # a chosen candidate whose stored error departs by more than this from its curve is entered anew, and solved again


class Settled(NamedTuple):
    """A solution and what it built: module of every compressed linear, error of each linear or group in the metric of its method."""

    solution: Solution
    problem: Problem
    modules: dict[str, CompressedLinear]
    measured: dict[str, float]


def choose(job: Job, found: Found, probed: Probes) -> tuple[Plan, dict[str, CompressedLinear]]:
    """Allocate and build what was chosen.

    Where several methods compete and divergence is measured, each also gets the whole budget alone, dense linears allowed; of all these
    plans the one whose model diverges least on the held-out windows is taken. Probes look at one linear at a time, this looks at all.
    """
    damages = damages_of(job.recipe, job.block_of, found, probed.results, len(models.blocks(job.model)[1]))
    others = other_bytes(stored_tensors(job.model), job.assignments, output_dtype(job.recipe))
    problem = Problem(job.recipe, job.assignments, job.groups, found, others, job.calibration.tokens.numel())
    options = options_of(problem, damages)
    together = settle(problem, options, probed.results)
    methods = sorted({part.method.name for parts in found.values() for part in parts})
    if probed.prober is None or len(methods) == 1:
        return to_plan(*together, {}), together.modules
    entrants = {"all": together}
    for method in methods:
        try:
            entrants[method] = settle(problem, without(options, {*methods} - {method}), probed.results)
        except BudgetError:  # it offers nothing small enough by itself
            continue
    with job.computing():
        contest = {name: probed.prober.kl(settled.modules, 0) for name, settled in entrants.items()}
    best = entrants[min(contest, key=contest.__getitem__)]
    return to_plan(*best, contest), best.modules


def settle(problem: Problem, options: dict[str, list[Option]], probed: ResultOf) -> Settled:
    """Solve and build; where what is stored departs from its curve, enter what was measured and solve once more."""
    solution = solve(problem, options)
    modules, measured = build(solution)
    expected = {name: expected_error(solution.options[name], problem.found[name], probed) for name in measured}
    off = [name for name, error in measured.items() if abs(error - expected[name]) > REMEASURE * expected[name] > 0]
    if off and problem.recipe.allocation.kind == "knapsack":
        changed = {name: correct(options[name], solution.options[name].candidate, measured[name] / expected[name]) for name in off}
        solution = solve(problem, options | changed)
        modules, measured = build(solution)
    return Settled(solution, problem, modules, measured)


def expected_error(option: Option, parts: list[Decomposition], probed: ResultOf) -> float:
    """Error of a candidate as its curve has it, corrected by what its probe showed the curve to be off by."""
    key = option.unit, next(index for index, part in enumerate(parts) if part is option.decomposition)
    return option.candidate.error * (probed[key].departure if key in probed else 1.0)


def build(solution: Solution) -> tuple[dict[str, CompressedLinear], dict[str, float]]:
    """Modules of the chosen candidates as they will be stored, and the error of each linear or group in the metric of its method."""
    modules, measured = {}, {}
    for unit, option in solution.options.items():
        if option.decomposition is not None:
            made, measured[unit] = option.decomposition.build(option.candidate)
            modules |= made
    return modules, measured


def build_plan(job: Job, plan: Plan, found: Found) -> tuple[Plan, dict[str, CompressedLinear]]:
    """Build an edited plan as it stands. Raises ConfigError for linears or methods that the recipe does not have."""
    if missing := sorted(job.assignments.keys() ^ plan.linears.keys()):
        raise ConfigError(f"the plan and the targets of the recipe differ in {missing[0]} ({len(missing)} in all)")
    chosen: dict[str, Option] = {}
    for name, choice in plan.linears.items():
        setting = {key: value for key, value in choice.setting.items() if key != "shared"}
        unit = next((group.name for group in job.groups.values() if list(group.members) == choice.setting.get("shared")), name)
        if choice.method == DENSE:
            assignment = job.assignments[name]
            dense = Candidate(DENSE, {}, assignment.bits, assignment.parameters, 0.0)
            chosen[name] = Option(name, 0, 0.0, dense, None)
            continue
        part = next((part for part in found[unit] if part.method.name == choice.method), None)
        if part is None:
            raise ConfigError(f"{name}: the plan says '{choice.method}', which the recipe does not offer for it")
        candidate = next((c for c in part.curve.candidates if c.setting == setting), None)
        if candidate is None:
            raise ConfigError(f"{name}: {choice.method} offers no setting {setting}; `compressor plan` lists those it has")
        if chosen.setdefault(unit, Option(unit, 0, 0.0, candidate, part)).candidate is not candidate:
            raise ConfigError(f"{name}: shares what it stores with others of {unit}, but their settings differ; make them equal")
    solution = Solution(chosen, None, in_nats=False)
    modules, measured = build(solution)
    problem = Problem(job.recipe, job.assignments, job.groups, found, 0, 0)
    return replace(to_plan(solution, problem, modules, measured, {}), recipe=plan.recipe), modules
