"""What a run would do and what a checkpoint holds, from headers alone: nothing is written, no
weight is read.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from compressor.allocation.assign import Assignment, Group, assign, groups
from compressor.allocation.budgets import budgets, reserved
from compressor.allocation.knapsack import Row, check_budget
from compressor.calibrate.collect import GRADIENT_FIELDS
from compressor.calibrate.windows import heldout_count
from compressor.checkpoint.weights import DTYPES, warn_of_untying
from compressor.files.model_folder import ModelFolder
from compressor.linears import Dense
from compressor.methods.base import Member, Method
from compressor.models.linears import LinearInfo, blocks, covered_share, fused
from compressor.models.load import skeleton
from compressor.pipeline.stages import other_bytes, output_dtype
from compressor.plan import Candidate
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
WRITES = (
    "weights (*.safetensors), config.json, tokenizer, recipe.yaml, plan.json, report.json, "
    "README.md, manifest.json, timings.json"
)
PASSES_IN_ORDER = 2.5  # forward passes that a sequential solve takes for each stream
# side of the matrices whose products and eigenpairs are timed here, to scale the estimates by
SAMPLE = 384


def outline(recipe: Recipe, source: ModelFolder) -> dict[str, Any]:
    """Candidate sizes of every linear, the budget, what would be written, and estimates of memory
    and time.

    Raises BudgetError if the smallest candidates exceed the budget, ConfigError for targets that
    select nothing.
    """
    model = skeleton(source.path)
    assignments = assign(recipe, model)
    warn_of_untying(model, assignments)
    sharing = [group for group in groups(recipe, assignments).values() if group.methods]
    denses = {
        name: meta_dense(name, assignment, source, output_dtype(recipe))
        for name, assignment in assignments.items()
    }
    sizes = {
        name: [
            size
            for method in assignments[name].methods
            for size in method.sizes_of_unit({name: Member(name, dense)})
        ]
        for name, dense in denses.items()
    }
    bits = recipe.allocation.count == "bits"
    whole = {name: dense.bits if bits else dense.parameters for name, dense in denses.items()}
    others = other_bytes(stored(source), assignments, output_dtype(recipe))
    kept = 0
    shares = budgets(recipe, assignments, whole, others)
    for (names, keep), (_, left) in zip(
        shares, reserved(recipe, assignments, whole, shares), strict=True
    ):
        together = sum(whole[name] for name in names)
        rows = rows_of(names, assignments, sharing, denses, sizes, bits)
        budget = (
            sum(min(row.costs) for row in rows)
            if recipe.allocation.kind == "fixed"
            else int(left * together + 1e-6)
        )
        check_budget(rows, budget)
        kept += budget + int((keep - left) * together + 1e-6)
    targets, share = sum(dense.bits for dense in denses.values()) // 8, kept / sum(whole.values())
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
        "linears": [
            row(name, assignments[name], denses[name], sizes[name]) for name in assignments
        ],
    }


def stored(source: ModelFolder) -> dict[str, torch.Tensor]:
    """The tensors of a folder as meta tensors."""
    return {
        name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
        for name, info in source.tensors.items()
    }


def meta_dense(
    name: str, assignment: Assignment, source: ModelFolder, dtype: torch.dtype | None
) -> Dense:
    """The dense linear of a target with the shape and dtype it will have, on the meta device."""
    info = assignment.info
    found = source.tensors.get(f"{name}.weight") or next(iter(source.tensors.values()))
    bias = None if info.module.bias is None else torch.empty(info.out_features, device="meta")
    weight = torch.empty(info.out_features, info.in_features, device="meta")
    return Dense(weight, bias, dtype or TORCH_DTYPES[found.dtype], head_dim=info.head_dim)


def rows_of(
    names: list[str],
    assignments: dict[str, Assignment],
    sharing: Sequence[Group],
    denses: dict[str, Dense],
    sizes: dict[str, list[Candidate]],
    bits: bool,
) -> list[Row]:
    """Costs of all choices for the linears of one budget; of a group that may share, also the least
    and the most its linears take apart.
    """

    def cost(size: Candidate | Dense) -> int:
        return size.bits if bits else size.parameters

    costs = {
        name: costs_of(sizes[name], cost(denses[name]), assignments[name].keep_dense, bits)
        for name in names
    }
    rows = []
    for group in (group for group in sharing if set(group.members) <= set(names)):
        apart = [costs.pop(name) for name in group.members]
        together = [
            cost(size)
            for method in group.methods
            for size in sizes_of(method, group, assignments, denses)
        ]
        least, most = sum(map(min, apart)), sum(map(max, apart))
        rows.append(
            Row(
                tuple(sorted([*together, least, most])),
                (0.0,) * (len(together) + 2),
                sum(cost(denses[n]) for n in group.members),
            )
        )
    return rows + [Row(own, (0.0,) * len(own), cost(denses[name])) for name, own in costs.items()]


def sizes_of(
    method: Method, group: Group, assignments: dict[str, Assignment], denses: dict[str, Dense]
) -> list[Candidate]:
    """Sizes that a method offers for a group."""
    return method.sizes_of_unit(
        {
            name: Member(name, denses[name], role=assignments[name].info.role)
            for name in group.members
        }
    )


def costs_of(sizes: list[Candidate], whole: int, keep_dense: bool, bits: bool) -> tuple[int, ...]:
    """Costs of all options of a linear, ascending; dense among them if it may be kept or nothing is
    smaller.
    """
    costs = [size.bits if bits else size.parameters for size in sizes]
    return tuple(sorted(costs + ([whole] if keep_dense or not costs else [])))


def row(name: str, assignment: Assignment, dense: Dense, sizes: list[Candidate]) -> dict[str, Any]:
    info, least, most = (
        assignment.info,
        min(sizes, key=_bits, default=None),
        max(sizes, key=_bits, default=None),
    )
    return {
        "name": name,
        "role": info.role,
        "shape": f"{info.out_features} × {info.in_features}",
        "dense_bits": dense.bits,
        "methods": ", ".join(sorted({size.method for size in sizes})) or "none is smaller",
        "candidates": len(sizes),
        "least_bits": least.bits if least else dense.bits,
        "most_bits": most.bits if most else dense.bits,
    }


def _bits(size: Candidate) -> int:
    return size.bits


def memory(
    recipe: Recipe, source: ModelFolder, assignments: dict[str, Assignment]
) -> dict[str, int]:
    """Bytes held at once: weights, statistics (float64 sums), and decompositions (one float64 basis
    for each linear and method).
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
    """Bytes in memory, about, of the block outputs that sequential solves carry, in float32: one
    stream, and with anchoring a second.
    """
    section, hidden = recipe.calibration, min(a.info.in_features for a in assignments.values())
    tokens = (section.windows - heldout_count(section.windows, section.heldout)) * section.length
    return min(size_in_bytes(section.cache), 4 * tokens * hidden * (2 if section.anchor else 1))


def seconds(
    recipe: Recipe, source: ModelFolder, assignments: dict[str, Assignment], depth: int
) -> dict[str, float]:
    """Estimates from multiply-adds and the speed of one product and one eigendecomposition measured
    here, on the CPU.
    """
    rate, cubic = gemm_rate(), eigh_cubic()
    parameters = sum(torch.Size(info.shape).numel() for info in source.tensors.values())
    section = recipe.calibration
    heldout = heldout_count(section.windows, section.heldout)
    fitted = (section.windows - heldout) * section.length
    infos = [assignment.info for assignment in assignments.values()]
    backward = any(assignment.needs & GRADIENT_FIELDS for assignment in assignments.values())
    inputs = {info.feeds: info.in_features for info in infos}
    moments = sum(width**2 for width in inputs.values()) + (
        sum(info.out_features**2 for info in infos) if backward else 0
    )
    calibrate = fitted * (parameters * (2 if backward else 1) + moments) / rate
    decompose = sum(cubic * min(info.out_features, info.in_features) ** 3 for info in infos)
    windows = recipe.allocation.probe.windows or heldout
    passes = forward_passes(recipe, infos, depth) if recipe.allocation.probes else 0.0
    found = {
        "calibrate": calibrate,
        "decompose": decompose,
        "probe": passes * windows * section.length * parameters / rate,
    }
    if (
        section.sequential
    ):  # each stream goes through a block once as a whole and, group by group, through parts of it
        streams = 2 if section.anchor else 1
        found["solve_in_order"] = (
            fitted
            * streams
            * (PASSES_IN_ORDER * parameters + sum(width**2 for width in inputs.values()))
            / rate
            + decompose
        )
    return found


def forward_passes(recipe: Recipe, infos: Sequence[LinearInfo], depth: int) -> float:
    """Forward passes over the held-out windows that the probes cost, about."""
    section = recipe.allocation
    if section.damage == "kl_probe":
        return sum((depth - info.block) / depth for info in infos)
    kinds = max(len(entry.candidates) for entry in recipe.method)
    return 1 + section.probe.samples + kinds


def gemm_rate() -> float:
    """float32 multiply-adds per second of a product, best of three."""
    x = torch.randn(4 * SAMPLE, 4 * SAMPLE)
    return (4 * SAMPLE) ** 3 / _best(lambda: x @ x)


def eigh_cubic() -> float:
    """Seconds ÷ n³ of a float64 eigendecomposition, best of three."""
    x = torch.randn(SAMPLE, SAMPLE, dtype=torch.float64)
    symmetric = x @ x.T
    return _best(lambda: torch.linalg.eigh(symmetric)) / SAMPLE**3


def _best(call: Callable[[], Any]) -> float:
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)
