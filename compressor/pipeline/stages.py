"""The stages of a run, each a function of what the stages before it made."""

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from compressor.allocation import fisher
from compressor.allocation.decompose import (
    Decomposition,
    Decompositions,
    decompose_group,
    decompose_one,
    gram_error,
)
from compressor.allocation.probe import Prober, ProbeResult, probe
from compressor.allocation.solve import ProbeResults
from compressor.calibrate.collect import collect
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear
from compressor.models.install import replace as install_module
from compressor.pipeline.job import Job, log
from compressor.plan import Plan
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe
from compressor.resume.store import Store
from compressor.statistics import LinearStats, describe_blind_spots, describe_dense

HEADER_BYTES = 160  # of a stored tensor in a safetensors header, its name apart; for target sizes


def statistics(job: Job) -> dict[str, LinearStats]:
    """Collect everything that the methods need in one calibration run."""
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
            progress=job.progress,
            store=job.store,
        )


def explain_dense(job: Job, stats: Mapping[str, LinearStats]) -> dict[str, str]:
    """Return why targets stay dense whatever the budget, by name.

    The text says nothing about them, or about one that they can only be compressed together with.
    """
    reasons = {name: reason for name in job.assignments if (reason := stats[name].silence)}
    silenced = set(reasons)
    for group in job.groups.values():
        if cause := next((name for name in group.members if name in silenced), None):
            bound = [
                name for name in group.members if group.tied or not job.assignments[name].methods
            ]
            reasons |= {
                name: f"{cause}, which it is compressed with, stays dense"
                for name in bound
                if name not in silenced
            }
    return reasons


def decompose_all(job: Job, stats: dict[str, LinearStats]) -> Decompositions:
    """Decompose every linear and group by each of its methods, but for those that stay dense.

    A decomposition serves every size.
    """
    dense = explain_dense(job, stats)
    for line in describe_dense(dense) + describe_blind_spots(stats):
        log.warning(line)

    def decompose(unit: str) -> list[Decomposition]:
        group = job.groups.get(unit)
        if not dense.keys().isdisjoint([unit] if group is None else group.members):
            return []
        if group is not None:
            return decompose_group(group, job.assignments, stats, job.store)
        return decompose_one(unit, job.assignments[unit], stats[unit], job.store)

    units = [*job.assignments, *job.groups]
    return {unit: decompose(unit) for unit in job.steps(units, "decompose")}


def probe_all(job: Job, decompositions: Decompositions) -> ProbeResults:
    """Probe one candidate of every curve; nothing where the allocation does not ask for it.

    `fisher_probe` estimates all, and measures the largest.
    """
    allocation = job.recipe.allocation
    if not allocation.probes:
        return {}
    section, tokens = allocation.probe, job.heldout.tokens
    if section.skip >= tokens.shape[1]:
        raise ConfigError(
            f"allocation.probe.skip {section.skip} leaves no position of windows of "
            f"{tokens.shape[1]} tokens"
        )
    tokens = tokens[-(section.windows or len(tokens)) :]
    candidates = {
        (name, index): part
        for name, parts in decompositions.items()
        for index, part in enumerate(parts)
        if part.curve.candidates
    }
    store = job.store.within(section.model_dump(mode="json"))
    with job.computing(), torch.no_grad():
        measure = _prober(job, tokens, candidates, store)
        if allocation.damage == "kl_probe":
            return {key: measure(key) for key in job.steps(candidates, "probe")}
        generator = torch.Generator().manual_seed(job.recipe.seed)
        estimates = fisher.probe_all(
            fisher.FisherProber(job.model, tokens, section, generator),
            candidates,
            section.rank,
            size_in_bytes(job.recipe.calibration.memory),
            store,
            job.steps,
        )
        return fisher.check(estimates, measure, section.checks, job.steps)


def _prober(
    job: Job,
    tokens: Tensor,
    candidates: Mapping[tuple[str, int], Decomposition],
    store: Store,
) -> Callable[[tuple[str, int]], ProbeResult]:
    """Return what measures one candidate; the original runs when the first is asked for."""
    section = job.recipe.allocation.probe

    @cache
    def prober() -> Prober:
        batch_size = job.recipe.calibration.batch_size
        return Prober(job.model, tokens, batch_size, section.temperature, section.skip)

    def measure(key: tuple[str, int]) -> ProbeResult:
        part, block = candidates[key], job.block_of[key[0]]

        def make() -> ProbeResult:
            return probe(prober(), part, block, section.rank)

        return store.recall("probe", part.key, make)

    return measure


def other_bytes(
    tensors: Mapping[str, Tensor], targets: Container[str], dtype: torch.dtype | None
) -> int:
    """Count the bytes of a checkpoint besides its targets, header entries of all tensors included.

    Args:
        tensors: stored ones by name; meta tensors will do.
        targets: names of the linears that are targets.
        dtype: that floating tensors are stored in; None: as they are.
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
    """Return the dtype that floating tensors are stored in; None for the one they have."""
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
    """Add why linears stay dense, as `explain_dense` says."""
    return replace(
        plan,
        linears={
            name: replace(choice, reason=reasons.get(name)) for name, choice in plan.linears.items()
        },
    )


def install(job: Job, modules: Mapping[str, nn.Module]) -> None:
    """Turn the loaded model into the compressed one, in the output dtype.

    The original weights of the targets are let go.
    """
    if dtype := output_dtype(job.recipe):
        for parameter in job.model.parameters():
            parameter.data = parameter.data.to(dtype)
    for name, module in modules.items():
        install_module(job.model, name, module)
