"""Score a compressed model beside its original: within a run, and any model folder for the verb
`evaluate`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.calibrate import windows as data
from compressor.evaluation import lm_eval, perplexity
from compressor.evaluation.speed import speed as measure_speed
from compressor.files import model_folder
from compressor.models import load as models
from compressor.pipeline import job as jobs
from compressor.pipeline.job import Job
from compressor.recipe.sections import Recipe
from compressor.reporting import report
from compressor.reporting.records import Metrics, Report, Scores
from compressor.resume.journal import journaled, writable_cache
from compressor.resume.store import Store, digest
from compressor.runtime.progress import Progress, silent

# tokens of an evaluation window where nothing says otherwise and the model has as many positions
WINDOW = 512


def measure(job: Job, results: Report, store: Store) -> Report:
    """Add to a report the scores of the model that the job has become, against its source.

    That model is bit for bit what a reload gives.
    """
    recipe, model, progress = job.recipe, job.model, job.progress
    section = recipe.evaluation
    original, tokenizer = models.load(job.source.path, device=str(job.device))
    windows = jobs.evaluation_windows(job)
    store = store.within(windows.digest)

    def compare(tokens: Tensor, store: Store) -> Scores:
        comparison = perplexity.compare(
            original, model, tokens, section.batch_size, progress, store
        )
        return report.to_scores(comparison.to_json())

    def score_tasks(key: str, scored: PreTrainedModel) -> dict[str, Metrics] | None:
        score = partial(score_on_tasks, scored, tokenizer, recipe, progress)
        return store.recall("tasks", [key, *section.tasks], score) if section.tasks else None

    scores = compare(windows.tokens, store)
    heldout = calibration = None
    if job.heldout.tokens.numel():
        heldout = compare(job.heldout.tokens, store.within("heldout"))
    if recipe.trains and job.calibration.tokens.numel():
        calibration = compare(job.calibration.tokens, store.within("calibration"))
    evaluated = report.Evaluated(
        scores,
        heldout,
        calibration,
        score_tasks("lm_eval", model),
        score_tasks("lm_eval_original", original),
        describe_overlap(job, windows),
        windows.digest,
    )
    return report.add_evaluation(results, evaluated)


def describe_overlap(job: Job, windows: data.Windows) -> list[str]:
    """Warn of text that calibration and evaluation windows have in common."""
    shared = data.overlap(job.calibration, windows)
    text = f"{shared:.1%} of the evaluation windows repeat text of the calibration windows"
    return [text] if shared else []


def score_on_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    progress: Progress,
) -> dict[str, Any]:
    """Score one model on the lm-eval tasks of a recipe."""
    section = recipe.evaluation
    names, window = list(section.tasks), recipe.evaluation_window
    return lm_eval.scores(
        model, tokenizer, names, section.limit, section.batch_size, window, progress
    )


def evaluate(
    name: str,
    against: str | None = None,
    text: str | None = None,
    column: str | None = None,
    window: int | None = None,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: str = "auto",
    batch_size: int = 8,
    speed: bool = False,
    progress: Progress = silent,
    restart: bool = False,
) -> dict[str, Any]:
    """Measure perplexity per token, KL(original‖model) with `against`, lm-eval tasks, and speed.

    The keys are those of `evaluate --json`.

    An evaluation that was stopped goes on where it was, or from nothing with `restart`; its journal
    is in the user's cache.
    """
    device = jobs.choose_device(device)
    paths = {"compressed": model_folder.resolve(name)} | (
        {} if against is None else {"original": model_folder.resolve(against)}
    )
    model, tokenizer = models.load(paths["compressed"], device=device)
    window = window or min(
        WINDOW, getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW)
    )
    loaded = data.load_windows(
        text or str(data.bundled("evaluation")),
        tokenizer,
        window,
        windows,
        column,
        model=model,
        progress=progress,
    )
    run = {
        "models": {
            which: model_folder.content_digest(model_folder.read(path))
            for which, path in paths.items()
        },
        "windows": loaded.digest,
        "options": [device, batch_size, [*tasks], limit],
    }
    with (
        writable_cache() as folder,
        journaled(folder / f"evaluate-{digest(run)[:40]}", restart) as journal,
    ):
        store = journal.begin(run).within(run)
        original = None if against is None else models.load(paths["original"], device=device)[0]
        results = _scores(original, model, loaded, batch_size, progress, store)
        if tasks:
            score = partial(
                lm_eval.scores, model, tokenizer, list(tasks), limit, batch_size, window, progress
            )
            results["lm_eval"] = store.recall("tasks", window, score)
    if speed:
        results["speed"] = {
            which: measure_speed(path, device).to_json()
            for which, path in progress(paths.items(), "speed")
        }
    return results


def _scores(
    original: PreTrainedModel | None,
    model: PreTrainedModel,
    windows: data.Windows,
    batch_size: int,
    progress: Progress,
    store: Store,
) -> dict[str, Any]:
    given = windows.tokens, batch_size, progress, store
    if original is None:
        scores = perplexity.perplexity(model, *given).to_json()
    else:
        scores = perplexity.compare(original, model, *given).to_json()
    return scores | {
        "text": windows.source,
        "unit": "token",
        "lm_eval": None,
        "fingerprint": windows.digest,
    }
