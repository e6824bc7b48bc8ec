"""Curves of sparse dictionaries: the grid of sizes, its select_front, and profiles between truncation and
start.
"""

import math

import pytest
import torch
from support import weights as cases

from compressor.linears import Dense
from compressor.methods.dictionary.base import (
    Basis,
    basis_of,
    list_sizes,
    profile_sizes,
    select_front,
    spread_places,
    start_errors,
)
from compressor.plan import Candidate


def tall() -> Basis:
    case = cases.make("tall")
    return basis_of(
        "linear",
        Dense(case.dense.weight.double(), None, torch.float64),
        case.stats,
        "gram",
        0.0,
        0.1,
    )


def candidate(bits: int, error: float) -> Candidate:
    return Candidate("any", {"atoms": bits, "nonzeros": 1}, bits, bits, error)


def test_front_drops_what_a_smaller_or_equal_size_beats():
    sizes = [candidate(bits, math.nan) for bits in (3, 1, 2, 3, 4, 5)]
    assert select_front(sizes, [0.2, 0.5, 0.5, 0.1, 0.1, 0.0]) == [1, 3, 5]
    assert select_front(sizes[:3], [0.0, 0.0, 0.0]) == [1, 2, 0]  # a zero weight keeps its sizes


def test_anchors_spread_over_the_middles_of_equal_intervals():
    assert spread_places([10, 11, 19, 30, 41, 50], 2) == [2, 4]
    assert spread_places([10, 11, 19, 30, 41, 50], 1) == [3]
    assert spread_places([10, 11], 0) == spread_places([], 3) == []


def lattice(most: int) -> list[Candidate]:
    return [
        Candidate("any", {"atoms": k, "nonzeros": s}, 20 * k + 40 * s, 20 * k + 40 * s, math.nan)
        for k in range(1, most + 1)
        for s in range(1, k + 1)
    ]


def test_profiles_lie_between_the_truncated_decomposition_and_the_start_where_the_anchors_say():
    """Fits 30 % of the way up: two anchors predict all of them, and the front moves to more atoms
    with fewer nonzeros.
    """
    basis, sizes, asked = tall(), lattice(20), []
    start = {
        tuple(size.setting.values()): error
        for size, error in zip(sizes, start_errors(sizes, basis.coordinates), strict=True)
    }
    tails = 1 - basis.values.cumsum(0) / basis.energy

    def fit(atoms: int, nonzeros: int) -> float:
        asked.append((atoms, nonzeros))
        low = tails[atoms - 1].item()
        return low + 0.3 * (start[atoms, nonzeros] - low)

    found = profile_sizes(sizes, basis.coordinates, 2, fit)
    assert 1 <= len(asked) <= 3
    assert [size.error for size in found] == pytest.approx(
        [fit(**size.setting) for size in found], rel=1e-6, abs=1e-9
    )
    best = select_front(sizes, [fit(**size.setting) for size in sizes])
    assert [size.setting for size in found] == [sizes[place].setting for place in best]
    plain = profile_sizes(sizes, basis.coordinates, 0, None)
    assert [size.error for size in plain] == pytest.approx(
        [start[tuple(size.setting.values())] for size in plain], rel=1e-9
    )

    def ratio(sizes: list[Candidate]) -> float:
        return sum(size.setting["atoms"] / size.setting["nonzeros"] for size in sizes) / len(sizes)

    assert ratio(found) > ratio(plain)


def test_without_a_number_of_anchors_every_size_of_the_front_is_fitted():
    basis, sizes = tall(), lattice(12)
    expected = {
        tuple(size.setting.values()): size.error / 2
        for size in profile_sizes(sizes, basis.coordinates, 0, None)
    }
    found = profile_sizes(
        sizes, basis.coordinates, None, lambda atoms, nonzeros: expected[atoms, nonzeros]
    )
    assert {tuple(size.setting.values()): size.error for size in found} == expected


def test_grid_offers_what_saves_bits_and_parameters():
    dense = Dense(torch.empty(40, 24, device="meta"), None, torch.bfloat16)
    sizes = list_sizes("any", dense, (1.0, 2.0), None, 24)
    assert {(size.setting["atoms"], size.setting["nonzeros"]) for size in sizes} >= {
        (1, 1),
        (10, 5),
        (14, 14),
        (20, 10),
    }
    assert all(size.bits < dense.bits and size.parameters < dense.parameters for size in sizes)
    assert [size.bits for size in sizes] == sorted(size.bits for size in sizes)
    assert {size.setting["atoms"] for size in list_sizes("any", dense, (2.0,), 5, 24)} == {
        5,
        10,
        15,
        20,
    }
