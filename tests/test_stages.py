"""What the stages of a run share: what their pieces depend on."""

from dataclasses import replace

import pytest
from test_pipeline import recipe

from compressor import stages
from compressor.data import split_heldout
from compressor.store import Store


@pytest.fixture
def job(tiny_llama, text_file):
    return stages.start(recipe(tiny_llama, text_file), stages.open_source(str(tiny_llama), None))


def test_pieces_depend_on_the_heldout_windows_and_statistics_do_not(job, tmp_path):
    def scope(one):
        return stages.keeping(one, Store(tmp_path)).store.scope

    other = replace(job, heldout=replace(job.heldout, tokens=job.heldout.tokens.flip(0)))
    none = replace(job, heldout=split_heldout(job.calibration, 0)[1])
    assert len({scope(job), scope(other), scope(none)}) == 3 and scope(job) == scope(replace(job))
    assert stages.fingerprint(job) == stages.fingerprint(other) == stages.fingerprint(none)
