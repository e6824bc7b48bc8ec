"""`compress` in several processes that `accelerate launch` has started with the same command:
healing is shared, data-parallel.

The main process runs as it would alone. The others wait until it has come to healing; then they
bring themselves to the same state, from the pieces of its journal, which they read and never change
(what they cannot find they make again, in memory), take the same steps, each on windows of its own,
and end. They write and show nothing.
"""

import sys
from dataclasses import replace
from pathlib import Path

from compressor.errors import CompressorError, ConfigError
from compressor.pipeline import job as jobs
from compressor.pipeline import run
from compressor.pipeline.build import plan_and_build
from compressor.recipe.sections import Recipe
from compressor.reporting.records import Report
from compressor.resume.journal import Journal
from compressor.resume.store import ReadOnlyStore
from compressor.runtime import launched
from compressor.runtime.deadline import Deadline
from compressor.runtime.progress import Progress, silent
from compressor.training.team import Dismissed, Team


def compress(
    recipe: Recipe,
    output: Path,
    plan: Path | None = None,
    stats: Path | None = None,
    progress: Progress = silent,
    restart: bool = False,
) -> Report | None:
    """Compress as `run.compress` does; return None in all processes but the main one.

    Raises ConfigError for a model that is spread over devices.
    """
    count, rank = launched.world_size(), launched.process_rank()
    if not (recipe.heal.enabled or rank):
        return run.compress(recipe, output, plan, stats, progress, restart)
    if not recipe.heal.enabled:
        print(
            f"process {rank} of {count} ends: only healing is shared, and heal.enabled is false",
            file=sys.stderr,
        )
        return None
    if recipe.model.device_map is not None:
        raise ConfigError(
            "model.device_map spreads the model over devices that other processes use; leave it "
            "out, or launch one process"
        )
    team = Team(count, rank, jobs.choose_device(recipe.model.device).partition(":")[0])
    if rank == 0:
        return run.compress(recipe, output, plan, stats, progress, restart, team=team)
    if team.called():
        assist(recipe, output, plan, stats, team)
    return None


def assist(recipe: Recipe, output: Path, plan: Path | None, stats: Path | None, team: Team) -> None:
    """Come to where the main process is, and heal with it.

    Raises ConfigError where what its clock has decided cannot be known.
    """
    pieces = ReadOnlyStore(Journal(output).store_folder)
    if recipe.budget is not None and not pieces.folder.is_dir():
        raise ConfigError(
            f"process {team.rank} does not see {pieces.folder}, where the main one keeps what its "
            "clock has decided; leave budget out, "
            "or give an output on a disk that all processes share"
        )
    job = jobs.start(recipe, jobs.open_source(recipe.model.name, recipe.model.revision))
    job = jobs.with_store(job, pieces)
    job = replace(job, budget=Deadline(recipe.budget_seconds), team=team)
    try:
        edited = None if plan is None else run.read_plan(plan)
        plan_and_build(job, run.read_or_collect(job, stats), edited)
    except Dismissed:
        return
    raise CompressorError(
        f"process {team.rank} has come to no healing, unlike the main one; are their files the "
        "same?"
    )
