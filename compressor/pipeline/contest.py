"""From curves and probes to modules: solve, build, measure, and let the plans of several methods
meet on held-out windows.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from compressor.allocation.decompose import offering
from compressor.allocation.options import Option, without
from compressor.allocation.probe import Prober
from compressor.allocation.solve import (
    Found,
    Problem,
    Solution,
    damages_of,
    options_of,
    solve,
    to_plan,
)
from compressor.checkpoint.weights import stored_tensors
from compressor.errors import BudgetError, ConfigError
from compressor.linears import CompressedLinear
from compressor.methods.base import LINEAR, Method
from compressor.models import linears
from compressor.pipeline.builder import Workshop
from compressor.pipeline.job import Job
from compressor.pipeline.stages import Probes, other_bytes, output_dtype
from compressor.plan import DENSE, Candidate, Plan
from compressor.runtime.progress import Progress, silent

# a chosen candidate whose stored error departs by more than this from what was expected is entered
# anew
REMEASURE = 0.05
ROUNDS = 3  # solutions at most


class Settled(NamedTuple):
    """A solution and what it built: modules of linears; errors of linears and groups, as expected
    and as stored, in the method's metric.
    """

    solution: Solution
    problem: Problem
    modules: dict[str, CompressedLinear]
    expected: dict[str, float]
    measured: dict[str, float]


def choose(
    job: Job, found: Found, probed: Probes, progress: Progress = silent, measured: bool = False
) -> tuple[Plan, dict[str, CompressedLinear]]:
    """Allocate and build what was chosen.

    Where several methods compete and divergence is measured, each also gets the whole budget alone,
    dense linears allowed, and so do all that work on single linears where others work on modules;
    of all these plans the one whose model diverges least on the held-out windows is taken, so it is
    never worse there than without one of the kinds. Probes look at one linear at a time, this looks
    at all. measured: whether to measure that divergence for one method too.
    """
    damages = damages_of(
        job.recipe, job.block_of, found, probed.results, len(linears.blocks(job.model)[1])
    )
    others = other_bytes(stored_tensors(job.model), job.assignments, output_dtype(job.recipe))
    problem = Problem(
        job.recipe, job.assignments, job.groups, found, others, job.calibration.tokens.numel()
    )
    options, workshop = options_of(problem, damages), Workshop(found, probed.results, job.store)
    methods = {part.method.name: part.method for parts in found.values() for part in parts}
    several = len(methods) > 1 and probed.prober is not None
    entrants = {}
    for entrant, taking_part in teams(methods).items() if several else ():
        try:
            entrants[entrant] = settle(
                problem, without(options, methods.keys() - taking_part), workshop, progress
            )
        except BudgetError:  # it offers nothing small enough by itself
            continue
    # the last: by now the curves have been corrected near what each method chose
    entrants["all"] = settle(problem, options, workshop, progress)
    if not several and not measured:
        return to_plan(*entrants["all"], {}), entrants["all"].modules
    with job.computing():
        contest = {
            name: divergence(job, probed.prober, settled)
            for name, settled in progress(entrants.items(), "contest")
        }
    best = entrants[min(contest, key=contest.__getitem__)]
    return to_plan(*best, contest), best.modules


def teams(methods: Mapping[str, Method]) -> dict[str, set[str]]:
    """Names of the methods of each entrant of the contest but the last, which has all: each alone,
    and those of single linears.
    """
    single = {name for name, method in methods.items() if method.unit == LINEAR}
    several = {"single linears": single} if 1 < len(single) < len(methods) else {}
    return {name: {name} for name in sorted(methods)} | several


def divergence(job: Job, prober: Prober, settled: Settled) -> float:
    """Held-out divergence of the model with all modules of a solution, nats per token."""
    options = settled.solution.options.items()
    chosen = {
        unit: [option.decomposition and option.decomposition.key, option.candidate.setting]
        for unit, option in options
    }
    store = job.store.within(job.recipe.allocation.probe.model_dump(mode="json"))
    return store.recall("contest", chosen, partial(prober.kl, settled.modules, 0))


def settle(
    problem: Problem,
    options: dict[str, list[Option]],
    workshop: Workshop,
    progress: Progress = silent,
) -> Settled:
    """Solve and build; where what is stored departs from what was expected, correct its curve and
    solve again, ROUNDS times at most.
    """
    for last in (*(False,) * (ROUNDS - 1), True):
        solution = solve(problem, workshop.corrected(options))
        chosen = {
            unit: option
            for unit, option in solution.options.items()
            if option.decomposition is not None
        }
        expected = {
            unit: option.candidate.error * workshop.ratio(option) for unit, option in chosen.items()
        }
        modules, measured = workshop.build_all(solution, progress)
        off = any(
            abs(error - expected[unit]) > REMEASURE * expected[unit] > 0
            for unit, error in measured.items()
        )
        if last or not off or problem.recipe.allocation.kind != "knapsack":
            return Settled(solution, problem, modules, expected, measured)


def build_plan(
    job: Job, plan: Plan, found: Found, progress: Progress = silent
) -> tuple[Plan, dict[str, CompressedLinear]]:
    """Build an edited plan as it stands. Raises ConfigError for linears or methods that the recipe
    does not have.
    """
    if missing := sorted(job.assignments.keys() ^ plan.linears.keys()):
        raise ConfigError(
            f"the plan and the targets of the recipe differ in {missing[0]} ({len(missing)} in all)"
        )
    chosen: dict[str, Option] = {}
    for name, choice in plan.linears.items():
        unit = next(
            (
                group.name
                for group in job.groups.values()
                if list(group.members) == choice.setting.get("shared")
            ),
            name,
        )
        if choice.method == DENSE:
            assignment = job.assignments[name]
            dense = Candidate(DENSE, {}, assignment.bits, assignment.parameters, 0.0)
            chosen[name] = Option(name, 0, 0.0, dense, None)
            continue
        part, candidate = offering(name, choice, found[unit])
        if (
            chosen.setdefault(unit, Option(unit, 0, 0.0, candidate, part)).candidate
            is not candidate
        ):
            raise ConfigError(
                f"{name}: shares what it stores with others of {unit}, but their settings differ; "
                "make them equal"
            )
    solution = Solution(chosen, None, in_nats=False)
    modules, measured = Workshop(found, {}, job.store).build_all(solution, progress)
    problem = Problem(job.recipe, job.assignments, job.groups, found, 0, 0)
    expected = {unit: option.candidate.error for unit, option in chosen.items()}
    return replace(
        to_plan(solution, problem, modules, expected, measured, {}),
        recipe=plan.recipe,
        search=plan.search,
    ), modules
