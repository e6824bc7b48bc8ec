"""Recipes that can be used by name."""

from pathlib import Path

from compressor.files.bundled import bundled_folder
from compressor.files.yaml import read_text


def presets() -> dict[str, Path]:
    """Recipes that can be used by name."""
    return {path.stem: path for path in sorted(bundled_folder("configs").glob("*.yaml"))}


def preset_titles() -> dict[str, str]:
    """First line of the header of each preset."""
    return {
        name: read_text(path).partition("\n")[0].removeprefix("# ")
        for name, path in presets().items()
    }
