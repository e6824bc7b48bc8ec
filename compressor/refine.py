"""From the modules of a plan to the final ones, methods and settings fixed: solved again in order, on the inputs they will have."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from compressor import linalg
from compressor.decompose import built, dense_weight, stacked, stacked_stats
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear, Dense
from compressor.methods.base import Method
from compressor.plan import Plan
from compressor.progress import Progress, silent
from compressor.sequential import solve_in_order
from compressor.stages import Job
from compressor.stats import LinearStats


def in_order(
    job: Job, plan: Plan, modules: dict[str, CompressedLinear], stats: dict[str, LinearStats], progress: Progress = silent
) -> tuple[Plan, dict[str, CompressedLinear]]:
    """Solve the chosen linears again, each on the inputs behind the compressed ones before it; nothing is allocated again.

    stats: of the dense model; its gradient sums serve here too. Linears that are kept dense stay as they are.
    """
    run = _Run(job, plan, modules, stats)
    with job.computing():
        solve_in_order(
            job.model,
            {name: assignment.info for name, assignment in job.assignments.items() if name in modules},
            [batch.to(job.device) for batch in job.calibration.tokens.split(job.recipe.calibration.batch_size)],
            {name: assignment.needs for name, assignment in job.assignments.items()},
            job.recipe.calibration.anchor > 0,
            run.solve,
            progress,
        )
    return replace(plan, linears=run.choices), run.modules


class _Run:
    """The modules and choices of a plan, replaced group by group."""

    def __init__(self, job: Job, plan: Plan, modules: dict[str, CompressedLinear], stats: dict[str, LinearStats]):
        self.job, self.stats, self.section = job, stats, job.recipe.calibration
        self.choices, self.modules = dict(plan.linears), dict(modules)

    def solve(self, names: Sequence[str], sums: LinearStats | None) -> dict[str, CompressedLinear]:
        """Modules of linears that read the same inputs, from their sums; those of the plan where the sums are the dense model's."""
        if sums is not None:
            shift, took = None, {}
            if sums.cross_gram is not None:
                shift, took["anchor_damping"] = linalg.drift(sums.gram, sums.cross_gram, self.section.anchor_damping, names[0])
            units = {tuple(self.choices[name].setting.get("shared", (name,))): None for name in names}
            for members in units:
                self.solve_unit(members, [self.target(name, shift) for name in members], sums, took)
        return {name: self.modules[name] for name in names}

    def target(self, name: str, shift: Tensor | None) -> Dense:
        """The dense linear, its weight moved towards what its inputs lack: W + β W Δ."""
        dense = dense_weight(self.job.assignments[name])
        if shift is None:
            return dense
        weight = dense.weight.double()
        return Dense(weight + self.section.anchor * weight @ shift, dense.bias, dense.dtype)

    def solve_unit(self, members: Sequence[str], targets: Sequence[Dense], sums: LinearStats, took: dict[str, float]) -> None:
        """Solve one linear, or several that share what they store, at the setting of the plan."""
        name, alone = members[0], len(members) == 1
        assignment, choice = self.job.assignments[name], self.choices[name]
        setting = {key: value for key, value in choice.setting.items() if key != "shared"}
        stats = [over(self.stats[member], sums) for member in members]
        dense, stats = (targets[0], stats[0]) if alone else (stacked(targets), stacked_stats(stats))
        method = only(name, choice.method, assignment.methods if alone else assignment.shared, setting, dense)
        state = method.prepare(name, dense, stats)
        heights = {name: len(target.weight) for name, target in zip(members, targets, strict=True)}
        modules, error = built(method, state, setting, heights)
        if "damping" in setting:  # the method's own: the plan says what the dense Gram took, `sequential` what this one did
            took = took | {"damping": state.damping}
        for name, module in modules.items():
            sizes = {"bits": module.bits(), "parameters": module.stored_parameters()}
            self.choices[name] = replace(self.choices[name], **sizes, measured=error, sequential=took)
        self.modules |= modules


def over(stats: LinearStats, sums: LinearStats) -> LinearStats:
    """Statistics of the dense model with its input sums replaced by new ones."""
    return replace(sums, fisher=stats.fisher, grad_tokens=stats.grad_tokens, grad_gram=stats.grad_gram)


def only(linear: str, name: str, methods: Sequence[Method], setting: dict[str, Any], dense: Dense) -> Method:
    """The method of that name; of several, the one that offers the setting. Raises ConfigError if the plan does not tell them apart."""
    named = [method for method in methods if method.name == name]
    if len(named) > 1:
        named = [method for method in named if any(size.setting.items() <= setting.items() for size in method.sizes(dense))]
    if len(named) > 1:
        raise ConfigError(f"{linear}: several candidates '{name}' offer {setting}; list one, or set calibration.sequential to false")
    return named[0]
