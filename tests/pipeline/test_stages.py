"""Probes of a recipe: what is estimated, what is measured, and where whole models can be."""

import pytest
from support.jobs import exactly, job_of

from compressor.pipeline import stages
from compressor.pipeline.solution import allocate

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
        return stages.probe_all(job, stages.decompose_all(job, stages.statistics(job)))

    return probe


def test_estimates_above_the_limit_are_measured(probes):
    measured = probes("allocation.damage=kl_probe")
    assert probes(FISHER, ALL_EXACT) == measured
    estimated = probes(FISHER, NONE_EXACT)
    middle = sorted(result.kl for result in estimated.values())[len(estimated) // 2]
    mixed = probes(FISHER, f"allocation.probe.exact_above={middle}")
    assert estimated.keys() == measured.keys() == mixed.keys()
    for key, result in mixed.items():
        expected = measured if estimated[key].kl > middle else estimated
        assert result.kl == pytest.approx(expected[key].kl, rel=1e-9)
        assert measured[key].kl != estimated[key].kl


def test_whole_models_are_measured_only_where_something_is_decided_by_them(tiny_llama, text_file):
    def contest(*overrides: str) -> dict[str, float]:
        job = job_of(tiny_llama, text_file, *overrides, config=None)
        return allocate(job, stages.statistics(job)).plan.contest

    assert contest(FISHER, NONE_EXACT) == contest("allocation.damage=two_sided") == {}
    assert contest(FISHER, NONE_EXACT, SEVERAL).keys() == {"low_rank", "sparse", "all"}


def test_damages_in_closed_form_are_not_probed(probes):
    assert probes("allocation.damage=two_sided") == {}


def test_labels_are_drawn_with_the_seed_of_the_recipe(probes):
    first, again, other = (probes(FISHER, NONE_EXACT, f"seed={seed}") for seed in (0, 0, 1))
    assert first == again
    assert all(first[key].kl != other[key].kl for key in first)
