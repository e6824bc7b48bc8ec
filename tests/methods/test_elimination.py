"""Backward elimination against brute-force least squares, in float64."""

import itertools

import pytest
import torch

from compressor.methods.elimination import dropped_errors, eliminate, group_costs, refit

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def case(seed: int, width: int = 8, outputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return torch.randn(outputs, width, generator=generator, dtype=torch.float64), x.T @ x / 60


def error(weight, new, moment) -> torch.Tensor:
    lost = weight - new
    return torch.trace(lost @ moment @ lost.T)


def mask_of(order, count: int, width: int, size: int = 1) -> torch.Tensor:
    kept = torch.ones(width // size, dtype=torch.bool)
    kept[order[:count]] = False
    return kept.repeat_interleave(size)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_sum_of_the_costs_is_the_error_of_the_refit_at_every_width(seed, size):
    weight, moment = case(seed)
    order, errors = eliminate(weight, moment, size)
    assert sorted(order.tolist()) == list(range(8 // size))
    for count in range(1, 8 // size):
        new = refit(weight, moment, mask_of(order, count, 8, size))
        torch.testing.assert_close(errors[count - 1], error(weight, new, moment), **EXACT)


@pytest.mark.parametrize("size", [1, 2])
def test_each_removal_is_the_cheapest_there_is(size):
    weight, moment = case(7)
    order, errors = eliminate(weight, moment, size)
    for count in range(8 // size - 1):
        left = [group for group in range(8 // size) if group not in order[:count].tolist()]
        costs = {}
        for group in left:
            kept = mask_of(torch.tensor([*order[:count].tolist(), group]), count + 1, 8, size)
            costs[group] = error(weight, refit(weight, moment, kept), moment).item()
        assert min(costs, key=costs.__getitem__) == order[count].item()
        assert min(costs.values()) == pytest.approx(errors[count].item(), rel=1e-9)


def test_a_refit_is_least_squares_and_never_worse_than_dropping():
    weight, moment = case(3)
    root = torch.linalg.cholesky(moment)  # moment = L Lᵀ
    for dropped in itertools.combinations(range(8), 3):
        kept = mask_of(torch.tensor(dropped), 3, 8)
        solution = torch.linalg.lstsq(root[kept].T, (weight @ root).T).solution.T
        torch.testing.assert_close(refit(weight, moment, kept)[:, kept], solution, **EXACT)


def test_errors_without_a_refit_are_those_of_masking():
    weight, moment = case(5)
    order = torch.tensor([3, 0, 2, 1])
    errors = dropped_errors(weight, moment, order, size=2)
    for count in range(1, 5):
        torch.testing.assert_close(errors[count - 1], error(weight, weight * mask_of(order, count, 8, 2), moment), **EXACT)
    assert torch.all(eliminate(weight, moment, 2, order)[1] <= errors * (1 + 1e-12))


def test_group_costs_are_the_errors_of_single_removals():
    weight, moment = case(9)
    for size in (1, 2, 4):
        costs = group_costs(weight, torch.linalg.inv(moment), size)
        for group in range(8 // size):
            kept = mask_of(torch.tensor([group]), 1, 8, size)
            torch.testing.assert_close(costs[group], error(weight, refit(weight, moment, kept), moment), **EXACT)
