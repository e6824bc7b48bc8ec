"""Ranks of the residuals of a plan."""

from itertools import pairwise

from compressor.allocation import residual_ranks
from compressor.allocation.budgets import Budget
from compressor.allocation.decompose import dense_weight
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear
from compressor.methods.low_rank import residual
from compressor.pipeline.solution import Solution


def choose_ranks(solution: Solution) -> dict[str, int]:
    """Return the rank of every residual.

    It is the recipe's, or what its budget buys by marginal gain in the damage that the allocation
    counts with; that of an edited plan is given.
    """
    if solution.is_given:
        return {name: choice.residual or 0 for name, choice in solution.plan.linears.items()}
    job, section = solution.job, solution.job.recipe.compensation
    if not section.enabled:
        return {}
    modules = {  # what is pruned is not to come back
        name: module for name, module in solution.compressed.items() if not module.is_pruned
    }
    limits = {
        name: residual.largest_rank(module, dense_weight(job.assignments[name]))
        for name, module in modules.items()
    }
    if section.rank is not None:
        for name, limit in limits.items():
            if section.rank > limit:
                raise ConfigError(
                    f"{name}: a residual of rank {section.rank} beside what "
                    f"'{solution.plan.linears[name].method}' stores is not smaller than "
                    f"dense, which takes {limit} at most; lower compensation.rank, or give "
                    "compensation.keep"
                )
        return dict.fromkeys(modules, section.rank)
    offers = {
        name: offer_ranks(solution, name, module, limits[name])
        for name, module in modules.items()
        if limits[name]
    }
    budget = Budget(job.recipe.allocation.count, section.keep or 0.0).of(job.assignments.values())
    return dict.fromkeys(modules, 0) | residual_ranks.spend(offers, budget)


def offer_ranks(
    solution: Solution, name: str, module: CompressedLinear, limit: int
) -> residual_ranks.Offer:
    """Return what each rank of a residual gains and costs.

    The gain is its part of the linear's predicted divergence, else of its loss or relative output
    error.

    Args:
        solution: what the residual is added to.
        name: of the linear.
        module: as it is stored now.
        limit: the largest rank.
    """
    recipe, choice = solution.job.recipe, solution.plan.linears[name]
    assignment, metric = solution.job.assignments[name], recipe.compensation.metric
    dense = dense_weight(assignment)
    fit = residual.fit(name, dense, module, solution.statistics[name], metric)
    loss = fit.residual.tail[0].item()
    if choice.kl is not None:
        scale = choice.kl / loss if loss > 0 else 0.0
    elif metric == "two_sided":
        scale = 0.5
    else:
        energy = fit.metric.energy(dense.weight)
        scale = 1 / energy if energy > 0 else 0.0
    place = ("bits", "parameters").index(recipe.allocation.count)
    sizes = [
        module.extended_size(rank, assignment.dtype.itemsize)[place] for rank in range(limit + 1)
    ]
    return residual_ranks.Offer(
        (scale * fit.gains[:limit]).tolist(), [after - before for before, after in pairwise(sizes)]
    )
