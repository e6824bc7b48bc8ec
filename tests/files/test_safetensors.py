# ruff: noqa: F401, F811 - fixtures come from neighbouring files
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.folders import INDEX, WEIGHTS, Bomb, edit_json, edit_tensors, llama, repoint, sharded
from support.models import read_json

from compressor.errors import CheckpointError
from compressor.files import safetensors
from compressor.files.model_folder import read


@pytest.mark.parametrize("damage", ["truncated", "empty", "huge header", "no header"])
def test_f12_truncated_shard(sharded, damage):
    shard = min(sharded.glob("model-*.safetensors"))
    data = shard.read_bytes()
    content = {
        "truncated": data[:-1],
        "empty": b"",
        "huge header": struct.pack("<Q", 2**62) + data[8:],
        "no header": data[:20],
    }
    shard.write_bytes(content[damage])
    with pytest.raises(CheckpointError, match=shard.name):
        read(sharded)


def test_f14_missing_and_extra_tensors_are_named_up_to_ten(sharded):
    shard = max(
        sharded.glob("model-*.safetensors"), key=lambda path: len(safetensors.read_header(path))
    )
    name = min(load_file(shard))
    edit_tensors(shard, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{shard.name}: missing {name};"):
        read(sharded)
    edit_tensors(
        shard,
        lambda tensors: tensors.update(
            {f"extra{i:02}": torch.zeros(1) for i in range(12)}, **{name: torch.zeros(1)}
        ),
    )
    with pytest.raises(CheckpointError, match=r"not in the index: extra00, .*extra09 and 2 more"):
        read(sharded)


@pytest.mark.parametrize(
    "target",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/outside.safetensors",
        "..",
        "model.bin",
        "a\0.safetensors",
        7,
        None,
    ],
)
def test_f15_index_entry_that_is_no_plain_shard_name(sharded, target, monkeypatch):
    shutil.copy(min(sharded.glob("model-*.safetensors")), sharded.parent / "outside.safetensors")
    opened = []
    monkeypatch.setattr(safetensors, "read_header", lambda path: opened.append(path) or {})
    repoint(sharded, target)
    with pytest.raises(CheckpointError, match=r"index\.json: .* points to"):
        read(sharded)
    assert opened == []


def test_f15_missing_shard(sharded):
    shard = min(sharded.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: the file is missing"):
        read(sharded)


@pytest.mark.parametrize("name", ["shard", INDEX, "config.json"])
def test_f15_link_that_leads_out(sharded, name, monkeypatch):
    path = min(sharded.glob("model-*.safetensors")) if name == "shard" else sharded / name
    shutil.move(path, sharded.parent / "outside")
    path.symlink_to(sharded.parent / "outside")
    opened = []
    original = safetensors.read_header
    monkeypatch.setattr(
        safetensors, "read_header", lambda path: opened.append(path) or original(path)
    )
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        read(sharded)
    assert path not in opened


def test_f15_special_file_is_not_opened(llama, monkeypatch):
    (llama / WEIGHTS).unlink()
    os.mkfifo(llama / WEIGHTS)
    monkeypatch.setattr(
        safetensors, "read_header", lambda path: pytest.fail("opened, which would wait for ever")
    )
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read(llama)


def test_links_of_the_hub_cache_are_followed(llama, tmp_path):
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "main",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in llama.iterdir():
        shutil.copy(path, blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    assert read(snapshot).weight_bytes == read(llama).weight_bytes


def test_f15_same_tensor_twice(sharded):
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    name = min(load_file(first))
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{last.name}",')
    )
    with pytest.raises(CheckpointError, match=f"given twice: {name}"):
        read(sharded)
    (sharded / INDEX).write_text(text)
    edit_tensors(last, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=f"{last.name}: not in the index: {name}"):
        read(sharded)


def test_two_sets_of_weights_are_refused(sharded, tiny_llama):
    shutil.copy(tiny_llama / WEIGHTS, sharded / WEIGHTS)
    with pytest.raises(CheckpointError, match="remove the set that is out of date"):
        read(sharded)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_f16_cut_short(sharded, name):
    path = sharded / name
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=rf"{name}:\d+:\d+: .*cut short"):
        read(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "byte 0 is not UTF-8"),
        (b"[]", "expected a JSON object"),
        (b"[" * 10**5, "too deeply|cut short"),
    ],
)
def test_f16_config_that_is_no_json_object(llama, content, message):
    (llama / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read(llama)


@pytest.mark.parametrize("content", ["benign", "malicious"])
def test_f19_pickle(llama, content):
    from compressor.models.load import load

    marker = llama.parent / "ran"
    data = {"benign": {"weight": [0.0]}, "malicious": Bomb(marker)}[content]
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(data))
    load(read(llama).path)  # safetensors beside it are used
    (llama / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        read(llama)
    with pytest.raises(CheckpointError):
        load(llama)
    assert not marker.exists()


def test_folder_without_weights(llama):
    (llama / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"no {WEIGHTS} and no {INDEX}"):
        read(llama)
