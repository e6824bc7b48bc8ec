"""The dictionary shared by two linears: card §11, 10, and the objective it minimises, in
float64.
"""

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.methods.dictionary.base import best_dictionary
from compressor.methods.dictionary.sylvester import (
    gram_basis,
    pair_basis,
    shared_dictionary,
    sylvester,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(size: int, seed: int) -> Tensor:
    root = (
        random(size, 2 * size, seed=seed)
        * torch.logspace(0, -1.5, size, dtype=torch.float64)[:, None]
    )
    return root @ root.T


def problem():
    """Two linears of 9 inputs with 14 and 20 outputs, 5 atoms, about half of the codes zero."""
    weights = random(14, 9), random(20, 9, seed=1)
    codes = tuple(
        random(5, height, seed=height) * (random(5, height, seed=2 * height) > 0)
        for height in (14, 20)
    )
    return weights, (definite(9, 2), definite(9, 3)), codes


def objective(atoms: Tensor, weights, grams, codes) -> Tensor:
    lost = [weight - code.T @ atoms for weight, code in zip(weights, codes, strict=True)]
    return sum((part @ gram * part).sum() for part, gram in zip(lost, grams, strict=True))


def test_pair_basis_makes_one_matrix_the_identity_and_the_other_diagonal():
    first, second = definite(6, 0), definite(6, 1)
    basis, values = pair_basis(first, second, "pair", "option")
    torch.testing.assert_close(
        basis.T @ first @ basis, torch.eye(6, dtype=torch.float64), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(basis.T @ second @ basis, values.diag(), rtol=1e-8, atol=1e-8)


def test_the_equation_is_solved():
    grams, moments, right = (
        (definite(9, 2), definite(9, 3)),
        (definite(5, 4), definite(5, 5)),
        random(9, 5),
    )
    solution = sylvester(gram_basis(grams, "pair"), moments, right, "pair")
    residual = (
        sum(gram @ solution @ moment for gram, moment in zip(grams, moments, strict=True)) - right
    )
    assert residual.norm() < 1e-8 * right.norm()


def test_one_by_one_by_hand():
    """2 · d · 3 + 5 · d · 7 = 82 gives d = 2."""
    matrices = [
        torch.tensor([[value]], dtype=torch.float64) for value in (2.0, 5.0, 3.0, 7.0, 82.0)
    ]
    basis = gram_basis((matrices[0], matrices[1]), "pair")
    assert sylvester(
        basis, (matrices[2], matrices[3]), matrices[4], "pair"
    ).item() == pytest.approx(2.0)


def test_no_shared_dictionary_is_better():
    weights, grams, codes = problem()
    atoms = shared_dictionary(weights, grams, codes, "pair")
    least = objective(atoms, weights, grams, codes)
    for seed in range(5):
        assert least < objective(atoms + 1e-3 * random(5, 9, seed=seed), weights, grams, codes)
    gradient = torch.func.grad(objective)(atoms, weights, grams, codes)
    assert gradient.norm() < 1e-4 * objective(torch.zeros_like(atoms), weights, grams, codes)
    alone = [best_dictionary(code, weight) for code, weight in zip(codes, weights, strict=True)]
    concatenated = best_dictionary(torch.cat(codes, 1), torch.cat(weights))
    for other in (*alone, concatenated):
        assert least < objective(other, weights, grams, codes)


def test_equal_grams_reduce_to_the_closed_form_of_the_concatenation():
    weights, (gram, _), codes = problem()
    closed = shared_dictionary(weights, (gram, gram.clone()), codes, "pair")
    torch.testing.assert_close(closed, best_dictionary(torch.cat(codes, 1), torch.cat(weights)))
    nearly = shared_dictionary(weights, (gram, gram * (1 + 1e-12)), codes, "pair")
    torch.testing.assert_close(nearly, closed, rtol=1e-4, atol=1e-4)


def test_a_singular_gram_names_the_pair_and_the_option():
    weights, (gram, _), codes = problem()
    singular = gram.clone()
    singular[0] = singular[:, 0] = 0
    with pytest.raises(NumericalError, match=r"gate and up: the Gram .*shrink_gram"):
        shared_dictionary(weights, (singular, gram), codes, "gate and up")
