"""The story of a run, top to bottom, for callers: `compress`, `plan`, `calibrate`, `evaluate`,
`inspect`, `verify`, `export`, `load`.

compress   source → statistics → curves → probes → plan → modules → checkpoint, committed whole →
           scores, added to its report
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.allocation import curves
from compressor.allocation.decompose import move_beside
from compressor.calibrate import statistics_folder
from compressor.checkpoint import write as checkpoint
from compressor.checkpoint.export import dense as exporting
from compressor.checkpoint.export import packed
from compressor.checkpoint.verify import verify as verify_checkpoint
from compressor.checkpoint.weights import stored_tensors
from compressor.errors import CheckpointError, CompressorError, ConfigError, did_you_mean
from compressor.files import manifest, model_folder
from compressor.files.documents import read_json, replace_text
from compressor.files.staging import Staging, amend, preflight
from compressor.models import load as models
from compressor.pipeline import dry_run, search, stages, train
from compressor.pipeline import job as jobs
from compressor.pipeline import score as evaluation
from compressor.pipeline.build import plan_and_build
from compressor.pipeline.forecast import forecast
from compressor.pipeline.inspect import describe_checkpoint
from compressor.pipeline.job import Job
from compressor.pipeline.score import evaluate
from compressor.plan import Plan
from compressor.recipe.load import dump_yaml
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe
from compressor.recipe.training import Heal, Repair
from compressor.reporting import card, report
from compressor.reporting.records import Report
from compressor.resume.journal import Journal, journaled
from compressor.resume.store import NOWHERE, FolderStore, Store, digest
from compressor.runtime.deadline import Deadline
from compressor.runtime.progress import Progress, expect, silent
from compressor.runtime.stopwatch import Stopwatch
from compressor.statistics import LinearStats
from compressor.training.team import ALONE, Team

__all__ = ["calibrate", "compress", "evaluate", "export", "inspect", "load", "plan", "verify"]

PENDING = "not evaluated yet"
ROOM = 2**20  # bytes beside the weights that a checkpoint may need


def load(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a checkpoint, compressed or dense: (model, tokenizer or None). Its files are checked
    first; code in it never runs.
    """
    return models.load(path, device=device, dtype=dtype)


def compress(
    recipe: Recipe,
    output: str | Path,
    plan: Path | None = None,
    stats: Path | None = None,
    progress: Progress = silent,
    restart: bool = False,
    shared: Store | None = None,
    team: Team = ALONE,
) -> Report:
    """Run a recipe and write the checkpoint folder `output`; return its report (`report.json`).

    plan: an edited plan.json to build as it stands; stats: statistics collected by `calibrate`. The
    scores are measured after the folder is in place: if that fails the folder stays, the scores are
    null, and `failure` says why. A run that was stopped goes on from its journal, or from nothing
    with `restart`; `shared` is a store that this run has in common with others; `team` shares
    healing with this process, its main one. Raises CompressorError before anything is written or
    changed at `output`.
    """
    output, watch, budget = Path(output), Stopwatch(), Deadline(recipe.budget_seconds)
    train.require_optimizers(recipe)
    source_path = model_folder.resolve(recipe.model.name, recipe.model.revision)
    with journaled(output, restart) as journal:
        overwrite = recipe.output.overwrite or journal.committed
        preflight(output, source_path, overwrite, 0)
        if shared is None and not journal.folder.exists():  # else much of the work is done
            expect(progress, lambda: forecast(recipe, source_path, bool(stats), bool(plan)))
        edited = None if plan is None else read_plan(plan)
        source = jobs.open_source(recipe.model.name, recipe.model.revision, progress)
        preflight(output, source.path, overwrite, source.weight_bytes + ROOM)
        job = jobs.require_heldout(jobs.start(recipe, source, progress))
        job = replace(job, budget=budget, team=team, watch=watch)
        store = journal.begin(describe_run(job, edited, stats), shared)
        job = jobs.with_store(job, store, journal.scratch)
        with watch("calibrate"):
            collected = read_or_collect(job, stats)
        solution = plan_and_build(job, collected, edited)
        team.dismiss()
        with watch("write"):
            stages.install(job, solution.modules)
            if journal.committed:
                results = describe_model(job, solution.plan, output)
            else:
                results = write(job, solution.plan, output, journal)
        if recipe.evaluation.enabled:
            with watch("evaluate"):
                results = score(job, solution.plan, output, results)
        replace_text(output / "timings.json", report.to_json(watch.to_json()))
    return results


def read_or_collect(job: Job, stats: Path | None) -> dict[str, LinearStats]:
    """Read what `calibrate` has collected in the folder `stats`, or (None) collect it now.

    It is put on the devices of the linears. Raises ConfigError for settings of a search that do not
    fit, before anything is computed.
    """
    job = jobs.with_needs(job, search.list_recipes(job.recipe))
    if stats is None:
        collected = stages.statistics(job)
    else:
        collected = statistics_folder.load_statistics(stats, jobs.fingerprint(job))
    return move_beside(job.assignments, collected)


def describe_run(job: Job, edited: Plan | None, stats: Path | None) -> dict[str, Any]:
    """Return what a run depends on, JSON; a stopped one goes on only where it is the same."""
    recipe = job.recipe.model_dump(mode="json", exclude={"output": {"overwrite"}})
    given = {
        "plan": edited and digest(edited.to_json()),
        "statistics": stats and manifest.digest(stats / manifest.NAME)["sha256"],
    }
    return {
        "fingerprint": jobs.fingerprint(job),
        "digest of the held-out windows": job.heldout.digest,
        "recipe": recipe,
    } | given


def write(job: Job, plan: Plan, output: Path, journal: Journal) -> Report:
    """Write the folder of the compressed model, prove that it reloads bit for bit, and put it in
    place; return the report so far.
    """
    with Staging(output, job.recipe.output.overwrite) as staging:
        shard_size = size_in_bytes(job.recipe.output.shard_size)
        checkpoint.write_model(
            staging.folder, job.model, job.tokenizer, job.source.path, shard_size, job.progress
        )
        checkpoint.compare_reload(staging.folder, job.model, job.progress)
        results = describe_model(job, plan, staging.folder)
        written, limit = results["bytes"]["compressed"], job.recipe.allocation.target_size
        if limit is not None and written > size_in_bytes(limit):
            raise CheckpointError(
                f"{output}: the weights take {written:,} bytes, target_size {limit} allows less; "
                "lower it by the excess"
            )
        for name, text in render_documents(job.recipe, plan, results).items():
            replace_text(staging.folder / name, text)
        replace_text(staging.folder / "timings.json", report.to_json(job.watch.to_json()))
        staging.commit(journal.note)
    return results


def describe_model(job: Job, plan: Plan, weights: Path) -> Report:
    """Return the report of a model that is written, in the folder `weights`, but not evaluated."""
    original_bytes = sum((job.source.path / name).stat().st_size for name in job.source.files)
    written = sum(path.stat().st_size for path in weights.glob("*.safetensors"))
    return report.build_report(
        plan,
        measure_sizes(job, plan, original_bytes, written),
        unit=job.recipe.allocation.count,
        reason=PENDING if job.recipe.evaluation.enabled else "evaluation is switched off",
        fingerprints=jobs.fingerprint(job) | {"recipe": digest(job.recipe.model_dump(mode="json"))},
        warnings=[
            f"{name} repeats another tensor of the source, which stores it once; here both are "
            "stored, so it makes the files larger"
            for name in untied_tensors(job)
        ],
    )


def render_documents(recipe: Recipe, plan: Plan, results: Report) -> dict[str, str]:
    """Render the readable files of a checkpoint folder, by name."""
    yaml = dump_yaml(recipe)
    return {
        "recipe.yaml": yaml,
        "plan.json": report.to_json(plan.to_json()),
        "curves.json": curves.to_json(plan.curves),
        "report.json": report.to_json(results),
        "README.md": card.model_card(results, yaml, recipe.model.name),
    }


def measure_sizes(job: Job, plan: Plan, original_bytes: int, written: int) -> report.Sizes:
    """Return bytes of files, and what the installed model stores besides the targets."""
    tensors, untied = stored_tensors(job.model), untied_tensors(job).values()
    bits = sum(tensor.nbytes * 8 for tensor in tensors.values()) - sum(
        choice.bits for choice in plan.linears.values()
    )
    parameters = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    return report.Sizes(
        original_bytes,
        written,
        bits,
        parameters - sum(choice.parameters for choice in plan.linears.values()),
        sum(tensor.nbytes * 8 for tensor in untied),
        sum(tensor.numel() for tensor in untied),
    )


def untied_tensors(job: Job) -> dict[str, Tensor]:
    """List the parameters that the source stores under another name and the output by themselves,
    as the source would be stored in the output dtype; on the meta device.
    """
    dtype, stored = stages.output_dtype(job.recipe), stored_tensors(job.model)
    return {
        name: tensor.to(dtype) if dtype else tensor
        for name, tensor in job.ties.items()
        if name in stored
    }


def score(job: Job, plan: Plan, output: Path, results: Report) -> Report:
    """Evaluate the committed folder against its source and amend its report.

    A failure leaves null scores and a reason.
    """
    failure = None
    try:
        results = evaluation.measure(job, results, job.store.within(plan.to_json()))
    except CompressorError as error:
        failure = f"the checkpoint is written, its evaluation failed: {error}"
        results = results | {"reason": str(error)}
    amend(
        output,
        {
            name: text
            for name, text in render_documents(job.recipe, plan, results).items()
            if name in ("report.json", "README.md")
        },
    )
    return results | {"failure": failure} if failure else results


def read_plan(path: Path) -> Plan:
    """Read an edited plan.json. Raises ConfigError if it is not one."""
    try:
        return Plan.from_json(read_json(path))
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is not a plan ({error}); start from the plan.json of a checkpoint"
        ) from None


def plan(recipe: Recipe, stats: Path | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Say what `compress` would do; write nothing but temporary files.

    Reads headers only, unless `stats` is given: then it decomposes and allocates too, with a search
    within the budget. Errors are those before solving in order, repair and healing, which change no
    size.
    """
    budget = Deadline(recipe.budget_seconds)
    source = model_folder.read_headers(
        model_folder.resolve(recipe.model.name, recipe.model.revision)
    )
    model_folder.refuse_quantised(source)
    outline = dry_run.outline(recipe, source)
    if stats is None:
        return outline
    source = jobs.open_source(recipe.model.name, recipe.model.revision, progress)
    job = jobs.require_heldout(jobs.start(recipe, source, progress))
    sizing = search.without_order(recipe).model_copy(update={"repair": Repair(), "heal": Heal()})
    job = replace(job, recipe=sizing, budget=budget)
    collected = read_or_collect(job, stats)
    with TemporaryDirectory(prefix="plan-") as pieces:  # which the trials of a search share
        searched = recipe.allocation.search is not None
        store = FolderStore(Path(pieces)) if searched else NOWHERE
        planned = plan_and_build(jobs.with_store(job, store), collected).plan
    chosen = {
        name: {"method": c.method, "setting": c.setting, "bits": c.bits, "error": c.error}
        for name, c in planned.linears.items()
    }
    return outline | {
        "price": planned.price,
        "linears": [linear | chosen[linear["name"]] for linear in outline["linears"]],
    }


def calibrate(
    recipe: Recipe,
    output: str | Path,
    overwrite: bool = False,
    progress: Progress = silent,
    restart: bool = False,
    others: Sequence[Recipe] = (),
) -> dict[str, Any]:
    """Collect the statistics that a recipe needs into a new folder, with a fingerprint of what they
    depend on.

    others: recipes with the same model and calibration, whose needs are met too.
    """
    output = Path(output)
    with journaled(output, restart) as journal:
        source = jobs.open_source(recipe.model.name, recipe.model.revision, progress)
        preflight(output, source.path, overwrite, 0)
        job = jobs.start(recipe, source, progress)
        needed = [r for base in (recipe, *others) for r in (base, *search.list_recipes(base))]
        job = jobs.with_needs(job, needed)
        job = jobs.with_store(job, journal.begin(describe_run(job, None, None)))
        collected = stages.statistics(job)
        mark = jobs.fingerprint(job)
        statistics_folder.save_statistics(output, collected, mark, overwrite)
    written = sum(path.stat().st_size for path in output.iterdir())
    return {
        "output": str(output),
        "linears": len(collected),
        "tokens": job.calibration.tokens.numel(),
        "bytes": written,
        "fingerprint": mark,
    }


def inspect(path: str | Path, plot: Path | None = None) -> dict[str, Any]:
    """Say what a checkpoint stores for each linear, from headers and its own plan and report."""
    return describe_checkpoint(model_folder.read_headers(model_folder.resolve(path)), plot)


def verify(path: str | Path, progress: Progress = silent) -> list[str]:
    """List problems of a checkpoint folder, one line each; none if it is what was written."""
    return verify_checkpoint(model_folder.resolve(path), progress)


def export(
    path: str | Path,
    output: str | Path,
    format: str = "dense",
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a compressed checkpoint in a layout that loads without this package: `dense` (equal in
    quality, not smaller), `compressed-tensors` (integers), or `peft` (a base with residuals as an
    adapter)."""
    path, output = model_folder.resolve(path), Path(output)
    if format == "dense":
        note = exporting.export_dense(path, output, overwrite, progress=progress)
    elif format in packed.FORMATS:
        note = packed.export_packed(path, output, packed.FORMATS[format], overwrite)
    else:
        raise ConfigError(
            f"there is no export format '{format}'; "
            f"{did_you_mean(format, ['dense', *packed.FORMATS])}"
        )
    return {"output": str(output), "format": format, "note": note}
