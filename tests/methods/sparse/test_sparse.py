"""Direct sparsity: the papers' claims against their baselines, hand-made cases, the stored
patterns, the screened curve.
"""

import math
from statistics import fmean

import pytest
import torch
from support import weights as cases
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError, NumericalError
from compressor.linalg import Metric
from compressor.linears import Dense
from compressor.linears.masks import unpack_mask
from compressor.methods import build
from compressor.methods.sparse.sparse import obs_factor, surgeon
from compressor.statistics import LinearStats

EXACT = 1e-9  # relative, float64 identities
SOLVERS = ("wanda", "sparsegpt", "admm")


def prepared(case: cases.Case, solver: str, metric: str = "gram", **options):
    method = build("sparse", {"solver": solver, "metric": metric, **options})
    return method, method.prepare("linear", case.dense, case.stats)


def solved(case: cases.Case, solver: str, count: int, metric: str = "gram", **options) -> Tensor:
    method, state = prepared(case, solver, metric, **options)
    return method.solve(state, [count])[0][0]


def gram_error(case: cases.Case, approximation: Tensor) -> float:
    return linalg.relative_error(case.dense.weight, approximation, Metric(case.stats.gram))


def correlated(height: int, width: int, seed: int = 0, tokens: int = 400) -> cases.Case:
    """Inputs with a spread of scales and neighbours that resemble each other, as in a trained
    model.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x = (noise + 0.8 * noise.roll(1, 1) + 0.4 * noise.roll(3, 1)) * torch.logspace(
        0, -1, width, dtype=torch.float64
    )
    x = x[:, torch.randperm(width, generator=generator)]
    g = torch.randn(tokens, height, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -1, height, dtype=torch.float64
    )
    weight = torch.randn(height, width, generator=generator)
    return cases.Case(Dense(weight, None, torch.float32), x, g, cases.sums(x, g))


@pytest.mark.parametrize("density", [0.7, 0.5, 0.3])
def test_each_paper_beats_its_baseline(density):
    """SparseGPT loses less than Wanda, Wanda less than magnitude, and ADMM no more than SparseGPT,
    on average over seeds.
    """
    errors: dict[str, list[float]] = {name: [] for name in (*SOLVERS, "magnitude")}
    for seed in range(3):
        case = correlated(32, 48, seed)
        count = int(density * 48) * 32
        for solver in SOLVERS:
            errors[solver].append(gram_error(case, solved(case, solver, count, pattern="rows")))
        weight = case.dense.weight.double()
        threshold = weight.abs().sort(1, descending=True).values[:, count // 32, None]
        errors["magnitude"].append(gram_error(case, weight * (weight.abs() > threshold)))
    mean = {name: fmean(found) for name, found in errors.items()}
    assert mean["sparsegpt"] < 0.95 * mean["wanda"] and mean["wanda"] < 0.95 * mean["magnitude"]
    assert mean["admm"] < mean["sparsegpt"]


@pytest.mark.parametrize("pattern", ["layer", "rows", "2:4"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_isotropic_inputs_make_every_solver_magnitude_pruning(solver, pattern):
    case = correlated(16, 24)
    stats = LinearStats(tokens=1, gram=3 * torch.eye(24, dtype=torch.float64))
    count = 16 * 12
    found = solved(cases.Case(case.dense, case.x, case.g, stats), solver, count, pattern=pattern)
    weight = case.dense.weight.double()
    if pattern == "2:4":
        groups = weight.unflatten(1, (-1, 4))
        mask = (groups.abs() >= groups.abs().sort(2).values[..., 2:3]).flatten(1)
    elif pattern == "rows":
        mask = weight.abs() >= weight.abs().sort(1).values[:, 12:13]
    else:
        mask = weight.abs() >= weight.abs().flatten().sort().values[-count]
    if solver == "admm":  # its duals let near ties change places
        assert (weight - found).square().sum() < 1.005 * (weight * ~mask).square().sum()
    else:
        torch.testing.assert_close(found, weight * mask, rtol=1e-6, atol=1e-9)


def test_more_sensitive_outputs_keep_more_in_the_two_sided_metric():
    """It beats the Gram alone at the second-order loss tr(H D G Dᵀ), which is what it minimises."""
    for seed in range(3):
        case = correlated(32, 48, seed)
        method, state = prepared(case, "admm", "two_sided")
        found = method.solve(state, [768])[0][0]
        assert state.weighed.error(found) < 0.9 * state.weighed.error(
            solved(case, "admm", 768, pattern="layer")
        )
        kept = (found != 0).sum(1)
        assert (
            kept[:8].sum() > 1.5 * kept[-8:].sum()
        )  # output gradients shrink tenfold from the first output to the last


def test_wanda_by_hand():
    """|W| ‖X‖ with norms 1, 2, 4: 3·1, 1·2, 1·4 keeps inputs 0 and 2; 5·1, 3·2, 1·4 keeps inputs 0
    and 1; nothing is updated.
    """
    weight = torch.tensor([[3.0, 1.0, -1.0], [-5.0, 3.0, 1.0]])
    stats = LinearStats(tokens=7, gram=torch.diag(torch.tensor([1.0, 4.0, 16.0]).double()))
    method = build("sparse", {"solver": "wanda", "metric": "gram", "pattern": "rows"})
    values, mask = method.solve(
        method.prepare("linear", Dense(weight, None, torch.float32), stats), [4]
    )
    assert values[0].tolist() == [[3.0, 0.0, -1.0], [-5.0, 3.0, 0.0]]
    assert mask[0].int().tolist() == [[1, 0, 1], [1, 1, 0]]


def test_sparsegpt_by_hand():
    """Two inputs with Gram [[2, 1], [1, 1]]: (G⁻¹) = [[1, −1], [−1, 2]], so U = [[1, −1], [0, 1]]
    and both columns compete as they are.

    Row (1, 3) loses its first entry, and the second takes over G₁₂ / G₂₂ = 1 of it: (0, 4). Row (3,
    1) loses its second, last entry, which nothing behind it can make up for: (3, 0).
    """
    gram = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    factor, damping = obs_factor(gram, (0.0,), "linear")
    torch.testing.assert_close(factor, torch.tensor([[1.0, -1.0], [0.0, 1.0]], dtype=torch.float64))
    values, mask = surgeon(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), factor, "rows", [2], 128)
    torch.testing.assert_close(
        values[0], torch.tensor([[0.0, 4.0], [3.0, 0.0]], dtype=torch.float64)
    )
    assert mask[0].tolist() == [[False, True], [True, False]] and damping == 0.0


def test_sparsegpt_columns_are_optimal_brain_surgeon_steps():
    """Against the definition: dropping w_j moves the columns behind it by −w_j / (K⁻¹)_jj ·
    (K⁻¹)_j, K the Gram of columns from j on.
    """
    case = correlated(6, 20)
    gram = case.stats.gram / len(case.x)
    factor, _ = obs_factor(gram, (0.01,), "linear")
    values, mask = surgeon(case.dense.weight, factor, "2:4", [60], 8)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    expected = case.dense.weight.double().clone()
    for j in range(20):
        inverse = torch.linalg.inv(damped[j:, j:])
        dropped = torch.where(mask[0][:, j], 0.0, expected[:, j])
        expected[:, j:] -= dropped[:, None] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(values[0], expected * mask[0], rtol=1e-7, atol=1e-9)


def test_sparsegpt_blocks_only_delay_the_updates():
    """2:4 chooses its masks group by group, so the block size must not matter; and sizes solved
    together are those solved alone.
    """
    case = correlated(8, 40)
    factor, _ = obs_factor(case.stats.gram, (0.01,), "linear")
    one, two = (surgeon(case.dense.weight, factor, "2:4", [160], block) for block in (8, 128))
    assert torch.equal(one[1], two[1])
    torch.testing.assert_close(one[0], two[0], rtol=1e-8, atol=1e-9)
    together = surgeon(case.dense.weight, factor, "layer", [100, 220], 16)
    for place, count in enumerate((100, 220)):
        alone = surgeon(case.dense.weight, factor, "layer", [count], 16)
        assert torch.equal(alone[1][0], together[1][place]) and alone[1].sum() == count
        torch.testing.assert_close(alone[0][0], together[0][place], rtol=1e-8, atol=1e-9)


def test_the_damping_rung_is_the_first_that_works_and_is_reported():
    case = cases.make("low_rank_gram")
    gram = case.stats.gram.double()
    assert obs_factor(gram, (0.01, 0.1), "linear")[1] == 0.01
    assert obs_factor(gram, (0.0, 0.1), "linear")[1] == 0.1
    method = build("sparse", {"solver": "sparsegpt", "metric": "gram", "damping": [0.0, 0.1]})
    curve = method.candidates(method.prepare("linear", case.dense, case.stats))
    assert {candidate.setting["damping"] for candidate in curve.candidates} == {0.1}
    with pytest.raises(
        NumericalError, match=r"blocks\.2\.o: the Gram is singular at dampings \[0\.0\].*'damping'"
    ):
        build("sparse", {"solver": "sparsegpt", "metric": "gram", "damping": [0.0]}).prepare(
            "blocks.2.o", case.dense, case.stats
        )


def test_dead_inputs_are_dropped_first():
    case = cases.make("dead_inputs")
    for solver in SOLVERS:
        for pattern in ("rows", "layer"):
            assert not solved(case, solver, 28 * 18, pattern=pattern)[:, ::3].abs().gt(1e-9).any()
            assert gram_error(
                case, solved(case, solver, 28 * 18, pattern=pattern)
            ) == pytest.approx(0, abs=1e-9)


def test_admm_meets_the_masked_least_squares_condition():
    """Card invariant 8 on what is stored: no gradient of the error is left on the mask."""
    case = correlated(16, 24)
    method, state = prepared(case, "admm", "two_sided", refit=400)
    values, mask = method.solve(state, [200])
    lost = (
        (case.dense.weight.double() - values[0])
        * state.weighed.problem.outputs
        * state.weighed.problem.inputs
    )
    gradient, pull = (
        state.weighed.problem.weigh(lost),
        state.weighed.problem.weigh(state.weighed.problem.weight),
    )
    assert (gradient * mask[0]).norm() < 2e-5 * (pull * mask[0]).norm() < gradient.norm()
    assert not values[0][~mask[0]].any() and mask.sum() == 200


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("pattern", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_n_of_m_holds_in_the_stored_form(solver, pattern, kept, group):
    case = correlated(12, 40)
    dense = Dense(case.dense.weight.bfloat16(), None, torch.bfloat16)
    method = build("sparse", {"solver": solver, "metric": "gram", "pattern": pattern})
    state = method.prepare("linear", dense, case.stats)
    (candidate,) = method.candidates(state).candidates
    module = method.compress(state, candidate.setting)
    mask = unpack_mask(module.mask, 480).view(12, -1, group)
    assert (mask.sum(2) == kept).all()
    assert module.bits() == candidate.bits == 480 * 9  # half of 16 bits, and one bit of mask
    assert not module.to_dense()[~mask.flatten(1)].any()


@pytest.mark.parametrize("name", ["sparse", "sparse_low_rank"])
def test_n_of_m_on_other_widths_is_one_clear_error(name):
    case = correlated(8, 42)
    method = build(name, {"pattern": "2:4"})
    with pytest.raises(
        ConfigError,
        match=r"blocks\.0\.up: pattern 2:4 does not divide its 42 inputs; use pattern 'rows'",
    ) as caught:
        method.prepare("blocks.0.up", case.dense, case.stats)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="does not divide"):
        method.sizes(case.dense)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_keep_equal_numbers_and_layers_do_not(solver):
    case = correlated(16, 24)
    method, state = prepared(case, solver, pattern="rows")
    assert method.solve(state, [160])[1][0].sum(1).tolist() == [10] * 16
    method, state = prepared(case, solver, pattern="layer")
    mask = method.solve(state, [160])[1][0]
    assert mask.sum() == 160 and len(set(mask.sum(1).tolist())) > 1


def test_sizes_fill_each_step_of_the_dense_bits():
    weight, bias = torch.empty(30, 50, device="meta"), torch.empty(30, device="meta")
    for dense in (Dense(weight, None, torch.bfloat16), Dense(weight, bias, torch.float32)):
        width = 8 * dense.dtype.itemsize
        sizes = build("sparse", {"step": 0.1}).sizes(dense)
        limits = [tenth / 10 * dense.bits for tenth in range(1, 10)]
        for size, limit in zip(sizes, limits, strict=True):
            assert limit - width < size.bits <= limit + 1e-6
            assert (
                size.bits == width * size.parameters + 8 * 188
            )  # 1500 bits of mask, in whole bytes
        assert all(
            size.setting["nonzeros"] % 30 == 0
            for size in build("sparse", {"pattern": "rows"}).sizes(dense)
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_screened_errors_are_near_and_anchors_exact(solver):
    case = correlated(48, 64)
    method, state = prepared(case, solver, pattern="layer", step=0.05, anchors=4)
    exact = build(
        "sparse",
        {"solver": solver, "metric": "gram", "pattern": "layer", "step": 0.05, "anchors": None},
    ).candidates(state)
    screened = method.candidates(state)
    pairs = list(zip(screened.candidates, exact.candidates, strict=True))
    ratios = [math.log(one.error / two.error) for one, two in pairs]
    assert sum(ratio == 0 for ratio in ratios) == 4 and ratios[0] == ratios[-1] == 0
    assert fmean(map(abs, ratios)) < 0.06 and max(map(abs, ratios)) < 0.25
    for one, two in pairs:
        assert (one.setting, one.bits, one.parameters) == (two.setting, two.bits, two.parameters)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparse", {"solver": "wanda"}, "solver 'wanda' knows inputs only; set metric to 'gram'"),
        (
            "sparse",
            {"solver": "sparsegpt"},
            "solver 'sparsegpt' knows inputs only; set metric to 'gram'",
        ),
        (
            "sparse_low_rank",
            {"solver": "oats"},
            "solver 'oats' knows inputs only; set metric to 'gram'",
        ),
        ("sparse", {"pattern": "2:8"}, "pattern"),
        ("sparse", {"damping": [-1.0]}, "damping"),
        ("sparse", {"anchors": -1}, "anchors"),
        ("sparse", {"step": 0.0}, "step"),
        ("sparse_low_rank", {"rank_share": 0.0}, "rank_share"),
        ("sparse", {"patern": "rows"}, "did you mean 'pattern'"),
    ],
)
def test_bad_options_are_one_clear_line(name, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(name, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_f22_extreme_scales_and_zero_grams_complete(solver, scale):
    case = cases.make("square")
    scaled = cases.Case(case.dense, case.x, case.g, cases.sums(case.x * scale**0.5, case.g))
    torch.testing.assert_close(
        solved(scaled, solver, 400), solved(case, solver, 400), rtol=1e-4, atol=1e-5
    )
    nothing = cases.Case(case.dense, case.x, case.g, cases.sums(torch.zeros_like(case.x), case.g))
    method, state = prepared(nothing, solver)
    curve = method.candidates(state)
    assert curve.energy == 0 and all(candidate.error == 0 for candidate in curve.candidates)
    assert torch.isfinite(method.compress(state, curve.candidates[0].setting).to_dense()).all()


def test_f20_weight_with_nan_names_the_linear():
    case = cases.make("square")
    weight = case.dense.weight.clone()
    weight[3, 4] = float("nan")
    with pytest.raises(NumericalError, match=r"blocks\.3\.q"):
        build("sparse", {"metric": "gram"}).prepare(
            "blocks.3.q", Dense(weight, None, torch.float32), case.stats
        )
