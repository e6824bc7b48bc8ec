"""Probes of a recipe: what is estimated, what is measured, and where whole models can be."""

import pytest
from support.jobs import exactly, job_of

from compressor.pipeline import stages

FISHER, ALL_EXACT, NONE_EXACT = (
    f"allocation.{setting}"
    for setting in ("damage=fisher_probe", "probe.exact_above=0", "probe.exact_above=null")
)
SEVERAL = "method=[{candidates: [{name: low_rank}, {name: sparse, options: {step: 0.05}}]}]"


@pytest.fixture
def probes(tiny_llama, text_file):
    """Probes of `default` with overrides."""

    def probe(*overrides: str):
        job = exactly(job_of(tiny_llama, text_file, *overrides, config=None))
        found = stages.decompositions(job, stages.statistics(job))
        return stages.probes(job, found)

    return probe


def test_estimates_above_the_limit_are_measured(probes):
    measured = probes("allocation.damage=kl_probe").results
    assert probes(FISHER, ALL_EXACT).results == measured
    estimated = probes(FISHER, NONE_EXACT).results
    middle = sorted(result.kl for result in estimated.values())[len(estimated) // 2]
    mixed = probes(FISHER, f"allocation.probe.exact_above={middle}").results
    assert estimated.keys() == measured.keys() == mixed.keys()
    for key, result in mixed.items():
        expected = measured if estimated[key].kl > middle else estimated
        assert result.kl == pytest.approx(expected[key].kl, rel=1e-9)
        assert measured[key].kl != estimated[key].kl


def test_whole_models_are_measured_only_where_something_is_decided_by_them(probes):
    assert probes(FISHER, NONE_EXACT).prober is None
    assert probes(FISHER, NONE_EXACT, SEVERAL).prober is not None
    assert probes(FISHER, NONE_EXACT, "allocation.search=[]").prober is not None
    assert probes("allocation.damage=two_sided").prober is None


def test_labels_are_drawn_with_the_seed_of_the_recipe(probes):
    first, again, other = (probes(FISHER, NONE_EXACT, f"seed={seed}").results for seed in (0, 0, 1))
    assert first == again
    assert all(first[key].kl != other[key].kl for key in first)
