"""COMPOT: exact half-steps, an orthonormal dictionary, and the paper's claim, in float64."""

from itertools import pairwise

import pytest
import torch
from support import weights as cases
from torch import Tensor

from compressor.linears import Dense
from compressor.methods import build
from compressor.methods.dictionary.compot import procrustes, rotate

SETTING = {"atoms": 14, "nonzeros": 6}
SHAPES = ["square", "tall", "wide"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(*shape, seed=seed))[0]


def prepared(kind: str, **options):
    """Method and state of a case in float64."""
    case, method = cases.make(kind), build("compot", options)
    return method, method.prepare(
        "linear", Dense(case.dense.weight.double(), None, torch.float64), case.stats
    )


def test_procrustes_is_the_nearest_orthonormal_dictionary_and_9_its_value_is_closed_form():
    targets, codes = random(8, 20), random(5, 20, seed=1)
    rotation = procrustes(targets, codes)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(5, dtype=torch.float64))
    least = (targets - rotation @ codes).square().sum()
    singular = torch.linalg.svdvals(targets @ codes.T)
    torch.testing.assert_close(
        least, targets.square().sum() + codes.square().sum() - 2 * singular.sum()
    )
    for seed in range(20):
        other = orthonormal(8, 5, seed=seed)
        near = (
            torch.linalg.qr(rotation + 1e-2 * other)[0]
            * torch.linalg.qr(rotation + 1e-2 * other)[1].diagonal().sign()
        )
        assert (
            least < (targets - other @ codes).square().sum()
            and least < (targets - near @ codes).square().sum()
        )


def test_procrustes_by_hand():
    """Codes that are the targets turned by a quarter: the rotation turns them back."""
    targets = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(procrustes(targets, turn @ targets), turn.T)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_round_keeps_more_energy_and_the_error_is_what_is_left(kind):
    _, state = prepared(kind)
    kept = []
    for rounds in (0, 1, 2, 5, 20):
        rotation, codes = rotate(state.coordinates, **SETTING, rounds=rounds)
        kept.append(codes.square().sum().item())
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(14, dtype=torch.float64))
        assert (codes != 0).sum(0).max() <= 6
        lost = (state.coordinates - rotation @ codes).square().sum().item()
        assert lost == pytest.approx(state.energy - kept[-1], rel=1e-9)
    assert all(later > earlier for earlier, later in pairwise(kept))


@pytest.mark.parametrize("kind", SHAPES)
def test_stored_atoms_are_orthonormal_in_the_gram(kind):
    case = cases.make(kind)
    method, state = prepared(kind)
    atoms = method.compress(state, SETTING).atoms
    products = atoms @ (case.stats.gram / len(case.x)) @ atoms.T
    scale = products.diagonal().rsqrt()  # storage balances atoms and codes
    torch.testing.assert_close(
        scale[:, None] * products * scale, torch.eye(14, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_order_and_signs_of_the_atoms_are_free():
    _, state = prepared("tall")
    rotation, codes = rotate(state.coordinates, **SETTING, rounds=3)
    order, signs = torch.randperm(14, generator=torch.Generator().manual_seed(0)), random(14).sign()
    torch.testing.assert_close(
        (rotation[:, order] * signs) @ (signs[:, None] * codes[order]), rotation @ codes
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_all_codes_kept_is_the_truncated_svd(kind):
    method, state = prepared(kind)
    tail = 1 - state.values[:7].sum().item() / state.energy
    assert method.measure(
        state, method.compress(state, {"atoms": 7, "nonzeros": 7})
    ) == pytest.approx(tail, rel=1e-6)


def test_planted_orthonormal_dictionaries_are_recovered():
    """20: codes with two nonzeros of fifteen, from the leading directions alone."""
    planted = random(15, 400)
    planted = (planted + planted.sign()) * (random(15, 400, seed=1).argsort(0) < 2)
    target = orthonormal(15, 15, seed=2) @ planted
    before, after = (
        rotate(target, 15, 2, rounds)[1].square().sum() / target.square().sum()
        for rounds in (0, 300)
    )
    assert before < 0.8 and after > 0.98


@pytest.mark.parametrize("kind", SHAPES)
def test_the_papers_claim_rotations_beat_the_start_and_a_free_dictionary_at_the_end_is_better_still(
    kind,
):
    errors = []
    for options in ({"rounds": 0}, {}, {"free": True}):
        method, state = prepared(kind, **options)
        errors.append(method.measure(state, method.compress(state, SETTING)))
    assert errors[2] < errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("kind", ["square", "tall"])
def test_a_learned_dictionary_that_is_not_orthonormal_is_closer(kind):
    """Against CoSpaDi's fast solver at the same size: what orthonormality costs."""
    method, state = prepared(kind)
    free = build("cospadi", {})
    assert free.measure(state, free.compress(state, SETTING)) < method.measure(
        state, method.compress(state, SETTING)
    )
