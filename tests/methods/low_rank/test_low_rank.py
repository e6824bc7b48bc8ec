"""The low-rank family against the identities of its card (section 4, float64) and the papers'
claims against their baselines.
"""

import itertools

import pytest
import torch
from support import weights as cases
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError, NumericalError
from compressor.linalg import Metric
from compressor.linears import Dense
from compressor.methods import build
from compressor.statistics import LinearStats

EXACT = 1e-9  # relative, float64 identities
RANK = 7


def prepared(case: cases.Case, metric: str, **options):
    method = build("low_rank", {"metric": metric, **options})
    return method, method.prepare(
        "linear", Dense(case.dense.weight.double(), case.dense.bias, torch.float64), case.stats
    )


def approximation(state, rank: int) -> Tensor:
    up, down = state.factors(rank)
    return up @ down


def errors(method, state) -> list[float]:
    """Absolute error at every rank offered, rank 1 first."""
    curve = method.candidates(state)
    return [candidate.error * curve.energy for candidate in curve.candidates]


@pytest.mark.parametrize("kind", ["square", "tall", "wide"])
def test_identity_1_error_is_the_tail_of_the_whitened_spectrum_and_energy_splits(kind):
    case = cases.make(kind)
    method, state = prepared(case, "gram")
    weight, tokens = case.dense.weight.double(), len(case.x)
    whitened = torch.linalg.svdvals(weight @ torch.linalg.cholesky(case.stats.gram / tokens))
    close = approximation(state, RANK)
    lost = (case.x @ (weight - close).T).square().sum().item() / tokens
    assert lost == pytest.approx(whitened[RANK:].square().sum().item(), rel=EXACT)
    assert lost == pytest.approx(errors(method, state)[RANK - 1], rel=EXACT)
    kept = (case.x @ close.T).square().sum().item() / tokens
    assert kept + lost == pytest.approx(
        (case.x @ weight.T).square().sum().item() / tokens, rel=EXACT
    )


@pytest.mark.parametrize("kind", ["square", "tall", "wide"])
def test_identity_2_all_routes_give_the_same_weight(kind):
    case = cases.make(kind)
    _, state = prepared(case, "gram")
    weight, gram = case.dense.weight.double(), case.stats.gram / len(case.x)
    values, basis = torch.linalg.eigh(gram)
    for root in (
        torch.linalg.cholesky(gram),
        basis * values.sqrt(),
        basis * values.sqrt() @ basis.T,
    ):
        left, sigma, right = torch.linalg.svd(weight @ root, full_matrices=False)
        route = (left[:, :RANK] * sigma[:RANK]) @ right[:RANK] @ torch.linalg.inv(root)
        torch.testing.assert_close(approximation(state, RANK), route, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "metric",
    ["identity", "fisher", "mean_abs", "gram_diagonal", "gram", "centred_gram", "two_sided"],
)
def test_identity_3_full_rank_is_exact_and_16_smaller_ranks_are_leading_slices(metric):
    case = cases.make("wide")
    _, state = prepared(case, metric)
    torch.testing.assert_close(
        approximation(state, 20), case.dense.weight.double(), rtol=1e-8, atol=1e-8
    )
    up, down = state.factors(20)
    torch.testing.assert_close(state.factors(RANK)[0], up[:, :RANK], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(state.factors(RANK)[1], down[:RANK], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["square", "tall", "wide", "dead_inputs", "few_tokens"])
def test_identity_4_each_metric_is_best_at_its_own_error(kind, seed):
    """SVD-LLM, FWSVD, ASVD and AWSVD against plain SVD: each paper's claim, measured in the norm it
    minimises.
    """
    case = cases.make(kind, seed)
    weight, gram = case.dense.weight.double(), case.stats.gram / len(case.x)
    close = {
        name: approximation(prepared(case, name)[1], RANK)
        for name in ("identity", "fisher", "mean_abs", "gram_diagonal", "gram")
    }
    metrics = {
        "identity": None,
        "fisher": case.stats.fisher,
        "mean_abs": case.stats.abs_sum,
        "gram_diagonal": gram.diagonal(),
        "gram": gram,
    }
    for name, metric in metrics.items():
        best = Metric(metric).energy(weight - close[name])
        for other in close.values():
            assert best <= Metric(metric).energy(weight - other) * (1 + EXACT) + 1e-12
    curve = errors(*prepared(case, "gram"))
    steps = [one - two for one, two in itertools.pairwise(curve)]
    assert all(step >= -1e-9 * curve[0] for step in steps)
    assert all(later <= earlier + 1e-9 * curve[0] for earlier, later in itertools.pairwise(steps))


def test_identity_5_centring_gains_at_most_one_rank_and_its_bias_keeps_the_mean_output():
    case = cases.make("biased")
    centred, plain = errors(*prepared(case, "centred_gram")), errors(*prepared(case, "gram"))
    for rank in range(len(centred) - 1):
        assert plain[rank + 1] - 1e-9 <= centred[rank] <= plain[rank] + 1e-9
    method, state = prepared(case, "centred_gram", storage="factors")
    module = method.compress(state, {"rank": RANK})
    expected = case.x @ case.dense.weight.double().T + case.dense.bias.double()
    lost = module(case.x) - expected
    torch.testing.assert_close(
        lost.mean(0), torch.zeros(28, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert lost.square().sum().item() / len(case.x) == pytest.approx(centred[RANK - 1], rel=1e-6)


def test_identity_6_isotropic_whitening_is_plain_svd_and_rescaled_inputs_change_nothing():
    case = cases.make("square")
    scaled = LinearStats(tokens=1, gram=4 * torch.eye(28, dtype=torch.float64))
    method = build("low_rank", {"metric": "gram"})
    isotropic = method.prepare(
        "linear", Dense(case.dense.weight.double(), None, torch.float64), scaled
    )
    torch.testing.assert_close(
        approximation(isotropic, RANK),
        approximation(prepared(case, "identity")[1], RANK),
        rtol=1e-8,
        atol=1e-8,
    )
    scale = torch.linspace(0.2, 3, 28, dtype=torch.float64)
    moved = cases.sums(case.x * scale, case.g)
    state = method.prepare(
        "linear", Dense(case.dense.weight.double() / scale, None, torch.float64), moved
    )
    torch.testing.assert_close(
        approximation(state, RANK) * scale,
        approximation(prepared(case, "gram")[1], RANK),
        rtol=1e-7,
        atol=1e-7,
    )


def test_identity_7_refitting_either_factor_on_the_same_inputs_changes_nothing():
    case = cases.make("wide")
    _, state = prepared(case, "gram")
    up, down = state.factors(RANK)
    outputs = case.x @ case.dense.weight.double().T
    refit = torch.linalg.lstsq(case.x @ down.T, outputs).solution.T
    torch.testing.assert_close(refit, up, rtol=1e-6, atol=1e-6)
    again = torch.linalg.lstsq(case.x, outputs @ torch.linalg.pinv(up).T).solution.T
    torch.testing.assert_close(case.x @ again.T, case.x @ down.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["square", "tall", "wide"])
def test_identity_9_two_sided_error_is_the_tail_and_reduces_to_one_sided(kind):
    case = cases.make(kind)
    method, state = prepared(case, "two_sided", shrink_gram=0.0, shrink_grad_gram=0.05)
    weight, gram = case.dense.weight.double(), case.stats.gram / len(case.x)
    moment = linalg.shrink(case.stats.grad_gram / len(case.g), 0.05)
    sigma = torch.linalg.svdvals(
        torch.linalg.cholesky(moment).T @ weight @ torch.linalg.cholesky(gram)
    )
    lost = weight - approximation(state, RANK)
    direct = torch.trace(moment @ lost @ gram @ lost.T).item()
    assert direct == pytest.approx(sigma[RANK:].square().sum().item(), rel=EXACT)
    assert direct == pytest.approx(errors(method, state)[RANK - 1], rel=EXACT)
    flat = cases.sums(case.x, torch.zeros(1, weight.shape[0], dtype=torch.float64))
    flat = LinearStats(
        **{**vars(flat), "grad_gram": torch.eye(weight.shape[0], dtype=torch.float64)}
    )
    same = build("low_rank", {"metric": "two_sided", "shrink_gram": 0.0}).prepare(
        "linear", Dense(weight, None, torch.float64), flat
    )
    torch.testing.assert_close(
        approximation(same, RANK),
        approximation(prepared(case, "gram")[1], RANK),
        rtol=1e-7,
        atol=1e-7,
    )


@pytest.mark.parametrize("seed", range(3))
def test_two_sided_is_best_at_the_second_order_loss(seed):
    """KFAC-SVD's claim against SVD-LLM and plain SVD."""
    case = cases.make("square", seed)
    weight = case.dense.weight.double()
    _, state = prepared(case, "two_sided")
    best = state.metric.energy(state.root.T @ (weight - approximation(state, RANK)))
    for metric in ("gram", "identity"):
        other = approximation(prepared(case, metric)[1], RANK)
        assert best < state.metric.energy(state.root.T @ (weight - other))


@pytest.mark.parametrize("kind", ["square", "tall", "wide", "low_rank_weight"])
@pytest.mark.parametrize("rank", [1, RANK, 19])
def test_identity_11_pivoted_storage_is_lossless_smaller_and_bounded(kind, rank):
    case = cases.make(kind)
    pair, state = prepared(case, "gram", storage="factors")
    pivoted = build("low_rank", {"metric": "gram", "storage": "pivoted"})
    one, two = pair.compress(state, {"rank": rank}), pivoted.compress(state, {"rank": rank})
    torch.testing.assert_close(two.to_dense(), one.to_dense(), rtol=1e-7, atol=1e-7)
    height, width = case.dense.weight.shape
    assert two.stored_parameters() == rank * (height + width - rank)
    assert one.stored_parameters() - two.stored_parameters() == rank**2
    assert two.weight.abs().max() <= 2.0 + 1e-9


@pytest.mark.parametrize("metric", ["gram", "gram_diagonal", "mean_abs", "centred_gram"])
def test_identity_15_dead_and_duplicated_inputs_leave_calibrated_outputs_alone(metric):
    case = cases.make("square")
    weight = case.dense.weight.double()
    x = torch.cat([case.x, torch.zeros(len(case.x), 4, dtype=torch.float64)], 1)
    wider = Dense(
        torch.cat([weight, torch.ones(28, 4, dtype=torch.float64)], 1), None, torch.float64
    )
    state = build("low_rank", {"metric": metric}).prepare("linear", wider, cases.sums(x, case.g))
    narrow = prepared(case, metric)[1]
    torch.testing.assert_close(
        x @ approximation(state, RANK).T,
        case.x @ approximation(narrow, RANK).T,
        rtol=1e-7,
        atol=1e-7,
    )


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_f22_extreme_scales_and_zero_grams_complete(scale):
    case = cases.make("square")
    stats = cases.sums(case.x * scale**0.5, case.g * scale**0.5)
    for metric in ("gram", "fisher", "gram_diagonal", "two_sided"):
        method = build("low_rank", {"metric": metric})
        state = method.prepare("linear", case.dense, stats)
        assert torch.isfinite(method.compress(state, {"rank": RANK}).to_dense()).all()
        unscaled = method.candidates(prepared(case, metric)[1]).candidates[RANK].error
        assert method.candidates(state).candidates[RANK].error == pytest.approx(unscaled, rel=1e-3)
    nothing = cases.sums(torch.zeros_like(case.x), case.g)
    method = build("low_rank", {"metric": "gram"})
    curve = method.candidates(method.prepare("linear", case.dense, nothing))
    assert curve.energy == 0 and all(candidate.error == 0 for candidate in curve.candidates)


def test_a_singular_gradient_moment_without_shrinkage_names_the_option():
    case = cases.make("few_tokens")
    with pytest.raises(NumericalError, match=r"linear.*shrink_grad_gram"):
        prepared(case, "two_sided", shrink_grad_gram=0.0)


def test_f20_weight_with_nan_names_the_linear():
    case = cases.make("square")
    weight = case.dense.weight.clone()
    weight[3, 4] = float("nan")
    with pytest.raises(NumericalError, match=r"blocks\.3\.q"):
        build("low_rank", {"metric": "gram"}).prepare(
            "blocks.3.q", Dense(weight, None, torch.float32), case.stats
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrc": "gram"}, "did you mean 'metric'"),
        ({"metric": "grams"}, "metric"),
        ({"shrink_gram": 1.5}, "shrink_gram"),
        ({"rank_step": 0}, "rank_step"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build("low_rank", options)
    assert "\n" not in str(caught.value)


def test_welore_thresholds_are_min_max_normalised_singular_values():
    case = cases.make("square")
    method, state = prepared(case, "identity", storage="factors")
    sigma = torch.linalg.svdvals(case.dense.weight.double())
    normalised = (sigma - sigma[-1]) / (sigma[0] - sigma[-1])
    curve = method.candidates(state)
    assert curve.thresholds == pytest.approx(
        normalised[: len(curve.candidates) + 1].tolist(), rel=1e-7, abs=1e-9
    )
