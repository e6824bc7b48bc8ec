"""ADMM in a coupled metric: scaling, the relaxed step, least squares on masks, projections, and the
one-sided case against the coder.
"""

import pytest
import torch
from support import weights as cases
from torch import Tensor

from compressor import linalg
from compressor.errors import NumericalError
from compressor.methods.dictionary import sparse_coding
from compressor.methods.sparse.admm import Problem, admm, pose, projection, refit

EXACT = 1e-9  # relative, float64 identities
METRICS = pytest.mark.parametrize("two_sided", [False, True], ids=["gram", "two_sided"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posed(case: cases.Case, two_sided: bool) -> tuple[Problem, Tensor, Tensor]:
    """Problem with M and H per token; H is shrunk a little, so that it has an inverse."""
    moment, grad_gram = (
        case.stats.gram / len(case.x),
        linalg.shrink(case.stats.grad_gram / len(case.g), 0.05),
    )
    weight = case.dense.weight
    return (
        pose("linear", weight, moment, grad_gram if two_sided else None),
        moment,
        grad_gram if two_sided else torch.eye(len(weight)).double(),
    )


@pytest.mark.parametrize("kind", ["square", "tall", "wide", "dead_inputs"])
@METRICS
def test_scaled_coordinates_keep_the_error(kind, two_sided):
    case = cases.make(kind)
    problem, moment, grad_gram = posed(case, two_sided)
    lost = random(*case.dense.weight.shape)
    direct = torch.trace(grad_gram @ lost @ moment @ lost.T)
    scaled = lost * problem.outputs * problem.inputs
    assert (problem.weigh(scaled) * scaled).sum().item() == pytest.approx(direct.item(), rel=EXACT)
    torch.testing.assert_close(problem.original(scaled), lost, rtol=EXACT, atol=EXACT)
    assert set(problem.gram.diagonal().round(decimals=9).tolist()) <= {0.0, 1.0}


@METRICS
def test_dead_inputs_have_no_weight(two_sided):
    case = cases.make("dead_inputs")
    problem = posed(case, two_sided)[0]
    assert not problem.weight[:, ::3].any() and problem.weight[:, 1::3].all()
    mask, values = admm(problem, projection("layer", [28 * 18 + 5]), 1, 5, 0.1, 1.2)
    assert refit(problem, problem.weight, mask, values, 10)[..., ::3].abs().max() < 1e-12


@METRICS
def test_the_relaxed_copy_solves_its_equation(two_sided):
    problem, _, _ = posed(cases.make("wide"), two_sided)
    pull = random(3, 20, 44)
    relaxed = problem.relax(pull, 0.3)
    torch.testing.assert_close(problem.weigh(relaxed) + 0.3 * relaxed, pull, rtol=EXACT, atol=EXACT)


@METRICS
def test_invariant_8_least_squares_on_the_mask_leaves_no_gradient_on_it_and_nothing_off_it(
    two_sided,
):
    problem, _, _ = posed(cases.make("square"), two_sided)
    mask = random(2, 28, 28, seed=4) > 0.2
    values = refit(problem, problem.weight, mask, random(2, 28, 28, seed=5), 3000, tolerance=1e-12)
    assert not values[~mask].any()
    gradient = problem.weigh(problem.weight - values) * mask
    assert gradient.abs().max() < 1e-9 * problem.weigh(problem.weight).abs().max()
    for one, kept in zip(values, mask, strict=True):  # the best on its mask, by brute force
        whole = torch.kron(
            torch.eye(28).double() if problem.grad_gram is None else problem.grad_gram, problem.gram
        )
        inside = kept.flatten().nonzero().flatten()
        best = torch.linalg.solve(
            whole[inside][:, inside], (whole @ problem.weight.flatten())[inside]
        )
        torch.testing.assert_close(one.flatten()[inside], best, rtol=1e-6, atol=1e-6)


def test_rows_that_are_solved_rest_while_others_go_on():
    """Without H every row has a step length of its own: an easy row must not stop or disturb a hard
    one.
    """
    problem, _, _ = posed(cases.make("square"), False)
    mask = torch.ones(1, 28, 28, dtype=torch.bool)
    mask[0, 0] = False
    mask[0, 0, 3] = True
    values = refit(
        problem, problem.weight, mask, torch.zeros(1, 28, 28).double(), 500, tolerance=1e-10
    )
    torch.testing.assert_close(values[0, 1:], problem.weight[1:], rtol=1e-5, atol=1e-5)
    assert values[0, 0, 3].item() == pytest.approx(
        (problem.weight[0] @ problem.gram[:, 3]).item(), rel=EXACT
    )


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
def test_without_output_moment_this_is_the_coder(pattern):
    problem, _, _ = posed(cases.make("wide"), False)
    project = {"rows": sparse_coding.project_columns(15), "2:4": sparse_coding.project_nm(2, 4)}[
        pattern
    ]
    correlations = problem.gram @ problem.weight.T
    first = problem.weight.T * project(problem.weight.T)
    expected = sparse_coding.admm_codes(
        problem.gram, correlations, project, first, 12, rho=0.2, growth=1.15, refit=0
    )
    mask, values = admm(problem, projection(pattern, [15 * 20]), 1, 12, 0.2, 1.15)
    torch.testing.assert_close(values[0].T, expected, rtol=1e-7, atol=1e-7)
    start = random(44, 20, seed=2)
    fitted = refit(problem, problem.weight, mask, start.T[None], 9)
    torch.testing.assert_close(
        fitted[0].T,
        sparse_coding.masked_cg(problem.gram, correlations, mask[0].T, start, 9),
        rtol=1e-7,
        atol=1e-7,
    )


@METRICS
def test_sizes_solved_together_are_those_solved_alone(two_sided):
    problem, _, _ = posed(cases.make("tall"), two_sided)
    counts = [100, 400, 700]
    masks, values = admm(problem, projection("layer", counts), 3, 15, 0.1, 1.2)
    for count, mask, one in zip(counts, masks, values, strict=True):
        alone, kept = admm(problem, projection("layer", [count]), 1, 15, 0.1, 1.2)
        assert torch.equal(alone[0], mask) and mask.sum() == count
        torch.testing.assert_close(kept[0], one, rtol=1e-7, atol=1e-7)


@METRICS
def test_keeping_everything_is_exact(two_sided):
    problem, _, _ = posed(cases.make("square"), two_sided)
    mask, values = admm(problem, projection("layer", [28 * 28]), 1, 3, 0.1, 1.2)
    assert mask.all()
    torch.testing.assert_close(
        refit(problem, problem.weight, mask, values, 1000, 1e-12)[0],
        problem.weight,
        rtol=1e-5,
        atol=1e-5,
    )


@METRICS
def test_the_rest_is_taken_off_the_target(two_sided):
    """With every entry kept, what is left of the weight is met in the metric."""
    problem, _, _ = posed(cases.make("square"), two_sided)
    rest = random(28, 28, seed=3)
    _, values = admm(
        problem,
        projection("layer", [28 * 28]),
        1,
        200,
        1e-3,
        1.0,
        rest=lambda relaxed: rest.expand_as(relaxed),
    )
    pull = problem.weigh(problem.weight - rest)
    torch.testing.assert_close(
        problem.weigh(values[0]), pull, rtol=0, atol=1e-3 * pull.abs().max().item()
    )


@pytest.mark.parametrize("seed", range(3))
@METRICS
def test_invariant_13_permuted_outputs_permute_the_answer(two_sided, seed):
    case, order = (
        cases.make("square", seed),
        torch.randperm(28, generator=torch.Generator().manual_seed(seed)),
    )
    moved = cases.Case(
        cases.Dense(case.dense.weight[order], None, torch.float32),
        case.x,
        case.g[:, order],
        cases.sums(case.x, case.g[:, order]),
    )
    answers = []
    for one in (case, moved):
        problem = posed(one, two_sided)[0]
        answers.append(admm(problem, projection("layer", [350]), 1, 15, 0.1, 1.2)[1][0])
    torch.testing.assert_close(answers[0][order], answers[1], rtol=1e-6, atol=1e-6)


def test_projections_by_hand():
    values = torch.tensor([[[4.0, -3.0, 2.0, 1.0], [-8.0, 5.0, 0.5, 6.0]]])
    assert projection("layer", [3])(values)[0].tolist() == [
        [False, False, False, False],
        [True, True, False, True],
    ]
    assert projection("rows", [2])(values)[0].tolist() == [
        [True, False, False, False],
        [True, False, False, False],
    ]
    assert projection("2:4", [4])(values)[0].tolist() == [
        [True, True, False, False],
        [True, False, False, True],
    ]
    assert projection("layer", [2, 5])(values.expand(2, -1, -1)).sum((1, 2)).tolist() == [2, 5]


def test_ties_and_zeros_meet_the_count():
    assert projection("layer", [5])(torch.zeros(1, 3, 4)).sum() == 5
    assert projection("rows", [6])(torch.ones(1, 3, 4)).sum(2).tolist() == [[2, 2, 2]]
    assert projection("4:8", [8])(torch.zeros(1, 2, 8)).sum(2).tolist() == [[4, 4]]


def test_non_finite_input_names_the_linear():
    with pytest.raises(NumericalError, match=r"blocks\.1\.q: the Gram"):
        pose("blocks.1.q", random(3, 4), torch.full((4, 4), float("nan")), None)
