"""What the stages of a run share: what their pieces depend on, and where statistics are."""

from dataclasses import replace

import pytest
from support.recipes import recipe

from compressor.allocation.decompose import move_beside
from compressor.calibrate.windows import split_heldout
from compressor.pipeline import job as jobs
from compressor.pipeline import run
from compressor.resume.store import FolderStore


@pytest.fixture
def job(tiny_llama, text_file):
    return jobs.start(recipe(tiny_llama, text_file), jobs.open_source(str(tiny_llama), None))


def test_pieces_depend_on_the_heldout_windows_and_statistics_do_not(job, tmp_path):
    def scope(one):
        return jobs.with_store(one, FolderStore(tmp_path)).store.scope

    other = replace(job, heldout=replace(job.heldout, tokens=job.heldout.tokens.flip(0)))
    none = replace(job, heldout=split_heldout(job.calibration, 0)[1])
    assert len({scope(job), scope(other), scope(none)}) == 3 and scope(job) == scope(replace(job))
    assert jobs.fingerprint(job) == jobs.fingerprint(other) == jobs.fingerprint(none)


def test_statistics_are_where_the_weights_are(job, tmp_path):
    run.calibrate(job.recipe, tmp_path / "stats")
    stats = run.read_or_collect(job, tmp_path / "stats")
    query, key, down = (
        f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "mlp.down")
    )
    for name in (query, key):
        job.assignments[name].info.module.to("meta")
    moved = move_beside(job.assignments, stats | {"another": stats[down]})
    assert (
        moved[query].gram.is_meta
        and moved[key].gram is moved[query].gram
        and moved[query].tokens == stats[query].tokens
    )
    assert (
        moved[down] == stats[down]
        and moved["another"] is stats[down]
        and not stats[query].gram.is_meta
    )
    name = "model.layers.1.self_attn.q_proj"
    job.assignments[name].info.module.to("meta")
    assert run.read_or_collect(job, tmp_path / "stats")[name].gram.is_meta
