"""Corrections of curves by what has been built: screening curves along their length, exact ones at
the point, everything built once.
"""

import math

import pytest

from compressor.allocation.decompose import Decomposition
from compressor.allocation.options import Option
from compressor.allocation.probe import ProbeResult
from compressor.pipeline.builder import CandidateBuilder
from compressor.plan import Candidate, Curve


class Counting:
    """A method whose stored error is `off` times the predicted one, and which counts what it
    builds.
    """

    def __init__(self, off):
        self.off, self.builds = off, 0

    def compress_unit(self, state, setting, outputs):
        self.builds += 1
        return dict.fromkeys(outputs, setting)

    def measure_unit(self, state, modules):
        (module,) = modules.values()
        return self.off(module["rank"]) / module["rank"]


def decomposition(off, screened: bool) -> Decomposition:
    candidates = tuple(
        Candidate("m", {"rank": rank}, 16 * rank, rank, error=1 / rank) for rank in (10, 20, 40, 80)
    )
    return Decomposition(
        Counting(off),
        None,
        Curve("linear", "m", candidates, 1600, 100, 1.0, screened=screened),
        {"linear": 8},
    )


def options_of(part: Decomposition) -> list[Option]:
    """Damages that follow from a probe at rank 20 with a divergence of 1, as if the whole curve
    were off by what the probe was.
    """
    return [Option("linear", c.bits, 20 * c.error, c, part) for c in part.curve.candidates]


def builder_of(part: Decomposition, departure: float) -> CandidateBuilder:
    probe = ProbeResult({"rank": 20}, predicted=1 / 20, measured=departure / 20, kl=1.0)
    return CandidateBuilder({"linear": [part]}, {("linear", 0): probe})


def test_a_screening_curve_is_corrected_between_what_was_measured():
    part = decomposition(
        lambda rank: 0.5 if rank <= 20 else 0.5 * (20 / rank), screened=True
    )  # the share falls with the size
    builder, options = builder_of(part, 0.5), options_of(part)
    assert [
        option.damage for option in builder.correct_damages({"linear": options})["linear"]
    ] == pytest.approx([2, 1, 0.5, 0.25])
    assert builder.ratio(options[3]) == pytest.approx(0.5)
    builder.build(options[3])  # rank 80: a quarter of the share at the probe
    corrected = builder.correct_damages({"linear": options})["linear"]
    assert [option.damage for option in corrected] == pytest.approx(
        [2, 1, 0.25, 0.0625]
    )  # rank 40 half way, on a log scale
    assert builder.ratio(options[2]) == pytest.approx(0.5 * math.sqrt(0.25))


def test_an_exact_curve_is_corrected_at_the_point_alone():
    part = decomposition(lambda rank: 3.0 if rank == 80 else 1.0, screened=False)
    builder, options = builder_of(part, 1.0), options_of(part)
    builder.build(options[3])
    assert [
        option.damage for option in builder.correct_damages({"linear": options})["linear"]
    ] == pytest.approx([2, 1, 0.5, 0.75])


def test_each_candidate_is_built_once():
    part = decomposition(lambda rank: 1.0, screened=True)
    builder, options = builder_of(part, 1.0), options_of(part)
    first = builder.build(options[0])
    assert builder.build(options[0]) is first and part.method.builds == 1
    assert first == ({"linear": {"rank": 10}}, pytest.approx(0.1))
