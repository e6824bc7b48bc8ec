"""Direct sparsity: keep some entries of a weight, drop the others, and let the kept ones make up
for the loss.

References (solver → paper)
    wanda       |W_ij| ‖X_j‖, nothing is updated: Wanda, arXiv 2306.11695
    sparsegpt   optimal-brain-surgeon updates, column by column: SparseGPT, arXiv 2301.00774
    admm        ADMM for the mask, least squares for its values: ALPS, arXiv 2406.07831; see
                `admm`

Glossary
    metric M     second moment of the inputs                         H = 2 X Xᵀ / tokens of
                 SparseGPT, its factor 2 apart
    factor U     upper, UᵀU = (M + damping · mean(diag M) · I)⁻¹     Cholesky(H⁻¹)ᵀ, algorithm 1
    pattern      where the kept entries may be: `rows` equally many in each output (Wanda's choice),
                 `layer` anywhere (SparseGPT's,
                 within each block of columns), or N of M consecutive ones in each output

Differs from the papers: all statistics are of the dense model; the papers collect on the pruned
prefix, as sequential runs do. Sizes are met exactly; the authors' codes round what is dropped down
(Wanda) or drop ties besides (SparseGPT). ADMM minimises the two-sided error by default, which knows
how much the loss depends on each output; ALPS has the Gram alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor.errors import NumericalError
from compressor.linears import Dense, Sparse
from compressor.methods import register
from compressor.methods.base import Approximation
from compressor.methods.sparse import base
from compressor.methods.sparse.admm import admm, n_of_m, projection, refit
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

TOGETHER = 1 << 26  # entries of all sizes that are solved at once


def obs_factor(gram: Tensor, dampings: Sequence[float], linear: str) -> tuple[Tensor, float]:
    """Factor U (in, in) at the first of the dampings, relative to the mean diagonal, that leaves M
    positive definite, and that damping.

    gram: (in, in), any scale. Raises NumericalError naming the linear if none does.
    """
    dead = gram.diagonal() == 0
    mean = gram.diagonal().mean()
    for damping in dampings:
        damped = gram + torch.diag(torch.where(dead, 1.0, damping * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper, damping
    raise NumericalError(
        f"{linear}: the Gram is singular at dampings {list(dampings)}; add a larger one to the "
        "option 'damping'"
    )


def surgeon(
    weight: Tensor, factor: Tensor, pattern: base.Pattern, counts: Sequence[int], block: int
) -> tuple[Tensor, Tensor]:
    """SparseGPT of all sizes at once: values and masks (K, out, in).

    weight: (out, in), dead inputs zero; factor: U (in, in); counts: entries kept, each block of
    columns its share of them.
    """
    height, width = weight.shape

    def portion(count: int, start: int, stop: int) -> int:
        """Entries kept in these columns; the portions of all columns add up to `count`."""
        unit = height if pattern == "rows" else 1
        return unit * (count // unit * stop // width - count // unit * start // width)

    weight = weight.double().expand(len(counts), -1, -1).clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    segment = (n_of_m(pattern) or (0, block))[1]
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.zeros_like(weight[..., start:end])
        for column in range(start, end):
            if (
                column - start
            ) % segment == 0:  # the mask is chosen from the weights as they are now
                stop = min(column + segment, end)
                share = [portion(count, column, stop) for count in counts]
                scores = weight[..., column:stop] / factor.diagonal()[column:stop]
                mask[..., column:stop] = projection(pattern, share)(scores)
            kept = mask[..., column]
            error = torch.where(kept, 0.0, weight[..., column]) / factor[column, column]
            weight[..., column] *= kept
            weight[..., column + 1 : end] -= error[..., None] * factor[column, column + 1 : end]
            errors[..., column - start] = error
        weight[..., end:] -= errors @ factor[start:end, end:]
    return weight, mask


@dataclass(frozen=True)
class Prepared:
    """One linear in its metric, and for SparseGPT the factor of the damped inverse Gram with the
    damping it took.
    """

    weighed: base.Weighed
    factor: Tensor | None
    damping: float | None


@register
@dataclass(frozen=True)
class SparseMethod(base.Patterned[Prepared]):
    """A weight with most entries at zero, stored as the others and a bit mask."""

    name: ClassVar[str] = "sparse"
    paper: ClassVar[str] = (
        "Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774; ALPS, arXiv 2406.07831"
    )

    solver: Literal["wanda", "sparsegpt", "admm"] = "admm"
    # `sparsegpt` only: tried in this order
    damping: tuple[Annotated[float, Field(ge=0)], ...] = (0.01, 0.1, 1.0)
    # `sparsegpt` only: columns whose mask is chosen together
    block: Annotated[int, Field(ge=8, multiple_of=8)] = 128
    iterations: Annotated[int, Field(ge=1)] = 15  # `admm` only
    # `admm` only: factor of the penalty from one iteration to the next
    growth: Annotated[float, Field(ge=1)] = 1.2

    def __post_init__(self):
        if self.solver != "admm" and self.metric != "gram":
            raise ValueError(f"solver '{self.solver}' knows inputs only; set metric to 'gram'")

    def sizes(self, dense: Dense) -> list[Candidate]:
        base.require_divisible(self.pattern, dense.weight.shape[1], "a target")
        fixed, row = (
            base.pattern_count(dense, self.pattern),
            len(dense.weight) if self.pattern == "rows" else 1,
        )
        counts = (
            [fixed] if fixed else [count - count % row for count in base.payloads(dense, self.step)]
        )
        return base.keep_smaller(
            self.name, dense, [({"nonzeros": count}, count) for count in counts if count]
        )

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> Prepared:
        """Scale the problem min tr(H D M Dᵀ), D = W − Ŵ (out, in), to unit diagonals and find its
        eigenbases, O(in³ + out³); for SparseGPT, factorise the damped inverse of M besides.
        """
        base.require_divisible(self.pattern, dense.weight.shape[1], linear)
        weighed = self.weigh(linear, dense, stats)
        factor, damping = None, None
        if self.solver == "sparsegpt":
            gram = stats.total(linear, "gram").double() / stats.tokens
            factor, damping = obs_factor(gram, self.damping, linear)
        return Prepared(weighed, factor, damping)

    def candidates(self, state: Prepared) -> Curve:
        """Screen the sizes (see `base`); SparseGPT's settings name the damping that it took."""
        sizes = self.sizes(state.weighed.dense)
        if state.damping is not None:
            sizes = [
                replace(size, setting=size.setting | {"damping": state.damping}) for size in sizes
            ]
        counts = [size.setting["nonzeros"] for size in sizes]
        return base.screen_curve(
            state.weighed,
            self.name,
            sizes,
            counts,
            self.pattern,
            self.anchors,
            lambda chosen: self.errors(state, chosen),
        )

    def errors(self, state: Prepared, sizes: list[Candidate]) -> list[float]:
        """Relative error of what the solver makes of each size."""
        together = max(1, TOGETHER // state.weighed.dense.weight.numel())
        counts = [size.setting["nonzeros"] for size in sizes]
        parts = [
            self.solve(state, counts[place : place + together])[0]
            for place in range(0, len(counts), together)
        ]
        return [state.weighed.error(values) for part in parts for values in part]

    def solve(self, state: Prepared, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Values and masks (K, out, in) of all sizes, values zero off the mask."""
        problem, weight = state.weighed.problem, state.weighed.dense.weight.double()
        if state.factor is not None:
            alive = problem.gram.diagonal() > 0
            return surgeon(weight * alive, state.factor, self.pattern, counts, self.block)
        project = projection(self.pattern, counts)
        if self.solver == "wanda":
            mask = project(problem.weight.expand(len(counts), -1, -1))
            return weight * mask, mask
        mask, values = admm(problem, project, len(counts), self.iterations, self.rho, self.growth)
        return problem.original(refit(problem, problem.weight, mask, values, self.refit)), mask

    def compress(self, state: Prepared, setting: dict[str, Any]) -> Sparse:
        values, mask = self.solve(state, [setting["nonzeros"]])
        return base.store(state.weighed, values[0], mask[0])

    def measure(self, state: Prepared, module: Approximation) -> float:
        return state.weighed.error(module.to_dense())
