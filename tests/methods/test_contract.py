"""What every registered method promises, on every case and for every metric or option that changes
its mathematics.
"""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load, save
from support import weights as cases

from compressor.linears import build_empty
from compressor.methods import METHODS, build
from compressor.methods.base import LinearMethod
from compressor.methods.low_rank.low_rank import NEEDS
from compressor.resume.codec import decode, encode

# relative error of float32 factors against the float64 closed form, in units of the energy
STORED = 2e-5
OUTPUT = 1e-4  # float32 forward against float64 products

VARIANTS = [
    ("low_rank", {"metric": metric, "storage": storage})
    for metric in NEEDS
    for storage in ("factors", "pivoted")
]
VARIANTS += [("utilized_rank", {"storage": storage}) for storage in ("factors", "pivoted")]
EXACT = {"step": 0.05, "anchors": None}  # every size measured, none interpolated
VARIANTS += [
    ("sparse", {"solver": solver, "metric": metric, "pattern": pattern} | EXACT)
    for solver, metric in (
        ("wanda", "gram"),
        ("sparsegpt", "gram"),
        ("admm", "gram"),
        ("admm", "two_sided"),
    )
    for pattern in ("layer", "rows", "2:4")
]
VARIANTS += [
    ("sparse_low_rank", {"solver": solver, "metric": metric, "pattern": pattern} | EXACT)
    for solver, metric, pattern in (
        ("oats", "gram", "rows"),
        ("admm", "gram", "rows"),
        ("admm", "two_sided", "layer"),
        ("admm", "two_sided", "2:4"),
    )
]
FITTED = {"anchors": None}  # every size of the curve fitted
VARIANTS += [
    ("rocket", options)
    for options in (FITTED, {"metric": "weighted_gram"} | FITTED, {"profile": "weight"} | FITTED)
]
VARIANTS += [
    ("cospadi", {"rounds": 2} | options | FITTED)
    for options in ({}, {"metric": "weighted_gram"}, {"solver": "ksvd"})
]
VARIANTS += [
    ("compot", options | FITTED) for options in ({}, {"free": True}, {"metric": "weighted_gram"})
]
VARIANTS += [
    ("dsformer", {"metric": metric, "group": 4} | FITTED)
    for metric in ("identity", "gram", "weighted_gram")
]
VARIANTS += [
    ("quantize", {"bits": [2, 3, 4, 6, 8], "group": ["auto:16", "channel"]} | options)
    for options in (
        {"solver": "rtn"},
        {"symmetric": False},
        {"metric": "two_sided", "sweeps": 2},
        {"metric": "two_sided", "residual": [0, 2, 4], "bits": [2, 5]},
        {
            "metric": "two_sided",
            "residual": [0, 2, 4],
            "bits": [2, 5],
            "residual_bits": 8,
            "residual_group": "channel",
        },
        {
            "residual": [0, 1, 3],
            "bits": [2, 3, 5],
            "residual_bits": 4,
            "residual_group": "auto:16",
            "solver": "rtn",
        },
    )
]
VARIANTS += [
    ("low_rank_integers", {"clip": 1.0, "group": "auto:16"} | options | FITTED)
    for options in ({"bits": 4}, {"bits": 3, "metric": "two_sided", "symmetric": False})
]
VARIANTS += [
    ("armor", {"metric": metric, "wrapper": [2, 4], "sweeps": 3, "measured": True})
    for metric in ("gram", "two_sided")
]


def test_every_method_is_in_this_suite():
    assert {name for name, _ in VARIANTS} == {
        name for name, engine in METHODS.items() if issubclass(engine, LinearMethod)
    }  # of linears


def some(candidates, count=4):
    return candidates[:: max(1, len(candidates) // count)]


@pytest.fixture(
    params=VARIANTS, ids=lambda variant: "-".join([variant[0], *map(str, variant[1].values())])
)
def method(request):
    return build(*request.param)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_contract(method, kind):
    case = cases.make(kind)
    before = [case.dense.weight.clone(), case.stats.gram.clone(), case.stats.grad_gram.clone()]
    state = method.prepare("linear", case.dense, case.stats)
    curve = method.candidates(state)
    # an N:M pattern has one size; on one token a few numbers are exact, and nothing larger is offered
    sole = method.name == "armor" or (method.name == "sparse" and method.pattern == "2:4")
    fewest = 1 if sole or kind == "one_token" else 4
    assert curve.dense_bits == case.dense.bits and len(curve.candidates) >= fewest
    assert all(
        one.bits < two.bits
        for one, two in zip(curve.candidates, curve.candidates[1:], strict=False)
    )
    assert curve.candidates[-1].bits < curve.dense_bits
    assert not curve.thresholds or len(curve.thresholds) == len(curve.candidates) + 1
    assert list(curve.thresholds) == sorted(curve.thresholds, reverse=True)
    for candidate in some(curve.candidates):
        module = method.compress(state, candidate.setting)
        stored = dict(module.state_dict().items())
        assert (
            candidate.bits == module.bits() == 8 * sum(tensor.nbytes for tensor in stored.values())
        )
        assert candidate.parameters == module.stored_parameters()
        assert candidate.multiply_adds == module.multiply_adds()
        assert method.measure(state, module) == pytest.approx(candidate.error, abs=STORED, rel=1e-3)
        again = method.compress(method.prepare("linear", case.dense, case.stats), candidate.setting)
        assert all(torch.equal(stored[name], tensor) for name, tensor in again.state_dict().items())
        rebuilt = build_empty(module.spec(), torch.float32, "cpu")
        rebuilt.load_state_dict(stored)
        x = case.x[:5].float()
        expected = x.double() @ module.to_dense().double().T + (
            0 if module.bias is None else module.bias.double()
        )
        torch.testing.assert_close(
            rebuilt(x).double(),
            expected,
            rtol=OUTPUT,
            atol=OUTPUT * max(1.0, expected.abs().max().item()),
        )
    for tensor, copy in zip(
        [case.dense.weight, case.stats.gram, case.stats.grad_gram], before, strict=True
    ):
        assert torch.equal(tensor, copy)


def test_sizes_from_shapes_alone_are_the_sizes_of_the_curve(method):
    case = cases.make("wide")
    curve = method.candidates(method.prepare("linear", case.dense, case.stats))
    meta = cases.Dense(case.dense.weight.to("meta"), None, torch.float32)
    offered = {(size.bits, size.parameters) for size in method.sizes(meta)}
    assert {(candidate.bits, candidate.parameters) for candidate in curve.candidates} <= offered
    assert all(math.isnan(size.error) for size in method.sizes(meta))


def test_error_never_grows_with_size_on_isotropic_statistics(method):
    case = cases.make("wide")
    x = torch.linalg.qr(
        torch.randn(400, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )[0]
    g = torch.linalg.qr(
        torch.randn(400, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    )[0]
    curve = method.candidates(method.prepare("linear", case.dense, cases.sums(x, g)))
    errors = [candidate.error for candidate in curve.candidates]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))


def test_bfloat16_storage_halves_the_bits(method):
    case = cases.make("square", dtype=torch.bfloat16)
    state = method.prepare("linear", case.dense, case.stats)
    for candidate in some(method.candidates(state).candidates):
        module = method.compress(state, candidate.setting)
        assert {
            tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()
        } == {torch.bfloat16}
        assert module.bits() == candidate.bits
        assert method.measure(state, module) == pytest.approx(candidate.error, abs=2e-3)


def test_missing_statistics_name_the_linear_and_the_command(method):
    from compressor.errors import DataError
    from compressor.statistics import LinearStats

    if method.needs:
        with pytest.raises(
            DataError, match=r"model\.q_proj: the statistics lack .*`compressor calibrate"
        ):
            method.prepare("model.q_proj", cases.make("square").dense, LinearStats(tokens=1))


def test_a_decomposition_that_was_put_away_builds_the_same(method):
    case = cases.make("wide")
    given = case.dense, case.stats
    state = method.prepare("linear", *given)
    curve = method.candidates(state)
    data, tensors = encode((state, curve), given)
    text, stored = json.dumps(data), save(tensors)
    found = [decode(json.loads(text), load(stored), given) for _ in range(2)]
    assert found[0][1] == curve
    for candidate in some(curve.candidates, 2):
        expected = method.compress(state, candidate.setting)
        one, two = (method.compress(each, candidate.setting).state_dict() for each, _ in found)
        assert expected.spec() == method.compress(found[0][0], candidate.setting).spec()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
        assert method.measure(found[0][0], expected) == pytest.approx(
            method.measure(state, expected), rel=1e-9, abs=1e-12
        )
