"""Backward elimination against brute-force least squares, in float64."""

import itertools

import pytest
import torch

from compressor.errors import NumericalError
from compressor.methods.structured.elimination import (
    PANEL,
    dropped_errors,
    eliminate,
    refit,
    remove_greedily,
)

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
        torch.testing.assert_close(
            errors[count - 1], error(weight, weight * mask_of(order, count, 8, 2), moment), **EXACT
        )
    assert torch.all(eliminate(weight, moment, 2, order)[1] <= errors * (1 + 1e-12))


def naive(weight, moment, size: int) -> tuple[list[int], torch.Tensor]:
    """Groups and costs, one at a time, every step from the inverse of the moment of what is
    left.
    """
    names, order, costs = list(range(len(moment) // size)), [], []
    while names:
        places = (torch.tensor(names)[:, None] * size + torch.arange(size)).flatten()
        left = torch.linalg.inv(moment[places][:, places])
        now = (weight @ moment)[:, places] @ left  # the refit on what is left
        blocks = [slice(start, start + size) for start in range(0, len(places), size)]
        prices = torch.stack(
            [
                (now[:, block] @ torch.linalg.solve(left[block, block], now[:, block].T)).trace()
                for block in blocks
            ]
        )
        costs.append(prices.min())
        order.append(names.pop(prices.argmin().item()))
    return order, torch.stack(costs).cumsum(0)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("condition", [1e1, 1e8])
def test_panels_give_the_order_and_the_errors_of_one_at_a_time(size, condition):
    width = 6 * (PANEL // 2)
    generator = torch.Generator().manual_seed(11)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    moment = (
        basis
        * torch.logspace(0, -torch.tensor(condition).log10().item(), width, dtype=torch.float64)
        @ basis.T
    )
    weight = torch.randn(20, width, generator=generator, dtype=torch.float64)
    order, errors = eliminate(weight, (moment + moment.T) / 2, size)
    wanted, costs = naive(weight, (moment + moment.T) / 2, size)
    assert order.tolist() == wanted
    torch.testing.assert_close(errors, costs, rtol=1e-12 * condition + 1e-10, atol=0)


@pytest.mark.parametrize("size", [1, 2])
def test_the_first_groups_are_those_of_the_whole_order(size):
    weight, moment = case(13)
    order, errors = eliminate(weight, moment, size)
    found, costs = remove_greedily(weight, moment, size, 3)
    assert torch.equal(found, order[:3])
    torch.testing.assert_close(costs.cumsum(0), errors[:3])
    torch.testing.assert_close(eliminate(weight, moment, size, order)[1], errors, **EXACT)


@pytest.mark.parametrize("options", [{}, {"size": 2}, {"order": torch.arange(8)}], ids=str)
def test_a_singular_moment_is_one_clear_line(options):
    weight, moment = case(1)
    with pytest.raises(NumericalError, match=r"mlp: the moment .* raise the option 'ridge'"):
        eliminate(
            weight,
            moment - 2 * torch.eye(8) * moment.diagonal().max(),
            what="mlp: the moment of its inputs",
            **options,
        )
