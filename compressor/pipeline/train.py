"""Repair and healing of the modules of a plan: each is kept only where the divergence on the
held-out windows falls.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.allocation.decompose import offering
from compressor.allocation.solve import Found
from compressor.errors import NumericalError
from compressor.evaluation.perplexity import in_float32
from compressor.linears import CompressedLinear
from compressor.linears.base import Modules
from compressor.models.install import installed
from compressor.models.linears import blocks
from compressor.models.partial_forward import recomputing
from compressor.pipeline import job as jobs
from compressor.pipeline.job import Job
from compressor.pipeline.sequential_solve import Run
from compressor.pipeline.stages import output_dtype
from compressor.plan import Choice, Plan
from compressor.recipe.sections import Recipe
from compressor.recipe.training import Heal, Training
from compressor.resume.store import Store
from compressor.runtime.progress import Progress, silent
from compressor.training.learners import Learners, leaves, rebind, rebuilt
from compressor.training.loop import State, Task, attached, fit
from compressor.training.lora import Loras, input_metrics, mergeable
from compressor.training.losses import Objective
from compressor.training.optimizers import require
from compressor.training.repair import repair_blocks
from compressor.training.step_budget import Pace, timed
from compressor.training.supports import Latents, has_support, parted
from compressor.training.teacher import Original
from compressor.training.team import Dismissed

Again = Callable[[Store], Run]

BEGIN = 1.5  # comparisons on all windows, which the work before the first step is like
REPAIR = 1 / 3  # of the time left for training, where healing follows
SPARE = 0.15  # of it, since later steps may take longer than those that were timed

log = logging.getLogger(__name__)


def recover(
    job: Job,
    plan: Plan,
    modules: Modules,
    found: Found,
    progress: Progress = silent,
    again: Again | None = None,
) -> tuple[Plan, Modules]:
    """Train what the modules of a plan store, as the recipe says; return its choices, measured
    again, and the modules to install.

    These now hold norms and dense linears too, where they have changed. The job's model is left as
    it was. again: of a plan that was solved in order, what solves it once more, each block behind
    repaired ones; it keeps its pieces in the store that it is given. The job has held-out windows.
    Raises ConfigError where LoRA is to be merged into integers alone.
    """
    if job.recipe.heal.enabled and job.recipe.heal.train == "lora":
        mergeable(job.model, modules, blocks(job.model)[1])
    recovery = _Recovery(job, plan, modules)
    if not recovery.store.recall("begins", None, partial(begins, job)):
        stopped = {
            stage: {"kept": False, "steps": 0}
            for stage in ("repair", "heal")
            if getattr(job.recipe, stage).enabled
        }
        return replace(plan, trained=stopped), modules
    with training(job.model):
        recovery.begin()
        if job.recipe.repair.enabled and recovery.fits(
            "repair", REPAIR if job.recipe.heal.enabled else 1.0
        ):
            recovery.stage("repair", partial(recovery.repair, progress, again))
        if job.recipe.heal.enabled and recovery.fits("heal", 1.0):
            recovery.stage("heal", partial(recovery.heal, progress))
    return measured(
        recovery.plan, job, recovery.modules, found, recovery.outcomes
    ), recovery.modules


def require_optimizers(recipe: Recipe) -> None:
    """Raise ConfigError if training needs a library that is missing."""
    for section in (recipe.repair, recipe.heal):
        if section.enabled:
            require(section.optimizer)


@contextmanager
def training(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute in float32, with none of its own parameters taking gradients; everything
    is restored on leaving.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with in_float32(model):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


def stored_dtypes(job: Job, modules: Mapping[str, nn.Module]) -> dict[str, torch.dtype]:
    """Dtype in which every parameter will be stored, by full name."""
    wanted = output_dtype(job.recipe)
    found = {name: wanted or parameter.dtype for name, parameter in job.model.named_parameters()}
    return found | {
        f"{name}.{key}": parameter.dtype
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
    }


def begins(job: Job) -> bool:
    """Whether the budget has room for what precedes the first step: the original's outputs, and
    divergences, on all windows.
    """
    if not job.clock.limited:
        return True
    tokens = job.calibration.tokens.numel() + job.heldout.tokens.numel()
    return BEGIN * tokens * jobs.seconds_per_token(job) < job.clock.left


class _Recovery:
    """The modules of a plan, replaced by trained ones where that helps; `outcomes` says what each
    stage did.
    """

    def __init__(self, job: Job, plan: Plan, modules: Modules):
        self.job, self.plan, self.modules = job, plan, modules
        self.outcomes: dict[str, Any] = {}
        self.dtypes = stored_dtypes(job, modules)
        recipe = job.recipe.model_dump(
            mode="json",
            include={"seed", "budget", "method", "allocation", "compensation", "output", "repair"},
        )
        self.store: Store = job.store.within(plan.to_json(), recipe)

    def begin(self) -> None:
        with torch.no_grad():
            fit_on, heldout = self.batches(self.job.recipe.heal.batch_size)
            keep = (
                self.job.recipe.heal.teacher == "online"
            )  # else calibration windows are asked for when healing comes to them
            model, cache = self.job.model, self.job.cache
            self.originals = (
                Original(model, fit_on, keep, cache),
                Original(model, heldout, cache=cache),
            )
        self.before = self.divergence("before", self.modules)

    def batches(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Calibration windows in batches of `size`, and the held-out ones in batches of a forward
        pass.
        """
        sizes = (size, self.job.recipe.calibration.batch_size)
        texts = (self.job.calibration, self.job.heldout)
        return tuple(
            [batch.to(self.job.device) for batch in text.tokens.split(size)]
            for text, size in zip(texts, sizes, strict=True)
        )

    def divergence(self, stage: str, modules: Modules) -> dict[str, float]:
        """Divergence of the model with these modules, on the calibration and on the held-out
        windows, nats per token.
        """

        def measure() -> dict[str, float]:
            with installed(self.job.model, modules):
                return {
                    name: one.divergence()
                    for name, one in zip(("calibration", "heldout"), self.originals, strict=True)
                }

        return self.store.recall(
            "divergence",
            [stage, self.job.recipe.heal.batch_size, self.job.recipe.heal.teacher],
            measure,
        )

    def fits(self, stage: str, share: float) -> bool:
        """Fit the steps of a stage to its share of the time that is left for training; False if
        there is none for a look.
        """
        job, section = self.job, getattr(self.job.recipe, stage)
        if not job.clock.limited:
            return True
        key = [stage, section.model_dump(mode="json"), job.recipe.heal.model_dump(mode="json")]
        pace = self.store.recall("pace", key, partial(self.pace, section))
        seconds = share * (1 - SPARE) * job.clock.left
        steps = self.store.recall(
            "steps", key, lambda: pace.steps(section, seconds, job.recipe.heal.batch_size)
        )
        if not steps:
            self.outcomes[stage] = {
                "kept": False,
                "before": self.before,
                "after": self.before,
                "steps": 0,
            }
            return False
        self.job = replace(
            job,
            recipe=job.recipe.model_copy(
                update={stage: section.model_copy(update={"steps": steps})}
            ),
        )
        return True

    def pace(self, section: Training) -> Pace:
        """Time a step of healing with what learns in this section, and a look."""
        fit_on, heldout = self.originals
        learners = self.learners(section, self.modules)
        placed = installed(self.job.model, self.modules | learners.copies)
        with placed, self.recomputed(), attached(learners.parameters.values()):
            return timed(Objective(fit_on, self.job.recipe.heal).loss, heldout.divergence)

    def stage(self, name: str, train: Callable[[], None]) -> None:
        """Train. In a run that searches, for which each step must earn its place, a stage whose
        numbers fail is dropped.
        """
        try:
            train()
        except NumericalError as error:
            if self.job.recipe.allocation.search is None:
                raise
            log.warning("%s; what this stage has trained is dropped", error)
            self.outcomes[name] = {
                "kept": False,
                "before": self.before,
                "after": self.before,
                "dropped": str(error),
            }
            if self.job.team.rank and name == "heal":
                raise Dismissed from error

    def judge(
        self, stage: str, modules: Modules, details: dict[str, Any], plan: Plan | None = None
    ) -> None:
        """Take trained modules, and the plan that they have now, if the held-out divergence has
        fallen.
        """
        after = self.divergence(stage, modules)
        kept = after["heldout"] < self.before["heldout"]
        self.outcomes[stage] = {"kept": kept, "before": self.before, "after": after} | details
        if kept:
            self.modules, self.before, self.plan = modules, after, plan or self.plan

    def repair(self, progress: Progress, again: Again | None) -> None:
        """Repair block after block; in order, solve each on what the repaired ones before it leave,
        unless time is short.
        """
        job, section = self.job, self.job.recipe.repair
        run = (
            again(self.store)
            if again and job.recipe.calibration.sequential and not job.clock.limited
            else None
        )
        modules, found = repair_blocks(
            job.model,
            {} if run else self.modules,
            self.dtypes,
            self.batches(section.batch_size),
            section,
            job.recipe.seed,
            self.store,
            progress,
            job.cache,
            run.block if run else lambda streams: {},
        )
        self.judge(
            "repair",
            modules,
            {"blocks": [block.to_json() for block in found]},
            run and replace(self.plan, linears=run.choices),
        )

    def heal(self, progress: Progress) -> None:
        model, section, start, before = (
            self.job.model,
            self.job.recipe.heal,
            self.modules,
            State(0, {}, {}, {}, ()),
        )
        learners = self.learners(section, start)
        if not learners.parameters:
            return
        self.store = self.store.within(section.model_dump(mode="json"), self.job.team.processes)
        if isinstance(learners, Latents):
            first, section = parted(section)
            before = self.train("supports", first, learners, start, progress)
            start = start | learners.masters()
            learners = self.learners(section, start)
        state = self.train("heal", section, learners, start, progress)
        if self.job.team.rank:
            raise Dismissed
        metrics = []
        if isinstance(learners, Loras):
            with installed(model, start | learners.copies):
                metrics = [input_metrics(model, learners, self.originals[0].batches)]
        modules = start | rebuilt(learners.originals, learners.values(self.dtypes, *metrics))
        rebind(modules)
        several = {"processes": self.job.team.processes} if self.job.team.processes > 1 else {}
        self.judge(
            "heal",
            modules,
            {"steps": before.step + state.step, "looks": [*before.scores, *state.scores]} | several,
        )

    def train(
        self, title: str, section: Heal, learners: Any, start: Modules, progress: Progress
    ) -> State:
        """Train all blocks from these modules on, and leave what learns at its best."""
        fit_on, heldout = self.originals
        objective = Objective(fit_on, section)
        loss = (
            (lambda index: learners.pulled(objective.loss(index)))
            if isinstance(learners, Latents)
            else objective.loss
        )
        windows = tuple(len(batch) for batch in fit_on.batches)
        task = Task(title, learners.parameters, len(windows), loss, heldout.divergence, windows)
        with installed(self.job.model, start | learners.copies), self.recomputed():
            return fit(task, section, self.job.recipe.seed, self.store, progress, self.job.team)

    def recomputed(self) -> AbstractContextManager:
        """Blocks run again in the backward pass, where the recipe says so."""
        return recomputing(self.job.model) if self.job.recipe.heal.checkpointing else nullcontext()

    def learners(self, section: Training, modules: Modules) -> Learners | Loras | Latents:
        """What learns in a section, in all blocks."""
        model, scopes = self.job.model, blocks(self.job.model)[1]
        if section.train == "lora":
            return Loras(model, modules, scopes, section.rank, self.job.recipe.seed)
        if (
            isinstance(section, Heal)
            and section.supports == "learned"
            and any(map(has_support, leaves(model, modules, scopes).values()))
        ):
            return Latents(model, modules, scopes, section.train)
        return Learners(model, modules, scopes, section.train)


def measured(
    plan: Plan, job: Job, modules: Modules, found: Found, outcomes: dict[str, Any]
) -> Plan:
    """The plan with the error of every compressed linear as it is stored now, in the metric of its
    method on the dense model's inputs.
    """
    choices = dict(plan.linears)
    for name, choice in plan.linears.items():
        members = choice.setting.get("shared")
        if not isinstance(modules.get(name), CompressedLinear) or (
            members is not None and name != members[0]
        ):
            continue
        for each, error in _errors(name, choice, job, modules, found).items():
            choices[each] = replace(choices[each], measured=error)
    return replace(plan, linears=choices, trained=outcomes)


def _errors(
    name: str, choice: Choice, job: Job, modules: Modules, found: Found
) -> dict[str, float]:
    """Error of the linears that are stored together with this one."""
    members = choice.setting.get("shared")
    unit = (
        name
        if members is None
        else next(group.name for group in job.groups.values() if [*group.members] == members)
    )
    part = offering(name, choice, found[unit])[0]
    error = part.method.measure_unit(part.state, {each: modules[each] for each in part.members})
    return dict.fromkeys(part.members, error)
