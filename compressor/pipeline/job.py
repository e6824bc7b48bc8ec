"""What a run works on, read once from its recipe: model, windows, targets, and how they are found
again.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.allocation.assign import Assignment, Group, assign, groups
from compressor.calibrate import windows as data
from compressor.checkpoint.weights import tied_tensors, warn_of_untying
from compressor.errors import ConfigError
from compressor.evaluation.perplexity import compare, in_float32
from compressor.files import model_folder
from compressor.models import linears
from compressor.models import load as models
from compressor.plan import Choice
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe
from compressor.resume.spill import Cache
from compressor.resume.store import NOWHERE, Store
from compressor.runtime.deadline import NO_DEADLINE, Deadline
from compressor.runtime.progress import Progress, silent
from compressor.runtime.stopwatch import Stopwatch
from compressor.training.team import ALONE, Team

WRITE_SECONDS = 5.0
COMPRESSED_SLOWDOWN = 1.3  # of a comparison of the dense model with itself
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What every stage of one run works on."""

    recipe: Recipe
    source: model_folder.ModelFolder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    assignments: dict[str, Assignment]
    groups: dict[str, Group]
    calibration: data.Windows
    heldout: data.Windows
    store: Store = NOWHERE  # where finished pieces of work are kept
    budget: Deadline = NO_DEADLINE  # of the run, which trials and steps of training are fitted to
    deadline: Deadline = NO_DEADLINE  # of work that is dropped where it would end later
    progress: Progress = silent
    watch: Stopwatch = field(default_factory=Stopwatch)  # seconds of each stage
    cache: Cache = field(default_factory=Cache)  # of what blocks return
    team: Team = ALONE  # processes that heal together
    # parameters that the source stores under another name, on the meta device
    ties: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.model.device.type == "meta" else self.model.device

    @property
    def quiet(self) -> "Job":
        """The same job, which shows no progress."""
        return replace(self, progress=silent)

    def steps(self, items: Collection[T], title: str) -> Iterator[T]:
        """Hand on the items of a stage, show its progress, and check the deadline before each.

        Raises OutOfTime once the stage shows that it would end too late.
        """
        projection = self.deadline.project(len(items))
        for item in self.progress(items, title):
            projection.check()
            yield item

    @property
    def block_of(self) -> dict[str, int]:
        """Block of every target and group."""
        blocks = {name: assignment.info.block for name, assignment in self.assignments.items()}
        return blocks | {name: blocks[group.members[0]] for name, group in self.groups.items()}

    def unit_of(self, name: str, choice: Choice) -> str:
        """Return the group whose members a choice of a linear names, or the linear itself."""
        sharing = (group.name for group in self.groups.values() if group.members == choice.members)
        return next(sharing, name)

    def computing(self) -> AbstractContextManager:
        """Forward passes in float32 on a CPU, where half precision is slow and coarse; in the
        stored dtype on an accelerator.
        """
        return in_float32(self.model) if self.device.type == "cpu" else nullcontext()


def choose_device(name: str) -> str:
    """Resolve `auto` to CUDA where there is one. Raises ConfigError for a device that is not
    here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device '{name}' cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return name


def open_source(
    name: str, revision: str | None, progress: Progress = silent
) -> model_folder.ModelFolder:
    """Find and check a dense model folder: damaged, quantised, already compressed or non-finite
    ones are refused.
    """
    source = model_folder.read(model_folder.resolve(name, revision), progress)
    model_folder.refuse_quantised(source)
    model_folder.check_finite(source, progress)
    return source


def start(recipe: Recipe, source: model_folder.ModelFolder, progress: Progress = silent) -> Job:
    """Load model and calibration windows, and assign methods to linears."""
    device = choose_device(recipe.model.device)
    model, tokenizer = models.load(source.path, device=device, device_map=recipe.model.device_map)
    assignments = assign(recipe, model)
    warn_of_untying(model, assignments)
    if experts := linears.fused(model):
        share = sum(experts.values()) / sum(parameter.numel() for parameter in model.parameters())
        log.warning(
            "%d fused weights of experts, %.1f %% of the model, are no linears and stay as they "
            "are",
            len(experts),
            100 * share,
        )
    section = recipe.calibration
    windows = data.load_windows(
        section.source or str(data.bundled("calibration")),
        tokenizer,
        section.length,
        section.windows,
        column=section.column,
        chat_template=section.chat_template,
        seed=recipe.seed,
        model=model,
        progress=progress,
    )
    fit, heldout = data.split_heldout(windows, section.heldout)
    cache = Cache(size_in_bytes(section.cache))
    return Job(
        recipe,
        source,
        model,
        tokenizer,
        assignments,
        groups(recipe, assignments),
        fit,
        heldout,
        progress=progress,
        cache=cache,
        ties=tied_tensors(model),
    )


def require_heldout(job: Job) -> Job:
    """Return the job. Raises ConfigError if it needs held-out windows and there are none."""
    recipe, cure = job.recipe, "set calibration.heldout above 0, or give more windows"
    if len(job.heldout.tokens):
        return job
    if recipe.trains:
        raise ConfigError(f"repair and heal need held-out windows to be judged on; {cure}")
    if recipe.allocation.probes:
        damage = recipe.allocation.damage
        raise ConfigError(f"allocation.damage '{damage}' needs held-out windows; {cure}")
    return job


def evaluation_windows(job: Job) -> data.Windows:
    """Read the windows that original and compressed model are compared on."""
    section, window, seed = job.recipe.evaluation, job.recipe.evaluation_window, job.recipe.seed
    text = section.source or str(data.bundled("evaluation"))
    return data.load_windows(
        text,
        job.tokenizer,
        window,
        section.windows,
        section.column,
        seed=seed,
        model=job.model,
        progress=job.progress,
    )


def seconds_per_token(job: Job) -> float:
    """Time one model comparison on a held-out batch; seconds per token, warm."""
    tokens = job.heldout.tokens[: job.recipe.calibration.batch_size]
    with job.computing():
        for _ in range(2):
            start = time.monotonic()
            compare(job.model, job.model, tokens, len(tokens))
            seconds = time.monotonic() - start
    return seconds / tokens.numel()


def reserve(job: Job) -> float:
    """Estimate the seconds of writing and of the evaluation that ends a run, on all its windows."""
    tokens = evaluation_windows(job).tokens.numel() if job.recipe.evaluation.enabled else 0
    tokens += job.heldout.tokens.numel() + (
        job.calibration.tokens.numel() if job.recipe.trains else 0
    )
    return COMPRESSED_SLOWDOWN * seconds_per_token(job) * tokens + WRITE_SECONDS


def with_needs(job: Job, others: Sequence[Recipe]) -> Job:
    """Return the job with everything that other recipes need collected too.

    It is of use for its statistics only.
    """
    assignments = dict(job.assignments)
    for recipe in others:
        for name, other in assign(recipe, job.model).items():
            first = assignments.setdefault(name, other)
            assignments[name] = replace(first, residual_needs=first.needs | other.needs)
    return replace(job, assignments=assignments)


def fingerprint(job: Job) -> dict[str, Any]:
    """Return what statistics depend on; runs may share them only if all of it agrees."""
    section = job.recipe.calibration
    return {
        "model": model_folder.content_digest(job.source),
        "windows": job.calibration.digest,
        "seed": job.recipe.seed,
        "device": job.device.type,
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "gradients": section.gradients.model_dump(mode="json"),
    }


def with_store(job: Job, store: Store, scratch: Path | None = None) -> Job:
    """Return the job with a store for its pieces of work.

    They all depend on the source, the windows (held-out ones too) and the calibration.

    Args:
        job: the job.
        store: where finished pieces are kept.
        scratch: folder for what its cache does not hold in memory; None: with temporary files.
    """
    scope = fingerprint(job), collected_as(job.recipe), job.heldout.digest
    return replace(job, cache=Cache(job.cache.budget, scratch), store=store.within(*scope))


def collected_as(recipe: Recipe) -> dict[str, Any]:
    """Return the part of the calibration that statistics of the dense model depend on."""
    return recipe.calibration.model_dump(
        mode="json", exclude={"sequential", "anchor", "anchor_damping", "cache"}
    )
