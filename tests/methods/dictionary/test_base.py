"""What the sparse-dictionary methods share, against the invariants of their card (section 11), in
float64.
"""

import math
from dataclasses import replace

import pytest
import torch
from support import weights as cases
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.linears import Dense
from compressor.linears.masks import unpack_mask
from compressor.methods import build
from compressor.methods.dictionary.base import (
    DAMPING,
    Basis,
    basis_of,
    best_dictionary,
    fitted_error,
    require_atoms,
    start_errors,
    store,
    stored_size,
    unwhiten,
)
from compressor.methods.dictionary.sparse_coding import project_columns
from compressor.plan import Candidate
from compressor.statistics import LinearStats

EXACT = 1e-9  # relative, float64 identities
DAMPED = 10 * DAMPING  # relative, where the damping of best_dictionary enters to first order
ATOMS, NONZEROS = 9, 4
SHAPES = ["square", "tall", "wide"]


def based(case: cases.Case, metric: str = "gram", shrink: float = 0.0) -> Basis:
    dense = Dense(case.dense.weight.double(), case.dense.bias, torch.float64)
    return basis_of("linear", dense, case.stats, metric, shrink, 0.1)


def whitener(case: cases.Case) -> Tensor:
    """L (in, in) with LᵀL = G, per token."""
    return torch.linalg.cholesky(case.stats.gram / len(case.x)).T


def coded(basis: Basis, atoms: int = ATOMS, nonzeros: int = NONZEROS) -> Tensor:
    leading = basis.coordinates[:atoms]
    return leading * project_columns(nonzeros)(leading)


def built(basis: Basis, codes: Tensor, ridge: float = 0.0):
    """Module of codes with at most NONZEROS nonzeros in a column, with their best dictionary."""
    return store(
        basis.dense,
        basis.roots,
        codes,
        project_columns(NONZEROS)(codes),
        best_dictionary(codes, basis.weight, ridge),
    )


def square(matrix: Tensor) -> float:
    return matrix.square().sum().item()


@pytest.mark.parametrize("kind", SHAPES)
def test_1_2_errors_are_those_of_the_whitened_weight_and_values_its_squared_singular_values(kind):
    case = cases.make(kind)
    basis, root = based(case), whitener(case)
    module = store(
        basis.dense,
        basis.roots,
        coded(basis),
        project_columns(NONZEROS)(coded(basis)),
        best_dictionary(coded(basis), basis.weight),
    )
    lost = basis.weight - module.to_dense()
    assert basis.error(module) * basis.energy == pytest.approx(square(root @ lost.T), rel=EXACT)
    assert basis.error(module) * basis.energy == pytest.approx(
        square(case.x @ lost.T) / len(case.x), rel=EXACT
    )
    singular = torch.linalg.svdvals(root @ basis.weight.T)
    torch.testing.assert_close(basis.values, singular.square(), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", SHAPES)
def test_coordinates_are_the_codes_of_an_orthonormal_dictionary(kind):
    case = cases.make(kind)
    basis, target = based(case), whitener(case) @ case.dense.weight.double().T
    orthonormal = target @ basis.vectors / basis.values.sqrt()
    torch.testing.assert_close(
        orthonormal.T @ orthonormal,
        torch.eye(len(basis.values), dtype=torch.float64),
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(orthonormal.T @ target, basis.coordinates, rtol=1e-8, atol=1e-8)
    mask = torch.randn(basis.coordinates.shape, generator=torch.Generator().manual_seed(0)) > 0
    codes = basis.coordinates * mask  # 3: (0.2), for any mask
    assert square(target - orthonormal @ codes) == pytest.approx(
        square(target) - square(codes), rel=EXACT
    )
    original = torch.linalg.solve(whitener(case), orthonormal)
    torch.testing.assert_close(
        unwhiten(basis, torch.eye(len(basis.values))).T, original, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_4_5_6_the_best_dictionary_needs_no_gram_and_leaves_nothing_along_the_codes(kind):
    case = cases.make(kind)
    basis, root = based(case), whitener(case)
    codes, target = coded(basis), root @ case.dense.weight.double().T
    atoms = best_dictionary(codes, basis.weight)
    residual = target - root @ atoms.T @ codes
    assert (residual @ codes.T).norm() < DAMPED * (target @ codes.T).norm()
    for seed in range(3):  # weighted least squares under any other Gram
        other = cases.make(kind, seed=seed + 1)
        factor = whitener(other)
        solution = torch.linalg.lstsq(
            codes.T, (factor @ basis.weight.T).T
        ).solution.T  # D_L for the whitened target
        torch.testing.assert_close(
            torch.linalg.solve(factor, solution), atoms.T, rtol=1e-3, atol=1e-4
        )
    assert fitted_error(codes, basis.coordinates.T) * square(target) == pytest.approx(
        square(residual), rel=1e-7
    )
    closed = square(target) - square(
        torch.linalg.solve_triangular(
            torch.linalg.cholesky(codes @ codes.T), codes @ target.T, upper=False
        )
    )
    assert square(residual) == pytest.approx(closed, rel=1e-7)


@pytest.mark.parametrize("kind", SHAPES)
def test_7_fitted_errors_are_below_those_of_the_orthonormal_start_and_those_below_one(kind):
    basis = based(cases.make(kind))
    for atoms, nonzeros in ((3, 1), (9, 4), (15, 10)):
        codes = coded(basis, atoms, nonzeros)
        start = 1 - square(codes) / basis.energy
        assert fitted_error(codes, basis.coordinates.T) < start < 1


def test_11_scales_of_atoms_do_not_matter_and_are_balanced_in_storage():
    case = cases.make("tall")
    basis = based(case)
    codes, scale = coded(basis), torch.logspace(-3, 3, ATOMS, dtype=torch.float64)[:, None]
    one, two = built(basis, codes), built(basis, codes * scale)
    torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.atoms, two.atoms, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.atoms.norm(dim=1), one.codes().norm(dim=0))


def test_12_rotated_inputs_rotate_the_atoms_and_change_nothing_else():
    case = cases.make("square")
    rotation = torch.linalg.qr(
        torch.randn(28, 28, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    )[0]
    turned = cases.sums(case.x @ rotation, case.g)
    plain = based(case)
    moved = basis_of(
        "linear", Dense(plain.weight @ rotation, None, torch.float64), turned, "gram", 0.0, 0.1
    )
    torch.testing.assert_close(
        moved.coordinates.abs(), plain.coordinates.abs(), rtol=1e-6, atol=1e-6
    )
    codes = coded(plain)
    torch.testing.assert_close(
        best_dictionary(codes, moved.weight),
        best_dictionary(codes, plain.weight) @ rotation,
        rtol=1e-8,
        atol=1e-8,
    )


def test_13_permuted_outputs_permute_the_codes_alone():
    case = cases.make("tall")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    plain = based(case)
    moved = basis_of(
        "linear", Dense(plain.weight[order], None, torch.float64), case.stats, "gram", 0.0, 0.1
    )
    codes = coded(plain)
    torch.testing.assert_close(coded(moved).abs(), codes[:, order].abs(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        best_dictionary(codes[:, order], moved.weight),
        best_dictionary(codes, plain.weight),
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_14_all_codes_kept_is_the_truncated_svd(kind):
    case = cases.make(kind)
    basis = based(case)
    low_rank = build("low_rank", {"metric": "gram", "storage": "factors"})
    curve = low_rank.candidates(low_rank.prepare("linear", basis.dense, case.stats))
    ranks = {candidate.setting["rank"]: candidate.error for candidate in curve.candidates}
    for rank in (3, 7):
        assert fitted_error(coded(basis, rank, rank), basis.coordinates.T) == pytest.approx(
            ranks[rank], rel=1e-7
        )
        (error,) = start_errors(
            [Candidate("any", {"atoms": rank, "nonzeros": rank}, 1, 1, math.nan)], basis.coordinates
        )
        assert error == pytest.approx(ranks[rank], rel=1e-7)
    full = len(basis.values)
    torch.testing.assert_close(
        coded(basis, full, full).T @ unwhiten(basis, torch.eye(full)),
        basis.weight,
        rtol=1e-6,
        atol=1e-6,
    )
    assert fitted_error(coded(basis, full, full), basis.coordinates.T) < EXACT


def test_screening_is_0_2_for_every_size_and_15_falls_with_atoms_and_with_nonzeros():
    basis = based(cases.make("wide"))
    sizes = [
        Candidate("any", {"atoms": k, "nonzeros": s}, 1, 1, math.nan)
        for k in range(1, 21)
        for s in range(1, k + 1)
    ]
    errors = {
        tuple(size.setting.values()): error
        for size, error in zip(sizes, start_errors(sizes, basis.coordinates), strict=True)
    }
    for (atoms, nonzeros), error in errors.items():
        assert error == pytest.approx(
            1 - square(coded(basis, atoms, nonzeros)) / basis.energy, rel=EXACT, abs=1e-12
        )
        assert error <= errors.get((atoms, nonzeros - 1), 1.0) + 1e-12
        assert error <= errors.get((atoms - 1, nonzeros), 1.0) + 1e-12


def test_weighted_outputs_weigh_the_error_and_disappear_from_the_stored_weight():
    case = cases.make("tall")
    basis = based(case, "weighted_gram")
    squares = case.g.square().mean(0)
    torch.testing.assert_close(basis.roots.square(), 0.9 * squares + 0.1 * squares.mean())
    full = len(basis.values)
    codes = coded(basis, full, full)
    module = store(
        basis.dense,
        basis.roots,
        codes,
        torch.ones_like(codes, dtype=torch.bool),
        best_dictionary(codes, basis.weight),
    )
    torch.testing.assert_close(module.to_dense(), basis.dense.weight, rtol=1e-4, atol=1e-4)
    codes = coded(basis)
    module = built(basis, codes)
    lost = (basis.dense.weight - module.to_dense()) * basis.roots[:, None]
    assert basis.error(module) * basis.energy == pytest.approx(
        square(case.x @ lost.T) / len(case.x), rel=EXACT
    )
    assert basis.error(module) == pytest.approx(fitted_error(codes, basis.coordinates.T), rel=1e-6)


def test_an_output_without_weight_gets_no_codes():
    case = cases.make("tall")
    grad_gram = case.stats.grad_gram.clone()
    grad_gram[5, 5] = 0
    basis = basis_of(
        "linear", case.dense, replace(case.stats, grad_gram=grad_gram), "weighted_gram", 0.0, 0.0
    )
    module = built(basis, coded(basis))
    assert torch.isfinite(module.to_dense()).all() and (module.to_dense()[5] == 0).all()


def test_shrinkage_is_that_of_the_metric():
    case = cases.make("wide")
    gram = case.stats.gram / len(case.x)
    shrunk = 0.8 * gram + 0.2 * gram.diagonal().mean() * torch.eye(44, dtype=torch.float64)
    basis = based(case, shrink=0.2)
    assert basis.energy == pytest.approx(
        torch.trace(basis.weight @ shrunk @ basis.weight.T).item(), rel=EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 4])
def test_16_17_sizes_are_the_formula_and_the_mask_counts_the_codes(dtype, blocks):
    case, bits = cases.make("tall", dtype=dtype), dtype.itemsize * 8
    (height, width), generator = case.dense.weight.shape, torch.Generator().manual_seed(0)
    codes = torch.randn(blocks, 6, height, generator=generator, dtype=torch.float64)
    mask = torch.cat([project_columns(3)(block) for block in codes])
    atoms = torch.randn(blocks * 6, width // blocks, generator=generator, dtype=torch.float64)
    module = store(
        case.dense, torch.ones(height).double(), codes.flatten(0, 1) * mask, mask, atoms, blocks
    )
    numbers = 6 * width + blocks * 3 * height
    assert stored_size(case.dense, 6, 3, blocks) == (bits * numbers + height * blocks * 6, numbers)
    assert (module.bits(), module.stored_parameters()) == stored_size(case.dense, 6, 3, blocks)
    assert (
        unpack_mask(module.mask, height * blocks * 6).sum()
        == module.weight.numel()
        == 3 * height * blocks
    )
    products = [
        part.T @ rows
        for part, rows in zip(
            (codes.flatten(0, 1) * mask).chunk(blocks), atoms.chunk(blocks), strict=True
        )
    ]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(module.to_dense().double(), torch.cat(products, dim=1), **close)


def test_ridge_follows_the_mean_energy_of_an_atom():
    basis = based(cases.make("square"))
    codes = coded(basis)
    moment = codes @ codes.T
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(ATOMS, dtype=torch.float64)
    expected = torch.linalg.solve(damped, codes @ basis.weight)
    torch.testing.assert_close(
        best_dictionary(codes, basis.weight, 0.1), expected, rtol=1e-5, atol=1e-6
    )


def test_atoms_without_codes_or_with_the_same_codes_are_no_trouble():
    codes = torch.zeros(4, 6, dtype=torch.float64)
    codes[0], codes[1, 2], codes[2, 2] = (
        1.0,
        3.0,
        2.0,
    )  # atoms 1 and 2 serve one output, atom 3 none
    targets = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    atoms = best_dictionary(codes, targets)
    assert torch.isfinite(atoms).all() and (atoms[3] == 0).all()
    torch.testing.assert_close((codes.T @ atoms)[2], targets[2], rtol=1e-4, atol=1e-4)


def test_impossible_settings_name_the_linear_and_the_bound():
    for setting in (
        {"atoms": 25, "nonzeros": 3},
        {"atoms": 4, "nonzeros": 5},
        {"atoms": 4, "nonzeros": 0},
    ):
        with pytest.raises(
            ConfigError, match=r"model\.q: .* of .* atoms are not possible; .*24, the smaller side"
        ):
            require_atoms("model.q", setting, 24)


def test_missing_gradients_name_the_linear():
    with pytest.raises(DataError, match=r"model\.q: the statistics lack grad_gram"):
        basis_of(
            "model.q",
            cases.make("square").dense,
            LinearStats(tokens=1, gram=torch.eye(28)),
            "weighted_gram",
            0.0,
            0.1,
        )


@pytest.mark.parametrize("name", ["rocket", "cospadi", "compot", "dsformer"])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_scales_and_zero_grams_complete(name, scale):
    case = cases.make("square")
    method = build(name, {"group": 4, "metric": "gram"} if name == "dsformer" else {})
    plain = method.candidates(method.prepare("linear", case.dense, case.stats)).candidates
    state = method.prepare("linear", case.dense, cases.sums(case.x * scale**0.5, case.g))
    curve = method.candidates(state)
    assert [one.error for one in curve.candidates] == pytest.approx(
        [one.error for one in plain], rel=1e-2, abs=1e-6
    )
    assert torch.isfinite(method.compress(state, curve.candidates[-1].setting).to_dense()).all()
    nothing = method.prepare("linear", case.dense, cases.sums(torch.zeros_like(case.x), case.g))
    curve = method.candidates(nothing)
    assert curve.energy == 0 and all(one.error == 0 for one in curve.candidates)
    assert torch.isfinite(method.compress(nothing, curve.candidates[0].setting).to_dense()).all()
