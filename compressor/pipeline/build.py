"""From statistics to the modules that are stored: allocated, solved again in order, given
residuals, trained.

In a run that searches, what follows the allocation must earn its place too: solving in order is
kept where the divergence on the held-out windows falls, as repair and healing are in every run, and
what comes out last is measured against the plan as it was allocated.
"""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

from compressor.allocation import curves
from compressor.errors import NumericalError
from compressor.linears.base import Modules
from compressor.pipeline import contest, residual_rival, search, sequential_solve, stages, train
from compressor.pipeline import job as jobs
from compressor.pipeline.job import Job
from compressor.pipeline.search import Allocated
from compressor.plan import Plan
from compressor.resume.store import NOWHERE
from compressor.runtime.deadline import OutOfTime, paced
from compressor.runtime.progress import Progress
from compressor.runtime.stopwatch import Stopwatch
from compressor.statistics import LinearStats

IN_ORDER = 0.3  # of the time that is left once the search has ended, at most, for solving in order
# comparisons of two models on the calibration windows, which the passes of solving in order cost as
# much as
PASSES = 2.5


log = logging.getLogger(__name__)


def plan_and_build(
    job: Job,
    stats: dict[str, LinearStats],
    edited: Plan | None,
    watch: Stopwatch,
    progress: Progress,
) -> tuple[Plan, Modules]:
    """The plan with its measured errors, and the modules as they will be stored."""
    if job.clock.limited:
        job.clock.hold(jobs.reserve(job))
    start = allocated(job, stats, edited, watch, progress)
    job, found, made, modules = start.job, start.found, start.plan, start.modules
    reasons = stages.left_dense(job, stats)
    searched = edited is None and job.recipe.allocation.search is not None
    if not (sequential_solve.wanted(job.recipe, edited) or residual_rival.wanted(job.recipe)):
        stats = {name: LinearStats(tokens=one.tokens, gram=one.gram) for name, one in stats.items()}
    if sequential_solve.wanted(job.recipe, edited):
        with watch("decompose"):
            if searched:
                job, made, modules = solved_if_better(start, stats, progress)
            else:
                made, modules = sequential_solve.finish(
                    job, made, modules, found, stats, edited, progress
                )
    if residual_rival.wanted(job.recipe):
        with watch("evaluate"):
            made = residual_rival.judged(job, made, (start.plan, start.modules), found, stats)
    if job.recipe.trains:
        with watch("train"):
            again = partial(
                sequential_solve.in_order, job, start.plan, start.modules, found, stats, edited
            )
            made, modules = train.recover(job, made, modules, found, progress, again)
    if searched:
        made, modules = better(start, made, modules)
    made = stages.with_reasons(stages.with_gram_errors(made, job, modules, stats), reasons)
    return replace(made, curves=tuple(curves.summary(found))), modules


def allocated(
    job: Job,
    stats: dict[str, LinearStats],
    edited: Plan | None,
    watch: Stopwatch,
    progress: Progress,
) -> Allocated:
    """The plan and its modules: as edited, as searched for, or as the recipe says."""
    if edited is None:
        searches = job.recipe.allocation.search is not None
        return (search.search if searches else search.allocate)(job, stats, watch, progress)
    job = search.chosen(job, edited)
    with watch("decompose"):
        found = stages.decompositions(job, stats, progress)
    return Allocated(job, found, None, *contest.build_plan(job, edited, found, progress))


def solved_if_better(
    start: Allocated, stats: dict[str, LinearStats], progress: Progress
) -> tuple[Job, Plan, Modules]:
    """The plan solved in order where that lasts no longer than it may and lowers the held-out
    divergence, else as it was allocated.
    """
    job, seconds = start.job, start.job.clock.left * IN_ORDER
    solve = partial(
        sequential_solve.finish, job, start.plan, start.modules, start.found, stats, None
    )
    made: list[tuple[Plan, Modules]] = []

    def outcome() -> tuple[float | None, str | None]:
        if job.clock.limited and expected(start, stats) > seconds:
            return None, search.NO_TIME
        try:
            made.append(solve(paced(progress, seconds)))
        except OutOfTime:
            return None, search.NO_TIME
        except NumericalError as error:
            log.warning("%s; the linears are not solved in order", error)
            return None, str(error)
        return start.divergence(made[0][1]), None

    heldout, dropped = job.store.within(start.plan.to_json()).recall(
        "in order", search.depends(job.recipe), outcome
    )
    kept = heldout is not None and heldout < start.heldout
    tried = {"heldout": heldout, "kept": kept} | ({"dropped": dropped} if dropped else {})
    found = start.plan.search | {"in order": tried}
    if not kept:
        return (
            replace(job, recipe=search.not_in_order(job.recipe)),
            replace(start.plan, search=found),
            start.modules,
        )
    plan, modules = made[0] if made else solve(progress)
    return job, replace(plan, search=found), modules


def expected(start: Allocated, stats: dict[str, LinearStats]) -> float:
    """Seconds that solving in order takes, about; its first block, which has the dense model's
    inputs, does not show them.
    """
    job = start.job
    solving = sequential_solve.in_order(
        job, start.plan, start.modules, start.found, stats, None, NOWHERE
    ).seconds()
    return solving + PASSES * job.calibration.tokens.numel() * jobs.seconds_per_token(job)


def better(start: Allocated, plan: Plan, modules: Modules) -> tuple[Plan, Modules]:
    """What a run with a search ends with: the modules that diverge less, now that both are measured
    alike.
    """
    final = start.divergence(modules)
    kept = final < start.heldout
    found: dict[str, Any] = plan.search | {"final": {"heldout": final, "kept": kept}}
    if kept:
        return replace(plan, search=found), modules
    trained = {stage: outcome | {"kept": False} for stage, outcome in plan.trained.items()}
    return replace(start.plan, search=found, trained=trained), start.modules
