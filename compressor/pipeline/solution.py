"""What a run arrives at, and how it gets there first: a plan, built, and everything that later
stages need to better it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from compressor.allocation.decompose import Decomposition, Decompositions, find_offer
from compressor.linears.base import CompressedLinear, Modules
from compressor.pipeline import contest, stages
from compressor.pipeline.job import Job
from compressor.plan import Choice, Plan
from compressor.statistics import LinearStats


@dataclass(frozen=True)
class Solution:
    """A plan and its modules, on the job that it solves."""

    job: Job
    statistics: dict[str, LinearStats]  # of the dense model
    decompositions: Decompositions
    plan: Plan
    # as they will be stored; training adds norms and dense linears that it has changed
    modules: Mapping[str, nn.Module]
    is_given: bool = False  # whether an edited plan has made the choices, residual ranks included
    start: "Solution | None" = None  # as it was allocated; None: nothing has been done to it since

    @property
    def allocated(self) -> "Solution":
        """The solution before its linears were solved again or trained."""
        return self.start or self

    @property
    def compressed(self) -> Modules:
        """The modules of compressed linears."""
        return {n: m for n, m in self.modules.items() if isinstance(m, CompressedLinear)}

    @property
    def heldout(self) -> float:
        """Divergence on the held-out windows, nats per token, as the contest has measured it."""
        return min(self.plan.contest.values())

    def divergence(self) -> float:
        """Measure KL(original‖model) on the held-out windows, nats per token."""
        return contest.measure_divergences(self.job.quiet, {"solution": self.modules})["solution"]

    def decomposition(self, name: str) -> Decomposition:
        """Return the decomposition behind the choice of a linear."""
        choice = self.plan.linears[name]
        return find_offer(name, choice, self.decompositions[self.job.unit_of(name, choice)])[0]

    def improved(self, choices: dict[str, Choice], modules: Mapping[str, nn.Module]) -> "Solution":
        """Return the solution with other choices and modules; it remembers its allocation."""
        plan = replace(self.plan, linears=choices)
        return replace(self, plan=plan, modules=modules, start=self.allocated)

    def noted(self, **fields: Any) -> "Solution":
        """Return the solution with other fields of its plan."""
        return replace(self, plan=replace(self.plan, **fields))


def allocate(job: Job, statistics: dict[str, LinearStats], measured: bool = False) -> Solution:
    """Decompose, probe, allocate and build.

    Args:
        job: what is compressed.
        statistics: of every target, on the dense model.
        measured: whether the divergence of the outcome is measured where one method is on offer.
    """
    with job.watch("decompose"):
        decompositions = stages.decompose_all(job, statistics)
    with job.watch("probe"):
        probes = stages.probe_all(job, decompositions)
    with job.watch("allocate"):
        plan, modules = contest.choose(job, decompositions, probes, measured)
    return Solution(job, statistics, decompositions, plan, modules)


class Allocate(Protocol):
    """The interface of `allocate`."""

    def __call__(
        self, job: Job, statistics: dict[str, LinearStats], measured: bool = False
    ) -> Solution: ...


def allocate_as_given(job: Job, statistics: dict[str, LinearStats], edited: Plan) -> Solution:
    """Build an edited plan as it stands."""
    with job.watch("decompose"):
        decompositions = stages.decompose_all(job, statistics)
    plan, modules = contest.build_edited(job, edited, decompositions)
    return Solution(job, statistics, decompositions, plan, modules, is_given=True)
