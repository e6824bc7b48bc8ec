"""DSFormer: independent slices, optimal starts, and the claim over low rank on weights that are
locally low rank.
"""

import pytest
import torch
from support import weights as cases
from support.sameness import assert_same_output
from torch import Tensor

from compressor.errors import ConfigError
from compressor.linears import Dense
from compressor.methods import build
from compressor.methods.dictionary.dsformer import slice_width

METRICS = ["identity", "gram", "weighted_gram"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepared(kind: str, **options):
    """Case, method and state in float64."""
    case, method = cases.make(kind), build("dsformer", options)
    return (
        case,
        method,
        method.prepare(
            "linear", Dense(case.dense.weight.double(), None, torch.float64), case.stats
        ),
    )


@pytest.mark.parametrize("metric", METRICS)
def test_errors_are_sums_over_slices_of_their_own_blocks(metric):
    case, method, state = prepared("tall", metric=metric, group=6)
    module = method.compress(state, {"atoms": 4, "nonzeros": 2})
    lost, weight = (
        (state.dense.weight - module.to_dense()).split(6, dim=1),
        state.dense.weight.split(6, dim=1),
    )
    gram, squares = case.stats.gram / len(case.x), case.g.square().mean(0)
    outputs = (
        0.9 * squares + 0.1 * squares.mean()
        if metric == "weighted_gram"
        else torch.ones(40, dtype=torch.float64)
    )

    def energy(parts) -> float:
        blocks = [
            torch.eye(6).double()
            if metric == "identity"
            else gram[6 * i : 6 * i + 6, 6 * i : 6 * i + 6]
            for i in range(4)
        ]
        return sum(
            (outputs[:, None] * (part @ block) * part).sum().item()
            for part, block in zip(parts, blocks, strict=True)
        )

    assert method.measure(state, module) == pytest.approx(energy(lost) / energy(weight), rel=1e-9)


def test_a_slice_does_not_look_at_the_others():
    case, method, state = prepared("tall", group=6)
    changed = case.dense.weight.double().clone()
    changed[:, 6:12] *= 3
    other = method.prepare("linear", Dense(changed, None, torch.float64), case.stats)
    one, two = (
        method.compress(each, {"atoms": 4, "nonzeros": 2}).to_dense() for each in (state, other)
    )
    assert_same_output(one[:, :6], two[:, :6])
    assert_same_output(one[:, 12:], two[:, 12:])
    torch.testing.assert_close(3 * one[:, 6:12], two[:, 6:12], rtol=1e-5, atol=1e-6)


def test_the_start_of_a_slice_by_hand():
    """One slice with rows (3, 0) and (0, 2): atoms are the axes, and one of them serves each
    output.
    """
    method = build("dsformer", {"group": 2})
    dense = Dense(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), None, torch.float32)
    module = method.compress(
        method.prepare("linear", dense, cases.make("square").stats), {"atoms": 2, "nonzeros": 1}
    )
    torch.testing.assert_close(module.to_dense(), dense.weight)
    module = method.compress(
        method.prepare("linear", dense, cases.make("square").stats), {"atoms": 1, "nonzeros": 1}
    )
    torch.testing.assert_close(module.to_dense(), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("metric", METRICS)
def test_the_dictionary_is_fitted_below_the_orthonormal_start(metric):
    _, method, state = prepared("wide", metric=metric, group=11)
    start = 1 - method.codes(state, 6, 3)[0].square().sum().item() / state.energy
    assert method.measure(state, method.compress(state, {"atoms": 6, "nonzeros": 3})) < start < 1


def test_one_slice_is_a_dictionary_of_the_whole_weight():
    _, method, state = prepared("tall", metric="gram", group=24)
    whole = build("rocket", {"exponent": 0.0, "margin": 0.0, "ridge": 0.0})
    basis = whole.prepare("linear", state.dense, cases.make("tall").stats)
    setting = {"atoms": 9, "nonzeros": 4}
    one, two = method.compress(state, setting), whole.compress(basis, setting)
    torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=1e-5, atol=1e-6)


def test_the_papers_claim_locally_low_rank_weights_need_fewer_numbers_than_low_rank():
    """Six slices of 8 inputs, each of rank 2: exact with two atoms each, at a size where low rank
    has 7 of the 12 directions.
    """
    weight = torch.cat(
        [random(48, 2, seed=index) @ random(2, 8, seed=10 + index) for index in range(6)], dim=1
    )
    dense, stats = Dense(weight, None, torch.float64), cases.make("square").stats
    method, low_rank = (
        build("dsformer", {"group": 8}),
        build("low_rank", {"metric": "identity", "storage": "factors"}),
    )
    sizes = method.candidates(method.prepare("linear", dense, stats)).candidates
    exact = next(one for one in sizes if one.error < 1e-9)
    assert exact.setting == {"atoms": 2, "nonzeros": 2} and exact.parameters == 672
    ranks = low_rank.candidates(low_rank.prepare("linear", dense, stats)).candidates
    same = next(one for one in ranks if one.parameters == 672)
    assert same.setting["rank"] == 7 and same.error > 0.05


@pytest.mark.parametrize(
    ("group", "width", "expected"),
    [("auto:32", 172, 43), ("auto:32", 704, 32), ("auto:3", 8, 4), (6, 24, 6), ("8", 24, 8)],
)
def test_slices_divide_the_inputs(group, width, expected):
    assert slice_width(group, width, "linear") == expected


def test_slices_that_do_not_divide_name_the_linear_and_the_cure():
    case = cases.make("tall")
    with pytest.raises(
        ConfigError,
        match=r"blocks\.1\.up: its 24 inputs do not split into slices of 7; choose (6|8), or 'auto:7'",
    ):
        build("dsformer", {"group": 7}).prepare("blocks.1.up", case.dense, case.stats)
    for bad in ("auto", "auto:0", 0, -4, "x"):
        with pytest.raises(ConfigError, match="must be a number of inputs, or auto"):
            build("dsformer", {"group": bad})


def test_more_atoms_than_a_slice_has_inputs_is_one_clear_error():
    _, method, state = prepared("tall", group=6)
    with pytest.raises(
        ConfigError, match=r"linear: 3 nonzeros of 7 atoms are not possible; choose .* <= 6"
    ) as caught:
        method.compress(state, {"atoms": 7, "nonzeros": 3})
    assert "\n" not in str(caught.value)
