"""Residuals: the optimum the algebra promises in every metric, beside every storage, at the size
that was reserved for them.
"""

import pytest
import torch
from support import weights as cases
from support.jobs import built, exactly, job_of, received
from support.models import read_json
from support.recipes import recipe, tensors
from support.weights import make

from compressor import linalg
from compressor.allocation.residual_ranks import Offer, spend
from compressor.errors import BudgetError, ConfigError
from compressor.linears import Adapted, Dense, Dictionary, LowRank, Sparse, build_empty
from compressor.linears.masks import pack_mask
from compressor.methods import build
from compressor.methods.low_rank import residual
from compressor.models import install
from compressor.pipeline import run
from compressor.recipe.load import load_recipe

TAIL = 1e-10  # relative, float64
WANDA = (
    "method=[{candidates: [{name: sparse, options: {solver: wanda, metric: gram, pattern: "
    '"2:4"}}]}]'
)
BASE = [WANDA, "allocation.kind=uniform", "output.dtype=bfloat16"]


def pruned(case, pattern="rows"):
    """A Wanda base at half its entries in float64."""
    method = build(
        "sparse", {"solver": "wanda", "metric": "gram", "pattern": pattern, "anchors": None}
    )
    state = method.prepare("linear", case.dense, case.stats)
    candidates = method.candidates(state).candidates
    return method.compress(state, candidates[len(candidates) // 2].setting)


def objective(case, module, root=None):
    """tr(D G Dᵀ) per token in float64."""
    lost = case.dense.weight.double() - module.to_dense().double()
    return linalg.Metric(case.stats.gram, 1 / case.stats.tokens).energy(
        lost if root is None else root.T @ lost
    )


@pytest.mark.parametrize(
    "kind", ["square", "tall", "wide", "biased", "few_tokens", "low_rank_gram", "dead_inputs"]
)
def test_eora_leaves_the_tail_of_the_whitened_spectrum_and_never_more_than_plain_svd(kind):
    case = make(kind, dtype=torch.float64)
    base = pruned(case)
    lost = case.dense.weight - base.to_dense()
    values, vectors = torch.linalg.eigh(case.stats.gram / case.stats.tokens)
    whitened = torch.linalg.svdvals(lost @ vectors * values.clamp(min=0).sqrt()).square()
    fit = {
        metric: residual.fit("linear", case.dense, base, case.stats, metric)
        for metric in residual.METRICS
    }
    tiny = TAIL * whitened.sum().item()
    for rank in (1, 3, 9):
        made = residual.extend(base, fit["gram"], rank)
        assert objective(case, made) == pytest.approx(
            whitened[rank:].sum().item(), rel=TAIL, abs=tiny
        )
        assert fit["gram"].residual.tail[rank].item() == pytest.approx(
            objective(case, made), rel=1e-8, abs=tiny
        )
        for other in ("identity", "diagonal", "two_sided"):
            assert (
                objective(case, made)
                <= objective(case, residual.extend(base, fit[other], rank)) * (1 + TAIL) + tiny
            )
        assert isinstance(made, Adapted) and made.bits() == base.extended_size(rank, 8)[0]
        assert made.stored_parameters() == base.extended_size(rank, 8)[1]
        left, frame = (case.dense.weight - made.to_dense()), made.up.detach()
        torch.testing.assert_close(
            frame.T @ frame, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12
        )
        assert (frame.T @ left).norm() < 1e-12 * left.norm() + 1e-13


def test_the_plain_metric_is_the_truncated_svd_and_the_diagonal_one_its_scaled_form():
    case = make("wide", dtype=torch.float64)
    base = pruned(case)
    lost = case.dense.weight - base.to_dense()
    scales = case.stats.gram.diagonal().sqrt()
    for metric, scale in (("identity", torch.ones_like(scales)), ("diagonal", scales)):
        left, values, right = torch.linalg.svd(lost * scale, full_matrices=False)
        made = residual.extend(
            base, residual.fit("linear", case.dense, base, case.stats, metric), 4
        )
        expected = left[:, :4] * values[:4] @ right[:4] / scale
        torch.testing.assert_close(
            made.to_dense() - base.to_dense(), expected, rtol=1e-9, atol=1e-10
        )


def test_the_two_sided_residual_is_the_best_where_outputs_count():
    case = make("square", dtype=torch.float64)
    base = pruned(case)
    fits = {
        metric: residual.fit("linear", case.dense, base, case.stats, metric)
        for metric in ("gram", "two_sided")
    }
    moment = linalg.Metric(case.stats.gram, 1 / case.stats.tokens).shrink(0.01)
    root = fits["two_sided"].root

    def damage(made):
        return moment.energy(root.T @ (case.dense.weight - made.to_dense()))

    made = {metric: residual.extend(base, fit, 5) for metric, fit in fits.items()}
    assert damage(made["two_sided"]) == pytest.approx(
        fits["two_sided"].residual.tail[5].item(), rel=1e-8
    )
    assert damage(made["two_sided"]) < damage(made["gram"])


def bases(case):
    """One module of every storage."""
    low = {
        storage: build("low_rank", {"metric": "gram", "storage": storage})
        for storage in ("factors", "pivoted")
    }
    made = {
        name: method.compress(method.prepare("linear", case.dense, case.stats), {"rank": 5})
        for name, method in low.items()
    }
    sparse = pruned(case)
    noise = torch.randn(3, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    made |= {
        "sparse": sparse,
        "adapted": Adapted(pruned(case), sparse.to_dense() @ noise.T / 44, noise / 44),
    }
    mask = torch.ones(20, 6, dtype=torch.bool)
    codes = torch.randn(20 * 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return made | {
        "dictionary": Dictionary(codes, noise.repeat(2, 1), pack_mask(mask.flatten()), None, 20)
    }


@pytest.mark.parametrize("kind", ["factors", "pivoted", "sparse", "adapted", "dictionary"])
def test_every_storage_takes_a_residual_and_is_counted_and_reloaded(kind):
    case = make("wide", dtype=torch.float64)
    base = bases(case)[kind]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    fit = residual.fit("linear", case.dense, base, case.stats, "gram")
    made = residual.extend(base, fit, 3)
    assert type(made) is (LowRank if kind in ("factors", "pivoted") else Adapted)
    assert (made.bits(), made.stored_parameters()) == base.extended_size(3, 8)
    expected = fit.residual.tail[3].item()
    assert objective(case, made) == pytest.approx(expected, rel=1e-8)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    again = build_empty(made.spec(), torch.float64, "cpu")
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(
        again(case.x[:4]), case.x[:4] @ made.to_dense().T, rtol=1e-9, atol=1e-9
    )


def test_ranks_are_bought_where_they_gain_most_for_their_bits():
    offers = {
        "a": Offer([9.0, 4.0, 0.5], [10, 10, 10]),
        "b": Offer([16.0, 3.0], [20, 20]),
        "c": Offer([0.0], [1]),
        "d": Offer([], []),
    }
    assert spend(offers, 40) == {"a": 2, "b": 1, "c": 0, "d": 0}
    assert spend(offers, 19) == {"a": 1, "b": 0, "c": 0, "d": 0}
    assert spend(offers, 10**6) == {"a": 3, "b": 2, "c": 0, "d": 0}
    best = max(
        (sum(offers["a"].gains[:a]) + sum(offers["b"].gains[:b]), a, b)
        for a in range(4)
        for b in range(3)
        if 10 * a + 20 * b <= 40
    )
    assert best[1:] == (2, 1)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_a_run_keeps_its_size_and_reports_ranks_and_what_was_measured(
    kind, request, text_file, tmp_path
):
    made = recipe(
        request.getfixturevalue(kind),
        text_file,
        *BASE,
        "allocation.keep=0.75",
        "compensation.keep=0.15",
    )
    report = run.compress(made, tmp_path / "a")
    assert 0.7 < report["kept"]["targets"] <= 0.75
    plan = read_json(tmp_path / "a" / "plan.json")["linears"]
    ranks = {name: choice["residual"] for name, choice in plan.items()}
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) > 0
    assert all(
        choice["measured"] < choice["predicted"] for name, choice in plan.items() if ranks[name]
    )
    run.compress(made, tmp_path / "b", plan=tmp_path / "a" / "plan.json")
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    bare = recipe(request.getfixturevalue(kind), text_file, *BASE, "allocation.keep=0.6")
    former = run.compress(bare, tmp_path / "c")
    assert sum(one["error"] for one in report["linears"]) < sum(
        one["error"] for one in former["linears"]
    )
    assert {one["residual"] for one in former["linears"]} == {None}


def test_ranks_follow_measured_divergence_where_the_knapsack_has_it_and_dense_linears_have_none(
    tiny_llama, text_file
):
    job = job_of(
        tiny_llama,
        text_file,
        "allocation.keep=0.8",
        "compensation.keep=0.1",
        "compensation.metric=two_sided",
        config="sparse_admm",
    )
    plan, modules = built(job)
    assert sum(choice.bits for choice in plan.linears.values()) <= 0.8 * sum(
        choice.dense_bits for choice in plan.linears.values()
    )
    assert any(choice.residual for choice in plan.linears.values())
    for name, choice in plan.linears.items():
        if choice.method == "dense":
            assert choice.residual is None and name not in modules
        else:
            assert choice.bits == modules[name].bits() and isinstance(
                modules[name], Adapted if choice.residual else Sparse
            )


def test_sequential_residuals_are_fitted_on_the_compressed_prefix_behind_compensated_linears(
    tiny_llama, text_file
):
    sets = [
        *BASE,
        "allocation.keep=0.9",
        "compensation.rank=3",
        "calibration.sequential=true",
        "calibration.anchor=0",
    ]
    job = exactly(job_of(tiny_llama, text_file, *sets, config="default"))
    plan, modules = built(job)
    name = "model.layers.1.mlp.down_proj"
    assert {choice.residual for choice in plan.linears.values()} == {3} and plan.linears[
        name
    ].sequential == {}
    dense = job.model.get_submodule(name)
    for other, module in modules.items():
        if other != name:
            install.replace(job.model, other, module)
    x = received(job.model, name, job.calibration.tokens)
    case = cases.Case(Dense(dense.weight.detach(), None, torch.float64), x, x, cases.sums(x, x))
    base = pruned(case, "2:4")
    expected = residual.extend(base, residual.fit(name, case.dense, base, case.stats, "gram"), 3)
    torch.testing.assert_close(modules[name].to_dense(), expected.to_dense(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["compensation.keep=0.1", "compensation.rank=2"], "keep or rank, not both"),
        (
            ["compensation.keep=0.1", "allocation.limits={parameters: 0.8}"],
            "do not count the residuals",
        ),
    ],
)
def test_contradictions_are_refused_while_reading(sets, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, sets)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["allocation.keep=0.7", "compensation.keep=0.7"],
            r"compensation takes 0\.7 of the size and leaves nothing of the 0\.7",
        ),
        (
            ["allocation.keep=1.0", "compensation.rank=6"],
            r"k_proj: a residual of rank 6 .* is not smaller than dense, .* 4 at most",
        ),
    ],
)
def test_residuals_that_do_not_fit_are_refused(tiny_llama, text_file, sets, message):
    with pytest.raises(ConfigError, match=message):
        built(job_of(tiny_llama, text_file, *BASE, *sets, config="default"))


def test_the_outline_counts_residuals_and_sequential_passes(tiny_llama, text_file):
    made = recipe(
        tiny_llama,
        text_file,
        *BASE,
        "allocation.keep=0.8",
        "compensation.rank=2",
        "calibration.sequential=true",
    )
    outline = run.plan(made)
    assert outline["kept"] == pytest.approx(0.8, abs=1e-4)
    assert (
        outline["estimated_seconds"]["solve_in_order"] > outline["estimated_seconds"]["calibrate"]
    )
    assert outline["memory_bytes"]["streams"] == 2 * 4 * 8 * 32 * 32
    with pytest.raises(BudgetError):
        run.plan(recipe(tiny_llama, text_file, *BASE, "allocation.keep=0.6", "compensation.rank=2"))


def test_candidates_with_residuals_of_their_own_are_refused(tiny_llama, text_file):
    with pytest.raises(ConfigError, match="list residual ranks themselves; leave out compensation"):
        job_of(
            tiny_llama,
            text_file,
            "compensation.rank=2",
            "method.0.candidates.0.options.residual=[4]",
            config="gptq_w4",
        )
