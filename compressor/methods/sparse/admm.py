"""Sparse approximation of one weight in a metric that couples its entries: ADMM with a projected
copy, then least squares on the mask.

Problem: min tr(H (W − S − R) M (W − S − R)ᵀ) over sparse S (out, in), whose mask a projection
chooses; the rest R is the caller's, or 0. `sparse_coding` solves it for targets that do not
interact, H = I; here the output-gradient moment H couples the outputs as well.

References: ADMM pruning is ALPS (arXiv 2406.07831) and arXiv 2401.02938; a low-rank block within it
is 3BASiL's (arXiv 2603.01376); the two-sided metric is KFAC-SVD's (ICML 2026).

Glossary
    M   second moment of the inputs (in, in)      H   second moment of the output gradients (out,
        out), or the identity
    ν   (in,) √diag M      μ   (out, 1) √diag H   coordinates W̃ = μ ⊙ W ⊙ ν, in which both moments
        have unit diagonal
    X   relaxed copy, the exact minimiser of the error + ρ ‖X − Z + U‖², from the eigenbases of M
        and H
    Z   projected copy Π(X + U)                   U   scaled dual
All sizes of one linear are solved together: leading dimension K.

Differs from the papers: with H, magnitudes are compared in W̃ coordinates, where an entry's own
term of the error is its square; a mask over the whole layer then spends more on the outputs that
the loss depends on. The penalty grows by a fixed factor instead of by support change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compressor import linalg
from compressor.methods.dictionary.sparse_coding import top_mask

Projection = Callable[[Tensor], Tensor]  # (K, out, in) → mask of the entries that are kept


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """(2, 4) of "2:4"; None of a pattern that is not N:M."""
    kept, colon, group = pattern.partition(":")
    return (int(kept), int(group)) if colon else None


def projection(pattern: str, counts: Sequence[int]) -> Projection:
    """Keep the largest counts[k] entries of the k-th matrix: of the whole `layer`, as many in each
    of its `rows`, or N of M ("2:4").
    """

    def choose(scores: Tensor, count: int) -> Tensor:
        if parts := n_of_m(pattern):
            kept, group = parts
            return top_mask(scores.unflatten(1, (-1, group)), kept, 2).flatten(1)
        if pattern == "rows":
            return top_mask(scores, count // len(scores), 1)
        return top_mask(scores.flatten(), count, 0).view_as(scores)

    return lambda values: torch.stack(
        [choose(scores, count) for scores, count in zip(values.abs(), counts, strict=True)]
    )


@dataclass(frozen=True)
class Problem:
    """One weight and its metric in W̃ coordinates, float64; the error is the same number as in the
    original ones.
    """

    linear: str
    weight: Tensor  # (out, in) W̃
    inputs: Tensor  # (in,) ν
    outputs: Tensor  # (out, 1) μ
    gram: Tensor  # (in, in) M / (ν νᵀ)
    grad_gram: Tensor | None  # (out, out) H / (μ μᵀ); None for the identity

    @cached_property
    def input_basis(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (in,) and eigenvectors (in, in) of `gram`."""
        values, vectors = linalg.eigh_descending(self.gram, f"{self.linear}: the Gram")
        return values.clamp(min=0), vectors

    @cached_property
    def output_basis(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (out,) and eigenvectors (out, out) of `grad_gram`."""
        if self.grad_gram is None:
            raise ValueError(f"{self.linear}: the identity has no eigenbasis of its own")
        values, vectors = linalg.eigh_descending(
            self.grad_gram, f"{self.linear}: the output-gradient moment"
        )
        return values.clamp(min=0), vectors

    def of_outputs(self, rows: Tensor) -> "Problem":
        """Restrict the problem to some outputs, (k,) indices; it has the same inputs, so their
        eigenbasis is shared.
        """
        grad_gram = None if self.grad_gram is None else self.grad_gram[rows][:, rows]
        part = Problem(
            self.linear, self.weight[rows], self.inputs, self.outputs[rows], self.gram, grad_gram
        )
        vars(part)["input_basis"] = self.input_basis
        return part

    def weigh(self, lost: Tensor) -> Tensor:
        """H D M for D (…, out, in)."""
        weighted = lost @ self.gram
        return weighted if self.grad_gram is None else self.grad_gram @ weighted

    def error(self, approximation: Tensor) -> float:
        """tr(H D M Dᵀ) of an approximation (out, in) in W̃ coordinates."""
        lost = self.weight - approximation
        return (self.weigh(lost) * lost).sum().item()

    def relax(self, pull: Tensor, penalty: float) -> Tensor:
        """Solve H X M + penalty · X = pull for X (…, out, in)."""
        values, basis = self.input_basis
        if self.grad_gram is None:
            return ((pull @ basis) / (values + penalty)) @ basis.T
        across, frame = self.output_basis
        return (
            frame @ ((frame.T @ pull @ basis) / (torch.outer(across, values) + penalty)) @ basis.T
        )

    def original(self, scaled: Tensor) -> Tensor:
        """From W̃ coordinates to those of W: (…, out, in)."""
        return scaled / self.outputs / self.inputs


def pose(linear: str, weight: Tensor, moment: Tensor, grad_gram: Tensor | None) -> Problem:
    """Scale a weight (out, in), its input moment (in, in) and, for the two-sided metric, its
    output-gradient moment (out, out).

    Raises NumericalError naming the linear if an entry is not finite.
    """
    for tensor, what in (
        (weight, "the weight"),
        (moment, "the Gram"),
        (grad_gram, "the output-gradient moment"),
    ):
        if tensor is not None:
            linalg.require_finite(tensor, f"{linear}: {what}")
    norms = moment.diagonal().double().clamp(min=0).sqrt()
    weight, inputs, outputs = (
        weight.double() * norms,
        positive(norms),
        torch.ones_like(weight[:, :1], dtype=torch.float64),
    )
    if grad_gram is not None:
        norms = grad_gram.diagonal().double().clamp(min=0).sqrt()[:, None]
        weight, outputs = weight * norms, positive(norms)
        grad_gram = grad_gram.double() / outputs / outputs.T
    return Problem(
        linear, weight, inputs, outputs, moment.double() / inputs / inputs[:, None], grad_gram
    )


def positive(norms: Tensor) -> Tensor:
    """Norms to divide by: 1 instead of 0. Dead inputs have weight 0 in W̃ coordinates, so nothing
    is spent on them.
    """
    return torch.where(norms > 0, norms, 1.0)


def admm(
    problem: Problem,
    project: Projection,
    sizes: int,
    iterations: int,
    rho: float,
    growth: float,
    rest: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Masks and values of `sizes` sparse approximations, (K, out, in) each; the values are not
    least squares yet, see `refit`.

    rho: first penalty, relative to the unit diagonals; growth: its factor from one iteration to the
    next; rest: X → R, what other means approximate, from the relaxed copy of each iteration; 0
    without it.
    """
    weight = problem.weight.expand(sizes, -1, -1)
    target = problem.weigh(problem.weight)
    mask = project(weight)
    kept, dual = weight * mask, torch.zeros_like(weight)
    for _ in range(iterations):
        relaxed = problem.relax(target + rho * (kept - dual), rho)
        moved = relaxed + dual
        mask = project(moved)
        kept = moved * mask
        dual, rho = (moved - kept) / growth, rho * growth  # the dual is in units of 1 / rho
        if rest is not None:
            target = problem.weigh(problem.weight - rest(relaxed))
    return mask, kept


def refit(
    problem: Problem,
    target: Tensor,
    mask: Tensor,
    start: Tensor,
    steps: int,
    tolerance: float = 1e-5,
) -> Tensor:
    """Least squares on given masks, (H (target − S) M) ⊙ mask = 0, by conjugate gradients: (K, out,
    in).

    Rows are problems of their own where H is the identity, otherwise each matrix is one. A problem
    rests once its residual is below `tolerance` of its right-hand side. A singular moment is fine:
    the right-hand side lies in its range. Entries of `start` (K, out, in) off the mask are ignored.
    """
    axes = -1 if problem.grad_gram is None else (-2, -1)
    values = start * mask
    residual = problem.weigh(target - values) * mask
    goal = tolerance**2 * (problem.weigh(target) * mask).square().sum(axes, keepdim=True)
    direction, power = residual, residual.square().sum(axes, keepdim=True)
    for _ in range(steps):
        active = power > goal
        if not active.any():
            break
        image = problem.weigh(direction) * mask
        curvature = (direction * image).sum(axes, keepdim=True)
        step = torch.where(active & (curvature > 0), power / curvature, 0.0)
        values, residual = values + step * direction, residual - step * image
        renewed = residual.square().sum(axes, keepdim=True)
        direction, power = residual + torch.where(active, renewed / power, 0.0) * direction, renewed
    return values
