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

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.linalg import Metric
from compressor.linears import CompressedLinear, Dense
from compressor.methods.low_rank.low_rank import NEEDS, LowRankMethod
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
    return module.extend(up, down, fit.dtype)


def largest_rank(module: CompressedLinear, dense: Dense) -> int:
    """The largest residual that fits the shape and leaves the linear smaller than dense, in bits
    and in parameters; 0 if none does.
    """
    for rank in range(module.largest_extension, 0, -1):
        bits, parameters = module.extended_size(rank, dense.dtype.itemsize)
        if bits < dense.bits and parameters < dense.parameters:
            return rank
    return 0
