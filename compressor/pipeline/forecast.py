"""How long a run takes, about: said before its first stage."""

import logging
from pathlib import Path

from compressor.allocation.assign import assign
from compressor.calibrate.windows import bundled, heldout_count
from compressor.errors import CompressorError
from compressor.files import model_folder
from compressor.files.safetensors import read_header
from compressor.models.linears import blocks
from compressor.models.load import skeleton
from compressor.pipeline import dry_run
from compressor.pipeline.job import choose_device
from compressor.recipe.sections import Recipe

BYTES_PER_TOKEN = 4  # of text, about
TRAINED_PASSES = 4  # forward passes that a step takes: backward counts twice, the teacher once
log = logging.getLogger(__name__)


def forecast(
    recipe: Recipe, folder: Path, collected: bool = False, planned: bool = False
) -> dict[str, float]:
    """Estimate the seconds of each stage from headers and from products timed on the device.

    Args:
        recipe: what is run.
        folder: the model.
        collected: whether statistics are given, so that none are collected.
        planned: whether an edited plan is given, so that nothing is probed.

    Returns:
        Stage → seconds, in the order of the run; empty for a model that headers do not describe
        well enough (what is wrong with it is said where it is read).
    """
    try:
        seconds = _estimate(recipe, folder)
    except (CompressorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        log.info("no forecast: %s", error)
        return {}
    left_out = ({"calibrate"} if collected else set()) | ({"probe"} if planned else set())
    return {stage: spent for stage, spent in seconds.items() if stage not in left_out}


def _estimate(recipe: Recipe, folder: Path) -> dict[str, float]:
    source = model_folder.read_headers(folder)
    model_folder.refuse_quantised(source)
    model, device = skeleton(source.path), choose_device(recipe.model.device)
    depth = len(blocks(model)[1])
    seconds = dry_run.seconds(recipe, source, assign(recipe, model), depth, device)
    per_token = dry_run.parameters(source) / dry_run.gemm_rate(device)
    for stage, section in (("repair", recipe.repair), ("heal", recipe.heal)):
        if section.enabled:
            tokens = section.steps * section.batch_size * recipe.calibration.length
            seconds[stage] = TRAINED_PASSES * tokens * per_token
    if recipe.evaluation.enabled:
        seconds["evaluate"] = 2 * evaluated_tokens(recipe) * per_token
    return seconds


def evaluated_tokens(recipe: Recipe) -> int:
    """Estimate how many tokens both models are evaluated on, the held-out windows included."""
    section, calibration = recipe.evaluation, recipe.calibration
    heldout = heldout_count(calibration.windows, calibration.heldout) * calibration.length
    if section.windows is not None:
        return heldout + section.windows * recipe.evaluation_window
    source = section.source or str(bundled("evaluation"))
    stem, suffix, key = source.rpartition(".safetensors:")
    if suffix:
        shape = read_header(Path(f"{stem}.safetensors"))[key].shape
        return heldout + shape[0] * shape[1]
    path = Path(source)
    return heldout + (path.stat().st_size // BYTES_PER_TOKEN if path.is_file() else 0)
