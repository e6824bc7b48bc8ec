"""Probes of a recipe: what is estimated, what is measured, and where whole models can be."""

import pytest
from support.jobs import exactly, job_of

from compressor.pipeline import stages
from compressor.pipeline.solution import allocate

FISHER, ALL_CHECKED, UNCHECKED = (
    f"allocation.{setting}"
    for setting in ("damage=fisher_probe", "probe.checks=1000", "probe.checks=0")
)
SEVERAL = "method=[{candidates: [{name: low_rank}, {name: sparse, options: {step: 0.05}}]}]"


@pytest.fixture
def probes(tiny_llama, text_file):
    """Probes of `default` with overrides."""

    def probe(*overrides: str):
        job = exactly(job_of(tiny_llama, text_file, *overrides, config=None))
        return stages.probe_all(job, stages.decompose_all(job, stages.statistics(job)))

    return probe


def test_the_largest_estimates_are_measured(probes):
    measured = probes("allocation.damage=kl_probe")
    assert probes(FISHER, ALL_CHECKED) == measured
    estimated = probes(FISHER, UNCHECKED)
    assert estimated.keys() == measured.keys()
    assert all(estimated[key].kl != result.kl for key, result in measured.items())
    checked = probes(FISHER, "allocation.probe.checks=1")
    replaced = {key for key, result in checked.items() if result == measured[key]}
    assert max(estimated, key=lambda key: estimated[key].kl) in replaced
    assert len(replaced) < len(measured)
    assert all(checked[key] == estimated[key] for key in checked.keys() - replaced)


def test_whole_models_are_measured_only_where_something_is_decided_by_them(tiny_llama, text_file):
    def contest(*overrides: str) -> dict[str, float]:
        job = job_of(tiny_llama, text_file, *overrides, config=None)
        return allocate(job, stages.statistics(job)).plan.contest

    assert contest(FISHER, UNCHECKED) == contest("allocation.damage=two_sided") == {}
    assert contest(FISHER, UNCHECKED, SEVERAL).keys() == {"low_rank", "sparse", "all"}


def test_damages_in_closed_form_are_not_probed(probes):
    assert probes("allocation.damage=two_sided") == {}


def test_labels_are_drawn_with_the_seed_of_the_recipe(probes):
    first, again, other = (probes(FISHER, UNCHECKED, f"seed={seed}") for seed in (0, 0, 1))
    assert first == again
    assert all(first[key].kl != other[key].kl for key in first)
