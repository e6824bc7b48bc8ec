"""Search for kinds of candidates and for settings: each is tried, and the divergence on held-out
windows decides.

The first candidate of every entry alone is the start. Then each further kind joins those that are
in, then each entry of `allocation.search` is laid over the recipe; what lowers the divergence of
the whole allocated model stays. So the outcome is never worse there than the start, which for the
preset `best` is the preset `default`. LEMS (ICML 2026; code lems-svd/lems) tunes its depth bias in
ten trials on the divergence of the whole model; here it is any setting, greedily, and on windows
that nothing was fitted to.

With a budget a trial may take the time that is left for the search, and is dropped as soon as it
shows that it would take more; so those that come first matter most. What was decided, by the clock
too, is kept in the journal: a run that was stopped goes on with the same decisions.
"""

import json
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from compressor.allocation.assign import assign, groups
from compressor.errors import BudgetError, NumericalError
from compressor.pipeline.job import Job
from compressor.pipeline.solution import Allocate, Solution, allocate
from compressor.plan import Plan
from compressor.recipe.load import replace_settings
from compressor.recipe.sections import Recipe
from compressor.recipe.training import Heal, Repair
from compressor.runtime.deadline import OutOfTime
from compressor.statistics import LinearStats

# when each must have ended, of the time that the start leaves: a kind may gain more than training
KIND_SHARE = 2 / 3
SETTING_SHARE = 1 / 2  # a setting less
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

    def recipe(self, base: Recipe) -> Recipe:
        """Lay the trial over a recipe; entries without these kinds keep their first candidate."""
        for layer in self.settings:
            base = replace_settings(base, layer, WHERE)
        entries = []
        for entry in base.method:
            chosen = [engine for i, engine in enumerate(entry.candidates) if i in self.kinds]
            candidates = tuple(chosen or entry.candidates[:1])
            entries.append(entry.model_copy(update={"candidates": candidates}))
        return base.model_copy(update={"method": tuple(entries)})

    def names(self, base: Recipe) -> list[str]:
        """Return the engines of the kinds that are in, from the entry that has most of them."""
        longest = max((entry.candidates for entry in base.method), key=len)
        return [longest[kind].name for kind in self.kinds]


def list_recipes(recipe: Recipe) -> list[Recipe]:
    """Return everything that a search may try, for statistics that serve all of it.

    Raises ConfigError for settings that do not fit.
    """
    return [
        replace_settings(recipe, settings, f"{WHERE}.{number}")
        for number, settings in enumerate(recipe.allocation.search or ())
    ]


def outcome_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the part of a recipe that says what a model becomes, JSON."""
    return recipe.model_dump(
        mode="json", exclude={"evaluation": True, "output": {"overwrite", "shard_size"}}
    )


def apply_search(job: Job, plan: Plan) -> Job:
    """Return the job with the recipe that the search of an earlier run chose, as its plan says.

    What that run did not keep is left out.
    """
    if not plan.search:
        return job
    recipe = Trial(tuple(plan.search["kinds"]), tuple(plan.search["settings"])).recipe(job.recipe)
    # where the outcome was dropped, the plan is what it came from
    was_kept = plan.search.get("final", {}).get("kept", True)
    if not (was_kept and plan.search.get("in_order", {}).get("kept")):
        recipe = without_order(recipe)
    if not was_kept:
        recipe = recipe.model_copy(update={"repair": Repair(), "heal": Heal()})
    return with_recipe(job, recipe)


def without_order(recipe: Recipe) -> Recipe:
    """Return the recipe with every linear solved on the inputs of the dense model."""
    calibration = recipe.calibration.model_copy(update={"sequential": False})
    return recipe.model_copy(update={"calibration": calibration})


def with_recipe(job: Job, recipe: Recipe) -> Job:
    """Return the job with another recipe for the same model and calibration."""
    assignments = assign(recipe, job.model)
    return replace(job, recipe=recipe, assignments=assignments, groups=groups(recipe, assignments))


def search(job: Job, statistics: dict[str, LinearStats], allocate: Allocate = allocate) -> Solution:
    """Allocate with every trial of the recipe and return the best.

    Raises BudgetError where none meets the size.
    """
    return Search(job, statistics, allocate).run()


class Search:
    """Greedy search over kinds of candidates, then over settings, with the trials behind it."""

    def __init__(self, job: Job, statistics: dict[str, LinearStats], allocate: Allocate):
        self.job, self.statistics, self.allocate = job, statistics, allocate
        self.trials: list[dict[str, Any]] = []
        self.trial, self.heldout = Trial((0,)), float("inf")  # the best so far
        self.solution: Solution | None = None  # of it, unless an earlier run has made it

    def run(self) -> Solution:
        recipe, budget = self.job.recipe, self.job.budget
        self.attempt(self.trial, None)
        left = budget.left if budget.is_limited else 0.0
        for kind in range(1, max(len(entry.candidates) for entry in recipe.method)):
            trial = replace(self.trial, kinds=(*self.trial.kinds, kind))
            self.attempt(trial, budget.left - (1 - KIND_SHARE) * left)
        for settings in recipe.allocation.search or ():
            trial = replace(self.trial, settings=(*self.trial.settings, settings))
            self.attempt(trial, budget.left - (1 - SETTING_SHARE) * left)
        if self.heldout == float("inf"):
            raise BudgetError(self.trials[0]["dropped"])
        solution = self.solution or self.solve(self.trial, None)
        outcome = {
            "kinds": self.trial.kinds,
            "settings": self.trial.settings,
            "heldout": self.heldout,
            "trials": self.trials,
        }
        solution = replace(solution, job=replace(solution.job, deadline=self.job.deadline))
        return solution.noted(search=json.loads(json.dumps(outcome)))

    def attempt(self, trial: Trial, seconds: float | None) -> None:
        """Try, and take what is better; a recipe that has been tried is not tried again.

        Args:
            trial: what is tried.
            seconds: that it may take; None: as many as it needs.
        """
        recipe = trial.recipe(self.job.recipe)
        if self.trials and recipe == self.trial.recipe(self.job.recipe):
            return
        solutions: list[Solution] = []
        heldout, dropped = self.job.store.recall(
            "trial", outcome_fields(recipe), partial(self.measure, trial, seconds, solutions)
        )
        is_better = heldout is not None and heldout < self.heldout
        names = trial.names(self.job.recipe)
        record = {
            "candidates": names,
            "settings": trial.settings,
            "heldout": heldout,
            "kept": is_better,
        }
        self.trials.append(record | ({"dropped": dropped} if dropped else {}))
        if heldout is not None and is_better:
            self.trial, self.heldout = trial, heldout
            self.solution = next(iter(solutions), None)

    def measure(
        self, trial: Trial, seconds: float | None, solutions: list[Solution]
    ) -> tuple[float | None, str | None]:
        """Solve, append the solution, and return its held-out divergence, or why there is none.

        Either the size cannot be met, the time does not last, or the numbers do not; those of the
        first trial must.
        """
        try:
            solutions.append(self.solve(trial, seconds))
        except OutOfTime:
            return None, NO_TIME
        except BudgetError as error:
            return None, str(error)
        except NumericalError as error:
            if not self.trials:
                raise
            log.warning("%s; the trial that came to this is dropped", error)
            return None, str(error)
        return solutions[0].heldout, None

    def solve(self, trial: Trial, seconds: float | None) -> Solution:
        job = with_recipe(self.job, trial.recipe(self.job.recipe))
        job = replace(job, deadline=job.budget.within(seconds))
        return self.allocate(job, self.statistics, measured=True)
