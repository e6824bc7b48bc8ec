"""Model folders, edited file by file."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.models import read_json, tiny_model

WEIGHTS = "model.safetensors"


INDEX = "model.safetensors.index.json"


@pytest.fixture
def llama(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


@pytest.fixture
def sharded(llama) -> Path:
    """The same model in several shards."""
    (llama / WEIGHTS).unlink()
    tiny_model("llama").save_pretrained(llama, max_shard_size="20KB")
    return llama


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def repoint(folder: Path, target: str) -> None:
    """Let the first tensor of the index point to another file."""
    weight_map = read_json(folder / INDEX)["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {min(weight_map): target})


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)
