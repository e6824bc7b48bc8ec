"""Utilised rank: exact on calibration data when nothing is cut, dominated by the one-sided optimum
otherwise.
"""

import pytest
import torch
from support import weights as cases

from compressor.linears import Dense
from compressor.methods import build


def test_null_directions_of_the_data_are_free():
    """The paper's claim: projecting on what data and weight use changes no calibrated output."""
    case = cases.make("low_rank_gram")  # inputs span 6 directions
    method = build("utilized_rank", {})
    state = method.prepare(
        "linear", Dense(case.dense.weight.double(), None, torch.float64), case.stats
    )
    module = method.compress(state, {"inputs": 6, "outputs": 6})
    torch.testing.assert_close(
        case.x @ module.to_dense().T, case.x @ case.dense.weight.double().T, rtol=1e-7, atol=1e-7
    )
    exact = [
        candidate for candidate in method.candidates(state).candidates if candidate.error < 1e-12
    ]
    assert (
        min(min(candidate.setting.values()) for candidate in exact) <= 7
    )  # of 28; 6 but for rounding


@pytest.mark.parametrize("kind", ["square", "tall", "wide"])
def test_the_one_sided_optimum_dominates_it_at_equal_rank(kind):
    case = cases.make(kind)
    utilised, best = (
        build("utilized_rank", {}),
        build("low_rank", {"metric": "gram", "storage": "factors"}),
    )
    errors = {
        c.setting["rank"]: c.error
        for c in best.candidates(best.prepare("linear", case.dense, case.stats)).candidates
    }
    for candidate in utilised.candidates(
        utilised.prepare("linear", case.dense, case.stats)
    ).candidates:
        rank = min(candidate.setting["inputs"], candidate.setting["outputs"])
        assert errors[rank] <= candidate.error + 1e-9


def test_by_hand_on_a_diagonal():
    """W = diag(3, 2, 1, …), G = I: energies 9 : 4 : 1, so one direction carries 9/14 and the corner
    error is (4 + 1)/14.
    """
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    method = build("utilized_rank", {})
    stats = cases.sums(torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    state = method.prepare("linear", Dense(weight, None, torch.float64), stats)
    assert state.output_energy.tolist() == pytest.approx([9 / 6, 4 / 6, 1 / 6, 0, 0, 0])
    module = method.compress(state, {"inputs": 6, "outputs": 1})
    assert method.measure(state, module) == pytest.approx(5 / 14)
