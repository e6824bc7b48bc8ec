"""Sparse plus low rank: Ŵ = S + A B, the low-rank part for what all outputs share, the sparse part
for what is left.

References (solver → paper)
    oats   truncated SVD and hard thresholding in turn, inputs scaled by their norms: OATS, arXiv
           2409.13652
    admm   both parts within one ADMM loop in the full metric: 3BASiL, arXiv 2603.01376; see
           `admm`

Glossary
    metric M, grad_gram H = L Lᵀ      as in `sparse`; OATS alternates with diag M and the identity
    sparse S (out, in)                S, Z               rank r, up A (out, r), down B (r, in)    L
                                      = A B
    rank_share κ                      part of the stored numbers that is in A and B               κ
                                      (OATS), "+64" (3BASiL)
    frame U (out, r)                  orthonormal, A = L⁻ᵀ U, B = Uᵀ Lᵀ (W − S); the best has the
                                      leading eigenvectors of
                                      Lᵀ (W − S) M (W − S)ᵀ L

Differs from the papers: the frame follows by one warm step of orthogonal iteration for each step of
the loop and is exact at the end, where both papers decompose anew each time. All statistics are of
the dense model, where OATS collects on the compressed prefix. The two-sided metric and masks over
the whole layer are not in either paper. 3BASiL's matching of block outputs afterwards is not part
of this method.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor import linalg
from compressor.linalg import Metric
from compressor.linears import Adapted, Dense
from compressor.methods import register
from compressor.methods.base import Approximation
from compressor.methods.sparse import base
from compressor.methods.sparse.admm import admm, projection, refit
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats


class LowRankPart:
    """The low-rank part of several sizes, K, that are fitted together: it follows the residual that
    the sparse parts leave.

    gram: (in, in) M or None for the identity; root: (out, out) L or None; ranks: of the K sizes.
    """

    def __init__(self, linear: str, gram: Tensor | None, root: Tensor | None, ranks: list[int]):
        self.linear, self.gram, self.root, self.ranks = linear, gram, root, ranks
        # (K, out, largest r) U, columns beyond a size's own rank zero
        self.frames: Tensor | None = None

    def seen(self, residual: Tensor) -> Tensor:
        """Lᵀ (W − S), (K, out, in)."""
        return residual if self.root is None else self.root.T @ residual

    def fit(self, residual: Tensor) -> Tensor:
        """Fit the best A B (K, out, in) to W − S: K eigenproblems."""
        self.frames = residual.new_zeros(*residual.shape[:2], max(self.ranks))
        for frame, part, rank in zip(self.frames, self.seen(residual), self.ranks, strict=True):
            frame[:, :rank] = linalg.principal_outputs(
                part, Metric(self.gram), f"{self.linear}: low-rank part"
            )[1][:, :rank]
        return self.product(residual)

    def follow(self, residual: Tensor) -> Tensor:
        """Take one step of orthogonal iteration from the last frames and return A B (K, out, in);
        the first call is exact.
        """
        if self.frames is None:
            return self.fit(residual)
        seen = self.seen(residual)
        inside = seen.mT @ self.frames
        moved = seen @ (inside if self.gram is None else self.gram @ inside)
        self.frames = torch.linalg.qr(moved)[0] * self.frames.any(1, keepdim=True)
        return self.product(residual)

    def factors(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (K, out, r) and B (K, r, in) of the last fit."""
        if self.frames is None:
            raise ValueError(f"{self.linear}: nothing has been fitted yet")
        down = self.frames.mT @ self.seen(residual)
        up = (
            self.frames
            if self.root is None
            else torch.linalg.solve_triangular(self.root.T, self.frames, upper=True)
        )
        return up, down

    def product(self, residual: Tensor) -> Tensor:
        up, down = self.factors(residual)
        return up @ down


@register
@dataclass(frozen=True)
class SparseLowRankMethod(base.Patterned[base.Weighed]):
    """A sparse weight, stored as values and a bit mask, plus a low-rank pair."""

    name: ClassVar[str] = "sparse_low_rank"
    paper: ClassVar[str] = "OATS, arXiv 2409.13652; 3BASiL, arXiv 2603.01376"

    solver: Literal["oats", "admm"] = "admm"
    # part of the stored numbers in the low-rank pair; at least rank 1
    rank_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    iterations: Annotated[int, Field(ge=1)] = 40
    # `admm` only: factor of the penalty from one iteration to the next
    growth: Annotated[float, Field(ge=1)] = 1.07
    # `admm` only: exact low-rank fits after the loop, each followed by least squares on the
    # mask
    rounds: Annotated[int, Field(ge=1)] = 2

    def __post_init__(self):
        if self.solver == "oats" and self.metric != "gram":
            raise ValueError("solver 'oats' knows inputs only; set metric to 'gram'")

    def rank(self, dense: Dense, numbers: int) -> float:
        """Rank, not rounded, at which `numbers` numbers have the wanted share of low rank; or that
        is left beside an N:M pattern.
        """
        sides, fixed = sum(dense.weight.shape), base.pattern_count(dense, self.pattern)
        return (
            max(1.0, self.rank_share * numbers / sides)
            if fixed is None
            else max(0.0, (numbers - fixed) / sides)
        )

    def split(self, dense: Dense, numbers: int) -> dict[str, int] | None:
        """Rank and nonzeros that at most `numbers` numbers hold; None where they do not hold both
        parts.
        """
        (height, width), fixed = dense.weight.shape, base.pattern_count(dense, self.pattern)
        rank = round(self.rank(dense, numbers)) if fixed is None else int(self.rank(dense, numbers))
        nonzeros = numbers - rank * (height + width) if fixed is None else fixed
        if self.pattern == "rows":
            nonzeros -= nonzeros % height
        return (
            {"rank": rank, "nonzeros": nonzeros}
            if 0 < rank < min(height, width) and nonzeros >= height
            else None
        )

    def sizes(self, dense: Dense) -> list[Candidate]:
        base.require_divisible(self.pattern, dense.weight.shape[1], "a target")
        settings = [
            setting
            for setting in (
                self.split(dense, numbers) for numbers in base.payloads(dense, self.step)
            )
            if setting
        ]
        sides = sum(dense.weight.shape)
        return base.keep_smaller(
            self.name,
            dense,
            [(setting, setting["nonzeros"] + setting["rank"] * sides) for setting in settings],
        )

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> base.Weighed:
        """Scale the problem min tr(H D M Dᵀ), D = W − S − A B (out, in), to unit diagonals and find
        its eigenbases, O(in³ + out³).
        """
        base.require_divisible(self.pattern, dense.weight.shape[1], linear)
        return self.weigh(linear, dense, stats)

    def candidates(self, state: base.Weighed) -> Curve:
        """Screen the sizes (see `base`); the diagonal error is that of the nonzeros at unrounded
        rank, which is smooth in size.
        """
        sizes, sides = self.sizes(state.dense), sum(state.dense.weight.shape)
        numbers = [size.setting["nonzeros"] + size.setting["rank"] * sides for size in sizes]
        entries = [int(number - self.rank(state.dense, number) * sides) for number in numbers]
        return base.screen_curve(
            state,
            self.name,
            sizes,
            entries,
            self.pattern,
            self.anchors,
            lambda chosen: self.errors(state, chosen),
        )

    def errors(self, state: base.Weighed, sizes: list[Candidate]) -> list[float]:
        """Relative error of what the solver makes of each size."""
        values, _, up, down = self.solve(state, [size.setting for size in sizes])
        return [state.error(one) for one in values + up @ down]

    def solve(
        self, state: base.Weighed, settings: list[dict[str, Any]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S and its masks (K, out, in), A (K, out, r), B (K, r, in) of all sizes; r is the largest
        rank, smaller ones end in zeros.
        """
        problem, sizes = state.problem, len(settings)
        project = projection(self.pattern, [setting["nonzeros"] for setting in settings])
        ranks = [setting["rank"] for setting in settings]
        if self.solver == "oats":
            part = LowRankPart(state.linear, None, None, ranks)
            sparse = torch.zeros_like(problem.weight).expand(sizes, -1, -1)
            for _ in range(self.iterations):
                residual = problem.weight - sparse
                rest = problem.weight - part.follow(residual)
                mask = project(rest)
                sparse = rest * mask
        else:
            root = None if state.root is None else state.root / problem.outputs
            part = LowRankPart(state.linear, problem.gram, root, ranks)
            mask, sparse = admm(
                problem,
                project,
                sizes,
                self.iterations,
                self.rho,
                self.growth,
                lambda relaxed: part.follow(problem.weight - relaxed),
            )
            for _ in range(self.rounds):
                residual = problem.weight - sparse
                sparse = refit(
                    problem, problem.weight - part.fit(residual), mask, sparse, self.refit
                )
        up, down = part.factors(residual)
        return problem.original(sparse), mask, up / problem.outputs, down / problem.inputs

    def compress(self, state: base.Weighed, setting: dict[str, Any]) -> Adapted:
        values, mask, up, down = self.solve(state, [setting])
        pair = (
            factor[0].to(state.dense.dtype, memory_format=torch.contiguous_format, copy=True)
            for factor in (up, down)
        )
        return Adapted(base.store(state, values[0], mask[0]), *pair)

    def measure(self, state: base.Weighed, module: Approximation) -> float:
        return state.error(module.to_dense())
