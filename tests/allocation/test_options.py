"""Bundles: joint choices against brute force, ties, and what cannot be tied."""

import itertools

import numpy as np
import pytest

from compressor.allocation.assign import Group
from compressor.allocation.options import Option, combine, cost_of, damage_of, hull, tie
from compressor.errors import ConfigError
from compressor.plan import Candidate


def options(unit: str, seed: int, count: int = 6) -> list[Option]:
    rng = np.random.default_rng(seed)
    costs, damages = np.sort(rng.choice(100, count, replace=False)), rng.lognormal(0, 1, count)
    return [
        Option(
            unit, int(cost), float(damage), Candidate("m", {"rank": place}, int(cost), 1, 0.1), None
        )
        for place, (cost, damage) in enumerate(zip(costs, damages, strict=True))
    ]


@pytest.mark.parametrize("seed", range(10))
def test_some_price_makes_each_point_of_the_hull_the_best_and_no_other(seed):
    points, everything = hull(options("a", seed)), options("a", seed)
    best = {min(everything, key=lambda option, price=price: (option.damage + price * option.cost, option.cost)).cost
            for price in np.geomspace(1e-6, 1e3, 4000)}  # fmt: skip
    assert {option.cost for option in points} == best


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("price", [1e-3, 0.01, 0.05, 0.3, 5.0])
def test_joint_bundles_hold_the_best_of_all_combinations_at_any_price(seed, price):
    members = [options("a", seed), options("b", seed + 100), options("c", seed + 200)]
    bundles = combine(members)
    assert [cost_of(bundle) for bundle in bundles] == sorted(cost_of(bundle) for bundle in bundles)
    assert all([option.unit for option in bundle] == ["a", "b", "c"] for bundle in bundles)
    best = min(
        damage_of(bundle) + price * cost_of(bundle) for bundle in itertools.product(*members)
    )
    assert min(damage_of(bundle) + price * cost_of(bundle) for bundle in bundles) == pytest.approx(
        best
    )


def test_tied_linears_have_equal_schemes():
    group = Group("layer.{a,b}", ("a", "b"), (), True)
    found = tie(group, [options("a", 1, 4), options("b", 2, 3)])
    assert [[option.candidate.setting["rank"] for option in bundle] for bundle in found] == [
        [0, 0],
        [1, 1],
        [2, 2],
    ]
    other = [Option("b", 1, 1.0, Candidate("other", {"rank": 0}, 1, 1, 0.1), None)]
    with pytest.raises(ConfigError, match=r"layer\.\{a,b\}: tied linears offer no equal settings"):
        tie(group, [options("a", 1), other])
