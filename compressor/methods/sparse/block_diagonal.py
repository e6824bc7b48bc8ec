"""A 2:4 core between block-diagonal wrappers, fitted by descent over its three factors: W ≈ A S B.

Problem: min tr(H D M Dᵀ), D = W − A S B, in the coordinates of `admm` (unit diagonals), over A
of blocks b × b, S with two of every four consecutive entries of a row, and B of blocks c × c. Every
step is the exact minimum of the error, or of an upper bound of it that is tight where it starts, so
the error never grows.

References: the form is ARMOR's (arXiv 2510.05528), whose Adam steps become least squares here.

Steps of one sweep
    wrapper B   block after block: Δ_j = (P_jᵀ H P_j)⁻¹ (Pᵀ H D M)_jj M_jj⁻¹ with P = A S; for A the
                same of the transposed problem
    mask        four columns after four, all rows: with C = Aᵀ H A ≼ diag(d) and N = B M Bᵀ, each
                row takes the best two of its four
                entries under d_r (s − s₀) N_gg (s − s₀)ᵀ − 2 (s − s₀) gᵀ, g the pull on them; all
                six pairs are tried
    values      conjugate gradients for tr(C S N Sᵀ) on the mask
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from compressor.linears.wrapped import GROUP, KEPT, multiply_blocks
from compressor.methods.sparse.admm import Problem

PAIRS = tuple(combinations(range(GROUP), KEPT))
# ridge on the change of a factor, relative to the mean diagonal: singular blocks keep what they
# cannot see
EPSILON = 1e-9


@dataclass(frozen=True)
class Factors:
    """A, S and B in the coordinates of a problem, float64."""

    left: Tensor  # (out / b, b, b)
    core: Tensor  # (out, in)
    mask: Tensor  # (out, in)
    right: Tensor  # (in / c, c, c)

    def product(self) -> Tensor:
        return times(times(self.core.T, self.left.mT).T, self.right)


def times(matrix: Tensor, blocks: Tensor) -> Tensor:
    """matrix (n, m) · the block-diagonal matrix of `blocks` (m / b, b, b)."""
    return multiply_blocks(blocks.mT, matrix)


def descend(
    problem: Problem, start: Factors, sweeps: int, steps: int, tolerance: float
) -> tuple[Factors, list[float]]:
    """Factors after at most `sweeps` sweeps, and the error before and after each; it ends once a
    sweep gains less than `tolerance` of it.

    steps: of conjugate gradients in each sweep.
    """
    factors, errors = start, [problem.error(start.product())]
    for _ in range(sweeps):
        found = values(problem, masks(problem, wrappers(problem, factors)), steps)
        errors.append(problem.error(found.product()))
        if not errors[-1] < errors[-2]:  # nothing left but rounding
            errors[-1] = errors[-2]
            break
        factors = found
        if errors[-1] > (1 - tolerance) * errors[-2]:
            break
    return factors, errors


def wrappers(problem: Problem, factors: Factors) -> Factors:
    """Best right, then best left wrapper."""
    lost = problem.weigh(problem.weight - factors.product())
    right = fitted(
        factors.right,
        times(factors.core.T, factors.left.mT).T,
        lost,
        problem.grad_gram,
        problem.gram,
    )
    factors = Factors(factors.left, factors.core, factors.mask, right)
    lost = problem.weigh(problem.weight - factors.product())
    left = fitted(
        factors.left.mT, times(factors.core, right).T, lost.T, problem.gram, problem.grad_gram
    ).mT
    return Factors(left, factors.core, factors.mask, right)


def fitted(
    blocks: Tensor, factor: Tensor, lost: Tensor, across: Tensor | None, along: Tensor | None
) -> Tensor:
    """Blocks (q, c, c) of the best B in P B, each given those before it.

    factor: P (rows, in); lost: H D M (rows, in) of the blocks as they are; across: H, along: M,
    None for the identity.
    """
    count, size = blocks.shape[:2]
    seen = factor.T @ (factor if across is None else across @ factor)  # Pᵀ H P
    pull = diagonal(factor.T @ lost, size)
    inner = inverses(diagonal(seen, size))
    if along is None:  # blocks do not interact
        return blocks + inner @ pull
    outer, blocks = inverses(diagonal(along, size)), blocks.clone()
    seen, along = seen.view(count, size, count, size), along.view(count, size, count, size)
    for block in range(count):
        change = inner[block] @ pull[block] @ outer[block]
        blocks[block] += change
        pull -= seen[:, :, block] @ (change @ along[block].transpose(0, 1))
    return blocks


def diagonal(matrix: Tensor, size: int) -> Tensor:
    """Diagonal blocks (n / size, size, size) of a matrix (n, n)."""
    count = len(matrix) // size
    places = torch.arange(count, device=matrix.device)
    return matrix.view(count, size, count, size)[places, :, places]


def inverses(blocks: Tensor) -> Tensor:
    """Inverses of positive semi-definite blocks (q, c, c) with a ridge."""
    level = (
        EPSILON * blocks.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(blocks.dtype).tiny ** 0.5
    )
    ridge = level[:, None, None] * torch.eye(
        blocks.shape[1], dtype=blocks.dtype, device=blocks.device
    )
    return torch.cholesky_inverse(torch.linalg.cholesky(blocks + ridge))


def coupled(problem: Problem, left: Tensor) -> Tensor:
    """C = Aᵀ H A: its diagonal blocks (out / b, b, b), all there is of it where H is the identity;
    else one block (1, out, out).
    """
    across = problem.grad_gram
    return left.mT @ left if across is None else times(times(across, left).T, left)[None]


def bounds(coupling: Tensor) -> Tensor:
    """d (out, 1) with C ≼ diag(d): the diagonal of C times the largest eigenvalue of what is left
    once it is taken out.
    """
    level = coupling.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(coupling.dtype).tiny ** 0.5)
    scales = level.sqrt()
    largest = torch.linalg.eigvalsh(coupling / scales[:, :, None] / scales[:, None])[:, -1:]
    return (level * largest.clamp(min=1.0) * (1 + 1e-9)).view(-1, 1)


def solvers(inner: Tensor) -> tuple[Tensor, Tensor]:
    """For every four columns: their block of N with a ridge (in / 4, 4, 4), and maps (in / 4, 4, 6
    · 4) to the values of each pair.
    """
    level = EPSILON * inner.diagonal().mean() + torch.finfo(inner.dtype).tiny ** 0.5
    blocks = diagonal(inner, GROUP) + level * torch.eye(GROUP).to(inner)
    maps = torch.zeros(len(blocks), len(PAIRS), GROUP, GROUP).to(blocks)
    for place, pair in enumerate(PAIRS):
        rows, columns = torch.tensor(pair)[:, None], torch.tensor(pair)
        maps[:, place, rows, columns] = torch.linalg.inv(blocks[:, rows, columns])
    return blocks, maps.permute(0, 2, 1, 3).flatten(2)


def masks(problem: Problem, factors: Factors) -> Factors:
    """Choose a better mask, and values on it."""
    inner, pull = seen_by_core(problem, factors)
    coupling = coupled(problem, factors.left)
    limits = bounds(coupling)
    blocks, maps = solvers(inner)
    every = torch.arange(len(pull), device=pull.device)
    found, taken = [], []
    for index, (block, solver) in enumerate(zip(blocks, maps, strict=True)):
        start, stop = index * GROUP, (index + 1) * GROUP
        old = factors.core[:, start:stop]
        target = pull[:, start:stop] / limits + old @ block
        solved = (target @ solver).view(len(target), len(PAIRS), GROUP)
        best = (solved @ target[:, :, None])[..., 0].argmax(1)  # what each pair gains
        found.append(solved[every, best])
        taken.append(best)
        moved = (coupling @ (found[-1] - old).view(*coupling.shape[:2], GROUP)).view(-1, GROUP)
        pull[:, stop:] -= moved @ inner[start:stop, stop:]
    patterns = torch.zeros(len(PAIRS), GROUP, dtype=torch.bool, device=pull.device)
    patterns[torch.arange(len(PAIRS))[:, None], torch.tensor(PAIRS)] = True
    return Factors(
        factors.left, torch.cat(found, 1), patterns[torch.stack(taken, 1)].flatten(1), factors.right
    )


def seen_by_core(problem: Problem, factors: Factors) -> tuple[Tensor, Tensor]:
    """N = B M Bᵀ (in, in), and the pull Aᵀ H D M Bᵀ on every entry of S (out, in)."""
    inner = times(times(problem.gram, factors.right.mT).T, factors.right.mT)
    pull = problem.weigh(problem.weight - factors.product())
    return inner, times(times(pull, factors.right.mT).T, factors.left).T.contiguous()


def values(problem: Problem, factors: Factors, steps: int) -> Factors:
    """Better values on the mask, by conjugate gradients."""
    inner, pull = seen_by_core(problem, factors)
    coupling, core, residual = coupled(problem, factors.left), factors.core, pull * factors.mask
    direction, power = residual, residual.square().sum()
    for _ in range(steps):
        image = (coupling @ (direction @ inner).view(*coupling.shape[:2], -1)).view_as(
            core
        ) * factors.mask
        curvature = (direction * image).sum()
        if not (power > 0 and curvature > 0):
            break
        core, residual = core + power / curvature * direction, residual - power / curvature * image
        renewed = residual.square().sum()
        direction, power = residual + renewed / power * direction, renewed
    return Factors(factors.left, core, factors.mask, factors.right)
