"""The curves that a checkpoint keeps for its reports: few points, the right ones, small files."""

import doctest
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import read_json

from compressor.allocation import curves
from compressor.plan import Candidate, Curve


def curve(points, spectrum=()) -> Curve:
    """points: (bits, error) of the candidates."""
    candidates = tuple(
        Candidate("m", {"rank": rank}, bits, bits, error)
        for rank, (bits, error) in enumerate(points)
    )
    return Curve("layers.0.q", "m", candidates, 1000, 1000, 1.0, spectrum)


def test_examples():
    assert doctest.testmod(curves).failed == 0


def test_candidates_that_a_smaller_one_beats_are_left_out():
    found = curves.thin(
        curve([(100, 0.5), (200, 0.6), (300, 0.25), (300, 0.123456), (400, 0.123456)]),
        ["layers.0.q"],
    )
    assert (found["kept"], found["error"]) == ([0.1, 0.3], [0.5, 0.1235])
    assert "spectrum" not in found


@settings(derandomize=True)
@given(st.integers(1, 5000))
def test_few_points_with_both_ends(count):
    found = curves.thin(
        curve(
            [(n + 1, 1 / (n + 1)) for n in range(count)], tuple(1 / (n + 1) for n in range(count))
        ),
        ["layers.0.q"],
    )
    assert len(found["kept"]) == len(found["error"]) == min(count, curves.POINTS)
    assert found["kept"][0] == 0.001 and found["error"][-1] == pytest.approx(1 / count, rel=1e-3)
    assert (
        found["ranks"][0] == 1
        and found["ranks"][-1] == count
        and len(found["ranks"]) <= curves.POINTS
    )
    assert found["spectrum"] == [curves.rounded(1 / rank) for rank in found["ranks"]]


def test_a_line_for_each_curve_in_strict_json():
    found = [curves.thin(curve([(100, 0.5)]), ["a"]), curves.thin(curve([(100, 0.5)]), ["b"])]
    text = curves.to_json(found)
    assert json.loads(text) == {"curves": found} and text.count("\n") == 4
    with pytest.raises(ValueError):
        curves.to_json([{"error": [float("nan")]}])
    assert json.loads(curves.to_json([])) == {"curves": []}


def test_a_checkpoint_keeps_the_curves_that_its_choices_lie_on(tiny_llama, text_file, tmp_path):
    from support.recipes import recipe

    from compressor.pipeline import run

    run.compress(
        recipe(tiny_llama, text_file, "allocation.keep=0.6", "evaluation.enabled=false"),
        tmp_path / "out",
    )
    found, plan = (
        read_json(tmp_path / "out" / "curves.json")["curves"],
        read_json(tmp_path / "out" / "plan.json"),
    )
    assert [one["linear"] for one in found] == list(plan["linears"]) and "curves" not in plan
    for one in found:
        choice = plan["linears"][one["linear"]]
        if choice["method"] == one["method"]:
            kept, error = choice["bits"] / choice["dense_bits"], choice["predicted"]
            above = [e for k, e in zip(one["kept"], one["error"], strict=True) if k <= kept * 1.001]
            below = [e for k, e in zip(one["kept"], one["error"], strict=True) if k >= kept * 0.999]
            assert min(above) * 1.001 >= error >= max(below) * 0.999
