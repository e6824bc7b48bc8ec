"""Repair and heal the modules of a plan, each kept only where the divergence on the held-out
windows falls.
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

from compressor.calibrate.windows import Windows
from compressor.errors import NumericalError
from compressor.evaluation.perplexity import in_float32
from compressor.models.install import installed
from compressor.models.linears import blocks
from compressor.models.partial_forward import recomputing
from compressor.pipeline import job as jobs
from compressor.pipeline.job import Job
from compressor.pipeline.sequential_solve import prepare_solver
from compressor.pipeline.solution import Solution
from compressor.pipeline.stages import output_dtype
from compressor.recipe.sections import Recipe
from compressor.recipe.training import Heal, Training
from compressor.resume.store import Store
from compressor.training.learners import Learners, Trainable, collect_leaves, rebind, rebuild
from compressor.training.loop import State, Task, fit, taking_gradients
from compressor.training.lora import Loras, select_mergeable
from compressor.training.losses import Objective
from compressor.training.optimizers import require
from compressor.training.repair import repair_blocks
from compressor.training.step_budget import StepTimes, time_step
from compressor.training.supports import Supports, has_support, split_section
from compressor.training.teacher import Teacher
from compressor.training.team import Dismissed

Fit = Callable[..., State]  # the interface of `training.loop.fit`

BEGIN_COST = 1.5  # work before the first step ÷ one model comparison on all windows
REPAIR_SHARE = 1 / 3  # of the time left for training, where healing follows
SPARE_SHARE = 0.15  # of it, since later steps may take longer than those that were timed

log = logging.getLogger(__name__)


def train(solution: Solution, fit: Fit = fit) -> Solution:
    """Train what the modules of a plan store, as the recipe says.

    The modules to install hold norms and dense linears too, where they have changed; the job's
    model is left as it was. The job has held-out windows. In a plan that was solved in order, each
    block is solved once more behind repaired ones.

    Args:
        solution: what is trained.
        fit: takes the steps of healing.

    Raises:
        ConfigError: where LoRA is to be merged into integers alone.
    """
    job = solution.job
    if not job.recipe.trains:
        return solution
    with job.watch("train"):
        if job.recipe.heal.enabled and job.recipe.heal.train == "lora":
            select_mergeable(job.model, solution.modules, blocks(job.model)[1])
        recovery = _Recovery(solution, fit)
        if not recovery.store.recall("begins", None, partial(has_time_to_begin, job)):
            stopped = {
                stage: {"kept": False, "steps": 0}
                for stage in ("repair", "heal")
                if getattr(job.recipe, stage).enabled
            }
            return solution.noted(trained=stopped)
        with training(job.model):
            recovery.begin()
            repair_share = REPAIR_SHARE if job.recipe.heal.enabled else 1.0
            if job.recipe.repair.enabled and recovery.fits("repair", repair_share):
                recovery.stage("repair", recovery.repair)
            if job.recipe.heal.enabled and recovery.fits("heal", 1.0):
                recovery.stage("heal", recovery.heal)
        return measure_again(recovery.solution).noted(trained=recovery.outcomes)


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
    """Return the dtype in which every parameter will be stored, by full name."""
    dtype = output_dtype(job.recipe)
    dtypes = {name: dtype or parameter.dtype for name, parameter in job.model.named_parameters()}
    return dtypes | {
        f"{name}.{key}": parameter.dtype
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
    }


def has_time_to_begin(job: Job) -> bool:
    """Tell whether the deadline has room for what precedes the first step.

    That is the original's outputs, and divergences, on all windows.
    """
    if not job.budget.is_limited:
        return True
    tokens = job.calibration.tokens.numel() + job.heldout.tokens.numel()
    return BEGIN_COST * tokens * jobs.seconds_per_token(job) < job.budget.left


class _Recovery:
    """The modules of a plan, replaced by trained ones where that helps; `outcomes` says what each
    stage did.
    """

    def __init__(self, solution: Solution, fit: Fit):
        self.solution, self.fit = solution, fit
        self.job = job = solution.job  # whose recipe has the steps that there is time for
        self.outcomes: dict[str, Any] = {}
        self.dtypes = stored_dtypes(job, solution.modules)
        recipe = job.recipe.model_dump(
            mode="json",
            include={"seed", "budget", "method", "allocation", "compensation", "output", "repair"},
        )
        self.store: Store = job.store.within(solution.plan.to_json(), recipe)

    def begin(self) -> None:
        with torch.no_grad():
            fit_on, heldout = self.batches(self.job.recipe.heal.batch_size)
            # offline, healing asks for the calibration windows when it comes to them
            keep = self.job.recipe.heal.teacher == "online"
            model, cache = self.job.model, self.job.cache
            self.originals = (
                Teacher(model, fit_on, keep, cache),
                Teacher(model, heldout, cache=cache),
            )
        self.before = self.divergence("before", self.solution.modules)

    def batches(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Divide calibration windows into batches of `size`, held-out ones into those of a pass."""

        def split(text: Windows, size: int) -> list[Tensor]:
            return [batch.to(self.job.device) for batch in text.tokens.split(size)]

        heldout = split(self.job.heldout, self.job.recipe.calibration.batch_size)
        return split(self.job.calibration, size), heldout

    def divergence(self, stage: str, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Measure KL(original‖model) with these modules on the calibration and on the held-out
        windows, nats per token.
        """

        def measure() -> dict[str, float]:
            with installed(self.job.model, modules):
                return {
                    text: original.divergence()
                    for text, original in zip(
                        ("calibration", "heldout"), self.originals, strict=True
                    )
                }

        return self.store.recall(
            "divergence",
            [stage, self.job.recipe.heal.batch_size, self.job.recipe.heal.teacher],
            measure,
        )

    def fits(self, stage: str, share: float) -> bool:
        """Fit the steps of a stage to its share of the time that is left for training.

        Return whether there is time for a look at least.
        """
        job, section = self.job, getattr(self.job.recipe, stage)
        if not job.budget.is_limited:
            return True
        key = [stage, section.model_dump(mode="json"), job.recipe.heal.model_dump(mode="json")]
        pace = self.store.recall("pace", key, partial(self.pace, section))
        seconds = share * (1 - SPARE_SHARE) * job.budget.left
        steps = self.store.recall(
            "steps",
            key,
            lambda: pace.affordable_steps(section, seconds, job.recipe.heal.batch_size),
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

    def pace(self, section: Training) -> StepTimes:
        """Time a step of healing with what learns in this section, and a look."""
        fit_on, heldout = self.originals
        modules = self.solution.modules
        learners = self.learners(section, modules)
        placed = installed(self.job.model, {**modules, **learners.copies})
        with placed, self.recomputed(), taking_gradients(learners.parameters.values()):
            return time_step(Objective(fit_on, self.job.recipe.heal).loss, heldout.divergence)

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

    def judge(self, stage: str, solution: Solution, details: dict[str, Any]) -> None:
        """Take a trained solution if the held-out divergence has fallen."""
        after = self.divergence(stage, solution.modules)
        kept = after["heldout"] < self.before["heldout"]
        self.outcomes[stage] = {"kept": kept, "before": self.before, "after": after} | details
        if kept:
            self.solution, self.before = solution, after

    def repair(self) -> None:
        """Repair block after block.

        In order, each is solved on what the repaired ones before it leave, unless time is short.
        """
        job, section = self.job, self.job.recipe.repair
        solver = None
        if job.recipe.calibration.sequential and not job.budget.is_limited:
            solver = prepare_solver(self.solution.allocated, self.store)
        modules, repaired = repair_blocks(
            job.model,
            {} if solver else dict(self.solution.modules),
            self.dtypes,
            self.batches(section.batch_size),
            section,
            job.recipe.seed,
            self.store,
            job.progress,
            job.cache,
            solver.block if solver else lambda streams: {},
        )
        choices = solver.choices if solver else self.solution.plan.linears
        details = {"blocks": [block.to_json() for block in repaired]}
        self.judge("repair", self.solution.improved(choices, modules), details)

    def heal(self) -> None:
        """Train all blocks together; with learned supports, these first."""
        model, section, start = self.job.model, self.job.recipe.heal, self.solution.modules
        before = State(0, {}, {}, {}, ())
        learners = self.learners(section, start)
        if not learners.parameters:
            return
        self.store = self.store.within(section.model_dump(mode="json"), self.job.team.processes)
        if isinstance(learners, Supports):
            first, section = split_section(section)
            before = self.train("supports", first, learners, start)
            start = {**start, **learners.masters()}
            learners = self.learners(section, start)
        state = self.train("heal", section, learners, start)
        if self.job.team.rank:
            raise Dismissed
        if isinstance(learners, Loras):
            with installed(model, {**start, **learners.copies}):
                learners.measure_inputs(model, self.originals[0].batches)
        modules = {**start, **rebuild(learners.originals, learners.values(self.dtypes))}
        rebind(modules)
        several = {"processes": self.job.team.processes} if self.job.team.processes > 1 else {}
        details = {
            "steps": before.step + state.step,
            "looks": [*before.scores, *state.scores],
        }
        solution = self.solution.improved(self.solution.plan.linears, modules)
        self.judge("heal", solution, details | several)

    def train(
        self, title: str, section: Heal, learners: Trainable, start: Mapping[str, nn.Module]
    ) -> State:
        """Train all blocks from these modules on, and leave what learns at its best."""
        fit_on, heldout = self.originals
        objective = Objective(fit_on, section)
        windows = tuple(len(batch) for batch in fit_on.batches)
        task = Task(
            title,
            learners.parameters,
            len(windows),
            lambda index: learners.penalise(objective.loss(index)),
            heldout.divergence,
            windows,
        )
        with installed(self.job.model, {**start, **learners.copies}), self.recomputed():
            return self.fit(
                task, section, self.job.recipe.seed, self.store, self.job.progress, self.job.team
            )

    def recomputed(self) -> AbstractContextManager:
        """Have blocks run again in the backward pass, where the recipe says so."""
        return recomputing(self.job.model) if self.job.recipe.heal.checkpointing else nullcontext()

    def learners(self, section: Training, modules: Mapping[str, nn.Module]) -> Trainable:
        """Create what learns in a section, in all blocks."""
        model, scopes = self.job.model, blocks(self.job.model)[1]
        if section.train == "lora":
            return Loras(model, modules, scopes, section.rank, self.job.recipe.seed)
        if (
            isinstance(section, Heal)
            and section.supports == "learned"
            and any(map(has_support, collect_leaves(model, modules, scopes).values()))
        ):
            return Supports(model, modules, scopes, section.train)
        return Learners(model, modules, scopes, section.train)


def measure_again(solution: Solution) -> Solution:
    """Measure every compressed linear as it is stored now, in the metric of its method.

    Its inputs are those of the dense model.
    """
    choices, modules = dict(solution.plan.linears), solution.compressed
    for name, choice in solution.plan.linears.items():
        if name not in modules or name != (choice.members or (name,))[0]:
            continue
        part = solution.decomposition(name)
        stored = {member: modules[member] for member in part.members}
        error = part.method.measure_unit(part.state, stored)
        for member in part.members:
            choices[member] = replace(choices[member], measured=error)
    return solution.noted(linears=choices)
