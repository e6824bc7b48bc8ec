"""Outputs that are produced, interrupted and compared."""

from pathlib import Path

import pytest

from compressor.files import manifest
from compressor.files.staging import Staging

KB = 1024


def write(folder: Path, version: str) -> None:
    """Something like a model, in two files that must not be mixed."""
    (folder / "config.json").write_text(f'"{version}"')
    (folder / "model.safetensors").write_bytes(version.encode() * 100)


def produce(output: Path, version: str, overwrite: bool = False) -> None:
    with Staging(output, overwrite) as stage:
        write(stage.folder, version)
        stage.commit()


def version_of(output: Path) -> str | None:
    """Which version a folder is, checked to be whole; None if it is not there."""
    if not output.exists():
        return None
    version = (output / "config.json").read_text().strip('"')
    assert (output / "model.safetensors").read_bytes() == version.encode() * 100
    assert manifest.problems(output, manifest.read(output)) == []
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    return version


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise OSError(28, "No space left on device")
