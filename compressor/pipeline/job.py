"""The stages of a run, each a function of what the stages before it made: job → statistics → curves → probes → plan → modules."""

import logging
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.calibrate import windows as data
from compressor.files import model_folder
from compressor.models import load as models
from compressor.allocation.assign import Assignment, Group, assign, groups
from compressor.resume.spill import Cache
from compressor.calibrate.collect import collect
from compressor.runtime.deadline import NO_LIMIT, Clock
from compressor.allocation.decompose import decompose_group, decompose_one, gram_error
from compressor.errors import ConfigError
from compressor.linears import Pruned
from compressor.training.team import ALONE, Team
from compressor.plan import Plan
from compressor.allocation.solve import Found
from compressor.allocation.probe import Prober, ProbeResult, probe
from compressor.runtime.progress import Progress, silent
from compressor.recipe.sections import Recipe
from compressor.evaluation.perplexity import compare, in_float32
from compressor.recipe.quantities import size_in_bytes
from compressor.statistics import LinearStats, blind_spots
from compressor.resume.store import NOWHERE, Store

WRITING, SLOWER = 5.0, 1.3  # seconds; times a comparison of the dense model with itself: compressed linears may be slower
HEADER_BYTES = 160  # of a stored tensor in a safetensors header, its name apart; for target sizes
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
    clock: Clock = NO_LIMIT  # what is left of the budget
    cache: Cache = field(default_factory=Cache)  # of what blocks return
    team: Team = ALONE  # processes that heal together

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.model.device.type == "meta" else self.model.device

    @property
    def block_of(self) -> dict[str, int]:
        """Block of every target and group."""
        blocks = {name: assignment.info.block for name, assignment in self.assignments.items()}
        return blocks | {name: blocks[group.members[0]] for name, group in self.groups.items()}

    def computing(self) -> AbstractContextManager:
        """Forward passes in float32 on a CPU, where half precision is slow and coarse; in the stored dtype on an accelerator."""
        return in_float32(self.model) if self.device.type == "cpu" else nullcontext()


def choose_device(name: str) -> str:
    """Resolve `auto` to CUDA where there is one. Raises ConfigError for a device that is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def open_source(name: str, revision: str | None, progress: Progress = silent) -> model_folder.ModelFolder:
    """Find and check a dense model folder: damaged, quantised, already compressed or non-finite ones are refused."""
    source = model_folder.read(model_folder.resolve(name, revision), progress)
    model_folder.refuse_quantised(source)
    model_folder.check_finite(source, progress)
    return source


def start(recipe: Recipe, source: model_folder.ModelFolder, progress: Progress = silent) -> Job:
    """Load model and calibration windows, and assign methods to linears."""
    device = choose_device(recipe.model.device)
    model, tokenizer = models.load(source.path, device=device, device_map=recipe.model.device_map)
    assignments = assign(recipe, model)
    if experts := models.fused(model):
        share = sum(experts.values()) / sum(parameter.numel() for parameter in model.parameters())
        log.warning("%d fused weights of experts, %.1f %% of the model, are no linears and stay as they are", len(experts), 100 * share)
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
    return Job(recipe, source, model, tokenizer, assignments, groups(recipe, assignments), fit, heldout, cache=cache)


def checked(job: Job) -> Job:
    """The job. Raises ConfigError if its recipe measures something on held-out windows, and there are none."""
    recipe, cure = job.recipe, "set calibration.heldout above 0, or give more windows"
    if len(job.heldout.tokens):
        return job
    if recipe.trains:
        raise ConfigError(f"repair and heal need held-out windows to be judged on; {cure}")
    if recipe.allocation.kind == "knapsack" and recipe.allocation.damage == "kl_probe":
        raise ConfigError(f"allocation.damage 'kl_probe' needs held-out windows; {cure}")
    return job


def evaluation_windows(job: Job, progress: Progress = silent) -> data.Windows:
    """The windows that original and compressed model are compared on."""
    section, window, seed = job.recipe.evaluation, job.recipe.evaluation_window, job.recipe.seed
    text = section.source or str(data.bundled("evaluation"))
    return data.load_windows(text, job.tokenizer, window, section.windows, section.column, seed=seed, model=job.model, progress=progress)


def seconds_per_token(job: Job) -> float:
    """Of comparing two models, timed on a batch of held-out windows and the model as it is, the second time."""
    tokens = job.heldout.tokens[: job.recipe.calibration.batch_size]
    with job.computing():
        for _ in range(2):
            start = time.monotonic()
            compare(job.model, job.model, tokens, len(tokens))
            seconds = time.monotonic() - start
    return seconds / tokens.numel()


def reserve(job: Job) -> float:
    """Seconds that writing takes, and the evaluation that ends a run, on all its windows."""
    tokens = evaluation_windows(job).tokens.numel() if job.recipe.evaluation.enabled else 0
    tokens += job.heldout.tokens.numel() + (job.calibration.tokens.numel() if job.recipe.trains else 0)
    return SLOWER * seconds_per_token(job) * tokens + WRITING


def needing(job: Job, others: Sequence[Recipe]) -> Job:
    """The job with everything that other recipes need collected too; of use for its statistics only."""
    found = dict(job.assignments)
    for recipe in others:
        for name, other in assign(recipe, job.model).items():
            first = found.setdefault(name, other)
            found[name] = replace(first, residual_needs=first.needs | other.needs)
    return replace(job, assignments=found)


def fingerprint(job: Job) -> dict[str, Any]:
    """What statistics depend on; two runs may share them only if all of it agrees."""
    section = job.recipe.calibration
    return {
        "model": model_folder.content_digest(job.source),
        "windows": job.calibration.digest,
        "seed": job.recipe.seed,
        "device": job.device.type,
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "gradients": section.gradients.model_dump(mode="json"),
    }


def keeping(job: Job, store: Store, scratch: Path | None = None) -> Job:
    """The job with a store for its pieces, which all depend on the source, the windows (held-out ones too) and the calibration.

    scratch: folder for what its cache does not hold in memory; None: with temporary files.
    """
    scope = fingerprint(job), collected_as(job.recipe), job.heldout.digest
    return replace(job, cache=Cache(job.cache.budget, scratch), store=store.within(*scope))


def collected_as(recipe: Recipe) -> dict[str, Any]:
    """The part of the calibration that statistics of the dense model depend on."""
    return recipe.calibration.model_dump(mode="json", exclude={"sequential", "anchor", "anchor_damping", "cache"})


def statistics(job: Job, progress: Progress = silent) -> dict[str, LinearStats]:
    """One calibration run for everything that the methods need."""
    section = job.recipe.calibration
    with job.computing():
        return collect(
            job.model,
            {name: assignment.info for name, assignment in job.assignments.items()},
            job.calibration.tokens,
            {name: assignment.needs for name, assignment in job.assignments.items()},
            batch_size=section.batch_size,
            gradients=section.gradients,
            memory=size_in_bytes(section.memory),
            generator=torch.Generator().manual_seed(job.recipe.seed),
            progress=progress,
            store=job.store,
        )


def decompositions(job: Job, stats: dict[str, LinearStats], progress: Progress = silent) -> Found:
    """One decomposition for each method and each linear or group that it decomposes; it serves every size."""
    for line in blind_spots(stats):
        log.warning(line)
    units = progress([*job.assignments, *job.groups], "decompose")
    return {
        name: decompose_group(job.groups[name], job.assignments, stats, job.store)
        if name in job.groups
        else decompose_one(name, job.assignments[name], stats[name], job.store)
        for name in units
    }


@dataclass(frozen=True)
class Probes:
    """What the probes found; keys are the linear or group and the index of its method. The prober can measure any other modules."""

    results: dict[tuple[str, int], ProbeResult]
    prober: Prober | None


def probes(job: Job, found: Found, progress: Progress = silent) -> Probes:
    """Probe one candidate of every curve, where the allocation asks for it."""
    allocation = job.recipe.allocation
    if allocation.kind != "knapsack" or allocation.damage != "kl_probe":
        return Probes({}, None)
    section, tokens = allocation.probe, job.heldout.tokens
    if section.skip >= tokens.shape[1]:
        raise ConfigError(f"allocation.probe.skip {section.skip} leaves no position of windows of {tokens.shape[1]} tokens")
    tokens = tokens[-(section.windows or len(tokens)) :]
    keys = [(name, index) for name, parts in found.items() for index, part in enumerate(parts) if part.curve.candidates]
    blocks = job.block_of
    with job.computing(), torch.no_grad():
        prober = Prober(job.model, tokens, job.recipe.calibration.batch_size, section.temperature, section.skip)
        store = job.store.within(section.model_dump(mode="json"))
        results = {}
        for name, index in progress(keys, "probe"):
            part = found[name][index]
            results[name, index] = store.recall("probe", part.key, partial(probe, prober, part, blocks[name], section.rank))
        return Probes(results, prober)


def other_bytes(tensors: Mapping[str, Tensor], targets: Container[str], dtype: torch.dtype | None) -> int:
    """Bytes of a checkpoint besides its targets, stored in `dtype` (None: as they are), with room for every tensor's header entry."""
    total = 0
    for name, tensor in tensors.items():
        total += HEADER_BYTES + len(name)
        if name.rpartition(".")[0] in targets:
            total += 2 * (HEADER_BYTES + len(name))  # a target may be stored as several tensors
        else:
            total += tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize
    return total


def output_dtype(recipe: Recipe) -> torch.dtype | None:
    """The dtype that floating tensors are stored in; None for the one they have."""
    return None if recipe.output.dtype == "auto" else getattr(torch, recipe.output.dtype)


def with_gram_errors(plan: Plan, job: Job, modules: Mapping[str, nn.Module], stats: dict[str, LinearStats]) -> Plan:
    """Add the error of every module in the one metric that reports share.

    Linears of a pruned module are in a basis of their own and say nothing one by one: they have the error of the module.
    """
    errors = {
        name: plan.linears[name].measured if isinstance(module, Pruned) else gram_error(job.assignments[name], module, stats[name])
        for name, module in modules.items()
        if name in plan.linears
    }
    return replace(plan, linears={n: replace(choice, error=errors.get(n, 0.0)) for n, choice in plan.linears.items()})


def install(job: Job, modules: Mapping[str, nn.Module]) -> None:
    """Turn the loaded model into the compressed one, in the output dtype. The original weights of the targets are let go."""
    if dtype := output_dtype(job.recipe):
        for parameter in job.model.parameters():
            parameter.data = parameter.data.to(dtype)
    for name, module in modules.items():
        models.replace(job.model, name, module)
