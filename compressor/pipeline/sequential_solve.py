"""Solve the linears of a plan again in order, methods and settings fixed, and give them low-rank
residuals.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from compressor import linalg
from compressor.allocation.decompose import (
    Decomposition,
    built,
    dense_weight,
)
from compressor.calibrate import streams
from compressor.calibrate.streams import Streams, solve_block
from compressor.errors import ConfigError
from compressor.linears import Dense
from compressor.linears.base import Modules
from compressor.methods.base import LINEAR, PAIR, Member
from compressor.methods.low_rank import residual
from compressor.pipeline.residuals import choose_ranks
from compressor.pipeline.solution import Solution
from compressor.plan import Choice
from compressor.resume.store import Store
from compressor.statistics import LinearStats

READERS = ("o", "down", "fc2")  # linears that read what the others of their module write
SEQUENTIAL_COST = 2.5  # forward passes that a sequential solve takes for each stream


def is_wanted(solution: Solution) -> bool:
    """Tell whether a recipe, or a plan that was given, asks for anything here."""
    recipe = solution.job.recipe
    has_residuals = solution.is_given and any(
        choice.residual for choice in solution.plan.linears.values()
    )
    return recipe.calibration.sequential or recipe.compensation.enabled or has_residuals


def solve_in_order(solution: Solution) -> Solution:
    """Return the final choices and modules of a plan; nothing is allocated again.

    Sequential runs solve each linear on the inputs behind the compressed ones before it, and give
    it its residual there; its rank was settled on the plan's modules. Gradient sums of the dense
    model serve in either case. Linears that are kept dense stay as they are.

    Raises ConfigError for residuals that do not fit, OutOfTime behind the deadline of the job.
    """
    if not is_wanted(solution):
        return solution
    job, solver = solution.job, prepare_solver(solution, solution.job.store)
    if not job.recipe.calibration.sequential:
        for name in job.steps(list(solution.modules), "compensate"):
            solver.solve([name], None)
        return solver.solution
    compressed = {n: a for n, a in job.assignments.items() if n in solution.modules}
    with job.computing():
        streams.solve_in_order(
            job.model,
            {name: assignment.info for name, assignment in compressed.items()},
            [
                batch.to(job.device)
                for batch in job.calibration.tokens.split(job.recipe.calibration.batch_size)
            ],
            {name: assignment.needs for name, assignment in job.assignments.items()},
            job.recipe.calibration.anchor > 0,
            solver.solve,
            solver.keep,
            job.progress,
            job.cache,
        )
    return solver.solution


def prepare_solver(solution: Solution, store: Store) -> "SequentialSolver":
    """Create the sequential solver for a plan, ranks of residuals settled, nothing solved yet.

    store: where it keeps the modules of blocks.
    """
    ranks = solution.job.store.recall(
        "ranks", [solution.plan.to_json(), solution.is_given], partial(choose_ranks, solution)
    )
    return SequentialSolver(solution, ranks, store)


class SequentialSolver:
    """The modules and choices of a plan, replaced group by group."""

    def __init__(self, solution: Solution, ranks: dict[str, int], store: Store):
        self.base, self.ranks = solution, ranks
        self.job, self.statistics = solution.job, solution.statistics
        self.choices, self.modules = dict(solution.plan.linears), solution.compressed
        self.anchor = self.job.recipe.calibration.anchor
        self.dampings = self.job.recipe.calibration.anchor_damping
        self.store = store.within(solution.plan.to_json(), ranks, [self.anchor, *self.dampings])
        # linears of modules whose last one has not been reached
        self.waiting: dict[str, Member] = {}
        blocks = {self.job.assignments[name].info.block for name in self.modules}
        self.projection = self.job.deadline.project(len(blocks))

    @property
    def solution(self) -> Solution:
        """The solution as far as it is solved."""
        return self.base.improved(self.choices, self.modules)

    def block(self, streams: Streams) -> Modules:
        """Solve the block that streams have come to, and return its final modules."""
        members = {
            name: assignment.info
            for name, assignment in self.job.assignments.items()
            if name in self.modules and assignment.info.block == streams.block
        }
        needs = {name: self.job.assignments[name].needs for name in members}
        make = partial(solve_block, streams, members, needs, self.anchor > 0, self.solve)
        return self.keep(list(members), make) if members else {}

    def solve(self, names: Sequence[str], sums: LinearStats | None) -> Modules:
        """Solve linears that read the same inputs, and return their final modules.

        sums: of their inputs; None: they are those of the dense model, the plan's modules serve.
        """
        shift, took = None, {}
        if sums is not None and sums.gram is not None and sums.cross_gram is not None:
            shift, took["anchor_damping"] = linalg.drift(
                sums.gram, sums.cross_gram, self.dampings, names[0]
            )
        placed = self.solve_modules(names, sums, shift, took)
        single = [name for name in names if self.module_of(name) is None]
        for part in self.decompositions(single):
            targets = {name: self.target(name, shift) for name in part.members}
            stats = {
                name: self.statistics[name]
                if sums is None
                else with_input_sums(self.statistics[name], sums)
                for name in part.members
            }
            state = part.state if sums is None else self.solve_part(part, targets, stats, took)
            self.compensate(part, state, targets, stats)
        return placed | {name: self.modules[name] for name in single}

    def keep(self, names: Sequence[str], make: Callable[[], Modules]) -> Modules:
        """Recall the modules of a block, or make them, with its final modules and choices.

        Raises OutOfTime, before it is begun, if the last block would end behind the deadline.
        """
        self.projection.check()

        def solve() -> tuple[Modules, Modules, dict[str, Choice]]:
            placed = make()
            modules = {name: self.modules[name] for name in names}
            return placed, modules, {name: self.choices[name] for name in names}

        placed, modules, choices = self.store.recall("solved", list(names), solve)
        self.modules |= modules
        self.choices |= choices
        return placed

    def module_of(self, name: str) -> Decomposition | None:
        """Return the decomposition that compresses this linear with its module, if one does."""
        part = self.base.decomposition(name) if self.choices[name].members else None
        return part if part is not None and part.method.unit != LINEAR else None

    def solve_modules(
        self,
        names: Sequence[str],
        sums: LinearStats | None,
        shift: Tensor | None,
        took: dict[str, float],
    ) -> Modules:
        """Solve whole modules once the sums of their last linear are known; before, their linears
        run as they were.

        That linear reads channels, heads or value dimensions that are the same whether the others
        have been removed or not. Queries and keys end with what they read, so values are mixed by
        the compressed ones. Pairs in two blocks stay as planned: the first is needed before the
        second is known.
        """
        solved: Modules = {}
        for name, part in ((name, part) for name in names if (part := self.module_of(name))):
            if part.method.unit == PAIR:
                solved[name] = self.modules[name]
                continue
            stats = self.statistics[name]
            stats = stats if sums is None else with_input_sums(stats, sums)
            role = self.job.assignments[name].info.role
            anchored = shift if role in READERS else None
            self.waiting[name] = Member(name, self.target(name, anchored), stats, role)
            if not part.members.keys() <= self.waiting.keys():
                continue
            if sums is not None:
                members = {member: self.waiting[member] for member in part.members}
                state = part.method.prepare_unit(part.curve.linear, members)
                self.install(part, state, {} if anchored is None else took)
            solved |= {member: self.modules[member] for member in part.members}
        return solved

    def install(self, part: Decomposition, state: Any, took: dict[str, float]) -> None:
        """Build the linears of a decomposition from a new state, at the setting of the plan."""
        setting = self.choices[next(iter(part.members))].setting
        modules, error = built(part.method, state, setting, part.members)
        self.modules |= modules
        for name in modules:
            self.choices[name] = replace(self.choices[name], measured=error, sequential=took)

    def decompositions(self, names: Sequence[str]) -> Iterator[Decomposition]:
        """Yield the decompositions behind the choices of some linears, shared ones once."""
        for name in names:
            if name == (self.choices[name].members or (name,))[0]:
                yield self.base.decomposition(name)

    def target(self, name: str, shift: Tensor | None) -> Dense:
        """Return the dense linear, its weight moved by what its inputs lack: W + β W Δ."""
        dense = dense_weight(self.job.assignments[name])
        if shift is None:
            return dense
        weight = dense.weight.double()
        return replace(dense, weight=weight + self.anchor * weight @ shift)

    def solve_part(
        self,
        part: Decomposition,
        targets: dict[str, Dense],
        stats: dict[str, LinearStats],
        took: dict[str, float],
    ) -> Any:
        """Solve one linear, or several that share what they store, at the setting of the plan;
        return the state of the method.
        """
        members = {name: Member(name, targets[name], stats[name]) for name in part.members}
        state = part.method.prepare_unit(part.curve.linear, members)
        if "damping" in self.choices[next(iter(members))].setting:
            # the method's own: the setting says what the dense Gram took, this what the new one did
            took = took | {"damping": state.damping}
        self.install(part, state, took)
        return state

    def seconds(self) -> float:
        """Estimate the seconds of solving everything anew.

        The largest linear is solved here, and all take as long for each of their numbers.
        """
        sizes = {
            name: self.job.assignments[name].parameters
            for name in self.modules
            if self.module_of(name) is None
        }
        if not sizes:
            return 0.0
        part = self.base.decomposition(max(sizes, key=sizes.__getitem__))
        targets = {name: self.target(name, None) for name in part.members}
        stats = {name: self.statistics[name] for name in part.members}
        start = self.job.deadline.now()
        self.solve_part(part, targets, stats, {})
        spent = self.job.deadline.now() - start
        return spent * sum(sizes.values()) / sum(sizes[name] for name in part.members)

    def compensate(
        self,
        part: Decomposition,
        state: Any,
        targets: dict[str, Dense],
        stats: dict[str, LinearStats],
    ) -> None:
        """Give linears their residuals, and measure and count what they have become."""
        metric = self.job.recipe.compensation.metric
        for name, target in targets.items():
            if rank := self.ranks.get(name, 0):
                dense = dense_weight(self.job.assignments[name])
                if rank > (most := residual.largest_rank(self.modules[name], dense)):
                    raise ConfigError(
                        f"{name}: the plan says a residual of rank {rank}; {most} is the largest "
                        "that is smaller than dense"
                    )
                fit = residual.fit(name, target, self.modules[name], stats[name], metric)
                self.modules[name] = residual.extend(self.modules[name], fit, rank)
        modules = {name: self.modules[name] for name in part.members}
        if any(self.ranks.get(name, 0) for name in part.members):
            error = part.method.measure_unit(state, modules)
            for name in part.members:
                self.choices[name] = replace(self.choices[name], measured=error)
        for name, module in modules.items():
            self.choices[name] = replace(
                self.choices[name],
                residual=self.ranks.get(name),
                bits=module.bits(),
                parameters=module.stored_parameters(),
            )


def with_input_sums(stats: LinearStats, sums: LinearStats) -> LinearStats:
    """Return statistics of the dense model with its input sums replaced by new ones."""
    return replace(
        sums, fisher=stats.fisher, grad_tokens=stats.grad_tokens, grad_gram=stats.grad_gram
    )
