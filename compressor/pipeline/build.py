"""From statistics to the modules that are stored: allocated, solved again in order, given
residuals, trained.

In a run that searches, what follows the allocation must earn its place too: solving in order is
kept where the divergence on the held-out windows falls, as repair and healing are in every run, and
what comes out last is measured against the plan as it was allocated.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

from compressor.allocation import curves
from compressor.errors import NumericalError
from compressor.pipeline import job as jobs
from compressor.pipeline import search, stages
from compressor.pipeline.job import Job
from compressor.pipeline.residual_rival import compare_residuals
from compressor.pipeline.sequential_solve import (
    SEQUENTIAL_COST,
    is_wanted,
    prepare_solver,
    solve_in_order,
)
from compressor.pipeline.solution import Solution, allocate, allocate_as_given
from compressor.pipeline.train import train
from compressor.plan import Plan
from compressor.resume.store import NOWHERE
from compressor.runtime.deadline import OutOfTime
from compressor.statistics import LinearStats

ORDER_SHARE = 0.3  # of the time that a search leaves, at most, for solving in order

log = logging.getLogger(__name__)


def plan_and_build(
    job: Job, statistics: dict[str, LinearStats], edited: Plan | None = None
) -> Solution:
    """Find the plan, with its measured errors, and build the modules as they will be stored.

    Args:
        job: what is compressed.
        statistics: of every target, on the dense model.
        edited: a plan that is built as it stands; None: one is allocated.
    """
    if job.budget.is_limited:
        job.budget.hold(jobs.reserve(job))
    if edited is not None:
        start = allocate_as_given(search.apply_search(job, edited), statistics, edited)
    elif job.recipe.allocation.search is None:
        start = allocate(job, statistics)
    else:
        start = search.search(job, statistics)
    return finish(start)


def finish(start: Solution, train: Callable[[Solution], Solution] = train) -> Solution:
    """Better an allocation as the recipe says, and describe what has become of it."""
    is_searched = bool(start.plan.search) and not start.is_given
    with start.job.watch("decompose"):
        solution = keep_order_if_better(start) if is_searched else solve_in_order(start)
    solution = train(compare_residuals(solution))
    if is_searched:
        solution = better(start, solution)
    job, reasons = solution.job, stages.explain_dense(solution.job, solution.statistics)
    plan = stages.with_gram_errors(solution.plan, job, solution.modules, solution.statistics)
    return replace(
        solution,
        plan=replace(
            stages.with_reasons(plan, reasons),
            curves=tuple(curves.summarise(solution.decompositions)),
        ),
    )


def keep_order_if_better(
    start: Solution, solve: Callable[[Solution], Solution] = solve_in_order
) -> Solution:
    """Solve a plan in order, and keep that where it lowers the held-out divergence.

    Where it lasts longer than it may, or its numbers fail, the plan stays as it was allocated.
    """
    job, seconds = start.job, start.job.budget.left * ORDER_SHARE
    if not is_wanted(start):
        return start
    solutions: list[Solution] = []

    def measure() -> tuple[float | None, str | None]:
        if job.budget.is_limited and expected_seconds(start) > seconds:
            return None, search.NO_TIME
        limited = replace(start, job=replace(job, deadline=job.budget.within(seconds)))
        try:
            solutions.append(replace(solve(limited), job=job))
        except OutOfTime:
            return None, search.NO_TIME
        except NumericalError as error:
            log.warning("%s; the linears are not solved in order", error)
            return None, str(error)
        return solutions[0].divergence(), None

    heldout, dropped = job.store.within(start.plan.to_json()).recall(
        "in_order", search.outcome_fields(job.recipe), measure
    )
    is_better = heldout is not None and heldout < start.heldout
    record = {"heldout": heldout, "kept": is_better} | ({"dropped": dropped} if dropped else {})
    if not is_better:
        recipe = search.without_order(job.recipe)
        solution = replace(start, job=replace(job, recipe=recipe), start=start)
    else:
        solution = solutions[0] if solutions else solve(start)
    return solution.noted(search=start.plan.search | {"in_order": record})


def expected_seconds(start: Solution) -> float:
    """Estimate the seconds of solving in order.

    Its first block, which has the dense model's inputs, does not show them.
    """
    tokens = start.job.calibration.tokens.numel()
    passes = SEQUENTIAL_COST * tokens * jobs.seconds_per_token(start.job)
    return prepare_solver(start, NOWHERE).seconds() + passes


def better(start: Solution, solution: Solution) -> Solution:
    """Return the solution that diverges less, now that both are measured alike.

    Args:
        start: as it was allocated.
        solution: what has become of it.
    """
    heldout = solution.divergence()
    is_better = heldout < start.heldout
    record = solution.plan.search | {"final": {"heldout": heldout, "kept": is_better}}
    if is_better:
        return solution.noted(search=record)
    trained = {name: stage | {"kept": False} for name, stage in solution.plan.trained.items()}
    return start.noted(search=record, trained=trained)
