"""Outline what a run would do from headers alone: nothing is written, no weight is read."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from compressor.allocation.assign import Assignment, assign, groups
from compressor.allocation.decompose import Decomposition, list_sizes
from compressor.allocation.solve import Problem, check_size, list_options
from compressor.calibrate.collect import GRADIENT_FIELDS
from compressor.calibrate.windows import heldout_count
from compressor.checkpoint.weights import DTYPES, warn_of_untying
from compressor.files.model_folder import ModelFolder
from compressor.models.linears import LinearInfo, blocks, covered_share, fused
from compressor.models.load import skeleton
from compressor.pipeline.sequential_solve import SEQUENTIAL_COST
from compressor.pipeline.stages import other_bytes, output_dtype
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
WRITES = (
    "weights (*.safetensors), config.json, tokenizer, recipe.yaml, plan.json, report.json, "
    "README.md, manifest.json, timings.json"
)
# side of the matrices whose products and eigenpairs are timed here, to scale the estimates by
SAMPLE = 384


def outline(recipe: Recipe, source: ModelFolder) -> dict[str, Any]:
    """Return candidate sizes of every linear, the budget, what would be written, and estimates of
    memory and time.

    Raises BudgetError if the smallest candidates exceed the budget, ConfigError for targets that
    select nothing.
    """
    model, dtype = skeleton(source.path), output_dtype(recipe)
    assignments = {
        name: replace(assignment, dtype=dtype or stored_dtype(name, source))
        for name, assignment in assign(recipe, model).items()
    }
    warn_of_untying(model, assignments)
    tied = groups(recipe, assignments)
    sizes = list_sizes(assignments, tied)
    damages = {
        name: [[0.0] * len(part.curve.candidates) for part in parts]
        for name, parts in sizes.items()
    }
    others = other_bytes(stored(source), assignments, dtype)
    problem = Problem(recipe, assignments, tied, sizes, others, tokens=0)
    most = check_size(problem, list_options(problem, damages))
    share = most / sum(map(problem.size, assignments))
    targets = sum(assignment.bits for assignment in assignments.values()) // 8
    return {
        "model": recipe.model.name,
        "kept": share,
        "unit": recipe.allocation.count,
        "covered_share": covered_share(model, assignments),
        "not_linear": fused(model),
        "bytes": {
            "source": source.weight_bytes,
            "targets": targets,
            "others": others,
            "compressed_at_most": int(share * targets) + others,
        },
        "memory_bytes": memory(recipe, source, assignments),
        "estimated_seconds": seconds(recipe, source, assignments, len(blocks(model)[1])),
        "writes": WRITES,
        "linears": [row(name, assignments[name], sizes[name]) for name in assignments],
    }


def stored(source: ModelFolder) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder as meta tensors."""
    return {
        name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
        for name, info in source.tensors.items()
    }


def stored_dtype(name: str, source: ModelFolder) -> torch.dtype:
    """Return the dtype of a linear as its folder holds it."""
    info = source.tensors.get(f"{name}.weight") or next(iter(source.tensors.values()))
    return TORCH_DTYPES[info.dtype]


def row(
    name: str, assignment: Assignment, decompositions: Sequence[Decomposition]
) -> dict[str, Any]:
    """Return what the outline says about one linear."""
    candidates = [c for part in decompositions for c in part.curve.candidates]
    bits = sorted(candidate.bits for candidate in candidates) or [assignment.bits]
    info = assignment.info
    return {
        "name": name,
        "role": info.role,
        "shape": f"{info.out_features} × {info.in_features}",
        "dense_bits": assignment.bits,
        "methods": ", ".join(sorted({c.method for c in candidates})) or "none is smaller",
        "candidates": len(candidates),
        "least_bits": bits[0],
        "most_bits": bits[-1],
    }


def memory(
    recipe: Recipe, source: ModelFolder, assignments: dict[str, Assignment]
) -> dict[str, int]:
    """Estimate the bytes held at once.

    They are weights, statistics (float64 sums), and decompositions (one float64 basis for each
    linear and method).
    """
    grams = {a.info.feeds: a.info.in_features for a in assignments.values()}
    sums = sum(8 * width**2 for width in grams.values())
    sums += sum(8 * a.info.out_features**2 for a in assignments.values() if "grad_gram" in a.needs)
    bases = sum(
        8 * a.info.out_features * min(a.info.out_features, a.info.in_features) * len(a.methods)
        for a in assignments.values()
    )
    return {
        "weights": source.weight_bytes,
        "statistics": sums,
        "decompositions": bases,
        "one_pass": size_in_bytes(recipe.calibration.memory),
    } | ({"streams": streams(recipe, assignments)} if recipe.calibration.sequential else {})


def streams(recipe: Recipe, assignments: dict[str, Assignment]) -> int:
    """Estimate the bytes of the block outputs that sequential solves hold, in float32.

    They are one stream, and with anchoring a second.
    """
    section, hidden = recipe.calibration, min(a.info.in_features for a in assignments.values())
    tokens = (section.windows - heldout_count(section.windows, section.heldout)) * section.length
    return min(size_in_bytes(section.cache), 4 * tokens * hidden * (2 if section.anchor else 1))


def seconds(
    recipe: Recipe,
    source: ModelFolder,
    assignments: dict[str, Assignment],
    depth: int,
    device: str = "cpu",
) -> dict[str, float]:
    """Estimate the seconds of each stage from multiply-adds and the speed of one product and one
    eigendecomposition measured on the device.
    """
    rate, cubic, count = gemm_rate(device), eigh_cubic(device), parameters(source)
    section = recipe.calibration
    heldout = heldout_count(section.windows, section.heldout)
    fitted = (section.windows - heldout) * section.length
    infos = [assignment.info for assignment in assignments.values()]
    backward = any(assignment.needs & GRADIENT_FIELDS for assignment in assignments.values())
    inputs = {info.feeds: info.in_features for info in infos}
    moments = sum(width**2 for width in inputs.values()) + (
        sum(info.out_features**2 for info in infos) if backward else 0
    )
    calibrate = fitted * (count * (2 if backward else 1) + moments) / rate
    decompose = sum(cubic * min(info.out_features, info.in_features) ** 3 for info in infos)
    windows = recipe.allocation.probe.windows or heldout
    passes = forward_passes(recipe, infos, depth) if recipe.allocation.probes else 0.0
    estimates = {
        "calibrate": calibrate,
        "decompose": decompose,
        "probe": passes * windows * section.length * count / rate,
    }
    if section.sequential:
        # each stream goes through a block as a whole and, group by group, through parts of it
        streams = 2 if section.anchor else 1
        work = SEQUENTIAL_COST * count + sum(width**2 for width in inputs.values())
        estimates["solve_in_order"] = fitted * streams * work / rate + decompose
    return estimates


def forward_passes(recipe: Recipe, infos: Sequence[LinearInfo], depth: int) -> float:
    """Estimate the forward passes over the held-out windows that the probes cost."""
    section = recipe.allocation
    if section.damage == "kl_probe":
        return sum((depth - info.block) / depth for info in infos)
    kinds = max(len(entry.candidates) for entry in recipe.method)
    return 1 + section.probe.samples + kinds


def parameters(source: ModelFolder) -> int:
    """Count the numbers in the tensors of a folder."""
    return sum(torch.Size(info.shape).numel() for info in source.tensors.values())


def gemm_rate(device: str = "cpu") -> float:
    """Measure float32 multiply-adds per second of a product, best of three."""
    x = _noise(4 * SAMPLE, torch.float32, device)
    return (4 * SAMPLE) ** 3 / _best(lambda: x @ x)


def eigh_cubic(device: str = "cpu") -> float:
    """Measure seconds ÷ n³ of a float64 eigendecomposition, best of three."""
    x = _noise(SAMPLE, torch.float64, device)
    symmetric = x @ x.T
    return _best(lambda: torch.linalg.eigh(symmetric)) / SAMPLE**3


def _noise(side: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(side, side, dtype=dtype, generator=generator).to(device)


def _best(call: Callable[[], Any]) -> float:
    """Measure the seconds of a call, an accelerator's work included, best of three."""
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent)
