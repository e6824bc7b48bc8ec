"""From curves and probes to modules: solve, build, measure, and let the plans of several methods
meet on held-out windows.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from compressor.allocation.decompose import Decompositions, find_offer
from compressor.allocation.options import Option, dense_candidate, leave_out
from compressor.allocation.solve import (
    ProbeResults,
    Problem,
    Selection,
    damages_of,
    list_options,
    solve,
    to_plan,
)
from compressor.checkpoint.weights import stored_tensors
from compressor.errors import BudgetError, ConfigError, NumericalError
from compressor.linears.base import Modules
from compressor.methods.base import LINEAR, Method
from compressor.models import linears
from compressor.models.install import installed
from compressor.pipeline.builder import CandidateBuilder
from compressor.pipeline.job import Job
from compressor.pipeline.stages import other_bytes, output_dtype
from compressor.plan import DENSE, SINGLE_LINEARS, Plan
from compressor.training.teacher import Teacher

# a chosen candidate whose stored error departs by more than this from what was expected is entered
# anew
REMEASURE = 0.05
ROUNDS = 3  # solutions at most


class Entrant(NamedTuple):
    """A selection and what was built of it; errors of linears and groups are in the metric of
    their method.
    """

    selection: Selection
    problem: Problem
    modules: Modules
    expected: dict[str, float]
    measured: dict[str, float]

    @property
    def scheme(self) -> dict[str, Any]:
        """What tells its modules from those of other entrants, JSON values."""
        return {
            unit: [option.decomposition and option.decomposition.key, option.candidate.setting]
            for unit, option in self.selection.options.items()
        }

    def plan(self, contest: dict[str, float]) -> Plan:
        """Return the plan of this entrant, with the outcome of the contest."""
        return to_plan(*self, contest)


def choose(
    job: Job, decompositions: Decompositions, probes: ProbeResults, measured: bool = False
) -> tuple[Plan, Modules]:
    """Allocate and build what was chosen.

    Where several methods compete and divergence is measured, each also gets the whole budget alone,
    dense linears allowed, and so do all that work on single linears where others work on modules;
    of all these plans the one whose model diverges least on the held-out windows is taken, so it is
    never worse there than without one of the kinds. Probes look at one linear at a time, this looks
    at all.

    Args:
        job: its recipe says what is kept.
        decompositions: what can be chosen.
        probes: what each of them costs the model.
        measured: whether to measure that divergence for one method too.
    """
    blocks = len(linears.blocks(job.model)[1])
    damages = damages_of(job.recipe, job.block_of, decompositions, probes, blocks)
    others = other_bytes(stored_tensors(job.model), job.assignments, output_dtype(job.recipe))
    tokens = job.calibration.tokens.numel()
    problem = Problem(job.recipe, job.assignments, job.groups, decompositions, others, tokens)
    options = list_options(problem, damages)
    builder = CandidateBuilder(decompositions, probes, job.store)
    methods = {part.method.name: part.method for parts in decompositions.values() for part in parts}
    several = len(methods) > 1 and bool(probes)
    entrants = {}
    for name, team in list_teams(methods).items() if several else ():
        try:
            own = leave_out(options, methods.keys() - team)
            entrants[name] = settle(job, problem, own, builder)
        except BudgetError:  # nothing of this team is small enough, so it takes no part
            continue
    # the last: by now the curves have been corrected near what each method chose
    entrants["all"] = settle(job, problem, options, builder)
    if not several and not measured:
        return entrants["all"].plan({}), entrants["all"].modules
    rivals = {name: entrant.modules for name, entrant in entrants.items()}
    contest = job.store.recall(
        "contest",
        {name: entrant.scheme for name, entrant in entrants.items()},
        partial(measure_divergences, job, rivals),
    )
    best = entrants[min(contest, key=contest.__getitem__)]
    return best.plan(contest), best.modules


def list_teams(methods: Mapping[str, Method]) -> dict[str, set[str]]:
    """Return the methods of each entrant of the contest but the last, which has all of them.

    Each method stands alone, and so do all of single linears together.
    """
    single = {name for name, method in methods.items() if method.unit == LINEAR}
    several = {SINGLE_LINEARS: single} if 1 < len(single) < len(methods) else {}
    return {name: {name} for name in sorted(methods)} | several


@torch.no_grad()
def measure_divergences(
    job: Job, rivals: Mapping[str, Mapping[str, nn.Module]]
) -> dict[str, float]:
    """Return KL(original‖model) with each set of modules, nats per token, on held-out windows."""
    batches = [
        batch.to(job.device)
        for batch in job.heldout.tokens.split(job.recipe.calibration.batch_size)
    ]
    divergences = {}
    with job.computing():
        original = Teacher(job.model, batches, cache=job.cache)
        for name, modules in job.steps(rivals.items(), "contest"):
            with installed(job.model, modules):
                divergences[name] = original.divergence()
            if not math.isfinite(divergences[name]):
                raise NumericalError(f"{name}: the output of the compressed model is not finite")
    return divergences


def settle(
    job: Job, problem: Problem, options: dict[str, list[Option]], builder: CandidateBuilder
) -> Entrant:
    """Solve and build; where what is stored departs from what was expected, correct its curve and
    solve again, ROUNDS times at most.
    """
    for _ in range(ROUNDS):
        selection = solve(problem, builder.correct_damages(options))
        expected = {
            unit: option.candidate.error * builder.ratio(option)
            for unit, option in selection.options.items()
            if option.decomposition is not None
        }
        modules, errors = builder.build_all(selection, job.steps)
        is_off = any(
            abs(error - expected[unit]) > REMEASURE * expected[unit] > 0
            for unit, error in errors.items()
        )
        entrant = Entrant(selection, problem, modules, expected, errors)
        if not is_off or problem.recipe.allocation.kind != "knapsack":
            break
    return entrant


def build_edited(job: Job, edited: Plan, decompositions: Decompositions) -> tuple[Plan, Modules]:
    """Build an edited plan as it stands; ranks of residuals are taken over, not yet built.

    Raises ConfigError for linears or methods that the recipe does not have.
    """
    if missing := sorted(job.assignments.keys() ^ edited.linears.keys()):
        raise ConfigError(
            f"the plan and the targets of the recipe differ in {missing[0]} ({len(missing)} in all)"
        )
    chosen: dict[str, Option] = {}
    for name, choice in edited.linears.items():
        if choice.method == DENSE:
            chosen[name] = Option(name, 0, 0.0, dense_candidate(job.assignments[name]), None)
            continue
        unit = job.unit_of(name, choice)
        part, candidate = find_offer(name, choice, decompositions[unit])
        option = chosen.setdefault(unit, Option(unit, 0, 0.0, candidate, part))
        if option.candidate is not candidate:
            raise ConfigError(
                f"{name}: shares what it stores with others of {unit}, but their settings differ; "
                "make them equal"
            )
    selection = Selection(chosen, None, in_nats=False)
    builder = CandidateBuilder(decompositions, {}, job.store)
    modules, errors = builder.build_all(selection, job.steps)
    problem = Problem(job.recipe, job.assignments, job.groups, decompositions, 0, 0)
    expected = {unit: option.candidate.error for unit, option in chosen.items()}
    plan = Entrant(selection, problem, modules, expected, errors).plan({})
    choices = {
        name: replace(choice, residual=edited.linears[name].residual)
        for name, choice in plan.linears.items()
    }
    return replace(plan, linears=choices, recipe=edited.recipe, search=edited.search), modules
