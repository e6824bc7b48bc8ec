# ruff: noqa: F401, F811 - fixtures come from neighbouring files
from pathlib import Path

import pytest
from support.checkpoints import damaged, written
from support.models import read_json
from support.outputs import output, produce, write

from compressor.checkpoint.verify import verify
from compressor.errors import CheckpointError
from compressor.files import manifest
from compressor.files.model_folder import read
from compressor.files.staging import Staging


def test_f13_bit_flip_in_a_shard(damaged):
    shard = max(damaged.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert verify(damaged) == [f"{shard}: its bytes differ from the sha256 in manifest.json"]
    with pytest.raises(CheckpointError, match=f"{shard.name}: its bytes differ"):
        read(damaged)


def test_f13_missing_shortened_and_extra_files(damaged):
    (damaged / "tokenizer.json").unlink()
    (damaged / "generation_config.json").write_text("{}")
    (damaged / "notes.txt").touch()
    (damaged / "timings.json").touch()  # outside the manifest
    found = verify(damaged)
    named = [Path(problem.split(": ")[0]).name for problem in found]
    assert named == ["generation_config.json", "tokenizer.json", "notes.txt"]
    assert "2 bytes, manifest.json says" in found[0]  # a size tells more than a digest
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the file is missing"):
        read(damaged)


def test_an_edited_document_is_reported_but_does_not_stop_reading(damaged):
    (damaged / "README.md").write_text("written")
    (damaged / "manifest.json").write_text(manifest.build(damaged))
    (damaged / "README.md").write_text("edited!")
    assert verify(damaged) == [
        f"{damaged / 'README.md'}: its bytes differ from the sha256 in manifest.json"
    ]
    assert read(damaged).tensors


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"format": "compressor manifest", "files": {"a": 1}}',
        '{"format": "compressor manifest"}',
    ],
)
def test_damaged_manifest(damaged, text):
    (damaged / "manifest.json").write_text(text)
    assert "manifest.json" in verify(damaged)[0]
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read(damaged)


def test_missing_manifest_is_a_problem_and_a_foreign_one_is_not_ours(damaged):
    (damaged / "manifest.json").write_text('{"name": "a web page"}')
    assert "cannot be compared" in verify(damaged)[0]
    assert read(damaged).tensors


def test_manifest_covers_all_but_itself_and_timings(output):
    with Staging(output) as stage:
        write(stage.folder, "new")
        (stage.folder / "timings.json").write_text("{}")
        (stage.folder / "templates").mkdir()
        (stage.folder / "templates" / "tool.jinja").write_text("{{ x }}")
        stage.commit()
    assert read_json(output / "manifest.json")["files"].keys() == {
        "config.json",
        "model.safetensors",
        "templates/tool.jinja",
    }


def test_manifest_entries_outside_the_folder_are_not_read(output):
    produce(output, "new")
    (output.parent / "secret").write_text("x")
    files = {"../secret": manifest.digest(output.parent / "secret")}
    assert "leads out" in manifest.problems(output, files)[0]
