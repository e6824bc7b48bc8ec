"""Sparse plus low rank: the papers' claims against sparsity alone, planted recovery, the low-rank
part, the stored form.
"""

from statistics import fmean

import pytest
import torch
from support import weights as cases
from torch import Tensor

from compressor import linalg
from compressor.linalg import Metric
from compressor.linears import Adapted, Dense, Sparse
from compressor.linears.masks import unpack_mask
from compressor.methods import build
from compressor.methods.sparse.sparse_low_rank import LowRankPart
from compressor.statistics import LinearStats

EXACT = 1e-9  # relative, float64 identities


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(
    seed: int, height: int = 48, width: int = 64, rank: int = 3, share: float = 0.05
) -> tuple[Tensor, Tensor]:
    """A low-rank and a spiky matrix of equal energy, (out, in) each."""
    low = random(height, rank, seed=seed) @ random(rank, width, seed=seed + 100)
    spikes = random(height, width, seed=seed + 200) * (
        random(height, width, seed=seed + 300) > torch.special.ndtri(torch.tensor(1 - share))
    )
    return low, spikes * (low.norm() / spikes.norm())


def case_of(weight: Tensor, seed: int = 0) -> cases.Case:
    """A weight with correlated inputs and output gradients of unequal size."""
    height, width = weight.shape
    noise = random(400, width, seed=seed + 400)
    x = (noise + 0.8 * noise.roll(1, 1)) * torch.logspace(0, -1, width, dtype=torch.float64)
    g = random(400, height, seed=seed + 500) * torch.logspace(0, -0.5, height, dtype=torch.float64)
    return cases.Case(Dense(weight.float(), None, torch.float32), x, g, cases.sums(x, g))


def errors_at(name: str, case: cases.Case, parameters: int, **options) -> float:
    """Gram error of the largest candidate of at most so many numbers; masks cost the same in both
    engines.
    """
    method = build(name, options)
    state = method.prepare("linear", case.dense, case.stats)
    best = max(
        (size for size in method.sizes(case.dense) if size.parameters <= parameters),
        key=lambda size: size.bits,
    )
    module = method.compress(state, best.setting)
    return linalg.relative_error(case.dense.weight, module.to_dense(), Metric(case.stats.gram))


def test_a_low_rank_part_pays_where_outputs_share_directions():
    """The claim of OATS and 3BASiL at equal bits, each against the sparse solver of its own kind,
    on weights like those they describe.
    """
    found: dict[str, list[float]] = {"oats": [], "wanda": [], "both": [], "admm": []}
    for seed in range(3):
        low, spikes = planted(seed)
        case = case_of(low + spikes + 0.05 * random(48, 64, seed=seed + 600), seed)
        rows = {"metric": "gram", "pattern": "rows"}
        oats = {"solver": "oats", "rank_share": 0.25, "iterations": 80}
        found["oats"].append(errors_at("sparse_low_rank", case, 1000, **oats, **rows))
        found["wanda"].append(errors_at("sparse", case, 1000, solver="wanda", **rows))
        found["both"].append(errors_at("sparse_low_rank", case, 1000, rank_share=0.25, **rows))
        found["admm"].append(errors_at("sparse", case, 1000, **rows))
    mean = {name: fmean(errors) for name, errors in found.items()}
    assert mean["oats"] < 0.5 * mean["wanda"]
    assert mean["both"] < 0.5 * mean["admm"]
    assert mean["both"] < 0.8 * mean["oats"]  # the full metric against its diagonal


@pytest.mark.parametrize(
    ("solver", "metric"), [("oats", "gram"), ("admm", "gram"), ("admm", "two_sided")]
)
def test_invariant_20_planted_parts_are_recovered(solver, metric):
    """Well conditioned inputs, twice the nonzeros that were planted."""
    low, spikes = planted(0, share=0.02)
    weight, x = low + spikes, random(800, 64, seed=1)
    case = cases.Case(
        Dense(weight.float(), None, torch.float32),
        x,
        random(800, 48, seed=2),
        cases.sums(x, random(800, 48, seed=2)),
    )
    method = build(
        "sparse_low_rank",
        {"solver": solver, "metric": metric, "pattern": "layer", "iterations": 80},
    )
    state = method.prepare("linear", case.dense, case.stats)
    module = method.compress(state, {"rank": 3, "nonzeros": 2 * int((spikes != 0).sum())})
    assert method.measure(state, module) < 1e-4
    kept = unpack_mask(module.mask, 48 * 64).view(48, 64)
    assert (kept & (spikes != 0)).sum() > 0.9 * (spikes != 0).sum()


def test_oats_by_hand():
    """Identity Gram, one iteration, rank 1 of diag(4, 2, 1): the leading direction is e₁, then the
    largest entry of what is left, 2.
    """
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    stats = LinearStats(tokens=1, gram=torch.eye(3, dtype=torch.float64))
    options = {"solver": "oats", "metric": "gram", "pattern": "layer", "iterations": 1}
    method = build("sparse_low_rank", options)
    state = method.prepare("linear", Dense(weight, None, torch.float32), stats)
    module = method.compress(state, {"rank": 1, "nonzeros": 1})
    torch.testing.assert_close(module.up @ module.down, torch.diag(torch.tensor([4.0, 0.0, 0.0])))
    torch.testing.assert_close(module.base.to_dense(), torch.diag(torch.tensor([0.0, 2.0, 0.0])))
    assert method.measure(state, module) == pytest.approx(1 / 21)


def test_oats_scales_inputs_by_their_norms():
    """The same case seen through inputs of norms (1, 2, 4): weights divided by them give scaled
    factors and the same mask.
    """
    norms = torch.tensor([1.0, 2.0, 4.0])
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0])) / norms
    stats = LinearStats(tokens=1, gram=torch.diag(norms.square()).double())
    method = build(
        "sparse_low_rank", {"solver": "oats", "metric": "gram", "pattern": "layer", "iterations": 1}
    )
    module = method.compress(
        method.prepare("linear", Dense(weight, None, torch.float32), stats),
        {"rank": 1, "nonzeros": 1},
    )
    torch.testing.assert_close(module.to_dense(), torch.diag(torch.tensor([4.0, 1.0, 0.0])))


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_low_rank_part_is_the_best_in_its_metric_and_its_warm_steps_approach_it(two_sided):
    gram, root = (
        random(30, 24, seed=1),
        torch.linalg.cholesky(random(40, 20, seed=2).T @ random(40, 20, seed=2)),
    )
    gram, root = gram.T @ gram, root if two_sided else None
    residuals = random(2, 20, 24, seed=3)

    def error(part: LowRankPart, residual: Tensor, product: Tensor) -> Tensor:
        lost = part.seen(residual - product)
        return ((lost @ gram) * lost).sum((1, 2))

    part = LowRankPart("linear", gram, root, [2, 5])
    best = error(part, residuals, part.fit(residuals))
    for place, rank in enumerate((2, 5)):
        values = linalg.principal_outputs(part.seen(residuals)[place], Metric(gram), "")[0]
        assert best[place].item() == pytest.approx(values[rank:].sum().item(), rel=EXACT)
        assert torch.linalg.matrix_rank(part.product(residuals)[place]) == rank
    moved = residuals + 0.3 * random(2, 20, 24, seed=4)
    stale = error(part, moved, part.product(moved))
    steps = [error(part, moved, part.follow(moved)) for _ in range(60)]
    exact = error(part, moved, LowRankPart("linear", gram, root, [2, 5]).fit(moved))
    assert (steps[0] < stale).all() and (steps[1] < steps[0]).all()
    torch.testing.assert_close(steps[-1], exact, rtol=1e-3, atol=0)
    assert torch.linalg.matrix_rank(part.product(moved)[0]) == 2


def test_the_sparse_part_is_least_squares_beside_the_low_rank_part():
    """Card invariant 8 on what is stored: no gradient of the error is left on the mask."""
    case = case_of(sum(planted(1)))
    method = build("sparse_low_rank", {"refit": 400})
    state = method.prepare("linear", case.dense, case.stats)
    values, mask, up, down = method.solve(state, [{"rank": 3, "nonzeros": 400}])
    scale = state.problem.outputs * state.problem.inputs
    gradient = state.problem.weigh(
        (case.dense.weight.double() - values[0] - up[0] @ down[0]) * scale
    )
    pull = state.problem.weigh((case.dense.weight.double() - up[0] @ down[0]) * scale)
    assert (gradient * mask[0]).norm() < 2e-5 * (pull * mask[0]).norm() < gradient.norm()


def test_stored_as_a_sparse_base_with_a_pair():
    case = case_of(sum(planted(2)))
    dense = Dense(case.dense.weight.bfloat16(), None, torch.bfloat16)
    method = build("sparse_low_rank", {"pattern": "2:4", "metric": "gram"})
    state = method.prepare("linear", dense, case.stats)
    curve = method.candidates(state)
    assert [candidate.setting["rank"] for candidate in curve.candidates] == list(
        range(1, 1 + len(curve.candidates))
    )
    module = method.compress(state, curve.candidates[1].setting)
    assert isinstance(module, Adapted) and isinstance(module.base, Sparse)
    assert (unpack_mask(module.mask, 48 * 64).view(48, -1, 4).sum(2) == 2).all()
    assert module.bits() == curve.candidates[1].bits == 48 * 64 * 9 + 2 * (48 + 64) * 16
    assert {tensor.dtype for tensor in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_rank_share_is_kept(share):
    dense = Dense(torch.empty(96, 160, device="meta"), None, torch.bfloat16)
    sizes = build("sparse_low_rank", {"rank_share": share}).sizes(dense)
    for size in sizes[len(sizes) // 3 :]:
        in_pair = size.setting["rank"] * 256
        assert in_pair + size.setting["nonzeros"] == size.parameters
        assert abs(in_pair - share * size.parameters) <= 128.5


def test_screened_errors_are_near():
    case = case_of(random(48, 64))
    options = {"step": 0.05, "metric": "gram"}
    method, exact = (
        build("sparse_low_rank", options | {"anchors": 4}),
        build("sparse_low_rank", options | {"anchors": None}),
    )
    state = method.prepare("linear", case.dense, case.stats)
    known = {candidate.bits: candidate.error for candidate in exact.candidates(state).candidates}
    found = {candidate.bits: candidate.error for candidate in method.candidates(state).candidates}
    gaps = [abs(error / known[bits] - 1) for bits, error in found.items() if bits in known]
    assert len(gaps) > 10 and fmean(gaps) < 0.15 and max(gaps) < 0.6
