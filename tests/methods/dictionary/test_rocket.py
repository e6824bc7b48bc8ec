"""ROCKET: its score, its reactivation, its closed form against brute force, and the published
refinement against torch's own Adam.
"""

import itertools
from itertools import pairwise

import pytest
import torch
from support import weights as cases
from support.sameness import assert_same_output
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import Dense
from compressor.linears.masks import unpack_mask
from compressor.methods import build
from compressor.methods.dictionary.base import Basis, best_dictionary, fitted_error
from compressor.methods.dictionary.rocket import reactivate, refine_with_adam

SETTING = {"atoms": 14, "nonzeros": 6}
SHAPES = ["square", "tall", "wide"]


def prepared(kind: str, **options):
    """Method and state of a case in float64."""
    case, method = cases.make(kind), build("rocket", options)
    return method, method.prepare(
        "linear", Dense(case.dense.weight.double(), None, torch.float64), case.stats
    )


def weight_error(state: Basis, module) -> float:
    return linalg.relative_error(state.weight, module.to_dense(), Metric())


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", SHAPES)
def test_scores_are_the_published_product_without_a_whitening_factor(kind, exponent):
    case = cases.make(kind)
    method, state = prepared(kind, exponent=exponent)
    root = torch.linalg.cholesky(case.stats.gram / len(case.x)).T
    left, values, right = torch.linalg.svd(
        root @ state.weight.T, full_matrices=False
    )  # A = L Wᵀ = B Σ Vᵀ
    coordinates, impact = (
        values[:, None] * right,
        torch.linalg.solve_triangular(root, left, upper=True).norm(dim=0),
    )
    torch.testing.assert_close(
        method.scores(state), coordinates.abs() * impact[:, None] ** exponent, rtol=1e-6, atol=1e-9
    )


def test_reactivation_by_hand():
    """Each column first keeps its best entry, then 2 · 2 − 2 places go to the best of the rest:
    both are in the first column.
    """
    scores = torch.tensor([[9.0, 3.0], [8.0, 2.0], [7.0, 1.0], [0.0, 0.0]])
    assert reactivate(scores, 2, 0.25).int().tolist() == [[1, 1], [1, 0], [1, 0], [0, 0]]
    assert reactivate(scores, 2, 0.0).int().tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert reactivate(scores, 2, 1.0).int().tolist() == [[1, 1], [1, 0], [1, 0], [0, 0]]
    assert reactivate(scores, 4, 0.1).all()


def test_every_column_keeps_almost_its_share_and_all_together_exactly():
    scores = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        0, 1, 50
    )
    counts = reactivate(scores, 12, 0.05).sum(0)
    assert counts.sum() == 12 * 50
    assert counts.min() == 10 and counts.max() > 12  # ⌈0.05 · 40⌉ = 2 given up
    method, state = prepared("tall")
    module = method.compress(state, SETTING)
    assert module.weight.numel() == unpack_mask(module.mask, 40 * 14).sum() == 40 * 6


def test_without_exponent_and_margin_no_mask_is_better():
    """(0.2) by brute force: all pairs of three atoms for each column, the dictionary
    orthonormal.
    """
    case = cases.make("tall")
    method = build("rocket", {"exponent": 0.0, "margin": 0.0})
    state = method.prepare(
        "linear", Dense(case.dense.weight[:6].double(), None, torch.float64), case.stats
    )
    codes, mask = method.codes(state, method.scores(state), 3, 2)
    kept = [
        torch.tensor([index in pair for index in range(3)])
        for pair in itertools.combinations(range(3), 2)
    ]
    best = max(
        (state.coordinates[:3] * pattern[:, None]).square().sum(0) for pattern in kept[:1]
    )  # shape (6,), the first pattern
    for pattern in kept[1:]:
        best = torch.maximum(best, (state.coordinates[:3] * pattern[:, None]).square().sum(0))
    torch.testing.assert_close(codes.square().sum(0), best)
    assert mask.sum(0).tolist() == [2] * 6


def test_constants_of_columns_change_nothing_without_a_margin():
    scores = torch.rand(9, 20, generator=torch.Generator().manual_seed(0))
    constants = torch.rand(20, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(reactivate(scores, 4, 0.0), reactivate(scores * constants, 4, 0.0))
    assert not torch.equal(reactivate(scores, 4, 0.2), reactivate(scores * constants, 4, 0.2))


@pytest.mark.parametrize("kind", SHAPES)
def test_all_codes_kept_is_the_truncated_svd(kind):
    method, state = prepared(kind, ridge=0.0)
    tail = 1 - state.values[:7].sum().item() / state.energy
    assert method.measure(
        state, method.compress(state, {"atoms": 7, "nonzeros": 7})
    ) == pytest.approx(tail, rel=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_dictionary_is_fitted_below_the_orthonormal_start(kind):
    method, state = prepared(kind, exponent=0.0, margin=0.0)
    codes, _ = method.codes(state, method.scores(state), **SETTING)
    start = 1 - codes.square().sum().item() / state.energy
    assert method.measure(state, method.compress(state, SETTING)) < start < 1


@pytest.mark.parametrize("kind", SHAPES)
def test_the_exponent_trades_output_error_for_weight_error(kind):
    found = {}
    for exponent in (0.0, 1.0):
        method, state = prepared(kind, exponent=exponent)
        module = method.compress(state, SETTING)
        found[exponent] = state.error(module), weight_error(state, module)
    assert found[0.0][0] < found[1.0][0] and found[0.0][1] > found[1.0][1]


@pytest.mark.parametrize("kind", ["square", "tall"])
def test_the_papers_claim_closer_than_svd_llm_at_equal_parameters(kind):
    case, method = cases.make(kind), build("rocket", {})
    state = method.prepare("linear", case.dense, case.stats)
    low_rank = build("low_rank", {"metric": "gram", "storage": "factors"})
    ranks = low_rank.candidates(low_rank.prepare("linear", case.dense, case.stats)).candidates
    sizes = method.candidates(state).candidates
    for rank in ranks[len(ranks) // 2 :: 3]:
        size = min(
            (one for one in sizes if one.parameters <= rank.parameters), key=lambda one: one.error
        )
        assert method.measure(state, method.compress(state, size.setting)) < rank.error


def test_published_profile_is_the_error_of_the_weights():
    method, state = prepared("tall", profile="weight", anchors=None)
    curve = method.candidates(state)
    assert curve.energy == pytest.approx(state.weight.square().sum().item())
    assert all(
        later.error < earlier.error and later.bits > earlier.bits
        for earlier, later in pairwise(curve.candidates)
    )
    for candidate in curve.candidates[::9]:
        module = method.compress(state, candidate.setting)
        assert candidate.error == pytest.approx(
            (state.weight - module.to_dense()).norm().item() / state.weight.norm().item(), rel=1e-6
        )


@pytest.mark.parametrize("profile", ["gram", "weight"])
@pytest.mark.parametrize("kind", SHAPES)
def test_four_anchors_predict_every_fit(kind, profile):
    method, state = prepared(kind, profile=profile)
    curve = [
        one
        for one in method.candidates(state).candidates
        if 0.4 < one.parameters / state.dense.parameters < 0.95
    ]
    ratios = [
        method.measure(state, method.compress(state, one.setting)) / one.error for one in curve
    ]
    assert sum(abs(ratio - 1) for ratio in ratios) / len(ratios) < 0.05


@pytest.mark.parametrize("kind", SHAPES)
def test_refinement_lowers_the_error_and_more_steps_lower_it_further(kind):
    errors = []
    for steps in (0, 25, 100):
        method, state = prepared(kind, refine_steps=steps)
        errors.append(method.measure(state, method.compress(state, SETTING)))
    assert errors[2] < errors[1] < errors[0]


def test_a_refinement_that_diverges_is_not_taken():
    plain, state = prepared("tall")
    wild, _ = prepared("tall", refine_steps=3, refine_rate=1e3)
    assert_same_output(
        wild.compress(state, SETTING).to_dense(), plain.compress(state, SETTING).to_dense()
    )


def test_refinement_is_adam_on_the_relative_error():
    method, state = prepared("square")
    codes, mask = method.codes(state, method.scores(state), **SETTING)
    atoms, goal = best_dictionary(codes, state.coordinates.T), len(state.coordinates) ** -0.5

    def scaled(factor: Tensor, entries: Tensor) -> Tensor:
        return (factor * goal / entries.square().mean().sqrt()).requires_grad_()

    free, sparse = scaled(atoms, atoms), scaled(codes, codes[mask])
    target = (
        state.coordinates * (free.norm() / atoms.norm() * sparse.norm() / codes.norm())
    ).detach()
    optimiser = torch.optim.Adam([free, sparse], lr=1e-3)
    for _ in range(7):
        optimiser.zero_grad()
        ((target - free.T @ (sparse * mask)).square().sum() / target.square().sum()).backward()
        optimiser.step()
    found = refine_with_adam(state.coordinates, codes, mask, atoms, 7, 1e-3)
    torch.testing.assert_close(found, sparse.detach() * mask, rtol=1e-6, atol=1e-9)
    assert fitted_error(found, state.coordinates.T) < fitted_error(codes, state.coordinates.T)


def test_more_atoms_than_the_smaller_side_is_one_clear_error():
    method, state = prepared("wide")
    with pytest.raises(
        ConfigError, match=r"linear: 5 nonzeros of 21 atoms are not possible; choose .* <= 20"
    ) as caught:
        method.compress(state, {"atoms": 21, "nonzeros": 5})
    assert "\n" not in str(caught.value)
