"""ROCKET's path as its code runs it (arXiv 2602.11008), written down step by step: the reference
that our closed form is timed against.

294 fits for each linear, 14 sizes times 21 ratios of atoms to nonzeros, each with its own least
squares, unwhitening and weight-space error; then the chosen size with the score, the reactivation
and 100 steps of Adam by autograd. Whitened by Cholesky, all in float64.
"""

import math

import torch
from torch import Tensor

SIZES = [removed / 100 for removed in range(5, 75, 5)]
RATIOS = [tenths / 10 for tenths in range(10, 31)]
MARGIN, RIDGE, EXPONENT, STEPS, RATE = 5e-3, 1e-3, 0.5, 100, 1e-3


def sparsified(codes: Tensor, scores: Tensor, nonzeros: int) -> Tensor:
    """Codes (k, n) without all but the best `nonzeros` of each column."""
    mask = torch.zeros_like(codes).scatter_(0, scores.topk(nonzeros, dim=0).indices, 1.0)
    return codes * mask


def dictionary(target: Tensor, codes: Tensor, ridge: float) -> Tensor:
    """Least-squares dictionary (m, k) of codes (k, n) for the whitened target A (m, n)."""
    moment = codes @ codes.T
    damped = moment + ridge * torch.eye(len(moment), dtype=moment.dtype)
    return torch.cholesky_solve(codes @ target.T, torch.linalg.cholesky(damped)).T


def shape(weight: Tensor, removed: float, ratio: float) -> tuple[int, int]:
    """Atoms and nonzeros that leave 1 − removed of the parameters."""
    height, width = weight.shape
    atoms = min(height, width, int((1 - removed) * height * width / (width + height / ratio)))
    return atoms, max(1, round(atoms / ratio))


def profile(
    weight: Tensor, target: Tensor, root: Tensor, left: Tensor
) -> dict[float, tuple[float, float]]:
    """Size → (weight-space error, ratio) of the best of its 21 fits."""
    best = {}
    for removed in SIZES:
        for ratio in RATIOS:
            atoms, nonzeros = shape(weight, removed, ratio)
            coordinates = left[:, :atoms].T @ target
            codes = sparsified(coordinates, coordinates.abs(), nonzeros)
            original = torch.linalg.solve_triangular(
                root, dictionary(target, codes, 1e-8), upper=True
            )
            error = ((weight - (original @ codes).T).norm() / weight.norm()).item()
            best[removed] = min(best.get(removed, (math.inf, ratio)), (error, ratio))
    return best


def final(
    weight: Tensor, target: Tensor, root: Tensor, left: Tensor, removed: float, ratio: float
) -> tuple[Tensor, Tensor]:
    """Dictionary and codes of one size, before and after Adam whichever is nearer to the weight."""
    atoms, nonzeros = shape(weight, removed, ratio)
    basis = left[:, :atoms]
    coordinates = basis.T @ target
    impact = torch.linalg.solve_triangular(root, basis, upper=True).norm(dim=0)
    scores = coordinates.abs() * impact[:, None] ** EXPONENT
    first = max(1, nonzeros - math.ceil(MARGIN * atoms))
    codes = sparsified(coordinates, scores, first)
    places = (scores * (codes == 0)).flatten().topk((nonzeros - first) * codes.shape[1]).indices
    codes.view(-1)[places] = coordinates.reshape(-1)[places]
    atoms_ = dictionary(target, codes, RIDGE * codes.square().sum().item() / atoms)
    free, sparse, mask = atoms_.clone().requires_grad_(), codes.clone().requires_grad_(), codes != 0
    optimiser = torch.optim.Adam([free, sparse], lr=RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        ((target - free @ (sparse * mask)).square().sum() / target.square().sum()).backward()
        optimiser.step()

    def distance(pair: tuple[Tensor, Tensor]) -> float:
        return (
            (weight - (torch.linalg.solve_triangular(root, pair[0], upper=True) @ pair[1]).T)
            .norm()
            .item()
        )

    return min((atoms_, codes), (free.detach(), sparse.detach() * mask), key=distance)


def compress(weight: Tensor, gram: Tensor, removed: float) -> tuple[Tensor, Tensor]:
    """The whole path for one linear. weight: (n, m); gram: (m, m), any scale."""
    weight = weight.double()
    damped = gram.double() + 1e-6 * gram.diagonal().mean() * torch.eye(
        len(gram), dtype=torch.float64
    )
    root = torch.linalg.cholesky(damped).T
    target = root @ weight.T
    left = torch.linalg.eigh(target @ target.T)[1].flip(1)
    best = profile(weight, target, root, left)
    return final(weight, target, root, left, removed, best[removed][1])
