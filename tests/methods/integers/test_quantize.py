"""Integer codes and their residuals: the papers' claims against their baselines, hand-made cases,
degenerate inputs, what is refused.
"""

from statistics import fmean

import pytest
import torch
from support import weights as cases
from support.sameness import assert_same_output, assert_same_tensors
from support.weights import correlated
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError, NumericalError
from compressor.linalg import Metric
from compressor.linears import Adapted, Dense, Packed
from compressor.methods import build
from compressor.methods.integers.coordinate_descent import descend
from compressor.methods.integers.error_feedback import (
    Entries,
    Grid,
    fit_grid,
    nearest,
    round_columns,
    round_entries,
)
from compressor.methods.integers.quantize import group_size
from compressor.methods.low_rank.residual import decompose
from compressor.methods.sparse.sparse import obs_factor
from compressor.statistics import LinearStats

EXACT = 1e-10  # relative, float64 identities


def prepared(case: cases.Case, **options):
    method = build("quantize", options)
    return method, method.prepare("linear", case.dense, case.stats)


def made(case: cases.Case, bits: int = 3, rank: int = 0, **options):
    """Module of one scheme in groups of 16."""
    method, state = prepared(case, bits=[bits], group=[16], residual=[rank], **options)
    (candidate,) = method.candidates(state).candidates
    return method.compress(state, candidate.setting)


def gram_error(case: cases.Case, module) -> float:
    return linalg.relative_error(case.dense.weight, module.to_dense(), Metric(case.stats.gram))


def two_sided_error(case: cases.Case, module) -> float:
    root = linalg.cholesky(case.stats.grad_gram, "gradients", "none")
    return linalg.relative_error(
        case.dense.weight, module.to_dense(), Metric(case.stats.gram), root
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_paper_beats_its_baseline(bits):
    """Error feedback loses less than rounding to nearest, in both metrics its own feedback the
    least; clipping helps; on average.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(3):
        case = correlated(seed=seed)
        for name, options in {
            "whole": {"solver": "rtn", "clip": 1.0},
            "rtn": {"solver": "rtn"},
            "gptq": {},
            "natural": {"ordering": "natural"},
            "yaqa": {"metric": "two_sided"},
        }.items():
            module = made(case, bits, **options)
            found.setdefault(name, []).append(
                (gram_error(case, module), two_sided_error(case, module))
            )
    gram, both = (
        {name: fmean(pair[place] for pair in pairs) for name, pairs in found.items()}
        for place in (0, 1)
    )
    assert (
        gram["gptq"] < 0.9 * gram["rtn"]
        and gram["gptq"] < gram["natural"] < gram["rtn"] <= gram["whole"]
    )
    assert bits == 8 or gram["rtn"] < 0.95 * gram["whole"]
    assert both["yaqa"] < 0.9 * both["gptq"] < 0.9 * both["rtn"]


def factors(case: cases.Case):
    gram, grad_gram = case.stats.gram / len(case.x), case.stats.grad_gram / len(case.g)
    inner, outer = (obs_factor(moment, (0.01,), "linear")[0] for moment in (gram, grad_gram))
    damped = [
        moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        for moment in (gram, grad_gram)
    ]
    return inner, outer, *damped


def grids(case: cases.Case) -> list[Grid]:
    weight, ones = (
        case.dense.weight.double(),
        torch.ones(case.dense.weight.shape[1], dtype=torch.float64),
    )
    schemes = [(3, 16, True), (4, 8, False), (2, 24, True)]
    return [
        fit_grid(weight, *scheme, ones, torch.linspace(1, 0.6, 5), torch.float32)
        for scheme in schemes
    ]


def by_definition(weight: Tensor, grid: Grid, moment: Tensor) -> Tensor:
    """Optimal-brain-surgeon rounding of all entries, row-major: each moves those behind it by −e /
    (K⁻¹)_11 (K⁻¹)_1, K of what is left.
    """
    scales, zeros = (part.flatten() for part in grid.columns())
    now, codes = weight.double().flatten().clone(), torch.empty(weight.numel(), dtype=torch.float64)
    for place in range(len(now)):
        inverse = torch.linalg.inv(moment[place:, place:])
        codes[place] = nearest(now[place], scales[place], zeros[place], 2 ** (grid.bits - 1))
        lost = now[place] - scales[place] * (codes[place] - zeros[place])
        now[place:] -= lost / inverse[0, 0] * inverse[0]
    return codes.view(weight.shape)


def test_feedback_is_optimal_brain_surgery_of_the_metric():
    """Along inputs with every output alone, and along both sides with the metric of all entries
    together, H ⊗ M.
    """
    case = correlated(5, 12)
    inner, outer, gram, grad_gram = factors(case)
    weight, order, rows = case.dense.weight.double(), torch.arange(12), torch.arange(5)
    grid = fit_grid(
        weight, 3, 6, False, torch.ones(12, dtype=torch.float64), torch.ones(1), torch.float32
    )
    codes = round_columns(weight, [grid], inner, order, 5)[0]
    assert torch.equal(
        codes, by_definition(weight, grid, torch.kron(torch.eye(5, dtype=torch.float64), gram))
    )
    both = round_entries(weight, [grid], inner, order, outer, rows, 4)[0]
    assert torch.equal(both, by_definition(weight, grid, torch.kron(grad_gram, gram)))
    assert not torch.equal(both, codes)


def test_blocks_only_delay_the_updates_and_grids_do_not_touch_each_other():
    case = correlated()
    inner, outer, *_ = factors(case)
    weight, order, rows = case.dense.weight.double(), torch.arange(48), torch.arange(24)
    together = round_columns(weight, grids(case), inner, order, 7)
    assert torch.equal(
        together,
        torch.cat([round_columns(weight, [grid], inner, order, 128) for grid in grids(case)]),
    )
    together = round_entries(weight, grids(case), inner, order, outer, rows, 7)
    alone = torch.cat(
        [round_entries(weight, [grid], inner, order, outer, rows, 128) for grid in grids(case)]
    )
    assert torch.equal(together, alone)
    identity = round_entries(
        weight, grids(case), inner, order, torch.eye(24, dtype=torch.float64), rows, 16
    )
    assert torch.equal(identity, round_columns(weight, grids(case), inner, order, 16))


def test_an_order_of_the_inputs_leaves_the_layout_alone():
    """Inputs that come permuted and are rounded in the order that undoes it get the same codes."""
    case = correlated()
    inner, *_ = factors(case)
    weight, shuffle = (
        case.dense.weight.double(),
        torch.randperm(48, generator=torch.Generator().manual_seed(1)),
    )
    grid = fit_grid(
        weight, 3, 48, True, torch.ones(48, dtype=torch.float64), torch.ones(1), torch.float32
    )
    direct = round_columns(weight, [grid], inner, torch.arange(48), 16)[0]
    assert torch.equal(
        round_columns(weight[:, shuffle], [grid], inner, shuffle.argsort(), 16)[0],
        direct[:, shuffle],
    )


def test_isotropic_inputs_make_feedback_rounding_to_nearest():
    case = correlated()
    alone = cases.Case(
        case.dense,
        case.x,
        case.g,
        LinearStats(tokens=1, gram=3 * torch.eye(48, dtype=torch.float64)),
    )
    one, two = made(alone, solver="rtn"), made(alone, solver="gptq")
    assert_same_output(one.to_dense(), two.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_nearest_on_the_stored_scales(symmetric, dtype):
    """Rounding again with the scales that are stored returns the same codes; inside the range
    nothing is off by more than half a step.
    """
    case = correlated()
    dense = Dense(case.dense.weight.to(dtype), None, dtype)
    module = made(
        cases.Case(dense, case.x, case.g, case.stats), 4, solver="rtn", symmetric=symmetric
    )
    zeros = torch.zeros_like(module.scales) if symmetric else module.zero_points().double()
    grid = Grid(module.scales.double(), zeros, 4, 16)
    scales, points = grid.columns()
    assert torch.equal(nearest(dense.weight.double(), scales, points, 8), module.codes().double())
    assert torch.equal(
        nearest(module.to_dense().double(), scales, points, 8), module.codes().double()
    )
    inside = (module.codes() > -8) & (module.codes() < 7)
    off = ((dense.weight.double() - module.to_dense().double()) / scales).abs()
    assert off[inside].max() <= 0.5 + EXACT and inside.sum() > 0.8 * inside.numel()


def test_rounding_by_hand():
    """Two bits, codes −2 … 1: [1, 4, −2, 0] has its largest entry at +4, so the scale is −2 and
    codes [−½ → 0, −2, 1, 0] exactly.

    Asymmetric, [0, 3, 1, 2] spans 3 steps of 1 from code −2 up: zero point −2.
    """
    one = torch.ones(4, dtype=torch.float64)
    symmetric = fit_grid(
        torch.tensor([[1.0, 4.0, -2.0, 0.0]]).double(),
        2,
        4,
        True,
        one,
        torch.ones(1),
        torch.float32,
    )
    assert symmetric.scales.tolist() == [[-2.0]]
    assert nearest(
        torch.tensor([[4.0, -2.0, 0.0]]), symmetric.scales, torch.zeros(1), 2
    ).tolist() == [[-2.0, 1.0, 0.0]]
    weight = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).double()
    asymmetric = fit_grid(weight, 2, 4, False, one, torch.ones(1), torch.float32)
    assert (asymmetric.scales.item(), asymmetric.zeros.item()) == (1.0, -2.0)
    assert nearest(weight, *asymmetric.columns(), 2).tolist() == [[-2.0, 1.0, -1.0, 0.0]]


def test_the_clip_search_weighs_inputs():
    """An outlier at an input that hardly counts is clipped away, at one that counts it is not."""
    weight = torch.tensor([[0.1, -0.2, 0.3, -0.15, 0.25, -0.3, 0.2, 1.0]]).double()
    clips = torch.linspace(1, 0.2, 81)
    light = torch.tensor([1.0] * 7 + [1e-6]).double()
    heavy = torch.tensor([1e-6] * 7 + [1.0]).double()
    wide, narrow = (
        fit_grid(weight, 3, 8, True, importance, clips, torch.float32).scales.abs().item()
        for importance in (heavy, light)
    )
    assert wide == pytest.approx(0.25) and narrow < 0.11


@pytest.mark.parametrize("metric", ["gram", "two_sided"])
def test_what_a_residual_leaves_is_the_tail_of_the_whitened_spectrum(metric):
    """Every rank from one decomposition, against singular values of Lᵀ E T with T Tᵀ = M; and as
    built, in float64.
    """
    case = correlated()
    dense = Dense(case.dense.weight.double(), None, torch.float64)
    method, state = prepared(
        cases.Case(dense, case.x, case.g, case.stats),
        bits=[3],
        group=[16],
        residual=range(24),
        metric=metric,
    )
    curve = {
        candidate.setting.get("rank", 0): candidate
        for candidate in method.candidates(state).candidates
    }
    lost = dense.weight - state.schemes[3, 16].module.to_dense()
    moment = state.weighed.metric.weigh(torch.eye(48, dtype=torch.float64))
    seen = lost if state.weighed.root is None else state.weighed.root.T @ lost
    spectrum = torch.linalg.svdvals(seen @ torch.linalg.cholesky(moment)).square()
    assert len(curve) > 10
    for rank, candidate in curve.items():
        assert candidate.error * state.weighed.energy == pytest.approx(
            spectrum[rank:].sum().item(), rel=EXACT
        )
        assert method.measure(state, method.compress(state, candidate.setting)) == pytest.approx(
            candidate.error, rel=EXACT
        )


@pytest.mark.parametrize("metric", ["gram", "two_sided"])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_what_an_integer_residual_leaves_is_that_of_the_codes(metric, solver):
    """Every rank is measured on what is stored, never better than exact factors; eight bits come
    close, four lose more.
    """
    case = correlated()
    dense = Dense(case.dense.weight.double(), None, torch.float64)
    options = {
        "bits": [3],
        "group": [16],
        "residual": [0, 1, 2, 5, 12],
        "metric": metric,
        "solver": solver,
    }
    excess = {}
    for bits in (None, 8, 4):
        method, state = prepared(
            cases.Case(dense, case.x, case.g, case.stats), residual_bits=bits, **options
        )
        errors = [candidate.error for candidate in method.candidates(state).candidates]
        for candidate in method.candidates(state).candidates:
            module = method.compress(state, candidate.setting)
            assert method.measure(state, module) == pytest.approx(candidate.error, rel=1e-8)
            assert isinstance(module, Packed) or (
                module.factor_bits == bits and module.rank == candidate.setting["rank"]
            )
        excess[bits] = errors
    assert len(excess[None]) == len(excess[8]) == len(excess[4]) == 5
    for exact, eight, four in list(zip(*excess.values(), strict=True))[1:]:
        assert exact * (1 - EXACT) <= eight < 1.002 * exact and eight < four < 1.5 * exact


def test_the_refit_and_feedback_of_residual_factors_pay():
    """Against both factors rounded to nearest as they are (card: naive 4-bit factors lose several
    times as much).
    """
    case = correlated()
    method, state = prepared(case, bits=[3], group=[16], residual=[8], residual_bits=4)
    (candidate,) = method.candidates(state).candidates
    lost = case.dense.weight.double() - state.schemes[3, 16].module.to_dense()
    naive = []
    for factor in state.schemes[3, 16].residual.pair(lost, None, 8):
        rows = factor if factor.shape[0] == 8 else factor.T
        grid = fit_grid(
            rows,
            4,
            rows.shape[1],
            True,
            torch.ones(rows.shape[1]).double(),
            torch.ones(1),
            torch.float32,
        )
        values = nearest(rows, *grid.columns(), 8) * grid.columns()[0]
        naive.append(values if factor.shape[0] == 8 else values.T)
    metric = Metric(case.stats.gram, 1 / case.stats.tokens)
    tail = state.schemes[3, 16].residual.tail[8].item()  # what exact factors leave
    assert candidate.error * state.weighed.energy - tail < 0.7 * (
        metric.energy(lost - naive[0] @ naive[1]) - tail
    )


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_eora_is_never_above_the_plain_svd_of_what_was_lost(rank, solver):
    case = correlated()
    base, eora = made(case, solver=solver), made(case, rank=rank, solver=solver)
    left, values, right = torch.linalg.svd(
        case.dense.weight.double() - base.to_dense(), full_matrices=False
    )
    plain = Adapted(base, left[:, :rank] * values[:rank], right[:rank])
    assert torch.equal(eora.base.weight, base.weight)
    assert (
        gram_error(case, eora)
        < gram_error(case, plain)
        < gram_error(case, made(case, solver=solver))
    )


def test_eora_makes_up_for_a_pruned_weight_too():
    """Wanda at 2:4: what is lost lies at the dropped entries alone; the residual leaves the tail,
    and the mask stays.
    """
    case = correlated()
    method = build("sparse", {"solver": "wanda", "metric": "gram", "pattern": "2:4"})
    state = method.prepare("linear", case.dense, case.stats)
    (candidate,) = method.candidates(state).candidates
    sparse = method.compress(state, candidate.setting)
    lost, metric = case.dense.weight.double() - sparse.to_dense(), Metric(case.stats.gram)
    assert not (lost * (sparse.to_dense() != 0)).any()
    found = decompose(lost, metric, None, 6, "linear")
    up, down = found.pair(lost, None, 6)
    spectrum = torch.linalg.svdvals(lost @ torch.linalg.cholesky(case.stats.gram)).square()
    assert found.tail.tolist() == pytest.approx(
        [spectrum[rank:].sum().item() for rank in range(7)], rel=EXACT
    )
    assert metric.energy(lost - up @ down) == pytest.approx(found.tail[6].item(), rel=EXACT)
    torch.testing.assert_close(up.T @ up, torch.eye(6, dtype=torch.float64))
    assert gram_error(case, Adapted(sparse, up.float(), down.float())) < 0.5 * gram_error(
        case, method.compress(state, candidate.setting)
    )


def test_a_singular_gram_leaves_finite_factors_and_corrects_unseen_directions():
    case = cases.make("few_tokens")
    method, state = prepared(case, bits=[3], residual=[12])
    (candidate,) = method.candidates(state).candidates
    assert candidate.error < 1e-12  # twelve tokens span twelve outputs
    module, base = method.compress(state, candidate.setting), state.schemes[3, 28].module
    weight = case.dense.weight
    assert (weight - module.to_dense()).norm() < (weight - base.to_dense()).norm()


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros_and_dead_inputs(solver, symmetric):
    case = cases.make("dead_inputs")
    weight = case.dense.weight.clone()
    weight[:5, :14] = 0
    dense = Dense(weight, None, torch.bfloat16)
    method, state = prepared(
        cases.Case(dense, case.x, case.g, case.stats),
        bits=[4],
        group=[14],
        solver=solver,
        symmetric=symmetric,
    )
    module = method.compress(state, {"bits": 4, "group": 14})
    scales = module.scales.float()
    assert (
        not module.to_dense()[:5, :14][:, 1::3].any() or solver == "gptq"
    )  # feedback may use live inputs of the group
    assert (scales[:5, 0] == 1).all() and scales.isfinite().all() and (scales != 0).all()
    off = ((weight - module.to_dense()).abs() / scales.abs().repeat_interleave(14, 1))[
        5:, ::3
    ]  # dead: to nearest, not to zero
    assert off.median() < 0.4


def test_scales_too_small_or_too_large_for_half_precision():
    case = cases.make("square")
    small = Dense(1e-9 * case.dense.weight, None, torch.float16)
    method, state = prepared(cases.Case(small, case.x, case.g, case.stats))
    module = method.compress(state, {"bits": 4, "group": 28})
    assert (module.scales != 0).all() and module.to_dense().isfinite().all()
    large = Dense(1e9 * case.dense.weight, None, torch.float16)
    method, state = prepared(cases.Case(large, case.x, case.g, case.stats))
    with pytest.raises(
        NumericalError, match=r"linear: scales in torch\.float16 holds NaN or infinity"
    ):
        method.candidates(state)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_scale_of_the_gram_does_not_matter(scale):
    case = cases.make("square")
    scaled = cases.Case(case.dense, case.x, case.g, cases.sums(case.x * scale**0.5, case.g))
    for metric in ("gram", "two_sided"):
        one, two = (prepared(which, metric=metric) for which in (case, scaled))
        modules = [
            method.compress(state, {"bits": 4, "group": 28, "rank": 0})
            for method, state in (one, two)
        ]
        assert (
            modules[0].codes() != modules[1].codes()
        ).float().mean() < 0.01  # ties may fall otherwise
    nothing = cases.Case(case.dense, case.x, case.g, cases.sums(torch.zeros_like(case.x), case.g))
    method, state = prepared(nothing)
    assert (
        method.candidates(state).energy == 0
        and method.compress(state, {"bits": 4, "group": 28}).to_dense().isfinite().all()
    )


def test_the_damping_rung_is_the_first_that_works_and_is_reported():
    case = cases.make("low_rank_gram")
    method, state = prepared(case, damping=[0.0, 0.1])
    assert [candidate.setting["damping"] for candidate in method.candidates(state).candidates] == [
        0.1
    ]
    with pytest.raises(
        NumericalError, match=r"the Gram is singular at dampings \[0\.0\].*'damping'"
    ):
        method, state = prepared(case, damping=[0.0])
        method.candidates(state)
    method, state = prepared(case, solver="rtn")
    assert "damping" not in method.candidates(state).candidates[0].setting


@pytest.mark.parametrize(
    ("group", "width", "size"),
    [
        ("auto:32", 64, 32),
        ("auto:32", 172, 43),
        ("channel", 172, 172),
        (43, 172, 43),
        ("auto:1", 5, 1),
    ],
)
def test_group_sizes(group, width, size):
    assert group_size(group, width, "linear") == size


def test_what_cannot_be_is_one_clear_line():
    case = cases.make("square")
    with pytest.raises(
        ConfigError,
        match=r"linear: groups of 16 do not divide its 28 inputs; use group 'auto:16' or 'channel'",
    ):
        method, state = prepared(case, group=[16])
        method.candidates(state)
    with pytest.raises(
        ConfigError, match=r"linear: residual rank 29 is above its smaller side, 28"
    ):
        method, state = prepared(case, residual=[29])
        method.candidates(state)
    for options, message in [
        ({"bits": [1]}, "bits"),
        ({"bits": [9]}, "bits"),
        ({"group": ["auto"]}, "auto:32"),
        ({"group": [0]}, "at least 1"),
        ({"group": ["auto:0"]}, "auto:32"),
        ({"solver": "awq"}, "'rtn' or 'gptq'"),
        ({"clip": 0.0}, "clip"),
        ({"bit": [4]}, "did you mean 'bits'"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            build("quantize", options)
        assert "\n" not in str(caught.value)


def test_ranks_above_a_side_are_left_out_where_others_fit():
    method, state = prepared(cases.make("wide"), residual=[0, 2, 64])
    assert {
        candidate.setting.get("rank", 0) for candidate in method.candidates(state).candidates
    } == {0, 2}


def test_modules_are_their_own():
    """Two ranks of one scheme, and the scheme alone, share no tensor that a change would spread
    through.
    """
    case = correlated()
    method, state = prepared(case, bits=[3], group=[16], residual=[0, 2, 4])
    modules = [
        method.compress(state, {"bits": 3, "group": 16} | rank)
        for rank in ({}, {"rank": 2}, {"rank": 4})
    ]
    assert isinstance(modules[0], Packed) and [module.down.shape[0] for module in modules[1:]] == [
        2,
        4,
    ]
    with torch.no_grad():
        modules[0].scales.zero_()
        modules[1].weight.zero_()
    again = method.compress(state, {"bits": 3, "group": 16, "rank": 4})
    assert_same_tensors(again.state_dict(), modules[2].state_dict())


def test_a_weight_that_is_not_finite_names_the_linear():
    case = cases.make("square")
    case.dense.weight[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="linear: the weight holds NaN"):
        prepared(case)


def loss(
    weight: Tensor, codes: Tensor, entries: Entries, metric: Metric, root: Tensor | None
) -> Tensor:
    """tr(H D M Dᵀ) of every scheme (K,), by definition."""
    lost = weight - entries.scales * (codes - entries.zeros)
    lost = lost if root is None else root.T @ lost
    return torch.stack([(metric.weigh(one) * one).sum() for one in lost])


@pytest.mark.parametrize("kind", ["square", "wide", "dead_inputs", "few_tokens", "zero_weight"])
@pytest.mark.parametrize("start", ["nearest", "random"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["gram", "two-sided"])
def test_no_sweep_of_adaptive_rounding_raises_the_error(kind, start, two_sided):
    """From any codes at all, on several grids at once; where nothing moves any more, no single code
    is better moved.
    """
    case = cases.make(kind)
    weight, metric = case.dense.weight.double(), Metric(case.stats.gram, 1 / case.stats.tokens)
    root = (
        linalg.cholesky(linalg.shrink(case.stats.grad_gram, 0.1), "gradients", "none")
        if two_sided
        else None
    )
    width, ones = weight.shape[1], torch.ones(weight.shape[1], dtype=torch.float64)
    schemes = [(2, width // 2, True), (4, width // 2, False)]
    grids = [fit_grid(weight, *scheme, ones, torch.ones(1), torch.float32) for scheme in schemes]
    entries, half = Entries.of(grids), torch.tensor([2.0, 8.0])[:, None, None]
    codes = nearest(weight, entries.scales, entries.zeros, half)
    if start == "random":
        codes = torch.randint(
            -2, 2, codes.shape, generator=torch.Generator().manual_seed(0)
        ).double()
    losses = [loss(weight, codes, entries, metric, root)]
    for sweeps in (1, 2, 30):
        found = descend(weight, codes, entries, metric, root, sweeps, 5)
        losses.append(loss(weight, found, entries, metric, root))
        assert (losses[-1] <= losses[-2] * (1 + EXACT) + 1e-12).all()
        assert (found >= -half).all() and (found < half).all() and torch.equal(found, found.round())
    if two_sided:
        return
    for column in range(0, width, 3):
        for move in (-1, 1):
            other = found.clone()
            other[..., column] = (other[..., column] + move).clamp(
                -entries.halves, entries.halves - 1
            )
            assert (loss(weight, other, entries, metric, root) >= losses[-1] * (1 - EXACT)).all()


@pytest.mark.parametrize("metric", ["gram", "two_sided"])
@pytest.mark.parametrize("bits", [2, 4])
def test_adaptive_rounding_ends_below_feedback_and_is_what_is_measured(bits, metric):
    errors: dict[int, float] = {}
    for sweeps in (0, 3):
        method, state = prepared(
            correlated(), bits=[bits], group=[16], metric=metric, sweeps=sweeps
        )
        (candidate,) = method.candidates(state).candidates
        assert method.measure(state, method.compress(state, candidate.setting)) == pytest.approx(
            candidate.error, rel=1e-6
        )
        errors[sweeps] = candidate.error
    assert errors[3] < 0.97 * errors[0]
