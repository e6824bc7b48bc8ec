"""Fixtures of the fault tests: a model to damage, a checkpoint made once."""

import shutil
from pathlib import Path

import pytest
from support.models import tiny_model
from support.shell import compress, run


@pytest.fixture(scope="session")
def checkpoint(tiny_llama, text_file, tmp_path_factory) -> Path:
    """The tiny Llama, compressed. Read only."""
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    assert run(*compress(tiny_llama, folder, text_file)).exit_code == 0
    return folder


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny Llama."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(model) -> Path:
    """The same in several shards."""
    (model / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(model, max_shard_size="20KB")
    return model


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the compressed checkpoint."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def old(copy) -> Path:
    """A finished output that a later run is to replace, alone in its folder."""
    (copy.parent / "place").mkdir()
    return copy.rename(copy.parent / "place" / "out")
