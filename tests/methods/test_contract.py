"""What every registered method promises, on every case and for every metric or option that changes
its mathematics.
"""

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from support import weights as cases
from torch import Tensor

from compressor.linears import CompressedLinear, build_empty
from compressor.methods import METHODS, build
from compressor.methods.base import LinearMethod
from compressor.methods.low_rank.low_rank import NEEDS
from compressor.plan import Candidate, Curve
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


def id_of(variant) -> str:
    return "-".join([variant[0], *map(str, variant[1].values())])


@pytest.fixture(params=VARIANTS, ids=id_of)
def method(request):
    return build(*request.param)


@dataclass(frozen=True)
class Prepared:
    """A method on one case, with some of its candidates built."""

    method: LinearMethod
    kind: str  # of the case
    case: cases.Case
    copies: list[Tensor]  # of the inputs, from before
    curve: Curve
    state: Any
    modules: list[tuple[Candidate, CompressedLinear]]

    @property
    def inputs(self) -> list[Tensor]:
        return [self.case.dense.weight, self.case.stats.gram, self.case.stats.grad_gram]


@pytest.fixture(
    scope="module",
    params=list(itertools.product(VARIANTS, cases.KINDS)),
    ids=lambda pair: f"{id_of(pair[0])}-{pair[1]}",
)
def prepared(request) -> Prepared:
    (name, options), kind = request.param
    method, case = build(name, options), cases.make(kind)
    copies = [case.dense.weight.clone(), case.stats.gram.clone(), case.stats.grad_gram.clone()]
    state = method.prepare("linear", case.dense, case.stats)
    curve = method.candidates(state)
    modules = [
        (candidate, method.compress(state, candidate.setting))
        for candidate in some(curve.candidates)
    ]
    return Prepared(method, kind, case, copies, curve, state, modules)


def test_sizes_of_a_curve_grow_and_stay_below_dense(prepared):
    method, curve = prepared.method, prepared.curve
    # an N:M pattern has one size; on one token a few numbers are exact, and nothing larger is offered
    has_one_size = method.name == "armor" or (method.name == "sparse" and method.pattern == "2:4")
    bits = [candidate.bits for candidate in curve.candidates]
    assert len(bits) >= (1 if has_one_size or prepared.kind == "one_token" else 4)
    assert all(one < two for one, two in itertools.pairwise(bits))
    assert bits[-1] < curve.dense_bits == prepared.case.dense.bits


def test_thresholds_fall_with_size_and_end_with_dense(prepared):
    curve = prepared.curve
    assert len(curve.thresholds) in (0, len(curve.candidates) + 1)
    assert list(curve.thresholds) == sorted(curve.thresholds, reverse=True)


def test_counts_are_those_of_what_is_stored(prepared):
    for candidate, module in prepared.modules:
        stored = 8 * sum(tensor.nbytes for tensor in module.state_dict().values())
        assert candidate.bits == module.bits() == stored
        assert candidate.parameters == module.stored_parameters()
        assert candidate.multiply_adds == module.multiply_adds()


def test_errors_are_predicted_as_they_are_measured(prepared):
    for candidate, module in prepared.modules:
        measured = prepared.method.measure(prepared.state, module)
        assert measured == pytest.approx(candidate.error, abs=STORED, rel=1e-3)


def test_equal_inputs_give_equal_tensors(prepared):
    method, case = prepared.method, prepared.case
    state = method.prepare("linear", case.dense, case.stats)
    for candidate, module in prepared.modules:
        again = method.compress(state, candidate.setting).state_dict()
        assert all(torch.equal(again[name], one) for name, one in module.state_dict().items())


def test_a_rebuilt_module_computes_with_its_dense_weight(prepared):
    x = prepared.case.x[:5].float()
    for _, module in prepared.modules:
        rebuilt = build_empty(module.spec(), torch.float32, "cpu")
        rebuilt.load_state_dict(module.state_dict())
        expected = x.double() @ module.to_dense().double().T
        if module.bias is not None:
            expected = expected + module.bias.double()
        atol = OUTPUT * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(rebuilt(x).double(), expected, rtol=OUTPUT, atol=atol)


def test_inputs_are_left_as_they_were(prepared):
    for tensor, copy in zip(prepared.inputs, prepared.copies, strict=True):
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
