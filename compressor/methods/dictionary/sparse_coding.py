"""The one batched sparse coder: many sparse least-squares problems that share a dictionary, solved
together with matrix products.

Problem: min ‖A − D S‖² over codes S whose nonzeros lie in a mask that a projection chooses. Only H
= DᵀD and R = DᵀA enter, so the same code fits the codes of a dictionary (H (k, k)), prunes a weight
directly (D = X: H the Gram of the inputs, R = H Wᵀ), and fits the sparse part of a sum. Give it
atoms of unit norm (`unit_atoms`): steps and penalties are relative to the diagonal of H.

References: ADMM with a projected copy is ALPS (arXiv 2406.07831) and arXiv 2401.02938; hard
thresholding pursuit (HTP) codes are GeoPair's (arXiv 2609.25963).

Glossary
    gram H          (k, k) inner products of the atoms            correlations R  (k, n) of the
                    atoms with the n targets
    codes S         (k, n), one column for each target            mask M          (k, n) bool, True
                    where a code may be nonzero
    projection Π    codes → mask of the entries that are kept; ties go to the lower index, so equal
                    inputs give equal masks

All functions keep the dtype and device of their inputs and write to none of them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Projection = Callable[[Tensor], Tensor]


def ascending(values: Tensor, dim: int) -> Tensor:
    """Values sorted along `dim`. NumPy sorts short columns an order of magnitude faster than torch
    does on a CPU.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.detach().numpy(), axis=dim))
    return values.sort(dim).values


def top_mask(scores: Tensor, count: int, dim: int) -> Tensor:
    """Mask of the `count` largest scores along `dim` (all of them if there are fewer); of equal
    scores the first ones are taken.
    """
    size = scores.shape[dim]
    if count <= 0 or count >= size:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    threshold = ascending(scores, dim).narrow(dim, size - count, 1)
    mask = scores >= threshold
    if not (mask.sum(dim) == count).all():
        above, level = scores > threshold, scores == threshold
        mask = above | (level & (level.cumsum(dim) <= count - above.sum(dim, keepdim=True)))
    return mask


def project_columns(count: int) -> Projection:
    """Keep the `count` largest magnitudes of every column: each target chooses its own atoms."""
    return lambda codes: top_mask(codes.abs(), count, 0)


def project_nm(kept: int, group: int) -> Projection:
    """Keep the `kept` largest of every `group` consecutive entries of a column (N:M sparsity;
    `group` must divide k).
    """

    def project(codes: Tensor) -> Tensor:
        groups = codes.abs().unflatten(0, (-1, group))  # (k / group, group, n)
        return top_mask(groups, kept, 1).flatten(0, 1)

    return project


def project_global(count: int) -> Projection:
    """Keep the `count` largest magnitudes of the whole matrix: targets share one allowance."""
    return lambda codes: top_mask(codes.abs().flatten(), count, 0).view_as(codes)


def unit_atoms(gram: Tensor, correlations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the atoms of a problem to unit norm: return H / (ν νᵀ), R / ν and the norms ν (k, 1),
    1 for atoms that are zero.

    Codes of the scaled problem are ν times the codes of the given one.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()[:, None]
    norms = torch.where(norms > 0, norms, 1.0)
    return gram / norms / norms.T, correlations / norms, norms


def column_errors(gram: Tensor, correlations: Tensor, codes: Tensor) -> Tensor:
    """Compute ‖a − D s‖² − ‖a‖² of every target: sᵀHs − 2 rᵀs, (n,). Their sum over targets plus
    ‖A‖² is the error.
    """
    return ((gram @ codes - 2 * correlations) * codes).sum(0)


def keep_better(gram: Tensor, correlations: Tensor, codes: Tensor, proposed: Tensor) -> Tensor:
    """Take each proposed column only where its error is lower. For masks chosen column by column;
    makes any coder monotone.
    """
    better = column_errors(gram, correlations, proposed) < column_errors(gram, correlations, codes)
    return torch.where(better, proposed, codes)


def masked_cg(
    gram: Tensor,
    correlations: Tensor,
    mask: Tensor,
    start: Tensor,
    steps: int = 10,
    tolerance: float = 1e-5,
) -> Tensor:
    """Least-squares codes on a given mask, M ⊙ (R − H S) = 0, by conjugate gradients on all columns
    at once.

    start: (k, n), entries off the mask are ignored. A column rests once its residual is below
    `tolerance` of its correlations, in the norm of the Jacobi preconditioner diag(H)⁻¹. A singular
    H is fine: R lies in its range.
    """
    scale = torch.where(gram.diagonal() > 0, gram.diagonal(), 1.0)[:, None]
    codes = start * mask
    residual = (correlations - gram @ codes) * mask
    goal = tolerance**2 * (correlations.square() * mask / scale).sum(0)
    direction = residual / scale
    power = (residual * direction).sum(0)  # (n,)
    for _ in range(steps):
        active = power > goal
        if not active.any():
            break
        image = (gram @ direction) * mask
        curvature = (direction * image).sum(0)
        step = torch.where(active & (curvature > 0), power / curvature, 0.0)
        codes.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        conditioned = residual / scale
        renewed = (residual * conditioned).sum(0)
        direction = conditioned.addcmul_(torch.where(active, renewed / power, 0.0), direction)
        power = renewed
    return codes


def damped_inverse(gram: Tensor, penalty: float) -> Tensor:
    """(H + penalty · I)⁻¹, (k, k), by Cholesky in float64, in the dtype of H."""
    damped = gram.double() + penalty * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).to(gram.dtype)


def admm_codes(
    gram: Tensor,
    correlations: Tensor,
    project: Projection,
    start: Tensor,
    iterations: int = 8,
    rho: float = 1.0,
    growth: float = 1.0,
    ramp: Sequence[Projection] = (),
    refit: int = 10,
) -> Tensor:
    """Sparse codes by ADMM between least squares and the projection, then least squares on the last
    mask.

    Scaled form: X = (H + ρI)⁻¹ (R + ρ (Z − U)), Z = Π(X + U) ⊙ (X + U), U ← U + X − Z. Not
    monotone; see `keep_better`.

    start: (k, n), the first Z. rho: penalty relative to the mean of diag H; growth: its factor from
    one iteration to the next, 1 for a single factorisation; ramp: projections of the first
    iterations, `project` afterwards; refit: conjugate-gradient steps at the end.
    """
    penalty = rho * (gram.diagonal().mean().item() or 1.0)
    inverse = damped_inverse(gram, penalty)
    mask, kept, dual = project(start), start, torch.zeros_like(start)
    for iteration in range(iterations):
        if iteration and growth != 1:
            penalty, dual = penalty * growth, dual / growth  # U is in units of 1 / ρ
            inverse = damped_inverse(gram, penalty)
        shifted = inverse @ (correlations + penalty * (kept - dual)) + dual
        mask = (ramp[iteration] if iteration < len(ramp) else project)(shifted)
        kept = shifted * mask
        dual = shifted - kept
    return masked_cg(gram, correlations, mask, kept, refit)


def htp_codes(
    gram: Tensor,
    correlations: Tensor,
    project: Projection,
    start: Tensor,
    iterations: int = 2,
    refit: int = 10,
) -> Tensor:
    """Sparse codes by hard thresholding pursuit: a gradient step of length 1 / λ_max(H),
    projection, least squares on the mask.

    Ends early at a fixed point, where a step changes no mask. start: (k, n).
    """
    largest = torch.linalg.eigvalsh(gram.double())[-1].item()
    codes, previous = start, None
    for _ in range(iterations):
        moved = codes + (correlations - gram @ codes) / (largest or 1.0)
        mask = project(moved)
        if previous is not None and torch.equal(mask, previous):
            break
        codes, previous = masked_cg(gram, correlations, mask, moved, refit), mask
    return codes
