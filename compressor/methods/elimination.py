"""Removing inputs of a linear one after the other, the rest making up for each: the order, and what every number of them costs.

References: OSSCAR (arXiv 2403.12983) and Týr-the-Pruner (arXiv 2503.09657); card "pruning", facts F0.1 and 4.4.

Glossary (consumer y = W x + b)
    moment H    (in, in) second moment of the inputs, centred where a bias may follow, plus a ridge λ I: the ridge is on the change of W
    group       inputs that leave together: one channel, or all dimensions of a head
    removed P, kept K
Equations
    refit       W'_K = W_K + W_P H_PK H_KK⁻¹, the best consumer of what is left; as a step: W ← W − W_P ((H⁻¹)_PP)⁻¹ (H⁻¹)_P
    cost        tr(W_P ((H⁻¹)_PP)⁻¹ W_Pᵀ) with W and H⁻¹ as the steps so far have left them; the costs of all steps add up to
                tr(D H Dᵀ), D = W − W', of the refit on what is left: one elimination is the exact curve of all widths
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BATCHES = 256  # eliminations in at most this many steps; within one, costs are not renewed
PACKED = 15 / 16  # share of what was there that is left when the matrices are made smaller


def eliminate(weight: Tensor, moment: Tensor, size: int = 1, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Order in which groups of `size` consecutive inputs leave, and the error of the refit after each, both (groups,).

    weight: W (out, in); moment: H (in, in), positive definite; order: a given order of the groups, or None for the cheapest first.
    Float64. The last group is never asked for, but has its place.
    """
    chosen, costs = zip(*removals(weight, moment, size, order), strict=True)
    return torch.cat(chosen), torch.cat(costs).clamp(min=0).cumsum(0)


def removals(weight: Tensor, moment: Tensor, size: int, order: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups that leave together, and the cost of each after those before it, step by step; as `eliminate`."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    weight, groups, gone = weight.clone(), len(moment) // size, 0
    names, left = torch.arange(groups, device=weight.device), torch.ones(groups, dtype=torch.bool, device=weight.device)
    batch, rank = max(1, groups // BATCHES), None
    if order is not None:
        rank = torch.empty_like(order)
        rank[order] = torch.arange(groups, device=order.device)
    while gone < groups:
        price = group_costs(weight, inverse, size) if rank is None else rank[names].double()
        take = price.masked_fill(~left, torch.inf).topk(min(batch, groups - gone), largest=False).indices
        inside = (take[:, None] * size + torch.arange(size, device=take.device)).flatten()
        yield names[take], torch.stack(step_costs(weight[:, inside], inverse[inside][:, inside], size))
        gone += len(take)
        rows = inverse[inside]
        step = torch.linalg.solve(rows[:, inside], rows)  # ((H⁻¹)_PP)⁻¹ (H⁻¹)_P
        weight -= weight[:, inside] @ step
        inverse -= rows.T @ step
        inverse[inside], inverse[:, inside], weight[:, inside] = 0.0, 0.0, 0.0
        inverse[inside, inside] = 1.0  # keeps their blocks invertible; they are not looked at again
        left[take] = False
        if left.sum() <= PACKED * len(left):
            places = left.repeat_interleave(size)
            weight, inverse, names, left = weight[:, places], inverse[places][:, places], names[left], left[left]


def step_costs(weight: Tensor, block: Tensor, size: int) -> list[Tensor]:
    """Exact costs of removing groups in order, each after those before it. weight: W_P (out, n); block: (H⁻¹)_PP (n, n)."""
    costs = []
    while len(block):
        first, rest = slice(size), slice(size, None)
        costs.append((weight[:, first] @ torch.linalg.solve(block[first, first], weight[:, first].T)).trace())
        step = torch.linalg.solve(block[first, first], block[first, rest])
        weight = weight[:, rest] - weight[:, first] @ step
        block = block[rest, rest] - block[rest, first] @ step
    return costs


def group_costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """tr(W_P ((H⁻¹)_PP)⁻¹ W_Pᵀ) of every group, (groups,)."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    groups = len(inverse) // size
    blocks = torch.stack([inverse[start : start + size, start : start + size] for start in range(0, groups * size, size)])
    parts = weight.unflatten(1, (groups, size)).permute(1, 2, 0)  # (groups, size, out)
    return (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))


def dropped_errors(weight: Tensor, moment: Tensor, order: Tensor, size: int = 1) -> Tensor:
    """tr(W_P H_PP W_Pᵀ) after each group of a given order has left and nothing makes up for it, (groups,)."""
    places = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
    coupled = (weight.T @ weight * moment)[places][:, places]
    return coupled.cumsum(0).cumsum(1).diagonal()[size - 1 :: size]


def refit(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """W' (out, in): the best consumer of the kept inputs, zero elsewhere. kept: boolean (in,)."""
    factor = torch.linalg.cholesky(moment[kept][:, kept])
    found = torch.zeros_like(weight)
    found[:, kept] = torch.cholesky_solve((weight @ moment[:, kept]).T, factor).T
    return found
