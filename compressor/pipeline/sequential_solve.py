"""From the modules of a plan to the final ones, methods and settings fixed: solved again in order,
and given low-rank residuals.
"""

import time
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
    offering,
    setting_of,
)
from compressor.allocation.solve import Found
from compressor.calibrate.streams import Streams, solve_block, solve_in_order
from compressor.errors import ConfigError
from compressor.linears import Dense
from compressor.linears.base import Modules
from compressor.methods.base import LINEAR, PAIR, Member
from compressor.methods.low_rank import residual
from compressor.pipeline.job import Job
from compressor.pipeline.residuals import ranks_of
from compressor.plan import Choice, Plan
from compressor.recipe.sections import Recipe
from compressor.resume.store import Store
from compressor.runtime.progress import Progress, silent
from compressor.statistics import LinearStats

READERS = ("o", "down", "fc2")  # linears that read what the others of their module write


def wanted(recipe: Recipe, edited: Plan | None) -> bool:
    """Whether a recipe, or a plan that is to be built as it stands, asks for anything here."""
    residuals = edited is not None and any(choice.residual for choice in edited.linears.values())
    return recipe.calibration.sequential or recipe.compensation.enabled or residuals


def finish(
    job: Job,
    plan: Plan,
    modules: Modules,
    found: Found,
    stats: dict[str, LinearStats],
    edited: Plan | None,
    progress: Progress = silent,
) -> tuple[Plan, Modules]:
    """Final choices and modules of a plan; nothing is allocated again, and linears that are kept
    dense stay as they are.

    Sequential runs solve each linear on the inputs behind the compressed ones before it, and give
    it its residual there; its rank was settled on the plan's modules. stats: of the dense model;
    their gradient sums serve in either case. edited: a plan whose ranks are taken as they are.
    Raises ConfigError for residuals that do not fit.
    """
    run = in_order(job, plan, modules, found, stats, edited, job.store)
    if not job.recipe.calibration.sequential:
        for name in progress(list(modules), "compensate"):
            run.solve([name], None)
    else:
        with job.computing():
            solve_in_order(
                job.model,
                {
                    name: assignment.info
                    for name, assignment in job.assignments.items()
                    if name in modules
                },
                [
                    batch.to(job.device)
                    for batch in job.calibration.tokens.split(job.recipe.calibration.batch_size)
                ],
                {name: assignment.needs for name, assignment in job.assignments.items()},
                run.section.anchor > 0,
                run.solve,
                run.keep,
                progress,
                job.cache,
            )
    return run.plan, run.modules


def in_order(
    job: Job,
    plan: Plan,
    modules: Modules,
    found: Found,
    stats: dict[str, LinearStats],
    edited: Plan | None,
    store: Store,
) -> "Run":
    """What `finish` works with, nothing solved yet. store: where it keeps the modules of blocks."""
    if edited is None:
        ranks = job.store.recall(
            "ranks", plan.to_json(), partial(ranks_of, job, plan, modules, stats)
        )
    else:
        ranks = {name: choice.residual or 0 for name, choice in edited.linears.items()}
    return Run(job, plan, modules, found, stats, ranks, store)


class Run:
    """The modules and choices of a plan, replaced group by group."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        modules: Modules,
        found: Found,
        stats: dict[str, LinearStats],
        ranks: dict[str, int],
        store: Store,
    ):
        self.job, self.found, self.stats, self.ranks = job, found, stats, ranks
        self.section = job.recipe.calibration
        self.planned, self.choices, self.modules = plan, dict(plan.linears), dict(modules)
        self.store = store.within(
            plan.to_json(), ranks, [self.section.anchor, *self.section.anchor_damping]
        )
        # linears of modules whose last one has not been reached
        self.waiting: dict[str, Member] = {}

    @property
    def plan(self) -> Plan:
        """The plan with the choices as they are now."""
        return replace(self.planned, linears=self.choices)

    def block(self, streams: Streams) -> Modules:
        """Final modules of the block that streams have come to."""
        members = {
            name: one.info
            for name, one in self.job.assignments.items()
            if name in self.modules and one.info.block == streams.block
        }
        needs = {name: self.job.assignments[name].needs for name in members}
        made = partial(solve_block, streams, members, needs, self.section.anchor > 0, self.solve)
        return self.keep(list(members), made) if members else {}

    def solve(self, names: Sequence[str], sums: LinearStats | None) -> Modules:
        """Final modules of linears that read the same inputs, from their sums; None: those of the
        dense model, the plan's modules serve.
        """
        shift, took = None, {}
        if sums is not None and sums.cross_gram is not None:
            shift, took["anchor_damping"] = linalg.drift(
                sums.gram, sums.cross_gram, self.section.anchor_damping, names[0]
            )
        placed = self.solve_modules(names, sums, shift, took)
        for part in self.parts([name for name in names if self.module_of(name) is None]):
            targets = {name: self.target(name, shift) for name in part.members}
            stats = {
                name: self.stats[name] if sums is None else over(self.stats[name], sums)
                for name in part.members
            }
            state = part.state if sums is None else self.solve_part(part, targets, stats, took)
            self.compensate(part, state, targets, stats)
        return placed | {name: self.modules[name] for name in names if self.module_of(name) is None}

    def keep(self, names: Sequence[str], make: Callable[[], Modules]) -> Modules:
        """Modules of a block, made now or in a run that was stopped, with its final modules and
        choices.
        """

        def outcome() -> tuple[Modules, Modules, dict[str, Choice]]:
            placed = make()
            return (
                placed,
                {name: self.modules[name] for name in names},
                {name: self.choices[name] for name in names},
            )

        placed, modules, choices = self.store.recall("solved", list(names), outcome)
        self.modules |= modules
        self.choices |= choices
        return placed

    def module_of(self, name: str) -> Decomposition | None:
        """The decomposition that compresses this linear with the rest of its module, if one
        does.
        """
        members = self.choices[name].setting.get("shared")
        part = None if members is None else next(self.parts(members))
        return part if part is not None and part.method.unit != LINEAR else None

    def solve_modules(
        self,
        names: Sequence[str],
        sums: LinearStats | None,
        shift: Tensor | None,
        took: dict[str, float],
    ) -> Modules:
        """Whole modules, once the sums of their last linear are known; before, their linears run as
        they were.

        That linear reads channels, heads or value dimensions that are the same whether the others
        have been removed or not. Queries and keys end with what they read, so values are mixed by
        the compressed ones. Pairs in two blocks stay as planned: the first is needed before the
        second is known.
        """
        found: Modules = {}
        for name, part in ((name, part) for name in names if (part := self.module_of(name))):
            if part.method.unit == PAIR:
                found[name] = self.modules[name]
                continue
            stats = self.stats[name] if sums is None else over(self.stats[name], sums)
            role = self.job.assignments[name].info.role
            anchored = shift if role in READERS else None
            self.waiting[name] = Member(name, self.target(name, anchored), stats, role)
            if not part.members.keys() <= self.waiting.keys():
                continue
            if sums is not None:
                state = part.method.prepare_unit(
                    part.curve.linear, {each: self.waiting[each] for each in part.members}
                )
                modules, error = built(
                    part.method, state, setting_of(self.choices[name]), part.members
                )
                self.modules |= modules
                for each in modules:
                    self.choices[each] = replace(
                        self.choices[each],
                        measured=error,
                        sequential={} if anchored is None else took,
                    )
            found |= {each: self.modules[each] for each in part.members}
        return found

    def parts(self, names: Sequence[str]) -> Iterator[Decomposition]:
        """The decompositions behind the choices of some linears, those that share one together."""
        for name in names:
            choice = self.choices[name]
            members = choice.setting.get("shared")
            if members is None or name == members[0]:
                unit = (
                    name
                    if members is None
                    else next(
                        group.name
                        for group in self.job.groups.values()
                        if [*group.members] == members
                    )
                )
                yield offering(name, choice, self.found[unit])[0]

    def target(self, name: str, shift: Tensor | None) -> Dense:
        """The dense linear, its weight moved by what its inputs lack: W + β W Δ."""
        dense = dense_weight(self.job.assignments[name])
        if shift is None:
            return dense
        weight = dense.weight.double()
        return replace(dense, weight=weight + self.section.anchor * weight @ shift)

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
        setting = setting_of(self.choices[next(iter(part.members))])
        members = {name: Member(name, targets[name], stats[name]) for name in part.members}
        state = part.method.prepare_unit(part.curve.linear, members)
        modules, error = built(part.method, state, setting, part.members)
        if (
            "damping" in setting
        ):  # the method's own: the setting says what the dense Gram took, this what the new one did
            took = took | {"damping": state.damping}
        self.modules |= modules
        for name in modules:
            self.choices[name] = replace(self.choices[name], measured=error, sequential=took)
        return state

    def seconds(self) -> float:
        """What solving everything anew takes, about: as the largest linear takes, which is solved
        here, for each of its numbers.
        """
        sizes = {
            name: self.job.assignments[name].parameters
            for name in self.modules
            if self.module_of(name) is None
        }
        if not sizes:
            return 0.0
        name = max(sizes, key=sizes.__getitem__)
        part = next(self.parts(self.choices[name].setting.get("shared") or [name]))
        targets, stats = (
            {each: self.target(each, None) for each in part.members},
            {each: self.stats[each] for each in part.members},
        )
        start = time.monotonic()
        self.solve_part(part, targets, stats, {})
        return (
            (time.monotonic() - start)
            * sum(sizes.values())
            / sum(sizes[each] for each in part.members)
        )

    def compensate(
        self,
        part: Decomposition,
        state: Any,
        targets: dict[str, Dense],
        stats: dict[str, LinearStats],
    ) -> None:
        """Give linears their residuals, and measure and count what they have become."""
        for name, target in targets.items():
            if rank := self.ranks.get(name, 0):
                if rank > (
                    most := residual.largest_rank(
                        self.modules[name], dense_weight(self.job.assignments[name])
                    )
                ):
                    raise ConfigError(
                        f"{name}: the plan says a residual of rank {rank}; {most} is the largest "
                        "that is smaller than dense"
                    )
                fit = residual.fit(
                    name,
                    target,
                    self.modules[name],
                    stats[name],
                    self.job.recipe.compensation.metric,
                )
                self.modules[name] = residual.extend(self.modules[name], fit, rank)
        modules = {name: self.modules[name] for name in part.members}
        if any(self.ranks.get(name, 0) for name in part.members):
            error = part.method.measure_unit(state, modules)
            for name in part.members:
                self.choices[name] = replace(self.choices[name], measured=error)
        for name, module in modules.items():
            sizes = {"bits": module.bits(), "parameters": module.stored_parameters()}
            self.choices[name] = replace(self.choices[name], residual=self.ranks.get(name), **sizes)


def over(stats: LinearStats, sums: LinearStats) -> LinearStats:
    """Statistics of the dense model with its input sums replaced by new ones."""
    return replace(
        sums, fisher=stats.fisher, grad_tokens=stats.grad_tokens, grad_gram=stats.grad_gram
    )
