"""Low-rank residuals: the product that best makes up for what a compressed weight has lost, in
closed form, for any compressed weight and every rank.

References (metric → paper)
    identity   LoRC of ZeroQuant-V2, arXiv 2303.08302
    diagonal   QERA-approx, arXiv 2410.06040; LQER, arXiv 2402.02446, which takes E|x| for the
               diagonal
    gram       EoRA, arXiv 2410.21271; QERA-exact, arXiv 2410.06040: one optimum, two derivations
    two_sided  the same with the output-gradient moment on the other side, as KFAC-SVD has it for
               weights

Glossary                                                                          EoRA
    lost E (out, in)   W − Ŵ; W is the target that Ŵ was solved for, moved in
                       anchored runs                                              Δ W
    metric M, H = L Lᵀ M of the inputs, H of the output gradients or the
                       identity                                                   X̃ X̃ᵀ; no H
    frame U (out, r)   leading eigenvectors of Lᵀ E M Eᵀ L
    up, down           L⁻ᵀ U (out, r) and Uᵀ Lᵀ E (r, in)                         B', A
    tail               sum of the other eigenvalues, which is
                       tr(H (E − up · down) M (E − up · down)ᵀ)

Differs from the papers: they take the truncated SVD of E times a root of M and multiply by the
inverse root, which explodes where M is nearly singular; the eigenvectors on the side of the outputs
give the same product without an inverse. M is a plain mean over tokens, and ranks follow from a
budget unless one is given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor import linalg
from compressor.linalg import Metric
from compressor.linears import CompressedLinear, Dense
from compressor.methods.low_rank.low_rank import NEEDS, LowRankMethod, MetricName
from compressor.recipe.sections import Compensation
from compressor.statistics import LinearStats

METRICS: dict[str, MetricName] = {  # of recipes → as `low_rank` calls them
    "identity": "identity",
    "diagonal": "gram_diagonal",
    "gram": "gram",
    "two_sided": "two_sided",
}


@dataclass(frozen=True)
class Residual:
    """Residuals of every rank up to some largest one."""

    # (largest rank + 1,) error left behind a residual of rank 0, 1, …; absolute, float64
    tail: Tensor
    frame: Tensor  # (out, largest rank) U, float64

    def pair(self, lost: Tensor, root: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
        """Return up (out, r) and down (r, in) of one rank, float64.

        Args:
            lost: E (out, in), the very one that was decomposed.
            root: L (out, out), or None for H = I.
            rank: r.
        """
        frame = self.frame[:, :rank]
        if root is None:
            return frame, frame.T @ lost.double()
        up = torch.linalg.solve_triangular(root.T, frame, upper=True)
        scale = up.norm(dim=0)  # gradients may be far from 1, and half precision is not wide
        return up / scale, scale[:, None] * (frame.T @ (root.T @ lost.double()))


def decompose(lost: Tensor, metric: Metric, root: Tensor | None, most: int, what: str) -> Residual:
    """Decompose E once for every rank up to `most`: one eigenproblem of size min(out, in).

    Args:
        lost: E (out, in).
        metric: M, per token.
        root: L (out, out), or None for H = I.
        most: largest rank.
        what: the matrix, for messages.

    Raises:
        NumericalError: an entry is not finite; names `what`.
    """
    seen = lost.double() if root is None else root.T @ lost.double()
    values, frame = linalg.principal_outputs(seen, metric, what)
    tail = torch.cat([values.clamp(min=0).flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    return Residual(tail[: most + 1].clone(), frame[:, :most].clone())


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


def needs(section: Compensation) -> frozenset[str]:
    """Name the fields of the statistics that the residuals of a recipe need."""
    return frozenset(NEEDS[METRICS[section.metric]]) if section.enabled else frozenset()


def fit(
    linear: str, target: Dense, module: CompressedLinear, stats: LinearStats, metric: str
) -> Fit:
    """Decompose what a linear has lost.

    Args:
        linear: its name, for messages.
        target: W (out, in), with the dtype of the stored result.
        module: Ŵ.
        stats: sums of the inputs that the module will have.
        metric: a key of METRICS.
    """
    method, root = LowRankMethod(metric=METRICS[metric]), None
    stats.require(linear, method.needs)
    lost, inputs = (
        target.weight.double() - module.to_dense().double(),
        method.input_metric(linear, stats),
    )
    if metric == "two_sided":
        root = stats.gradient_root(linear, method.shrink_grad_gram, "calibration.windows")
    residual = decompose(lost, inputs, root, min(lost.shape), f"{linear}: residual")
    return Fit(lost, root, inputs, target.dtype, residual)


@torch.no_grad()
def extend(module: CompressedLinear, fit: Fit, rank: int) -> CompressedLinear:
    """Build a new module of Ŵ + up · down: a low-rank part of Ŵ grows by `rank`, any other storage
    gets one beside it.
    """
    up, down = fit.residual.pair(fit.lost, fit.root, rank)
    return module.extend(up, down, fit.dtype)


def largest_rank(module: CompressedLinear, dense: Dense) -> int:
    """Find the largest residual that fits the shape and leaves the linear smaller than dense, in
    bits and in parameters; 0 if none does.
    """
    for rank in range(module.largest_extension, 0, -1):
        bits, parameters = module.extended_size(rank, dense.dtype.itemsize)
        if bits < dense.bits and parameters < dense.parameters:
            return rank
    return 0
