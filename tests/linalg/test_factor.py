"""Linear algebra of the methods: eigenpairs, the weighted error, shrinkage, pivots."""

import numpy as np
import pytest
import scipy.linalg
import torch
from support import weights as cases

from compressor import linalg
from compressor.errors import NumericalError
from compressor.linalg import Metric


def test_eigh_is_descending_reconstructs_and_fixes_signs():
    matrix = cases.make("square").stats.gram
    values, vectors = linalg.eigh_descending(matrix, "it")
    assert (values[:-1] >= values[1:]).all()
    torch.testing.assert_close(vectors * values @ vectors.T, matrix)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_f23_second_driver_then_an_error_that_names_the_matrix(monkeypatch):
    matrix = cases.make("square").stats.gram
    expected = linalg.eigh_descending(matrix, "it")[0]

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    torch.testing.assert_close(linalg.eigh_descending(matrix, "it")[0], expected)

    def fail_too(*args, **kwargs):
        raise np.linalg.LinAlgError("neither")

    monkeypatch.setattr(scipy.linalg, "eigh", fail_too)
    with pytest.raises(NumericalError, match=r"model\.q_proj.*converge"):
        linalg.eigh_descending(matrix, "model.q_proj")


def test_non_finite_input_is_refused_by_name():
    with pytest.raises(NumericalError, match=r"model\.q_proj"):
        linalg.eigh_descending(torch.full((3, 3), torch.inf), "model.q_proj")


def test_relative_error_is_the_trace_formula_and_the_mean_over_tokens():
    case = cases.make("wide")
    weight, close = case.dense.weight.double(), 0.9 * case.dense.weight.double()
    close[0] += 1
    lost, gram, moment = (
        weight - close,
        case.stats.gram,
        case.stats.grad_gram + torch.eye(20, dtype=torch.float64),
    )
    direct = torch.trace(moment @ lost @ gram @ lost.T) / torch.trace(
        moment @ weight @ gram @ weight.T
    )
    root = torch.linalg.cholesky(moment)
    assert linalg.relative_error(weight, close, Metric(gram), root) == pytest.approx(
        direct.item(), rel=1e-10
    )
    by_tokens = (case.x @ lost.T).square().sum() / (case.x @ weight.T).square().sum()
    assert linalg.relative_error(weight, close, Metric(gram, 0.1)) == pytest.approx(
        by_tokens.item(), rel=1e-10
    )
    assert linalg.relative_error(weight, weight, Metric(gram)) == 0
    assert (
        linalg.relative_error(torch.zeros_like(weight), torch.zeros_like(weight), Metric(gram)) == 0
    )


@pytest.mark.parametrize("kind", ["matrix", "diagonal", "identity"])
def test_metric_is_the_matrix_it_stands_for(kind):
    case, mean = cases.make("wide"), torch.linspace(0, 0.1, 44, dtype=torch.float64)
    moment = {"matrix": case.stats.gram, "diagonal": case.stats.gram.diagonal(), "identity": None}[
        kind
    ]
    full = {
        "matrix": moment,
        "diagonal": torch.diag(case.stats.gram.diagonal()),
        "identity": torch.eye(44, dtype=torch.float64),
    }[kind]
    metric = Metric(moment, 0.25, mean=mean, shift=2.0)
    expected = 0.25 * full - torch.outer(mean, mean) + 2.0 * torch.eye(44, dtype=torch.float64)
    torch.testing.assert_close(
        metric.weigh(case.dense.weight), case.dense.weight.double() @ expected
    )
    if kind == "matrix":
        shrunk = Metric(moment, 0.25).shrink(0.3)
        torch.testing.assert_close(shrunk.weigh(torch.eye(44)), linalg.shrink(0.25 * moment, 0.3))


def test_shrinkage_keeps_the_trace_and_ends_at_the_scaled_identity():
    gram = cases.make("square").stats.gram
    half = linalg.shrink(gram, 0.5)
    assert half.trace().item() == pytest.approx(gram.trace().item())
    torch.testing.assert_close(
        half - torch.diag(half.diagonal()), 0.5 * (gram - torch.diag(gram.diagonal()))
    )
    torch.testing.assert_close(
        linalg.shrink(gram, 1.0), gram.diagonal().mean() * torch.eye(28, dtype=torch.float64)
    )


@pytest.mark.parametrize("seed", range(5))
def test_pivots_are_exact_and_bounded(seed):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(9, 30, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -6, 30, dtype=torch.float64)
    )
    mask, coefficients = linalg.pivot_columns(down, bound=1.2)
    assert mask.sum() == 9 and coefficients.abs().max() <= 1.2 + 1e-9
    torch.testing.assert_close(down[:, mask] @ coefficients, down[:, ~mask], rtol=1e-8, atol=1e-14)


def test_exchange_is_a_basis_change():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    pivots, others = [0, 1, 2, 3], [4, 5, 6]
    swapped = linalg.exchange(torch.linalg.solve(basis[:, pivots], basis[:, others]), 2, 1)
    pivots[2], others[1] = 5, 2
    torch.testing.assert_close(swapped, torch.linalg.solve(basis[:, pivots], basis[:, others]))
