"""Residual compensation: a low-rank B A of what a compressed weight lost, in closed form, and the
ranks that a budget buys.

References (metric → paper)
    identity   LoRC of ZeroQuant-V2, arXiv 2303.08302
    diagonal   QERA-approx, arXiv 2410.06040; LQER, arXiv 2402.02446, which takes E|x| for the
               diagonal
    gram       EoRA, arXiv 2410.21271; QERA-exact, arXiv 2410.06040: one optimum, two derivations
    two_sided  the same with the output-gradient moment on the other side, as KFAC-SVD has it for
               weights

Glossary
    residual E (out, in) = W − Ŵ, whatever made Ŵ; W is the target that Ŵ was solved for, moved in
    anchored runs
    up B (out, r) = U_r, down A (r, in) = U_rᵀ E, U the eigenvectors of E M Eᵀ: see
    `methods.residual`, which `quantize` offers ranks of too

Differs from the papers: nothing is inverted (card 6: the projection U Uᵀ E is the same optimum as
the whitened SVD and stays finite where the Gram is singular), the Gram is a plain sum over tokens,
and ranks follow from a budget unless one is given.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.linalg import Metric
from compressor.linears import Adapted, CompressedLinear, Dense, LowRank
from compressor.methods.low_rank.low_rank import NEEDS, LowRankMethod, pair_size, store
from compressor.methods.low_rank.residual import Residual, decompose
from compressor.recipe.sections import Compensation
from compressor.statistics import LinearStats

METRICS = {
    "identity": "identity",
    "diagonal": "gram_diagonal",
    "gram": "gram",
    "two_sided": "two_sided",
}  # as `low_rank` calls them


def needs(section: Compensation) -> frozenset[str]:
    """Fields of the statistics that the residuals of a recipe need."""
    return frozenset(NEEDS[METRICS[section.metric]]) if section.enabled else frozenset()


@dataclass(frozen=True)
class Fit:
    """The residual of one linear, decomposed for every rank."""

    lost: Tensor  # (out, in) E, float64
    root: Tensor | None  # L (out, out), L Lᵀ = H, or None for H = I
    metric: Metric  # M, per token
    dtype: torch.dtype  # of the stored result
    residual: Residual

    @property
    def gains(self) -> Tensor:
        """(k,) what each next rank takes off tr(H E M Eᵀ), descending, per token."""
        return (self.residual.tail[:-1] - self.residual.tail[1:]).clamp(min=0)


def fit(
    linear: str, target: Dense, module: CompressedLinear, stats: LinearStats, metric: str
) -> Fit:
    """Decompose W − Ŵ once. target: W, with the dtype of the stored result; stats: of the inputs
    the module will have.
    """
    method, root = LowRankMethod(metric=METRICS[metric]), None
    stats.require(linear, method.needs)
    lost, inputs = target.weight.double() - module.to_dense().double(), method.input_metric(stats)
    if metric == "two_sided":
        root = stats.gradient_root(linear, method.shrink_grad_gram, "calibration.windows")
    return Fit(
        lost,
        root,
        inputs,
        target.dtype,
        decompose(lost, inputs, root, min(lost.shape), f"{linear}: residual"),
    )


@torch.no_grad()
def extend(module: CompressedLinear, fit: Fit, rank: int) -> CompressedLinear:
    """A new module, Ŵ + B A: a low-rank part of Ŵ grows by `rank`, any other storage gets one
    beside it.
    """
    up, down = fit.residual.pair(fit.lost, fit.root, rank)
    base = deepcopy(module)
    if isinstance(base, LowRank | Adapted):
        before = base.factors() if isinstance(base, LowRank) else base.pair()
        up, down = torch.cat([before[0].double(), up], 1), torch.cat([before[1].double(), down])
    if isinstance(base, LowRank):
        return store(up, down, base.bias, fit.dtype, base.pivots is not None)
    parts = (part.to(fit.dtype, memory_format=torch.contiguous_format) for part in (up, down))
    return Adapted(base.alone() if isinstance(base, Adapted) else base, *parts)


def size(module: CompressedLinear, rank: int, itemsize: int) -> tuple[int, int]:
    """(bits, parameters) of a module with a residual of this rank."""
    height, width = module.out_features, module.in_features
    if isinstance(module, LowRank):
        dense = Dense(torch.empty(height, width, device="meta"), None, module.up.dtype)
        return pair_size(
            dense, module.rank + rank, module.pivots is not None, module.bias is not None
        )[:2]
    return module.bits() + rank * (
        height + width
    ) * itemsize * 8, module.stored_parameters() + rank * (height + width)


def largest_rank(module: CompressedLinear, dense: Dense) -> int:
    """The largest residual that fits the shape and leaves the linear smaller than dense, in bits
    and in parameters; 0 if none does.
    """
    full = min(dense.weight.shape)
    most = full - 1 - module.rank if isinstance(module, LowRank) else full
    for rank in range(most, 0, -1):
        bits, parameters = size(module, rank, dense.dtype.itemsize)
        if bits < dense.bits and parameters < dense.parameters:
            return rank
    return 0
