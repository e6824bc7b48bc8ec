"""Wrapped 2:4 cores: every step lowers the error, nothing ends above its 2:4 start, small cases by
brute force.
"""

from itertools import combinations, pairwise

import pytest
import torch
from safetensors.torch import save_file
from support import weights as cases
from support.models import VOCABULARY

import compressor
from compressor.errors import ConfigError
from compressor.linears import Dense, Wrapped
from compressor.methods import build
from compressor.methods.sparse.admm import Problem, projection
from compressor.methods.sparse.armor import choose_core, divisor, identity
from compressor.methods.sparse.block_diagonal import (
    Factors,
    bounds,
    descend,
    masks,
    values,
    wrappers,
)
from compressor.pipeline import run
from compressor.recipe.load import load_recipe
from compressor.statistics import LinearStats

SLACK = 1 + 1e-9  # float64 rounding of an error that may not grow


def ill_conditioned(seed: int) -> cases.Case:
    """Inputs and gradients of nearly one dimension: condition numbers of 1e12 and more."""
    generator = torch.Generator().manual_seed(seed)
    case = cases.make("square", seed)
    x = torch.randn(200, 28, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -7, 28, dtype=torch.float64
    )
    x = x @ torch.linalg.qr(torch.randn(28, 28, generator=generator, dtype=torch.float64))[0]
    return cases.Case(
        case.dense,
        x,
        case.g * torch.logspace(0, -6, 28),
        cases.sums(x, case.g * torch.logspace(0, -6, 28)),
    )


EVERY = {
    kind: cases.make(kind, seed)
    for seed, kind in enumerate(
        ("wide", "tall", "biased", "low_rank_gram", "dead_inputs", "zero_weight")
    )
}
EVERY |= {f"ill_conditioned_{seed}": ill_conditioned(seed) for seed in range(2)} | {
    "correlated": cases.correlated()
}
CASES = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
METRICS = pytest.mark.parametrize(
    "options",
    [{"metric": "gram"}, {"metric": "two_sided", "shrink_gram": 0.0, "shrink_grad_gram": 1e-6}],
    ids=str,
)


def posed(case: cases.Case, wrapper: int = 4, **options) -> tuple[Problem, Factors, Factors]:
    """A problem, the start that the method takes, and Wanda's."""
    method = build("armor", options)
    state = method.prepare("linear", case.dense, case.stats)
    problem = state.weighed.problem
    left, right = (
        identity(size, divisor(size, wrapper), problem.weight) for size in problem.weight.shape
    )
    wanda = projection("2:4", [0])(problem.weight[None])[0]
    return (
        problem,
        Factors(left, state.core, state.mask, right),
        Factors(left, problem.weight * wanda, wanda, right),
    )


def error(problem: Problem, factors: Factors) -> float:
    return problem.error(factors.product())


@CASES
@METRICS
def test_the_error_never_grows_from_step_to_step_and_stays_two_of_four(case, options):
    for wrapper in (4, 14):
        problem, start, wanda = posed(case, wrapper, **options)
        rounding = 1e-13 * problem.error(torch.zeros_like(problem.weight))
        assert error(problem, start) <= error(problem, wanda) * SLACK
        for factors in (start, wanda):
            errors = [error(problem, factors)]
            for step in (wrappers, masks, lambda *known: values(*known, 4)) * 2:
                factors = step(problem, factors)
                errors.append(error(problem, factors))
                assert (factors.mask.view(-1, 4).sum(1) == 2).all() and not factors.core[
                    ~factors.mask
                ].any()
            assert all(
                later <= earlier * SLACK + rounding for earlier, later in pairwise(errors)
            ), errors
        found, path = descend(problem, wanda, 3, 4, 0.0)
        assert (
            all(later <= earlier for earlier, later in pairwise(path))
            and error(problem, found) <= path[0]
        )


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_errs_no_more_than_the_start_as_stored(case, dtype):
    method = build("armor", {"sweeps": 3})
    dense = Dense(case.dense.weight, case.dense.bias, dtype)
    state = method.prepare("linear", dense, case.stats)
    found, start = (
        each.compress(state, {"wrapper": 4}) for each in (method, build("armor", {"sweeps": 0}))
    )
    assert method.measure(state, found) <= method.measure(state, start)
    identity_wrappers = torch.eye(len(start.left[0]), dtype=dtype)
    assert torch.equal((start.left != 0), (identity_wrappers != 0).expand_as(start.left))
    groups = found.places()
    assert (groups[..., 0] < groups[..., 1]).all() and (found.bias is None) == (
        case.dense.bias is None
    )


def test_wrappers_are_worth_more_than_their_bits():
    """On resembling neighbours, wrappers take a part of the error of the better 2:4 start away,
    larger ones more.
    """
    case = cases.correlated(48, 96)
    method = build("armor", {"metric": "gram", "measured": True})
    state = method.prepare("linear", case.dense, case.stats)
    curve = method.candidates(state)
    errors = [candidate.error for candidate in curve.candidates]
    assert errors[0] < 0.85 * state.lost and errors[1] < 0.75 * errors[0]
    guessed = build("armor", {"metric": "gram"}).candidates(state)
    assert guessed.screened and all(
        0.3 < a.error / b.error < 3
        for a, b in zip(guessed.candidates, curve.candidates, strict=True)
    )


def test_four_inputs_take_the_best_pair_there_is():
    """With identity wrappers and independent outputs the mask step is exact: least squares for each
    of the six pairs.
    """
    generator = torch.Generator().manual_seed(0)
    moment = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    moment = moment.T @ moment
    weight = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    problem = Problem("linear", weight, torch.ones(4), torch.ones(12, 1), moment, None)
    mask = torch.tensor([True, True, False, False]).expand(12, 4)
    left, right = identity(12, 1, weight), identity(4, 2, weight)
    found = masks(problem, Factors(left, weight * mask, mask, right)).core
    for row in range(12):
        losses = []
        for pair in map(list, combinations(range(4), 2)):
            lost = weight[row].clone()
            lost[pair] -= torch.linalg.solve(moment[pair][:, pair], moment[pair] @ weight[row])
            losses.append((lost @ moment @ lost).item())
        lost = weight[row] - found[row]
        assert (lost @ moment @ lost).item() == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_single_wrapper_is_least_squares(two_sided):
    """Blocks as wide as the matrix: the right wrapper solves for everything that the core can pass
    on.
    """
    case = cases.correlated(12, 8)
    problem, start, _ = posed(case, 12, metric="two_sided" if two_sided else "gram")
    found = wrappers(problem, start)
    across = torch.eye(12, dtype=torch.float64) if problem.grad_gram is None else problem.grad_gram
    core = start.core
    right = torch.linalg.solve(core.T @ across @ core, core.T @ across @ problem.weight)
    torch.testing.assert_close(found.right[0], right, rtol=1e-5, atol=1e-6)


def test_the_bound_of_the_mask_step_is_one():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)
    coupling = blocks.mT @ blocks
    gap = torch.diag_embed(bounds(coupling).view(5, 6)) - coupling
    assert torch.linalg.eigvalsh(gap).min() > -1e-9


def test_starts_from_the_better_of_wanda_and_admm():
    problem, _, wanda = posed(cases.correlated(), metric="gram")
    core, mask, lost = choose_core(problem)
    assert (
        lost == problem.error(core) < 0.7 * error(problem, wanda)
        and (mask.view(-1, 4).sum(1) == 2).all()
    )


def test_inputs_that_are_no_multiple_of_four_are_refused():
    dense = Dense(torch.randn(6, 10), None, torch.float32)
    stats = LinearStats(tokens=3, gram=torch.eye(10, dtype=torch.float64))
    with pytest.raises(ConfigError, match="q_proj: pattern 2:4 does not divide its 10 inputs"):
        build("armor", {"metric": "gram"}).prepare("q_proj", dense, stats)


def test_blocks_are_the_largest_divisors_that_fit():
    assert [divisor(172, most) for most in (1, 4, 8, 32, 43, 1000)] == [1, 4, 4, 4, 43, 172]


def test_a_checkpoint_reloads_bit_for_bit(tiny_llama, tmp_path):
    windows = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0))
    save_file({"windows": windows}, tmp_path / "tokens.safetensors")
    small = [
        "calibration.windows=8",
        "calibration.length=32",
        "calibration.heldout=2",
        "evaluation.enabled=false",
        "model.device=cpu",
    ]
    named = {
        "model.name": str(tiny_llama),
        "calibration.source": f"{tmp_path / 'tokens.safetensors'}:windows",
    }
    report = run.compress(
        load_recipe(
            "armor",
            [*small, "allocation.keep=0.8", "method.0.candidates.0.options.sweeps=2"],
            named,
        ),
        tmp_path / "out",
    )
    model, _ = compressor.load(tmp_path / "out")
    assert (
        sum(isinstance(module, Wrapped) for module in model.modules())
        == len(report["linears"])
        == 14
    )
    assert report["kept"]["targets"] <= 0.8 and run.verify(tmp_path / "out") == []
    for linear in report["linears"]:
        assert linear["bits"] == model.get_submodule(linear["name"]).bits()
