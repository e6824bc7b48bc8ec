"""The stages of a run, each a function of what the stages before it made: job → statistics → curves → probes → plan → modules."""

import hashlib
import json
from collections.abc import Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor import data, folder
from compressor import model as models
from compressor.calibrate import collect
from compressor.decompose import Assignment, Decomposition, assign, decompose_one, gram_error
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear
from compressor.plan import DENSE, Plan
from compressor.planning import Option, Solution, correct, damages_of, linear_options, solve, to_plan
from compressor.probe import Prober, ProbeResult, probe
from compressor.progress import Progress, silent
from compressor.recipe import Recipe, size_in_bytes
from compressor.scoring import in_float32
from compressor.stats import LinearStats
from compressor.weights import stored_tensors

REMEASURE = 0.05  # a chosen candidate whose stored error departs by more than this from its curve is entered anew, and solved again
HEADER_BYTES = 160  # of a stored tensor in a safetensors header, its name apart; for target sizes

Found = dict[str, list[Decomposition]]  # linear → one decomposition for each method that competes for it


@dataclass(frozen=True)
class Job:
    """What every stage of one run works on."""

    recipe: Recipe
    source: folder.ModelFolder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    assignments: dict[str, Assignment]
    calibration: data.Windows
    heldout: data.Windows

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.model.device.type == "meta" else self.model.device

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


def open_source(name: str, revision: str | None) -> folder.ModelFolder:
    """Find and check a dense model folder: damaged, quantised, already compressed or non-finite ones are refused."""
    source = folder.read(folder.resolve(name, revision))
    folder.refuse_quantised(source)
    folder.check_finite(source)
    return source


def start(recipe: Recipe, source: folder.ModelFolder) -> Job:
    """Load model and calibration windows, and assign methods to linears."""
    device = choose_device(recipe.model.device)
    model, tokenizer = models.load(source.path, device=device, device_map=recipe.model.device_map)
    assignments = assign(recipe, model)
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
    )
    fit, heldout = data.split_heldout(windows, section.heldout)
    return Job(recipe, source, model, tokenizer, assignments, fit, heldout)


def fingerprint(job: Job) -> dict[str, Any]:
    """What statistics depend on; two runs may share them only if all of it agrees."""
    section = job.recipe.calibration
    return {
        "model": folder.content_digest(job.source),
        "windows": job.calibration.digest,
        "seed": job.recipe.seed,
        "device": job.device.type,
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "gradients": section.gradients.model_dump(mode="json"),
    }


def digest(data: dict[str, Any]) -> str:
    """sha256 of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


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
        )


def decompositions(job: Job, stats: dict[str, LinearStats], progress: Progress = silent) -> Found:
    """One decomposition for each linear and method; it serves every size."""
    items = progress(list(job.assignments.items()), "decompose")
    return {name: decompose_one(name, assignment, stats[name]) for name, assignment in items}


def probes(job: Job, found: Found, progress: Progress = silent) -> dict[tuple[str, int], ProbeResult]:
    """Probe one candidate of every curve, where the allocation asks for it; keys are the linear and the index of its method."""
    allocation = job.recipe.allocation
    if allocation.kind != "knapsack" or allocation.damage != "kl_probe":
        return {}
    section, tokens = allocation.probe, job.heldout.tokens
    if len(tokens) == 0:
        raise ConfigError("allocation.damage 'kl_probe' needs held-out windows; set calibration.heldout above 0")
    if section.skip >= tokens.shape[1]:
        raise ConfigError(f"allocation.probe.skip {section.skip} leaves no position of windows of {tokens.shape[1]} tokens")
    tokens = tokens[-(section.windows or len(tokens)) :]
    keys = [(name, index) for name, parts in found.items() for index, part in enumerate(parts) if part.curve.candidates]
    with job.computing(), torch.no_grad():
        prober = Prober(job.model, tokens, job.recipe.calibration.batch_size, section.temperature, section.skip)
        return {
            (name, index): probe(prober, found[name][index], job.assignments[name].info.block, section.rank)
            for name, index in progress(keys, "probe")
        }


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


def choose(job: Job, found: Found, probed: dict[tuple[str, int], ProbeResult]) -> tuple[Plan, dict[str, CompressedLinear]]:
    """Allocate and build what was chosen; where what is stored departs from its curve, enter what was measured and allocate once more."""
    damages = damages_of(job.recipe, job.assignments, found, probed, len(models.blocks(job.model)[1]))
    options = {name: linear_options(job.recipe, job.assignments[name], parts, damages[name]) for name, parts in found.items()}
    others = other_bytes(stored_tensors(job.model), job.assignments, output_dtype(job.recipe))
    size = others, job.calibration.tokens.numel()
    solution = solve(job.recipe, job.assignments, found, options, *size)
    modules, measured = build(solution)
    expected = {name: expected_error(solution.options[name], found[name], name, probed) for name in measured}
    off = [name for name, error in measured.items() if abs(error - expected[name]) > REMEASURE * expected[name] > 0]
    if off and job.recipe.allocation.kind == "knapsack":
        for name in off:
            options[name] = correct(options[name], solution.options[name].candidate, measured[name] / expected[name])
        solution = solve(job.recipe, job.assignments, found, options, *size)
        modules, measured = build(solution)
    plan = to_plan(solution, found, job.recipe)
    return with_measured(plan, measured), modules


def expected_error(option: Option, parts: list[Decomposition], name: str, probed: dict[tuple[str, int], ProbeResult]) -> float:
    """Error of a candidate as its curve has it, corrected by what its probe showed the curve to be off by."""
    index = next(index for index, part in enumerate(parts) if part is option.decomposition)
    return option.candidate.error * (probed[name, index].departure if (name, index) in probed else 1.0)


def build(solution: Solution) -> tuple[dict[str, CompressedLinear], dict[str, float]]:
    """Modules of the chosen candidates as they will be stored, and their errors in the metric of their method."""
    modules, measured = {}, {}
    for name, option in solution.options.items():
        if option.decomposition is not None:
            modules[name], measured[name] = option.decomposition.build(option.candidate)
    return modules, measured


def build_plan(plan: Plan, found: Found) -> tuple[Plan, dict[str, CompressedLinear]]:
    """Build an edited plan as it stands. Raises ConfigError for linears or methods that the recipe does not have."""
    if missing := sorted(found.keys() ^ plan.linears.keys()):
        raise ConfigError(f"the plan and the targets of the recipe differ in {missing[0]} ({len(missing)} in all)")
    modules, measured, choices = {}, {}, {}
    for name, choice in plan.linears.items():
        if choice.method == DENSE:
            choices[name] = choice
            continue
        part = next((part for part in found[name] if part.method.name == choice.method), None)
        if part is None:
            raise ConfigError(f"{name}: the plan says '{choice.method}', which the recipe does not offer for it")
        candidate = next((c for c in part.curve.candidates if c.setting == choice.setting), None)
        if candidate is None:
            raise ConfigError(f"{name}: {choice.method} offers no setting {choice.setting}; `compressor plan` lists those it has")
        modules[name], measured[name] = part.build(candidate)
        choices[name] = replace(choice, bits=candidate.bits, parameters=candidate.parameters, predicted=candidate.error, kl=None)
    return with_measured(replace(plan, linears=choices, price=None), measured), modules


def with_measured(plan: Plan, measured: dict[str, float]) -> Plan:
    return replace(plan, linears={n: replace(choice, measured=measured.get(n, 0.0)) for n, choice in plan.linears.items()})


def with_gram_errors(plan: Plan, job: Job, modules: dict[str, CompressedLinear], stats: dict[str, LinearStats]) -> Plan:
    """Add the error of every module in the one metric that reports share."""
    errors = {name: gram_error(job.assignments[name], module, stats[name]) for name, module in modules.items()}
    return replace(plan, linears={n: replace(choice, error=errors.get(n, 0.0)) for n, choice in plan.linears.items()})


def install(job: Job, modules: dict[str, CompressedLinear]) -> None:
    """Turn the loaded model into the compressed one, in the output dtype. The original weights of the targets are let go."""
    if dtype := output_dtype(job.recipe):
        for parameter in job.model.parameters():
            parameter.data = parameter.data.to(dtype)
    for name, module in modules.items():
        models.replace(job.model, name, module)
