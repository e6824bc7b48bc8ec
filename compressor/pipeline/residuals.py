"""Ranks of the residuals of a plan."""

from itertools import pairwise

from compressor.allocation import residual_ranks
from compressor.allocation.decompose import dense_weight
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear
from compressor.linears.base import Modules
from compressor.methods.low_rank import residual
from compressor.pipeline.job import Job
from compressor.plan import Choice, Plan
from compressor.statistics import LinearStats


def ranks_of(
    job: Job, plan: Plan, modules: Modules, stats: dict[str, LinearStats]
) -> dict[str, int]:
    """Rank of every residual: the recipe's, or what its budget buys by marginal gain in the damage
    that the allocation counts with.
    """
    section, ranks = job.recipe.compensation, {}
    if not section.enabled:
        return ranks
    # What is gone is not to come back.
    modules = {name: module for name, module in modules.items() if not module.is_pruned}
    limits = {
        name: residual.largest_rank(module, dense_weight(job.assignments[name]))
        for name, module in modules.items()
    }
    if section.rank is not None:
        for name, limit in limits.items():
            if section.rank > limit:
                raise ConfigError(
                    f"{name}: a residual of rank {section.rank} beside what "
                    f"'{plan.linears[name].method}' stores is not smaller than "
                    f"dense, which takes {limit} at most; lower compensation.rank, or give "
                    "compensation.keep"
                )
        return dict.fromkeys(modules, section.rank)
    offers = {
        name: offer(job, name, plan.linears[name], module, stats[name], limits[name])
        for name, module in modules.items()
        if limits[name]
    }
    bits = job.recipe.allocation.count == "bits"
    whole = sum(
        assignment.bits if bits else assignment.parameters
        for assignment in job.assignments.values()
    )
    return dict.fromkeys(modules, 0) | residual_ranks.spend(
        offers, int(section.keep * whole + 1e-6)
    )


def offer(
    job: Job, name: str, choice: Choice, module: CompressedLinear, stats: LinearStats, limit: int
) -> residual_ranks.Offer:
    """What each rank of a residual gains: its part of the linear's predicted divergence, else of
    its loss or relative output error.
    """
    assignment, metric = job.assignments[name], job.recipe.compensation.metric
    dense = dense_weight(assignment)
    fit = residual.fit(name, dense, module, stats, metric)
    lost = fit.residual.tail[0].item()
    if choice.kl is not None:
        scale = choice.kl / lost if lost > 0 else 0.0
    elif metric == "two_sided":
        scale = 0.5
    else:
        energy = fit.metric.energy(dense.weight)
        scale = 1 / energy if energy > 0 else 0.0
    count = 0 if job.recipe.allocation.count == "bits" else 1
    sizes = [
        module.extended_size(rank, assignment.dtype.itemsize)[count] for rank in range(limit + 1)
    ]
    return residual_ranks.Offer(
        (scale * fit.gains[:limit]).tolist(), [after - before for before, after in pairwise(sizes)]
    )
