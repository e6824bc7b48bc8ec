"""Which kinds of candidates compete, and with which settings: tried one after the other, decided by
the divergence on held-out windows.

The first candidate of every entry alone is the start. Then each further kind joins those that are
in, then each entry of `allocation.search` is laid over the recipe; what lowers the divergence of
the whole allocated model stays. So the outcome is never worse there than the start, which for the
preset `best` is the preset `default`. Card: low_rank.md R10 (LEMS tunes its depth bias in ten
trials on the divergence of the whole model; code lems-svd/lems), here for any setting, greedily,
and on windows that nothing was fitted to.

With a budget a trial may take the time that is left for the search, and is dropped as soon as it
shows that it would take more; so those that come first matter most. What was decided, by the clock
too, is kept in the journal: a run that was stopped goes on with the same decisions.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from compressor.allocation.assign import assign, groups
from compressor.allocation.probe import Prober
from compressor.allocation.solve import Found
from compressor.errors import BudgetError, NumericalError
from compressor.pipeline import contest, stages
from compressor.pipeline.job import Job
from compressor.plan import Plan
from compressor.recipe.load import replace_settings
from compressor.recipe.sections import Recipe
from compressor.recipe.training import Heal, Repair
from compressor.runtime.deadline import OutOfTime, paced
from compressor.runtime.progress import Progress, silent
from compressor.runtime.stopwatch import Stopwatch
from compressor.statistics import LinearStats

KINDS, SETTINGS = (
    2 / 3,
    1 / 2,
    # of the time left behind the start, when each must end: a kind may gain more than training, a
    # setting less
)
WHERE = "allocation.search"
NO_TIME = "no time"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A recipe within the recipe: some of its kinds of candidates, by their number in the lists,
    and settings over it.
    """

    kinds: tuple[int, ...]
    settings: tuple[dict[str, Any], ...] = ()

    def recipe(self, whole: Recipe) -> Recipe:
        """Entries that have none of these kinds keep their first candidate."""
        for layer in self.settings:
            whole = replace_settings(whole, layer, WHERE)
        entries = [
            entry.model_copy(
                update={
                    "candidates": tuple(
                        one for i, one in enumerate(entry.candidates) if i in self.kinds
                    )
                    or entry.candidates[:1]
                }
            )
            for entry in whole.method
        ]
        return whole.model_copy(update={"method": tuple(entries)})

    def names(self, whole: Recipe) -> list[str]:
        """Engines of the kinds that are in, from whichever entry has most of them."""
        longest = max((entry.candidates for entry in whole.method), key=len)
        return [longest[kind].name for kind in self.kinds]


@dataclass(frozen=True)
class Allocated:
    """An allocation, built; what follows works on its job."""

    job: Job
    found: Found
    prober: Prober | None  # None where nothing is probed
    plan: Plan
    modules: dict[str, nn.Module]

    @property
    def heldout(self) -> float:
        """Divergence of the whole model with these modules, nats per token; of a search's
        outcome.
        """
        return min(self.plan.contest.values())

    def divergence(self, modules: Mapping[str, nn.Module]) -> float:
        """That of the model with other modules, measured in the same way."""
        with self.job.computing():
            return self.prober.kl(dict(modules), 0)


def recipes(recipe: Recipe) -> list[Recipe]:
    """Everything that a search may try, for statistics that serve all of it. Raises ConfigError for
    settings that do not fit.
    """
    return [
        replace_settings(recipe, settings, f"{WHERE}.{number}")
        for number, settings in enumerate(recipe.allocation.search or ())
    ]


def allocate(
    job: Job,
    stats: dict[str, LinearStats],
    watch: Stopwatch,
    progress: Progress = silent,
    measured: bool = False,
) -> Allocated:
    """Decompose, probe, allocate and build; `measured` as in `selection.choose`."""
    with watch("decompose"):
        found = stages.decompositions(job, stats, progress)
    with watch("probe"):
        probed = stages.probes(job, found, progress)
    with watch("allocate"):
        return Allocated(
            job, found, probed.prober, *contest.choose(job, found, probed, progress, measured)
        )


def search(
    job: Job, stats: dict[str, LinearStats], watch: Stopwatch, progress: Progress = silent
) -> Allocated:
    """Allocate with every trial of the recipe and return the best. Raises BudgetError where none
    meets the size.
    """
    return _Search(job, partial(allocate, stats=stats, watch=watch, measured=True), progress).run()


def depends(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that says what a model becomes, JSON."""
    return recipe.model_dump(
        mode="json", exclude={"evaluation": True, "output": {"overwrite", "shard_size"}}
    )


def chosen(job: Job, plan: Plan) -> Job:
    """The job with the recipe that the search of an earlier run chose, as its plan says, without
    what it did not keep.
    """
    if not plan.search:
        return job
    recipe = Trial(tuple(plan.search["kinds"]), tuple(plan.search["settings"])).recipe(job.recipe)
    outcome = plan.search.get("final", {}).get(
        "kept", True
    )  # where it was dropped, the plan is what it came from
    if not (outcome and plan.search.get("in order", {}).get("kept")):
        recipe = not_in_order(recipe)
    if not outcome:
        recipe = recipe.model_copy(update={"repair": Repair(), "heal": Heal()})
    return with_recipe(job, recipe)


def not_in_order(recipe: Recipe) -> Recipe:
    """The same recipe, every linear solved on the inputs of the dense model."""
    return recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"sequential": False})}
    )


def with_recipe(job: Job, recipe: Recipe) -> Job:
    """The job with another recipe for the same model and calibration."""
    assignments = assign(recipe, job.model)
    return replace(job, recipe=recipe, assignments=assignments, groups=groups(recipe, assignments))


class _Search:
    def __init__(self, job: Job, make: Callable[..., Allocated], progress: Progress):
        self.job, self.make, self.progress = job, make, progress
        self.record: list[dict[str, Any]] = []
        self.at, self.best, self.heldout = Trial((0,)), None, float("inf")

    def run(self) -> Allocated:
        recipe = self.job.recipe
        self.attempt(self.at, float("inf"))
        clock = self.job.clock
        left = clock.left if clock.limited else 0.0
        for kind in range(1, max(len(entry.candidates) for entry in recipe.method)):
            self.attempt(
                replace(self.at, kinds=(*self.at.kinds, kind)), clock.left - (1 - KINDS) * left
            )
        for settings in recipe.allocation.search:
            self.attempt(
                replace(self.at, settings=(*self.at.settings, settings)),
                clock.left - (1 - SETTINGS) * left,
            )
        if self.heldout == float("inf"):
            return self.allocate(self.at, self.progress)  # says which size can be reached
        best = self.best or self.allocate(self.at, self.progress)
        found = {
            "kinds": self.at.kinds,
            "settings": self.at.settings,
            "heldout": self.heldout,
            "trials": self.record,
        }
        return replace(best, plan=replace(best.plan, search=json.loads(json.dumps(found))))

    def attempt(self, trial: Trial, seconds: float) -> None:
        """Try, and take what is better; a recipe that has been tried is not tried again."""
        recipe = trial.recipe(self.job.recipe)
        if self.record and recipe == self.at.recipe(self.job.recipe):
            return
        made: list[Allocated] = []
        heldout, dropped = self.job.store.recall(
            "trial", depends(recipe), partial(self.outcome, trial, seconds, made)
        )
        kept = heldout is not None and heldout < self.heldout
        names = trial.names(self.job.recipe)
        tried = {"candidates": names, "settings": trial.settings, "heldout": heldout, "kept": kept}
        self.record.append(tried | ({"dropped": dropped} if dropped else {}))
        if kept:
            self.at, self.heldout, self.best = trial, heldout, next(iter(made), None)

    def outcome(
        self, trial: Trial, seconds: float, made: list[Allocated]
    ) -> tuple[float | None, str | None]:
        """Held-out divergence; else why there is none: the size cannot be met, the time does not
        last, or a trial's numbers do not.
        """
        try:
            made.append(self.allocate(trial, paced(self.progress, seconds)))
        except OutOfTime:
            return None, NO_TIME
        except BudgetError as error:
            return None, str(error)
        except NumericalError as error:
            if not self.record:
                raise
            log.warning("%s; the trial that came to this is dropped", error)
            return None, str(error)
        return made[0].heldout, None

    def allocate(self, trial: Trial, progress: Progress) -> Allocated:
        return self.make(with_recipe(self.job, trial.recipe(self.job.recipe)), progress=progress)
