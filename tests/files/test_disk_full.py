# ruff: noqa: F401, F811 - fixtures come from neighbouring files
import os

import pytest
from support.models import tiny_model
from support.modules import disk_of_20_kb
from support.outputs import KB, fail, interrupt, output, produce, version_of

from compressor.errors import CheckpointError
from compressor.files import manifest
from compressor.files.staging import Staging, amend


@pytest.mark.parametrize(
    ("shard_size", "file"), [(10**9, "model.safetensors"), (30 * KB, "model-00001-of-0000")]
)
def test_f5_disk_full_in_a_shard(output, shard_size, file):
    from compressor.checkpoint.weights import write_weights

    produce(output, "old")
    with (
        disk_of_20_kb(),
        pytest.raises(CheckpointError, match=rf"{file}.* could not be written \(File too large\)"),
        Staging(output, overwrite=True) as stage,
    ):
        write_weights(stage.folder, tiny_model("llama"), shard_size)
    assert version_of(output) == "old"
    assert list(output.parent.iterdir()) == [output]


def test_f5_disk_full_in_a_document(output):
    produce(output, "old")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with (
        disk_of_20_kb(),
        pytest.raises(CheckpointError, match=r"report\.json: could not be written"),
    ):
        amend(output, {"report.json": "x" * 30 * KB})
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize("blow", [interrupt, fail])
def test_f5_interrupted_document_is_old_or_new(output, monkeypatch, blow):
    produce(output, "old")
    amend(output, {"report.json": "old"})
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: blow())
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        amend(output, {"report.json": "new"})
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_amend_replaces_documents_and_their_entries_only(output):
    produce(output, "new")
    entry = manifest.read(output)["model.safetensors"]
    amend(output, {"report.json": "{}", "README.md": "# new"})
    assert manifest.read(output).keys() == {
        "config.json",
        "model.safetensors",
        "report.json",
        "README.md",
    }
    assert manifest.read(output)["model.safetensors"] == entry
    assert manifest.problems(output, manifest.read(output)) == []
    with pytest.raises(CheckpointError, match="only README"):
        amend(output, {"config.json": "{}"})
    (output / "report.json").unlink()
    (output / "report.json").symlink_to(output.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="not a regular file"):
        amend(output, {"report.json": "{}"})
