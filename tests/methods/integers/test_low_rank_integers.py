"""Low-rank factors as integers: error feedback against rounding, the refit, what screening says,
what is refused.
"""

from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from support import weights as cases
from support.sameness import assert_same_output
from support.weights import correlated
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import Chained
from compressor.methods import build
from compressor.methods.integers.low_rank_integers import balance_down, refit

EXACT = 1e-9  # relative, float64 identities
SCREENED = 0.1  # relative, of an interpolated error


def prepared(case: cases.Case, **options):
    method = build("low_rank_integers", {"group": "auto:16"} | options)
    return method, method.prepare("linear", case.dense, case.stats)


def up_factor(state, rank: int) -> Tensor:
    """Up factor (out, r) that belongs to the down factor before it is rounded."""
    return refit(
        state.factors.dense.weight, balance_down(state.factors)[:rank], state.factors.metric
    )[0]


def second_moment(state, down: Tensor) -> Tensor:
    return state.factors.metric.weigh(down) @ down.double().T


def error_of(state, product: Tensor) -> float:
    factors = state.factors
    return linalg.relative_error(factors.dense.weight, product, factors.metric, factors.root)


def error(case: cases.Case, rank: int, **options) -> float:
    method, state = prepared(case, **options)
    return method.measure(state, method.compress(state, {"rank": rank}))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("metric", ["gram", "two_sided"])
def test_feedback_and_refit_beat_factors_rounded_to_nearest(bits, metric):
    """SVD-LLM + GPTQ against the same factors rounded to nearest: what rounding adds to the tail,
    on average over three linears.
    """
    added = {"down, nearest": [], "down, feedback": [], "nearest": [], "all": []}
    for seed in range(3):
        case = correlated(seed=seed)
        (nearest, rough), (method, state) = (
            prepared(case, bits=bits, metric=metric, solver=solver) for solver in ("rtn", "gptq")
        )
        up, tail = up_factor(state, 12), state.factors.tails()[2][12]
        for name, down in (("down, nearest", rough.down), ("down, feedback", state.down)):
            product = up @ down.leading(12).to_dense().double()
            added[name].append(error_of(state, product) - tail)
        moment = Metric(second_moment(state, rough.down.leading(12).to_dense()))
        rounded = nearest.round(
            "linear", replace(case.dense, weight=up), moment, state.factors.root, 12
        ).module
        added["nearest"].append(
            nearest.measure(rough, Chained(rough.down.leading(12), rounded)) - tail
        )
        added["all"].append(method.measure(state, method.compress(state, {"rank": 12})) - tail)
    mean = {name: fmean(values) for name, values in added.items()}
    assert 0 < mean["down, feedback"] < 0.9 * mean["down, nearest"]
    assert 0 < mean["all"] < 0.8 * mean["nearest"]


@pytest.mark.parametrize("kind", ["tall", "wide", "low_rank_gram", "few_tokens", "dead_inputs"])
def test_the_refit_is_never_worse_than_the_factor_it_replaces(kind):
    """And what it leaves behind has nothing in common with what the down factor sees: the normal
    equations.
    """
    case = cases.make(kind)
    _, state = prepared(case, bits=3)
    weight, metric = case.dense.weight.double(), Metric(case.stats.gram)
    down = state.down.to_dense().double()
    for rank in (1, 3, 6):
        up, moment = refit(weight, down[:rank], metric)
        lost, old = (
            metric.energy(weight - factor @ down[:rank]) for factor in (up, up_factor(state, rank))
        )
        assert lost <= old * (1 + EXACT)
        torch.testing.assert_close(moment, second_moment(state, down[:rank]) * len(case.x))
        common = metric.weigh(down[:rank]) @ (weight - up @ down[:rank]).T
        assert common.norm() <= EXACT * metric.weigh(down[:rank]).norm() * weight.norm()


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_the_down_factor_of_a_rank_is_the_beginning_of_that_of_full_rank(solver):
    case = cases.make("wide")
    method, state = prepared(case, solver=solver)
    exact = balance_down(state.factors)
    alone = method.round(
        "linear", replace(case.dense, weight=exact[:7]), state.factors.metric, None, 11
    ).module
    assert_same_output(alone.to_dense(), state.down.leading(7).to_dense())


def test_factors_of_eight_bits_lose_next_to_nothing_and_fewer_bits_lose_more():
    case = correlated()
    tail = prepared(case)[1].factors.tails()[2][12]
    found = [error(case, 12, bits=bits) for bits in (8, 4, 3, 2)]
    assert tail < found[0] < 1.001 * tail and all(fine < coarse for fine, coarse in pairwise(found))


@pytest.mark.parametrize("metric", ["gram", "two_sided"])
def test_screened_errors_are_near_those_of_the_modules(metric):
    case = correlated(32, 48)
    method, state = prepared(case, metric=metric, anchors=6)
    candidates = method.candidates(state).candidates
    assert len(candidates) > 25
    for candidate in candidates[::3]:
        measured = method.measure(state, method.compress(state, candidate.setting))
        assert candidate.error == pytest.approx(measured, rel=SCREENED)


def test_scales_survive_half_precision_with_gradients_of_any_size():
    case = cases.make("square", dtype=torch.float16)
    stats = replace(case.stats, grad_gram=1e-16 * case.stats.grad_gram)
    method = build("low_rank_integers", {"metric": "two_sided", "group": 28})
    state = method.prepare("linear", case.dense, stats)
    module = method.compress(state, {"rank": 10})
    assert module.scales.dtype == module.up_scales.dtype == torch.float16
    assert method.measure(state, module) == pytest.approx(
        error(case, 10, metric="two_sided", group=28), rel=1e-3
    )


def test_a_group_that_does_not_divide_names_the_linear():
    with pytest.raises(ConfigError, match="linear: groups of 5 do not divide its 28 inputs"):
        prepared(cases.make("square"), group=5)
