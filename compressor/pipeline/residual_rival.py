"""Measure whether low-rank residuals are worth their bytes, against finer bases of no more bytes.

A residual spends bytes that more bits or smaller groups could have . Which
one wins depends on the width, the rank and the bits, so it is measured: the plan as it is, against
the plan whose linears with residuals have the finest base that fits instead. Both are solved on the
inputs of the dense model, whatever the run does later.
"""

from dataclasses import replace

from compressor.allocation.decompose import dense_weight
from compressor.linears import CompressedLinear
from compressor.methods.integers.quantize import QuantizeMethod
from compressor.pipeline.contest import measure_divergences
from compressor.pipeline.search import without_order
from compressor.pipeline.sequential_solve import solve_in_order
from compressor.pipeline.solution import Solution
from compressor.plan import FINER_BASES, WITH_RESIDUALS, Candidate, Choice
from compressor.recipe.sections import Recipe

GROUPS = ("auto:16", "auto:32", "auto:64", "auto:128", "channel")


def has_residuals(recipe: Recipe) -> bool:
    """Tell whether plans of this recipe may have residuals that a finer base could replace."""
    engines = [engine for entry in recipe.method for engine in entry.candidates]
    ranks = [engine.options.get("residual") for engine in engines]
    listed = any(isinstance(own, list) and any(own) for own in ranks)
    return listed or recipe.compensation.enabled


def residual_rank(choice: Choice) -> int:
    """Return the rank of the residual of a linear, 0 where it has none."""
    inner = choice.setting.get("rank", 0) if choice.method == QuantizeMethod.name else 0
    return choice.residual or inner


def compare_residuals(solution: Solution) -> Solution:
    """Add two entries to the contest of a plan with residuals: held-out divergence with them, and
    with finer bases.

    Both are missing where no linear has a finer base of its kind that fits, or where no windows are
    held out.
    """
    job, start = solution.job, solution.allocated
    if not has_residuals(job.recipe) or len(job.heldout.tokens) == 0:
        return solution
    with job.watch("evaluate"):
        choices = solution.plan.linears
        rivals = {
            name: find_finest(solution, name)
            for name, choice in choices.items()
            if residual_rank(choice)
        }
        finer = {name: rival for name, rival in rivals.items() if rival is not None}
        if not finer:
            return solution
        ranked = {
            name: replace(choice, residual=choices[name].residual)
            for name, choice in start.plan.linears.items()
        }
        given = replace(
            start,
            job=replace(job.quiet, recipe=without_order(job.recipe)),
            is_given=True,
        ).noted(linears=ranked)
        modules = solve_in_order(given).modules
        pair = {WITH_RESIDUALS: modules, FINER_BASES: {**modules, **finer}}
        contest = solution.plan.contest | measure_divergences(job.quiet, pair)
        return solution.noted(contest=contest)


def find_finest(solution: Solution, name: str) -> CompressedLinear | None:
    """Build the finest base that takes no more bits than base and residual of a linear together;
    None if none is finer than the base.
    """
    choice, base = solution.plan.linears[name], solution.allocated.plan.linears[name]
    if base.members:
        return None
    part = solution.allocated.decomposition(name)
    dense = dense_weight(solution.job.assignments[name])
    if not isinstance(part.method, QuantizeMethod):
        fitting = [size for size in part.curve.candidates if size.bits <= choice.bits]
        best = max(fitting, key=lambda size: size.bits)
        return None if best.setting == base.setting else part.build(best)[0][name]
    groups = {base.setting["group"], *part.method.group, *GROUPS}
    method = replace(
        part.method, bits=tuple(range(base.setting["bits"], 9)), group=tuple(groups), residual=(0,)
    )
    fitting = [size for size in method.sizes(dense, name) if size.bits <= choice.bits]
    best = max(fitting, key=fineness)
    if fineness(best) <= (base.setting["bits"], -base.setting["group"]):
        return None
    state = method.prepare(name, dense, solution.statistics[name])
    return method.compress(state, best.setting)


def fineness(candidate: Candidate) -> tuple[int, int]:
    """Return what candidates of a quantiser are ordered by: bits, then the smallness of groups."""
    return candidate.setting["bits"], -candidate.setting["group"]
