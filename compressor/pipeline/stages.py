"""The stages of a run, each a function of what the stages before it made."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from compressor.allocation.decompose import (
    Decomposition,
    decompose_group,
    decompose_one,
    gram_error,
)
from compressor.allocation.fisher import FisherProber, probe_all
from compressor.allocation.probe import Prober, ProbeResult, probe
from compressor.allocation.solve import Found
from compressor.calibrate.collect import collect
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear
from compressor.models.install import replace as install_module
from compressor.pipeline.job import Job, log
from compressor.plan import Plan
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe
from compressor.runtime.progress import Progress, silent
from compressor.statistics import LinearStats, blind_spots, dense_lines

HEADER_BYTES = 160  # of a stored tensor in a safetensors header, its name apart; for target sizes


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


def left_dense(job: Job, stats: Mapping[str, LinearStats]) -> dict[str, str]:
    """Why targets stay dense, by name: the text says nothing about them, or about one that they can
    only be compressed together with.
    """
    found = {name: reason for name in job.assignments if (reason := stats[name].silence)}
    silenced = set(found)
    for group in job.groups.values():
        if cause := next((name for name in group.members if name in silenced), None):
            bound = [
                name for name in group.members if group.tied or not job.assignments[name].methods
            ]
            found |= {
                name: f"{cause}, which it is compressed with, stays dense"
                for name in bound
                if name not in silenced
            }
    return found


def decompositions(job: Job, stats: dict[str, LinearStats], progress: Progress = silent) -> Found:
    """One decomposition for each method and each linear or group that it decomposes; it serves
    every size. None of what stays dense.
    """
    dense = left_dense(job, stats)
    for line in dense_lines(dense) + blind_spots(stats):
        log.warning(line)

    def of(unit: str) -> list[Decomposition]:
        group = job.groups.get(unit)
        if not dense.keys().isdisjoint([unit] if group is None else group.members):
            return []
        if group is not None:
            return decompose_group(group, job.assignments, stats, job.store)
        return decompose_one(unit, job.assignments[unit], stats[unit], job.store)

    return {unit: of(unit) for unit in progress([*job.assignments, *job.groups], "decompose")}


@dataclass(frozen=True)
class Probes:
    """What the probes found; keys are the linear or group and the index of its method. The prober
    can measure any other modules.
    """

    results: dict[tuple[str, int], ProbeResult]
    prober: Prober | None


def probes(job: Job, found: Found, progress: Progress = silent) -> Probes:
    """Probe one candidate of every curve, where the allocation asks for it.

    `fisher_probe` estimates all, and measures those that do not look small; whole models are
    measured later where several methods compete, or a search decides.
    """
    allocation = job.recipe.allocation
    if not allocation.probes:
        return Probes({}, None)
    section, tokens = allocation.probe, job.heldout.tokens
    if section.skip >= tokens.shape[1]:
        raise ConfigError(
            f"allocation.probe.skip {section.skip} leaves no position of windows of "
            f"{tokens.shape[1]} tokens"
        )
    tokens = tokens[-(section.windows or len(tokens)) :]
    candidates = {
        (name, index): part
        for name, parts in found.items()
        for index, part in enumerate(parts)
        if part.curve.candidates
    }
    several = len({part.method.name for part in candidates.values()}) > 1
    calibration, store = job.recipe.calibration, job.store.within(section.model_dump(mode="json"))
    with job.computing(), torch.no_grad():
        results = {}
        if allocation.damage == "fisher_probe":
            generator = torch.Generator().manual_seed(job.recipe.seed)
            results = probe_all(
                FisherProber(job.model, tokens, section, generator),
                candidates,
                section.rank,
                size_in_bytes(calibration.memory),
                store,
                progress,
            )
        limit = float("inf") if section.exact_above is None else section.exact_above
        exact = [key for key in candidates if key not in results or results[key].kl > limit]
        if not (exact or several or allocation.search is not None):
            return Probes(results, None)
        prober = Prober(
            job.model, tokens, calibration.batch_size, section.temperature, section.skip
        )
        for key in progress(exact, "probe"):
            part, block = candidates[key], job.block_of[key[0]]
            results[key] = store.recall(
                "probe", part.key, partial(probe, prober, part, block, section.rank)
            )
        return Probes(results, prober)


def other_bytes(
    tensors: Mapping[str, Tensor], targets: Container[str], dtype: torch.dtype | None
) -> int:
    """Bytes of a checkpoint besides its targets, stored in `dtype` (None: as they are), with room
    for every tensor's header entry.
    """
    total = 0
    for name, tensor in tensors.items():
        total += HEADER_BYTES + len(name)
        if name.rpartition(".")[0] in targets:
            total += 2 * (HEADER_BYTES + len(name))  # a target may be stored as several tensors
        else:
            total += (
                tensor.numel()
                * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize
            )
    return total


def output_dtype(recipe: Recipe) -> torch.dtype | None:
    """The dtype that floating tensors are stored in; None for the one they have."""
    return None if recipe.output.dtype == "auto" else getattr(torch, recipe.output.dtype)


def with_gram_errors(
    plan: Plan, job: Job, modules: Mapping[str, nn.Module], stats: dict[str, LinearStats]
) -> Plan:
    """Add the error of every module in the one metric that reports share.

    Linears of a pruned module are in a basis of their own and say nothing one by one: they have the
    error of the module.
    """
    errors = {
        name: plan.linears[name].measured
        if isinstance(module, CompressedLinear) and module.is_pruned
        else gram_error(job.assignments[name], module, stats[name])
        for name, module in modules.items()
        if name in plan.linears
    }
    return replace(
        plan,
        linears={
            n: replace(choice, error=errors.get(n, 0.0)) for n, choice in plan.linears.items()
        },
    )


def with_reasons(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """Add why linears stay dense. reasons: as `left_dense` gives them."""
    return replace(
        plan,
        linears={
            name: replace(choice, reason=reasons.get(name)) for name, choice in plan.linears.items()
        },
    )


def install(job: Job, modules: Mapping[str, nn.Module]) -> None:
    """Turn the loaded model into the compressed one, in the output dtype. The original weights of
    the targets are let go.
    """
    if dtype := output_dtype(job.recipe):
        for parameter in job.model.parameters():
            parameter.data = parameter.data.to(dtype)
    for name, module in modules.items():
        install_module(job.model, name, module)
