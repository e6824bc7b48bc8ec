"""The batched sparse coder against brute force, planted codes and hand-made cases, in float64."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from compressor.methods.dictionary.sparse_coding import (
    admm_codes,
    column_errors,
    htp_codes,
    keep_better,
    masked_cg,
    project_columns,
    project_global,
    project_nm,
    top_mask,
    unit_atoms,
)

EXACT = 1e-9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    seed: int = 0, height: int = 12, atoms: int = 8, targets: int = 20, correlated: float = 0.5
):
    """Targets A (height, n), dictionary D (height, k) of correlated atoms with unequal norms, H and
    R.
    """
    dictionary = (
        random(height, atoms, seed=seed) + correlated * random(height, 1, seed=seed + 1)
    ) * torch.linspace(0.5, 3, atoms).double()
    target = random(height, targets, seed=seed + 2)
    return target, dictionary, dictionary.T @ dictionary, dictionary.T @ target


def error(target: Tensor, dictionary: Tensor, codes: Tensor) -> float:
    return (target - dictionary @ codes).square().sum().item()


def best_by_enumeration(target: Tensor, dictionary: Tensor, count: int) -> Tensor:
    """Least error of every target over all supports of `count` atoms, (n,)."""
    errors = []
    for support in combinations(range(dictionary.shape[1]), count):
        atoms = dictionary[:, list(support)]
        errors.append((target - atoms @ torch.linalg.lstsq(atoms, target).solution).square().sum(0))
    return torch.stack(errors).min(0).values


def test_projections_by_hand():
    codes = torch.tensor([[1.0, -5.0], [-4.0, 2.0], [3.0, 3.0], [2.0, -1.0]])
    assert project_columns(2)(codes).int().tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]
    assert project_nm(1, 2)(codes).int().tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]
    assert project_nm(2, 4)(codes).int().tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]
    assert project_global(3)(codes).int().tolist() == [[0, 1], [1, 0], [1, 0], [0, 0]]
    assert project_global(99)(codes).all() and not project_columns(0)(codes).any()


@pytest.mark.parametrize("dim", [0, 1])
def test_ties_keep_the_first_and_the_count_is_exact(dim):
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]] * 3)
    scores = scores.T if dim == 0 else scores
    mask = top_mask(scores, 3, dim)
    assert (mask.T if dim == 0 else mask).int().tolist() == [[1, 1, 1, 0, 0]] * 3
    assert top_mask(torch.zeros(6, 4), 2, 0).sum(0).tolist() == [2] * 4
    assert project_global(5)(torch.zeros(6, 4)).sum() == 5


@pytest.mark.parametrize("rows", [3, 8])
def test_projected_codes_are_nearest_among_all_masks(rows):
    codes = random(8, 5)
    for project, kept in ((project_columns(3), 3), (project_nm(2, 4), 4)):
        mask = project(codes)
        assert mask.sum(0).tolist() == [kept] * 5
        assert (codes * mask).abs().amin() == 0 or mask.all()
        assert torch.equal(project(codes * mask) | (codes * mask == 0), torch.ones_like(mask))
    groups = project_nm(2, 4)(codes).view(2, 4, 5).sum(1)
    assert (groups == 2).all()


def test_masked_least_squares_is_stationary_on_the_mask_and_zero_off_it():
    target, dictionary, gram, correlations = problem()
    mask = random(8, 20, seed=5) > 0
    codes = masked_cg(gram, correlations, mask, random(8, 20, seed=6), steps=50, tolerance=1e-12)
    assert (codes[~mask] == 0).all()
    assert ((correlations - gram @ codes)[mask].abs() < EXACT).all()
    for column in range(20):
        atoms = dictionary[:, mask[:, column]]
        exact = torch.linalg.lstsq(atoms, target[:, column : column + 1]).solution[:, 0]
        torch.testing.assert_close(codes[mask[:, column], column], exact, rtol=1e-8, atol=1e-8)


def test_masked_least_squares_survives_singular_and_empty_problems():
    _, _, gram, correlations = problem(height=4)  # 8 atoms in 4 dimensions
    everywhere = torch.ones(8, 20, dtype=torch.bool)
    codes = masked_cg(
        gram, correlations, everywhere, torch.zeros(8, 20).double(), steps=100, tolerance=1e-12
    )
    torch.testing.assert_close(gram @ codes, correlations, rtol=1e-8, atol=1e-8)
    nothing = torch.zeros(8, 20).double()
    assert torch.equal(masked_cg(gram, nothing, everywhere, nothing), nothing)
    assert torch.equal(masked_cg(torch.zeros_like(gram), nothing, everywhere, nothing), nothing)
    for coder in (admm_codes, htp_codes):
        assert torch.equal(
            coder(torch.zeros_like(gram), nothing, project_columns(2), nothing), nothing
        )


def test_unit_atoms_change_the_codes_by_their_norms_and_the_errors_not_at_all():
    _, dictionary, gram, correlations = problem()
    gram[0] = gram[:, 0] = correlations[0] = 0  # an atom that is zero
    scaled, moved, norms = unit_atoms(gram, correlations)
    assert scaled.diagonal().tolist() == pytest.approx([0.0] + [1.0] * 7)
    codes = random(8, 20, seed=9)
    torch.testing.assert_close(
        column_errors(scaled, moved, norms * codes), column_errors(gram, correlations, codes)
    )
    torch.testing.assert_close(norms[1:, 0], dictionary[:, 1:].norm(dim=0))


def test_column_errors_are_the_errors_up_to_the_energy():
    target, dictionary, gram, correlations = problem()
    codes = random(8, 20, seed=3)
    direct = (target - dictionary @ codes).square().sum(0) - target.square().sum(0)
    torch.testing.assert_close(column_errors(gram, correlations, codes), direct)


@pytest.mark.parametrize("coder", [admm_codes, htp_codes])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_orthonormal_atoms_are_coded_exactly(coder, count):
    """Largest coefficients are optimal for orthonormal atoms: card equation (0.2)."""
    target, basis = random(12, 30), torch.linalg.qr(random(12, 8, seed=1))[0]
    codes = coder(
        basis.T @ basis, basis.T @ target, project_columns(count), torch.zeros(8, 30).double()
    )
    kept = (basis.T @ target).abs().sort(0, descending=True).values[:count].square().sum(0)
    torch.testing.assert_close(
        (target - basis @ codes).square().sum(0), target.square().sum(0) - kept
    )
    assert (codes != 0).sum(0).tolist() == [count] * 30


@pytest.mark.parametrize(("coder", "slack"), [(admm_codes, 1.05), (htp_codes, 1.15)])
def test_codes_come_close_to_the_best_of_all_supports(coder, slack):
    """Sum over 20 targets of at most `slack` times the least error possible, never below it, and
    below thresholding's.
    """
    target, dictionary, gram, correlations = problem(correlated=0.3)
    scaled, moved, norms = unit_atoms(gram, correlations)
    start = moved * project_columns(3)(moved)
    codes = coder(scaled, moved, project_columns(3), start, iterations=20, refit=30) / norms
    found, least = (
        (target - dictionary @ codes).square().sum(0),
        best_by_enumeration(target, dictionary, 3),
    )
    assert (found >= least * (1 - EXACT)).all()
    assert found.sum() <= slack * least.sum()
    assert found.sum() < error(
        target, dictionary, masked_cg(gram, correlations, project_columns(3)(moved), start, 50)
    )


@pytest.mark.parametrize("coder", [admm_codes, htp_codes])
def test_planted_codes_are_recovered(coder):
    """s ≪ k and incoherent atoms: the error goes to zero (card §11, 20)."""
    dictionary = random(60, 40)
    dictionary = dictionary / dictionary.norm(dim=0)
    planted = random(40, 25, seed=1)
    planted = (planted + planted.sign()) * project_columns(3)(random(40, 25, seed=2))
    target = dictionary @ planted
    start = torch.zeros(40, 25).double()
    found = coder(
        dictionary.T @ dictionary,
        dictionary.T @ target,
        project_columns(3),
        start,
        iterations=20,
        refit=30,
    )
    assert error(target, dictionary, found) < 1e-6 * target.square().sum()


@pytest.mark.parametrize("project", [project_columns(3), project_nm(2, 4)], ids=["columns", "2:4"])
@pytest.mark.parametrize("coder", [admm_codes, htp_codes])
def test_guarded_coding_never_grows_the_error_of_any_target(coder, project):
    for seed in range(5):
        _, _, gram, correlations = problem(seed=10 * seed, correlated=3.0)
        codes = correlations * project(correlations) / gram.diagonal()[:, None]
        for _ in range(4):
            proposed = coder(gram, correlations, project, codes)
            least = torch.minimum(
                column_errors(gram, correlations, codes),
                column_errors(gram, correlations, proposed),
            )
            codes = keep_better(gram, correlations, codes, proposed)
            assert torch.equal(column_errors(gram, correlations, codes), least)
            assert torch.equal(
                project(codes) | (codes == 0), torch.ones_like(codes, dtype=torch.bool)
            )


def test_admm_penalty_growth_and_ramp_end_on_the_projection():
    _, _, gram, correlations = problem()
    start = torch.zeros(8, 20).double()
    ramp = [project_columns(8), project_columns(6), project_columns(4)]
    codes = admm_codes(
        gram,
        correlations,
        project_columns(3),
        start,
        iterations=10,
        rho=0.1,
        growth=1.3,
        ramp=ramp,
        refit=30,
    )
    assert (codes != 0).sum(0).tolist() == [3] * 20
    mask = codes != 0
    assert ((correlations - gram @ codes)[mask].abs() < 1e-4 * correlations.abs().max()).all()
    whole = admm_codes(
        gram, correlations, project_columns(8), start, iterations=3, ramp=ramp[:1], refit=50
    )
    torch.testing.assert_close(gram @ whole, correlations, rtol=1e-5, atol=1e-5)


def refit(gram: Tensor, correlations: Tensor, project, start: Tensor) -> Tensor:
    return masked_cg(gram, correlations, project(correlations), start)


@pytest.mark.parametrize("coder", [admm_codes, htp_codes, refit])
def test_a_coder_keeps_its_arguments_the_dtype_and_its_answer(coder):
    _, _, gram, correlations = (part.float() for part in problem())
    start = correlations.flip(0)
    arguments = [gram, correlations, start]
    before = [argument.clone() for argument in arguments]
    first, second = (coder(gram, correlations, project_columns(3), start) for _ in range(2))
    assert first.dtype == torch.float32 and torch.equal(first, second)
    assert all(
        torch.equal(argument, copy) for argument, copy in zip(arguments, before, strict=True)
    )
